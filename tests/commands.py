"""What tests of commands share: a tiny run, real processes, commands in this process, and how a refusal looks."""

import fcntl
import hashlib
import json
import os
import random
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import jax
import pytest

from moe_jax import cli, mesh
from moe_jax.checkpoint import Checkpoints

ROOT = Path(__file__).parent.parent
ENV = os.environ | {
    "PYTHONPATH": str(ROOT),
    "JAX_COMPILATION_CACHE_DIR": str(ROOT / ".cache" / "jax"),
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.3",
}

STEPS = 60
TINY = [  # its mesh is data=2 x expert=4; every test trains the same program, which is compiled once
    "tiny_switch",
    f"train.steps={STEPS}",
    "train.checkpoint_every=20",
    "train.keep=100",
    "train.log_every=1",
    "model.layers=2",
    "model.d_model=16",
    "model.d_ff=16",
    "model.heads=2",
    "model.max_length=64",
    "data.length=16",
    "data.batch=8",
    "train.eval_batches=1",
    "train.optimizer.warmup=2",
    "train.sample=unset",
    "train.tensorboard=false",
]

TIMES = ("step_seconds", "tokens_per_second")
NOISE = re.compile(r"Traceback|Warning|warning|INFO|ERROR|^[WIE]\d{4} ", re.MULTILINE)


def words(seed: int, count: int) -> str:
    rng = random.Random(seed)
    known = ["".join(rng.choices("abcdefghij", k=rng.randint(2, 6))) for _ in range(40)]
    return " ".join(rng.choices(known, k=count))


def write_text(folder: Path) -> Path:
    """About 20 kB of words."""
    path = folder / "text.txt"
    path.write_text(words(0, 4000))
    return path


def start(*argv: object, **options) -> subprocess.Popen:
    """A real `moe-jax` process."""
    command = [sys.executable, "-m", "moe_jax", *map(str, argv)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen(command, **({"env": ENV} | pipes | options))


def finish(child: subprocess.Popen) -> tuple[int, str, str]:
    """Exit code, standard output and standard error."""
    out, err = child.communicate(timeout=240)
    return child.returncode, out.decode(), err.decode()


def narrow(child: subprocess.Popen) -> subprocess.Popen:
    """A log of one page: with a line a step, the run waits for its reader some thirty steps ahead."""
    if hasattr(fcntl, "F_SETPIPE_SZ"):
        fcntl.fcntl(child.stderr, fcntl.F_SETPIPE_SZ, 4096)
    return child


def read_until(child: subprocess.Popen, step: int) -> str:
    """The log up to the line of a step."""
    lines = []
    while line := child.stderr.readline().decode():
        lines.append(line)
        if re.match(rf"step +{step}/", line):
            return "".join(lines)
    pytest.fail(f"the run ended before step {step}:\n{''.join(lines)}")


def rows(workdir: Path) -> tuple[list[dict], list[dict]]:
    """What metrics.jsonl says of steps and of evaluations, without the times; each step is there once, in order."""
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    lines = [{k: v for k, v in line.items() if k not in TIMES} for line in lines]
    steps = [line for line in lines if "loss" in line]
    assert [line["step"] for line in steps] == list(range(1, len(steps) + 1))
    return steps, [line for line in lines if "eval_loss" in line]


def steps_of(workdir: Path) -> list[int]:
    return Checkpoints(workdir / "checkpoints").steps()


def in_this_process() -> Iterator[None]:
    """Run commands in this process: a mesh takes the first of the eight devices, and the allocator stays as it is."""
    build = mesh.build_mesh
    assert jax.device_count() == 8  # and JAX has started: the commands leave the number as it is
    promotion = jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow")  # optax needs both
    with pytest.MonkeyPatch.context() as m, promotion[0], promotion[1]:
        m.setattr(mesh, "build_mesh", lambda shape: build(shape, jax.devices()[: shape.size]))
        m.setattr(cli, "keep_memory", lambda: None)
        yield


def calls(capfd):
    """A command in this process: exit code, JSON or standard output, standard error."""

    def run(*argv: object):
        capfd.readouterr()
        code = cli.main([str(a) for a in argv])
        out, err = capfd.readouterr()
        return code, json.loads(out.splitlines()[-1]) if code == 0 and "--json" in argv else out, err

    return run


def listing(root: Path) -> dict[str, tuple]:
    """Everything below a folder: of files the content and the time of the last write."""
    paths = {str(p.relative_to(root)): p for p in root.rglob("*")}
    return {
        name: (hashlib.sha256(p.read_bytes()).hexdigest(), p.stat().st_mtime_ns) if p.is_file() else ()
        for name, p in paths.items()
    }


def check_refusal(code: int, out: str, err: str, command: str, *needles: str) -> None:
    """Exit code 2, nothing on standard output, one message with every needle and a remedy."""
    assert code == 2, err
    assert out == "" and not NOISE.search(err), err
    assert err.startswith(f"moe-jax {command}: refused\n") and err.count("refused\n") == 1, err
    assert "remedy" in err and len(err) < 3000, err
    for needle in needles:
        assert needle in err, err
