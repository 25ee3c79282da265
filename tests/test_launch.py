"""tools/launch: what a scheduler does when a training ends, and that it gives the command again where it may go on."""

import os
import re
import subprocess
from pathlib import Path

import pytest
import yaml

from moe_jax.terminal import STOPPED

LAUNCH = Path(__file__).parent.parent / "tools" / "launch"
NOTES = 'echo "${0##*/} $*" >> "$CALLS"; exit ${CODE:-0}'


@pytest.mark.parametrize("code, again", [(0, False), (STOPPED, True), (1, False), (2, False), (137, False)])
def test_slurm_queues_a_stopped_training_again(tmp_path, code, again):
    """`srun` ends with the highest code of the processes."""
    for name, text in (("srun", NOTES), ("scontrol", NOTES.replace("CODE", "NONE"))):
        (tmp_path / name).write_text(f"#!/bin/sh\n{text}\n")
        (tmp_path / name).chmod(0o755)
    calls = tmp_path / "calls"
    env = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "CALLS": str(calls), "CODE": str(code), "SLURM_JOB_ID": "7"}
    argv = ["bash", LAUNCH / "train.sbatch", "tiny_gshard", "runs/mine", "train.steps=9"]
    assert subprocess.run(argv, env=env).returncode == code
    srun, *rest = calls.read_text().splitlines()
    assert srun.endswith("moe-jax train tiny_gshard train.steps=9 --workdir runs/mine --processes detect")
    assert rest == ["scontrol requeue 7"] * again


def test_kubernetes_starts_a_stopped_training_again():
    """As often as it is evicted; what fails, and is refused, counts as one of the restarts."""
    spec = yaml.safe_load((LAUNCH / "jobset.yaml").read_text())["spec"]
    (rule,) = spec["failurePolicy"]["rules"]
    assert rule == {"action": "RestartJobSetAndIgnoreMaxRestarts", "onJobFailureReasons": ["PodFailurePolicy"]}
    (hosts,) = spec["replicatedJobs"]
    job = hosts["template"]["spec"]
    assert job["template"]["spec"]["restartPolicy"] == "Never", "which a podFailurePolicy needs"
    (container,) = job["template"]["spec"]["containers"]
    exits, evicted = job["podFailurePolicy"]["rules"]
    assert exits["action"] == evicted["action"] == "FailJob"
    assert exits["onExitCodes"] == {"containerName": container["name"], "operator": "In", "values": [STOPPED]}
    assert evicted["onPodConditions"] == [{"type": "DisruptionTarget", "status": "True"}]
    assert re.match(r"exec moe-jax train ", container["args"][0]), "so that the signal and the code are its own"
