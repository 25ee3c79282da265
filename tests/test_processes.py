"""Several processes: the losses of one, one checkpoint for any number of them, and a death that all of them name."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import time
from pathlib import Path

import psutil
import pytest
from commands import (
    NOISE,
    STEPS,
    check_refusal,
    finish,
    narrow,
    read_until,
    rows,
    start,
    steps_of,
)
from joined import SLEEP, flags, free_port, workers

from moe_jax import cli, supervise
from moe_jax.processes import Place, find_place
from moe_jax.refused import Refused

pytestmark = pytest.mark.usefixtures("inside")


def several(argv: list, count: int, devices: int, **options) -> list[subprocess.Popen]:
    """Real processes of one run, each with as many fake devices."""
    port = free_port()
    return [start(*argv, "--fake-devices", devices, *flags(i, count, port), **options) for i in range(count)]


def check_same(got: list[dict], want: list[dict]) -> None:
    """Losses and norms to 1e-6, counts to the unit."""
    assert len(got) == len(want)
    for line, other in zip(got, want, strict=True):
        assert line.keys() == other.keys()
        for key, value in line.items():
            exact = key in ("step", "routed", "kept", "dropped", "load", "tokens")
            assert value == other[key] if exact else value == pytest.approx(other[key], rel=1e-6), (line["step"], key)


def check_all_same(workdir: Path, other: Path) -> None:
    """Steps and evaluations of two whole runs."""
    for got, want in zip(rows(workdir), rows(other), strict=True):
        check_same(got, want)


@pytest.fixture(scope="module")
def whole(train, tmp_path_factory):
    """The run in one process, this one."""
    workdir = tmp_path_factory.mktemp("whole") / "run"
    assert cli.main([*train, str(workdir)]) == 0
    return workdir


@pytest.fixture(scope="module")
def stopped(train, tmp_path_factory):
    """Two processes of four devices, of which the second gets SIGTERM: workdir, and code, output and log of each."""
    workdir = tmp_path_factory.mktemp("stopped") / "run"
    children = several([*train, workdir], 2, 4, bufsize=0)
    log = read_until(narrow(children[0]), 3)
    children[1].send_signal(signal.SIGTERM)
    code, out, rest = finish(children[0])
    return workdir, (code, out, log + rest), finish(children[1])


def test_two_processes_train_what_one_does(stopped, whole):
    (steps, evals), (want, want_evals) = rows(stopped[0]), rows(whole)
    assert len(steps) > 2 and len(evals) == 1
    check_same(steps, want[: len(steps)])
    check_same(evals, want_evals[:1])


def test_sigterm_for_one_stops_all_after_the_same_step(stopped):
    """One process tells, of one checkpoint for both."""
    workdir, (code, out, log), (other_code, other_out, other_log) = stopped
    assert (code, other_code) == (75, 75), log + other_log
    assert not NOISE.search(log + other_log) and "Gloo" not in log + out, log + other_log
    report = json.loads(out)
    step = report["step"]
    assert 3 <= step < STEPS and report["finished"] is False
    assert (report["processes"], report["devices"], report["mesh"]) == (2, 8, {"data": 2, "expert": 4})
    assert f"SIGTERM: saved at step {step} of {STEPS}; the same command goes on from there\n" in log
    assert "on 8 cpu device(s) of 2 processes\n" in log
    assert steps_of(workdir)[-1] == step and (workdir / "run.png").exists()
    assert other_out == ""
    assert other_log == "SIGTERM: stopping after this step and saving; Ctrl-C again quits without saving\n"


def test_one_process_goes_on_where_two_stopped(train, stopped, whole, tmp_path, call):
    workdir = Path(shutil.copytree(stopped[0], tmp_path / "run"))
    newest = steps_of(workdir)[-1]
    code, report, log = call(*train, workdir)
    assert code == 0 and f"goes on from the checkpoint at step {newest}\n" in log
    assert report["step"] == STEPS and report["processes"] == 1
    check_all_same(workdir, whole)


def test_two_processes_read_what_one_saved(whole, call):
    """Held-out losses of `eval`, told by one of them."""
    (code, out, log), (other_code, other_out, other_log) = map(finish, several(["eval", whole, "--json"], 2, 4))
    assert (code, other_code) == (0, 0), log + other_log
    assert other_out == other_log == ""
    got, want = json.loads(out), call("eval", whole, "--json")[1]
    assert got.keys() == want.keys() and got["routed"] == got["kept"] + got["dropped"] > 0
    for key, value in want.items():
        assert got[key] == (pytest.approx(value, rel=1e-6) if isinstance(value, float) else value), key


@pytest.mark.slow
@pytest.mark.parametrize(
    "count, devices, shape",
    [(4, 2, []), (2, 1, ["mesh.data=1", "mesh.expert=1", "mesh.tensor=2"])],
    ids=["4x2", "2x1, which share every row"],
)
def test_other_processes_and_meshes_train_what_one_does(train, whole, tmp_path, call, count, devices, shape):
    """To the sample of text at the end, whose every token they compute together."""
    workdir, sample = tmp_path / "run", ["train.sample=ab", "train.sample_tokens=4"]
    done = [finish(child) for child in several([*train, workdir, *shape, *sample], count, devices)]
    assert [code for code, _, _ in done] == [0] * count, [log for _, _, log in done]
    check_all_same(workdir, whole)
    assert steps_of(workdir) == steps_of(whole)
    assert json.loads(done[0][1])["sample"] == call(*train, workdir, *sample)[1]["sample"]


@pytest.mark.slow
def test_stages_of_a_pipeline_in_two_processes(train, tmp_path, call):
    """Each process has one of the stages; what they pass on crosses from one to the other."""
    shape = ["model.moe.every=1", "mesh.stage=2", "mesh.data=1", "mesh.expert=4", "train.microbatches=2"]
    more = [*shape, "train.steps=6", "train.checkpoint_every=3"]
    assert call(*train, tmp_path / "one", *more)[0] == 0
    done = [finish(child) for child in several([*train, tmp_path / "two", *more], 2, 4)]
    assert [code for code, _, _ in done] == [0, 0], [log for _, _, log in done]
    check_all_same(tmp_path / "two", tmp_path / "one")


@pytest.mark.slow
def test_folders_of_one_name_are_not_taken_for_one(train, tmp_path):
    """Of processes on hosts without a shared disk, the other one finds nothing of what process 0 writes."""
    port = free_port()
    argv = [[*train, tmp_path / str(i), "--fake-devices", 4, *flags(i, 2, port)] for i in range(2)]
    (code, _, log), (own_code, _, own_log) = [finish(child) for child in [start(*a) for a in argv]]
    assert (code, own_code) == (2, 2), log + own_log
    assert "is not the folder of that name in which process 0 writes\n    remedy: give all" in own_log, own_log
    assert "process 1 of 2 on " in log and "was refused" in log, log


# Deaths


def child_of(process: subprocess.Popen) -> int:
    """The process that a supervisor has forked."""
    (child,) = psutil.Process(process.pid).children()
    return child.pid


def gone(pid: int) -> bool:
    """Whether a process has ended, if need be after a moment; one that nobody has asked for has."""
    for _ in range(100):
        try:
            if psutil.Process(pid).status() == psutil.STATUS_ZOMBIE:
                return True
        except psutil.NoSuchProcess:
            return True
        time.sleep(0.05)
    return False


@pytest.mark.parametrize("role", [0, 1])
def test_a_killed_run_is_named_by_the_other(train, tmp_path, role):
    """kill -9 of the whole process 0, which coordinates, or of what trains in process 1."""
    argv = ["train", "tiny_dense", *train[2:-1], "mesh.data=2", "mesh.expert=1", "model.layers=1", "train.steps=100000"]
    children = several([*argv, "--workdir", tmp_path / "run"], 2, 1, bufsize=0)
    read_until(narrow(children[0]), 2)
    workers = [child_of(child) for child in children]
    os.kill(workers[1] if role else children[0].pid, signal.SIGKILL)
    killed = time.monotonic()
    code, out, log = finish(children[1 - role])
    assert time.monotonic() - killed < 60
    assert code == 1 and out == "" and not NOISE.search(log), log
    said = log.partition("moe-jax train: failed\n")[2]
    assert re.match(rf"process {role} of 2 on \S+ died: ", said) and said.count("died") == 1, log
    assert "remedy: see what it printed last, and start all of them again with the same command" in said
    assert finish(children[role])[0] == (1 if role else -signal.SIGKILL)
    assert all(gone(pid) for pid in workers)


@pytest.mark.parametrize("what", ["child", "supervisor"])
@pytest.mark.parametrize("role", [0, 1, 2])
def test_a_death_is_named_by_all(role, what):
    children, pids = workers(SLEEP, SLEEP, SLEEP)
    os.kill(pids[role] if what == "child" else children[role].pid, signal.SIGKILL)
    killed = time.monotonic()
    how = "killed by SIGKILL" if what == "child" else "its connection closed"
    for index, child in enumerate(children):
        code, _, log = finish(child)
        if index == role and what == "supervisor":
            assert code == -signal.SIGKILL
            continue
        here = ", this one," if index == role else ""
        assert code == 1 and re.match(rf"moe-jax train: failed\nprocess {role} of 3{here} on \S+ died: {how}", log), log
    assert all(gone(pid) for pid in pids)
    assert time.monotonic() - killed < 30, "what a supervisor leaves behind would keep its devices"


def test_an_abort_is_not_taken_for_the_cause():
    """JAX aborts the others where one dies, and that may come in first; its trace is not shown."""
    trace = "os.write(2, b'*** Check failure stack trace: ***'); " + SLEEP
    children, pids = workers(SLEEP, trace)
    os.kill(pids[1], signal.SIGABRT)
    time.sleep(0.5)
    os.kill(pids[0], signal.SIGKILL)
    for child in children:
        code, _, log = finish(child)
        assert code == 1 and re.match(r"moe-jax train: failed\nprocess 0 of 2(, this one,)? on \S+ died", log), log
        assert "stack trace" not in log


def test_an_abort_of_its_own_shows_its_trace():
    children, _ = workers(SLEEP, "os.write(2, b'*** the trace ***\\n'); os.abort()")
    (code, _, log), (own_code, _, own_log) = map(finish, children)
    assert (code, own_code) == (1, 1)
    assert "process 1 of 2 on " in log and "killed by SIGABRT" in log and "trace" not in log.replace("traceback", "")
    assert own_log.startswith("*** the trace ***\n") and "process 1 of 2, this one, on " in own_log


def test_of_two_failures_each_is_shown():
    """What a library says as it ends the process, in one that is not the first."""
    children, _ = workers(*(f"os.write(2, b'fault {i}\\n'); os._exit(1)" for i in range(2)))
    for index, (code, _, log) in enumerate(map(finish, children)):
        assert (code, log) == (1, f"fault {index}\n")


@pytest.mark.parametrize("number, kind", [(2, "refused"), (1, "failed")])
def test_a_refusal_or_failure_of_one_ends_the_others(number, kind):
    """What went wrong has been said once, by the one that knows."""
    children, pids = workers(SLEEP, f"code = {number}")
    (code, _, log), (own_code, _, own_log) = map(finish, children)
    assert (code, own_code) == (number, number) and own_log == ""
    assert re.match(rf"moe-jax train: {kind}\nprocess 1 of 2 on \S+:? (was )?{kind}", log), log
    assert all(gone(pid) for pid in pids)


@pytest.mark.parametrize("last", [0, 1])
def test_a_stop_after_saving_ends_no_other(last):
    """Each says so by its own code, whichever is the first to end."""
    children, _ = workers(*(f"time.sleep({6.0 * (i == last)}); code = 75" for i in range(2)))
    assert [finish(child)[::2] for child in children] == [(75, ""), (75, "")]


def test_a_failure_that_follows_from_a_death_is_not_told():
    """A library may notice the death before its process is ended."""
    children, pids = workers(SLEEP, "time.sleep(1); raise RuntimeError('connection reset by peer')")
    time.sleep(1.2)
    os.kill(pids[0], signal.SIGKILL)
    code, _, log = finish(children[1])
    assert code == 1 and "process 0 of 2 on " in log and not NOISE.search(log), log
    finish(children[0])


def test_a_second_signal_ends_all_at_once():
    stubborn = "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(60)"
    children, pids = workers(stubborn, stubborn)
    lines = []
    for _ in range(2):
        children[1].send_signal(signal.SIGINT)
        lines.append(children[1].stderr.readline().decode())
    assert lines[0] == "SIGINT: stopping after this step and saving; Ctrl-C again quits without saving\n"
    assert lines[1] == "SIGINT: quits without saving; the last complete checkpoint stays\n"
    (code, _, log), (own_code, _, _) = map(finish, children)
    assert own_code == 130 and code == 1 and "process 1 of 2 on " in log and "was interrupted" in log
    assert all(gone(pid) for pid in pids)


def test_an_evaluation_ends_at_the_first_signal():
    """Nothing in it would answer a SIGTERM by a checkpoint."""
    children, pids = workers(SLEEP, SLEEP, saves=False)
    children[1].send_signal(signal.SIGTERM)
    (code, _, log), (own_code, _, own_log) = map(finish, children)
    assert (own_code, own_log.splitlines()[0]) == (130, "SIGTERM: quits")
    assert code == 1 and "process 1 of 2 on " in log and "was interrupted" in log
    assert all(gone(pid) for pid in pids)


COME = f"here(); {SLEEP}"


@pytest.mark.parametrize(
    "code, named, all_named",
    [
        ((COME, COME, SLEEP), 2, ""),
        ((SLEEP, SLEEP, COME), 0, ""),
        ((COME, SLEEP, SLEEP), 1, "processes 1 and 2 of 3 did not come to JAX's service"),
    ],
    ids=["2", "0", "1 and 2"],
)
def test_who_does_not_come_to_jax_is_named(code, named, all_named):
    """By all. JAX would abort those that wait, and blame one of them."""
    children, pids = workers(*code, before="seconds = 4")
    for index, child in enumerate(children):
        got, _, log = finish(child)
        here = ", this one," if index == named else ""
        assert got == 1 and re.search(rf"failed\nprocess {named} of 3{here} on \S+ did not come to JAX's", log), log
        assert "raise --join-seconds" in log and (index != 0 or all_named in log)
    assert all(gone(pid) for pid in pids)


def test_who_has_come_to_jax_may_take_its_time():
    children, _ = workers(*(["here(); time.sleep(5); code = 0"] * 2), before="seconds = 3")
    assert [finish(child)[::2] for child in children] == [(0, ""), (0, "")]


JOIN = "place.start(seconds, here); import jax; code = 0 if jax.process_count() == 2 else 3"


@pytest.mark.parametrize("late", [0, 1])
def test_jax_waits_as_long_as_the_supervisors(late):
    """One whose JAX starts long before that of the other is not aborted."""
    code = [f"time.sleep({10 * (i == late)}); {JOIN}" for i in range(2)]
    children, _ = workers(*code, before="seconds, processes.JAX_SECONDS = 120, 2")
    for got, _, log in map(finish, children):
        assert got == 0, log


def test_process_0_is_out_of_reach_until_jax_has_started_there():
    """Only then does a process tell that it is here."""
    port = free_port()
    place = Place(1, 2, "localhost", 1, service=port)
    with pytest.raises(Refused, match=rf"--service-port: .* localhost:{port} cannot be reached within 0\.5 s"):
        place.reach(0.5)
    with socket.create_server(("localhost", port)):
        place.reach(0.5)
    Place(0, 2, "localhost", 1, service=port).reach(0.5)


ABORTED, KILLED = -signal.SIGABRT, -signal.SIGKILL


@pytest.mark.parametrize(
    "ended, count, want",
    [
        ({1: KILLED}, 2, (1, KILLED)),
        ({0: ABORTED, 1: KILLED}, 2, (1, KILLED)),
        ({2: 0, 1: ABORTED, 0: supervise.LOST}, 3, (0, supervise.LOST)),
        ({1: 2, 0: 2}, 2, (1, 2)),
        ({0: ABORTED}, 2, (1, supervise.HUNG)),
        ({0: ABORTED, 2: ABORTED, 3: ABORTED}, 4, (1, supervise.HUNG)),
        ({1: ABORTED, 2: ABORTED}, 3, (0, supervise.HUNG)),
        ({1: ABORTED}, 2, (1, ABORTED)),
        ({2: ABORTED}, 4, (2, ABORTED)),
    ],
)
def test_who_is_to_blame(ended, count, want):
    assert supervise.blame(ended, count) == want


# Refusals


@pytest.mark.parametrize(
    "argv, needles",
    [
        (["--processes", "2", "--process", "2"], ["--process: is 2, of 2 processes", "0 to 1"]),
        (["--processes", "2", "--process", "-1"], ["--process: is -1, of 2 processes"]),
        (["--processes", "2"], ["--process: is missing, of 2 processes", "0 to 1"]),
        (["--processes", "0"], ["--processes: is '0'", "a number from 1, or detect"]),
        (["--processes", "many"], ["--processes: is 'many'"]),
        (["--process", "1"], ["--process: is 1, and --processes is not given"]),
        (["--coordinator", "a:1"], ["--coordinator: is a:1, and --processes is not given"]),
        (["--service-port", "7"], ["--service-port: is 7, and --processes is not given"]),
        ([*flags(1, 2, 1), "--service-port", "1"], ["--service-port: is 1, and there the processes meet", "another"]),
        ([*flags(1, 2, 1), "--service-port", "65536"], ["--service-port: is 65536", "1 to 65535"]),
        (["--processes", "2", "--process", "1"], ["--coordinator: is missing", "HOST:PORT of process 0"]),
        (["--processes", "2", "--process", "1", "--coordinator", "node"], ["--coordinator: is 'node'"]),
        (["--processes", "2", "--process", "1", "--coordinator", "node:0"], ["--coordinator: is 'node:0'"]),
        ([*flags(1, 2, 1), "--join-seconds", "0"], ["--join-seconds: is 0"]),
        ([*flags(1, 2, 1), "--fake-devices", "8"], ["8 fake devices in each of 2 processes, 16 in all", "devices 4,"]),
        (flags(1, 3, 1), ["--processes: is 3, and a mesh of 8 (data=2 x expert=4)", "divisor"]),
        ([*flags(1, 2, 1), "data.batch=12"], ["data.batch: 12 sequences", "8 token shards"]),
        ([*flags(1, 2, 1), "--join-seconds", "0.5"], ["process 0 of 2 did not answer at localhost:1 within 0.5 s ("]),
        ([*flags(0, 4, 0), "--join-seconds", "0.5"], ["processes 1, 2 and 3 of 4 did not join within 0.5 s"]),
        (["--processes", "detect"], ["--processes: is detect, and JAX finds no SLURM step, Kubernetes job, TPU"]),
        (["--processes", "detect", "--process", "0"], ["--process: is 0, and --processes detect asks the cluster"]),
    ],
    ids=lambda x: " ".join(map(str, x)) if isinstance(x, list) and "-" in str(x[0])[:2] else None,
)
def test_wrong_flags_are_refused(train, tmp_path, call, argv, needles):
    argv = [str(a).replace("localhost:0", f"localhost:{free_port()}") for a in argv]
    check_refusal(*call(*train, tmp_path / "run", *argv), "train", *needles)
    assert not (tmp_path / "run").exists()


def test_a_folder_for_each_process_is_refused(train, call):
    check_refusal(*call(*train[:-1], *flags(0, 2, free_port())), "train", "--workdir: is missing")


def test_one_process_is_a_run_like_any_other(whole, train, call):
    code, report, log = call(*train, whole, "--processes", "1", "--process", "0")
    assert code == 0 and report["processes"] == 1 and "nothing to do" in log


def test_slurm_says_which_process_this_is(monkeypatch):
    """By JAX's own detection."""
    step = {"JOB_ID": "7", "STEP_NODELIST": "node[003-004]", "NTASKS": "4", "PROCID": "2", "LOCALID": "0"}
    for name, value in step.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    args = cli.parse(["train", "tiny_switch", "--processes", "detect"])
    assert find_place(args) == Place(2, 4, "node003", 65536 - 4096 + 7, detected=True)
