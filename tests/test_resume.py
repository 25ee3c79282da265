"""Stop and go on: the losses of a run that was never stopped, to the bit, and nothing lost or run twice."""

import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from subprocess import PIPE

import jax
import numpy as np
import psutil
import pytest
from commands import (
    ENV,
    NOISE,
    STEPS,
    check_refusal,
    finish,
    listing,
    narrow,
    read_until,
    rows,
    start,
    steps_of,
)

from moe_jax import config, mesh
from moe_jax.checkpoint import COMPLETE, Checkpoints
from moe_jax.data import Windows
from moe_jax.train import resume
from moe_jax.train.resume import Stop, changes
from moe_jax.train.state import Model

pytestmark = pytest.mark.usefixtures("inside")


def state(workdir: Path, step: int) -> list[tuple]:
    """Every leaf of a checkpoint with its bytes."""
    checkpoints = Checkpoints(workdir / "checkpoints")
    model = Model.of(config.from_dict(checkpoints.info(step)["config"]))
    restored, _ = checkpoints.restore(model.targets(mesh.build_mesh(model.cfg.mesh)), step)
    return [(jax.tree_util.keystr(k), np.asarray(v).tobytes()) for k, v in jax.tree.leaves_with_path(restored)]


@pytest.fixture(scope="module")
def stopped(train, tmp_path_factory):
    """Two real runs at once: one gets SIGTERM, the other SIGKILL. Workdir, exit code, output and log of each."""
    folder = tmp_path_factory.mktemp("stopped")
    signals = {"term": signal.SIGTERM, "kill": signal.SIGKILL}
    children = {name: narrow(start(*train, folder / name, bufsize=0)) for name in signals}
    out = {}
    for name, child in children.items():
        log = read_until(child, 12 if name == "term" else 24)
        while name == "kill" and not (folder / name / "checkpoints" / "20" / COMPLETE).exists():
            time.sleep(0.01)  # the run waits for the reader of its log; the save goes on
        child.send_signal(signals[name])
        code, stdout, rest = finish(child)
        out[name] = folder / name, code, stdout, log + rest
    return out


@pytest.fixture(scope="module")
def whole(train, stopped, tmp_path_factory):
    """A run that was never stopped, in this process."""
    from moe_jax import cli

    workdir = tmp_path_factory.mktemp("whole") / "run"
    assert cli.main([*train, str(workdir)]) == 0
    return workdir


def copy(workdir: Path, to: Path) -> Path:
    return Path(shutil.copytree(workdir, to / "run"))


def test_a_whole_run_is_logged_and_saved(whole):
    steps, evals = rows(whole)
    assert len(steps) == STEPS and [e["step"] for e in evals] == [0, STEPS]
    assert steps_of(whole) == [20, 40, STEPS]
    assert len({s["loss"] for s in steps}) > STEPS // 2, "the comparisons below need losses that differ"


def test_sigterm_saves_and_ends(stopped):
    workdir, code, out, log = stopped["term"]
    assert code == 75 and not NOISE.search(log), log
    report = json.loads(out.splitlines()[-1])
    step = report["step"]
    assert 12 <= step < STEPS and report["finished"] is False
    assert f"SIGTERM: saved at step {step} of {STEPS}; the same command goes on from there\n" in log
    assert steps_of(workdir)[-1] == step
    assert len(rows(workdir)[0]) == step


def test_sigkill_leaves_complete_checkpoints(stopped):
    workdir, code, out, _ = stopped["kill"]
    assert code == -signal.SIGKILL and out == ""
    assert 20 in steps_of(workdir) and STEPS not in steps_of(workdir)
    assert (workdir / "metrics.jsonl").read_text().count('"loss"') >= 24


@pytest.mark.parametrize("how", ["term", "kill"])
def test_going_on_gives_the_run_that_was_never_stopped(train, stopped, whole, tmp_path, call, how):
    """To the bit: losses, norms, counts, evaluations and the last checkpoint; a real process after SIGTERM."""
    workdir = copy(stopped[how][0], tmp_path)
    newest = steps_of(workdir)[-1]
    if how == "term":
        code, out, log = finish(start(*train, workdir))
        report = json.loads(out.splitlines()[-1])
        assert not NOISE.search(log), log
    else:
        with open(workdir / "metrics.jsonl", "ab") as f:
            f.write(b'{"step":2')  # a kill may tear the last line
        code, report, log = call(*train, workdir)
    assert code == 0, log
    assert f"goes on from the checkpoint at step {newest}\n" in log
    assert f"step {newest + 1}/{STEPS}" in log and f"step {newest}/{STEPS}" not in log, "no step is run again"
    assert report["step"] == STEPS and report["finished"] is True
    assert rows(workdir) == rows(whole)
    assert state(workdir, STEPS) == state(whole, STEPS)


@pytest.mark.parametrize(
    "shape", [["mesh.data=1", "mesh.expert=8"], ["mesh.data=1", "mesh.expert=2", "mesh.fsdp=2", "mesh.tensor=2"]]
)
def test_going_on_with_another_mesh(train, whole, tmp_path, call, shape):
    """From step 40 on the losses of the old mesh to 1e-5, and the log says what changed."""
    workdir = copy(whole, tmp_path)
    shutil.rmtree(workdir / "checkpoints" / str(STEPS))
    code, report, log = call(*train, workdir, *shape)
    assert code == 0 and not NOISE.search(log), log
    assert f"changed since that checkpoint: {shape[1].replace('=', ': 4 -> ')}\n" in log
    assert report["mesh"] == {k[5:]: int(n) for k, _, n in (s.partition("=") for s in shape) if n != "1"}
    (steps, evals), (want, want_evals) = rows(workdir), rows(whole)
    assert steps[:40] == want[:40] and len(steps) == STEPS
    assert [s["loss"] for s in steps] == pytest.approx([s["loss"] for s in want], rel=1e-5)
    assert evals[-1]["eval_loss"] == pytest.approx(want_evals[-1]["eval_loss"], rel=1e-5)


def test_a_finished_run_does_nothing_and_reports(train, whole, tmp_path, call):
    workdir = copy(whole, tmp_path)
    before = listing(workdir)
    code, report, log = call(*train, workdir)
    assert (
        code == 0
        and f"nothing to do: the checkpoint is at step {STEPS} of {STEPS}; raise train.steps to go on\n" in log
    )
    after = listing(workdir)
    del before["run.png"], after["run.png"], before["metrics.jsonl"], after["metrics.jsonl"]
    assert after == before
    assert (workdir / "metrics.jsonl").read_bytes() == (whole / "metrics.jsonl").read_bytes()
    steps, evals = rows(whole)
    assert report["step"] == STEPS and report["finished"] is True
    assert (report["loss"], report["eval_loss"]) == (steps[-1]["loss"], evals[-1]["eval_loss"])
    assert report["compile_seconds"] is None and report["time_to_first_step_seconds"] is None
    code, report, log = call(*train, workdir, "train.steps=30")
    assert (
        code == 0
        and f"nothing to do: the checkpoint is at step {STEPS}, beyond train.steps=30; raise train.steps to go on\n"
        in log
    )


def test_more_steps(train, whole, tmp_path, call, monkeypatch):
    workdir, built, init = copy(whole, tmp_path), [], Windows.__init__
    monkeypatch.setattr(Windows, "__init__", lambda *args: built.append(args) or init(*args))
    code, report, log = call(*train, workdir, f"train.steps={STEPS + 3}")
    assert code == 0 and f"changed since that checkpoint: train.steps: {STEPS} -> {STEPS + 3}\n" in log
    assert report["step"] == STEPS + 3 and report["finished"] is True
    steps, evals = rows(workdir)
    assert len(steps) == STEPS + 3 and steps[:STEPS] == rows(whole)[0]
    assert [e["step"] for e in evals] == [0, STEPS, STEPS + 3]
    assert len(built) == 2, "windows of the training text and of the held-out one, for all evaluations and the bigram"


@pytest.mark.parametrize(
    "change, key",
    [
        ("model.d_model=32", "model.d_model: is 32, and that run began with 16"),
        ("model.moe.capacity_factor=1.25", "model.moe.capacity_factor"),
        ("model.moe.experts=4", "model.moe.experts"),
        ("model.moe=unset", "model.moe: is unset, and that run began with a table of keys\n"),
        ("data.batch=16", "data.batch"),
        ("data.seed=1", "data.seed"),
        ("data.path=builtin:prose", "data.path"),
        ("train.seed=1", "train.seed: is 1, and that run began with 0"),
        ("train.optimizer.kind=adafactor", "train.optimizer.kind"),
    ],
)
def test_another_run_in_the_same_folder_is_refused(train, whole, call, change, key):
    before = listing(whole)
    holds = "--workdir: this folder holds a run of tiny_switch, and this would be another:\n"
    check_refusal(*call(*train, whole, change), "train", holds, key)
    assert listing(whole) == before


def test_a_table_that_one_side_lacks_is_one_change():
    whole, dense = config.load("tiny_mixtral"), config.load("tiny_mixtral", ["model.moe="])
    assert changes({"config": config.to_dict(whole)}, whole) == {}
    for saved, now, words in (
        (whole, dense, "is unset, and that run began with a table of keys"),
        (dense, whole, "is a table of keys, and that run began with unset"),
    ):
        with pytest.raises(config.ConfigError) as e:
            changes({"config": config.to_dict(saved)}, now)
        assert [p.reason.splitlines()[1:] for p in e.value.problems] == [[f"    model.moe: {words}"]]


def test_how_tokens_travel_may_change():
    """A run that began with one exchange goes on with another, as on another mesh: the numbers are the same."""
    before = config.load("tiny_gshard")
    keys = ["model.moe.exchange=shard_map", "model.attention_exchange=ring", "model.attention_kernel=xla"]
    now = config.load("tiny_gshard", [*keys, "mesh.data=4"])
    assert list(changes({"config": config.to_dict(before)}, now)) == [
        "mesh.data",
        "model.attention_exchange",
        "model.attention_kernel",
        "model.moe.exchange",
    ]


def test_how_a_text_begins_may_change():
    """Which token a decoder begins with is asked by generation alone."""
    before, now = config.load("tiny_t5"), config.load("tiny_t5", ["model.encoder.start=0"])
    assert changes({"config": config.to_dict(before)}, now) == {"model.encoder.start": "unset -> 0"}


def test_of_many_changes_some_are_named():
    with pytest.raises(config.ConfigError) as e:
        changes({"config": config.to_dict(config.load("tiny_mixtral"))}, config.load("bench_small"))
    (problem,) = e.value.problems
    head, *named, more = problem.reason.splitlines()
    assert "a run of tiny_mixtral" in head and len(named) == 8 and re.fullmatch(r"    and \d+ more", more)


def test_full_disk(train, whole, tmp_path, call):
    """A disk that takes no more than 48 KiB a file stands for it: the arrays of a checkpoint are larger."""
    workdir = copy(whole, tmp_path)
    for step in (40, STEPS):
        shutil.rmtree(workdir / "checkpoints" / str(step))
    code = (
        "import resource, sys\nfrom moe_jax.cli import main\n"
        f"resource.setrlimit(resource.RLIMIT_FSIZE, (48 * 1024, {resource.getrlimit(resource.RLIMIT_FSIZE)[1]}))\n"
        "sys.exit(main(sys.argv[1:]))"
    )
    argv = [sys.executable, "-c", code, *map(str, train), str(workdir)]
    env = ENV | {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "1000"}  # nothing large is written but checkpoints
    done = subprocess.run(argv, env=env, capture_output=True, text=True, timeout=240)
    assert done.returncode == 1 and done.stdout == "", done.stderr
    assert not NOISE.search(done.stderr), done.stderr
    said = done.stderr.partition("moe-jax train: failed\n")[2]
    assert str(workdir / "checkpoints") in said and "not written: File too large\n" in said, done.stderr
    assert "remedy: make room" in said and "step 20 is the newest complete one" in said
    assert steps_of(workdir) == [20]
    code, report, _ = call("eval", workdir, "--json")
    assert code == 0 and report["step"] == 20
    code, report, _ = call(*train, workdir)  # room has been made
    assert code == 0 and report["finished"] is True
    assert rows(workdir) == rows(whole) and state(workdir, STEPS) == state(whole, STEPS)


def test_ctrl_c_while_it_compiles(train, tmp_path):
    """One line at once; again, and the process ends at once, whatever its threads do."""
    env = {"JAX_ENABLE_COMPILATION_CACHE": "0"}
    child = start(*train, tmp_path / "run", bufsize=0, env=ENV | env)
    while not child.stderr.readline().startswith(b"eval  0/"):
        pass
    child.send_signal(signal.SIGINT)
    line = child.stderr.readline().decode()
    assert line == "SIGINT: stopping after this step and saving; Ctrl-C again quits without saving\n"
    child.send_signal(signal.SIGINT)
    code, out, err = finish(child)
    assert code == 130 and out == "" and steps_of(tmp_path / "run") == []
    assert err == "SIGINT: quits without saving; the last complete checkpoint stays\n"


def test_ctrl_c_in_a_callback_of_jax_is_not_lost():
    """Python drops what is raised there."""
    from moe_jax import cli

    def _xla_gc_callback():
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0)

    old = signal.signal(signal.SIGINT, cli.interrupt)
    try:
        _xla_gc_callback()
        with pytest.raises(KeyboardInterrupt):
            time.sleep(10)
    finally:
        signal.signal(signal.SIGINT, old)


DRAFT = """
import os, pathlib, signal, sys
from moe_jax import cli

def work():  # what has begun, and imports more
    open("draft", "w").close()
    try:
        import slow
    finally:
        os.remove("draft")

def run_it(args):
    {first}
    work()

signal.signal(signal.SIGINT, cli.interrupt)
try:
    run_it(None)
except KeyboardInterrupt:
    sys.exit("told" if not pathlib.Path("draft").exists() else "left")
"""


@pytest.mark.parametrize(
    "first, said", {"work": ("pass", "told\n"), "command": ("import slow", "interrupted\n")}.values()
)
def test_ctrl_c_in_an_import(first, said, tmp_path):
    """One of the work lets it take its draft away; one of the command itself, where nothing is begun, ends here."""
    (tmp_path / "slow.py").write_text("import os, signal\nos.kill(os.getpid(), signal.SIGINT)\n")
    env = ENV | {"PYTHONPATH": f"{ENV['PYTHONPATH']}{os.pathsep}{tmp_path}"}
    command = [sys.executable, "-c", DRAFT.format(first=first)]
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, check=False)
    assert done.stderr.endswith(said) and not (tmp_path / "draft").exists(), done.stderr
    assert done.returncode == (130 if first == "import slow" else 1)


@pytest.mark.parametrize("later", [0.0, 0.1, 0.3, 0.6])
def test_ctrl_c_before_the_run(later, train, tmp_path):
    """While it loads JAX, there is nothing to save: code 130, one line and no run."""
    child = start(*train, tmp_path / "run", cwd=tmp_path)
    maps = getattr(psutil.Process(child.pid), "memory_maps", None)  # not on macOS
    while maps is not None and not any("jaxlib" in m.path for m in maps()):
        time.sleep(0.02)
    time.sleep(later if maps else 1.0)
    child.send_signal(signal.SIGINT)
    code, out, err = finish(child)
    assert code == 130 and out == "" and err.count("\n") <= 1 and not NOISE.search(err), err
    assert steps_of(tmp_path / "run") == []


def test_a_background_job_ignores_ctrl_c():
    """As its shell wants it: Ctrl-C is then meant for another job."""
    plan = [sys.executable, "-m", "moe_jax", "plan", "moe_64x128", "--topology", "v5p", "--devices", "256"]
    child = subprocess.Popen(["sh", "-c", 'trap "" INT; exec "$@"', "sh", *plan], env=ENV, stdout=PIPE, stderr=PIPE)
    time.sleep(0.5)
    child.send_signal(signal.SIGINT)
    code, out, err = finish(child)
    assert code == 0 and out.startswith("moe_64x128, mesh ") and err == ""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=lambda s: s.name)
def test_a_second_signal_leaves(number, monkeypatch):
    """Also while the main thread waits in C; the handlers from before come back."""
    left, said, old = threading.Event(), [], signal.getsignal(number)
    monkeypatch.setattr(resume, "leave", lambda text: said.append(text) or left.set())
    with Stop(said.append) as stop:
        assert stop.signal is None
        os.kill(os.getpid(), number)
        while not said:
            time.sleep(0.01)
        assert stop.signal == number.name and not left.is_set()
        os.kill(os.getpid(), number)
        assert left.wait(10)
    assert signal.getsignal(number) == old
    assert "Ctrl-C again quits" in said[0] and "quits without saving" in said[1]
