"""An import by several processes: the weights of one, each part read by one of them, and a whole run or nothing."""

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from math import prod

import numpy as np
import published
import pytest
from commands import ENV, NOISE, check_refusal, finish, listing, write_text
from joined import flags, free_port, meet
from published import GOLDEN
from test_convert import read, tensors
from test_processes import child_of, gone, several

from moe_jax import cli
from moe_jax.checkpoint import claim_workdir
from moe_jax.convert import load
from moe_jax.convert.sample import PIECE, WHOLE, sample
from moe_jax.processes import Place, asks
from moe_jax.workdir import Before, locked

pytestmark = pytest.mark.usefixtures("inside")

MESH = ["mesh.expert=2", "data.length=8"]


def test_two_processes_write_what_one_does(tmp_path, call):
    """The same checkpoint bit for bit, told by process 0 alone; the folders on the way are made."""
    source, both, one = tmp_path / "source", tmp_path / "a" / "both", tmp_path / "one"
    published.synthetic(source, {"vocab_size": 300})
    argv = [*MESH, f"data.path={write_text(tmp_path)}", "--json"]
    done = [finish(child) for child in several(["convert", "import", source, both, *argv], 2, 1)]
    (code, out, log), (other_code, other_out, other_log) = done
    assert (code, other_code) == (0, 0), log + other_log
    assert other_out == other_log == "" and not NOISE.search(log), log + other_log
    code, want, _ = call("convert", "import", source, one, *argv)
    got = json.loads(out)
    assert code == 0 and (got["processes"], want["processes"]) == (2, 1) and got["text"]
    assert all(got[k] == want[k] for k in ("tensors", "params_total", "shard_bytes", "mesh", "family", "tokenizer"))
    for name, run in (("from-both", both), ("from-one", one)):
        assert call("convert", "export", run, tmp_path / name)[0] == 0
    two, alone = tensors(tmp_path / "from-both"), tensors(tmp_path / "from-one")
    assert two.keys() == alone.keys() and all(two[n].tobytes() == alone[n].tobytes() for n in two)
    assert (both / "tokens" / "index.json").read_bytes() == (one / "tokens" / "index.json").read_bytes()
    small = [{p.name: p.read_bytes() for p in (run / "published").iterdir()} for run in (both, one)]
    assert small[0] == small[1] and not (both / ".shared").exists()
    again = [*flags(0, 2, free_port()), "--join-seconds", "0.5"]
    check_refusal(*call("convert", "import", source, both, *MESH, *again), "convert", "process 1 of 2 did not join")
    assert (both / "checkpoints" / "0" / "complete.json").exists(), "a run that is whole stays"


SLOW = """
import sys, time
from moe_jax import cli
from moe_jax.convert import command

begin = command.run_import

def halts(args):
    from moe_jax.convert import load
    load.weights = lambda *a: print("reads", flush=True) or time.sleep(300)
    return begin(args)

command.run_import = halts
sys.exit(cli.main(sys.argv[1:]))
"""


@pytest.mark.parametrize("role", [0, 1])
def test_a_death_leaves_nothing(role, tmp_path):
    """kill -9 of the whole process 0, or of what reads in process 1, when both are at the weights; it is named."""
    run, port = tmp_path / "a" / "run", free_port()
    argv = ["convert", "import", GOLDEN / "mixtral", run, *MESH, "--fake-devices", 1]
    lines = [[sys.executable, "-c", SLOW, *map(str, [*argv, *flags(i, 2, port)])] for i in range(2)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "bufsize": 0}
    children = [subprocess.Popen(line, env=ENV, **pipes) for line in lines]
    for child in children:
        assert child.stdout.readline() == b"reads\n", finish(child)
    assert (run / "config.toml").exists() and (run / "published").is_dir()
    pids = [child_of(child) for child in children]
    os.kill(pids[1] if role else children[0].pid, signal.SIGKILL)
    code, out, log = finish(children[1 - role])
    assert code == 1 and out == "" and log.startswith("moe-jax convert: failed\n"), log
    assert f"process {role} of 2 on " in log and " died: " in log and "the same command\n" in log, log
    assert finish(children[role])[0] == (1 if role else -signal.SIGKILL)
    assert all(gone(pid) for pid in pids) and listing(tmp_path) == {}


# Other folders


def both_ask(tmp_path, *argv):
    """How a meeting ends of process 0 with a folder of this name, and process 1 with what else it is given."""
    given = [["convert", "import", GOLDEN / "mixtral", tmp_path / "run", *MESH], ["convert", "import", *argv]]
    port = free_port()
    places = [Place(i, 2, "localhost", port) for i in range(2)]
    return meet(*((p, asks(cli.parse([*map(str, a)]), p)) for p, a in zip(places, given, strict=True)))


def test_other_weights_and_options_are_refused(tmp_path):
    """Before anything starts: other weights, a folder that is not there and other keys. A copy is the same."""
    copy, run = tmp_path / "copy", tmp_path / "run"
    shutil.copytree(GOLDEN / "mixtral", copy)
    for answer in both_ask(tmp_path, copy, run, *MESH):
        assert not isinstance(answer, str), answer
        for link in answer[1].values():
            link.sock.close()
    with (copy / "model.safetensors").open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        last = file.read(1)
        file.seek(-1, os.SEEK_END)
        file.write(bytes([last[0] ^ 1]))
    for argv, needles in (
        ([copy, run, *MESH], ["SRC: 2 files of checksum ", " in process 1, 2 files of checksum "]),
        ([tmp_path / "none", run, *MESH], ["SRC: cannot be read: No such file or directory in process 1"]),
        ([GOLDEN / "mixtral", run, "mesh.expert=4", "data.length=8"], ["mesh.expert: 4 in process 1, 2 in process 0"]),
    ):
        for answer in both_ask(tmp_path, *argv):
            assert isinstance(answer, str) and all(n in answer for n in needles), answer
    assert listing(run.parent).keys() == {"copy", *(f"copy/{p.name}" for p in copy.iterdir())}


@pytest.mark.parametrize("place", [0, WHOLE - 1, WHOLE + PIECE])
def test_a_sample_of_a_large_file(place, tmp_path):
    """Its beginning and its middle are looked at, and its length."""
    file = tmp_path / "model.safetensors"
    size = 2 * (WHOLE + PIECE)
    os.truncate(file.touch() or file, size)
    before = sample(tmp_path)
    with file.open("r+b") as f:
        f.seek(place)
        f.write(b"x")
    changed = sample(tmp_path)
    os.truncate(file, size + 1)
    assert len({before, changed, sample(tmp_path)}) == 3 and before.startswith("1 files of checksum ")


def test_a_folder_of_another_disk(tmp_path, monkeypatch):
    """What process 0 writes is not seen there; the refusal has the name of the argument."""
    monkeypatch.setattr("moe_jax.train.resume.SHARED_SECONDS", 0.0)
    monkeypatch.setattr("moe_jax.train.resume.agree", lambda n: n)
    monkeypatch.setattr("jax.process_count", lambda: 2)
    monkeypatch.setattr("jax.process_index", lambda: 1)
    (tmp_path / "run").mkdir()
    with pytest.raises(load.Refused, match=r"WORKDIR: .* is not the folder of that name in which process 0 writes"):
        load.run(GOLDEN / "mixtral", tmp_path / "run", ["data.length=8"])
    assert listing(tmp_path) == {"run": ()}


# What stays


def half(run):
    """What an import has written by half."""
    claim_workdir(run)
    (run / "checkpoints" / "0").mkdir(parents=True)
    (run / "checkpoints" / "0" / "part").write_text("x")
    (run / "config.toml").write_text("x")


def test_what_came_is_taken_away(tmp_path):
    """And what was there stays: nothing, an empty folder, or a folder that a killed import left."""
    run = tmp_path / "a" / "run"
    before = Before(run)
    half(run)
    before.restore()
    before.restore()  # the other supervisor
    assert listing(tmp_path) == {}
    run.mkdir(parents=True)
    before = Before(run)
    half(run)
    before.restore()
    assert listing(tmp_path).keys() == {"a", "a/run"}
    claim_workdir(run)
    was, before = listing(tmp_path), Before(run)
    half(run)
    before.restore()
    assert listing(tmp_path) == was


@pytest.mark.parametrize("what", ["checkpoints/0/complete.json", "metrics.jsonl"])
def test_a_run_that_is_there_stays(what, tmp_path):
    run = tmp_path / "run"
    before = Before(run)
    half(run)
    (run / what).write_text("{}")
    was = listing(tmp_path)
    before.restore()
    assert listing(tmp_path) == was


def test_a_run_that_is_under_way_stays(tmp_path, monkeypatch):
    """Another command has the lock; a process that lets it go as it dies is waited for."""
    run = tmp_path / "run"
    before = Before(run)
    half(run)
    was = listing(tmp_path)
    with locked(run), monkeypatch.context() as m:
        m.setattr("moe_jax.workdir.LOCK_SECONDS", 0.2)
        before.restore()
        assert listing(tmp_path) == was
    taken, dies = threading.Event(), threading.Event()

    def hold():
        with locked(run):
            taken.set()
            dies.wait(0.3)

    thread = threading.Thread(target=hold)
    thread.start()
    taken.wait()
    before.restore()
    thread.join()
    assert listing(tmp_path) == {}


class Half:
    """A parameter of which this process has the devices of one expert in two."""

    def __init__(self, target):
        self.shape, self.sharding, self.whole = target.shape, self, target.sharding

    def addressable_devices_indices_map(self, shape):
        every = self.whole.addressable_devices_indices_map(shape)
        return {d: index for d, index in every.items() if (index[1].start or 0) < shape[1] // 2}


def test_a_process_reads_its_part_alone(monkeypatch):
    """Bytes of experts that are looked at for the devices of one of two processes."""
    found, devices, _ = read(GOLDEN / "mixtral", "mesh.expert=4", "mesh.tensor=2")
    target = found.model.weight_targets(devices).params["stacks"]["0"]["blocks"]["0"]["ffn"]["experts"]["w_down"]
    seen, piece = [], load.Piece.read
    monkeypatch.setattr(load.Piece, "read", lambda *a: seen.append(piece(*a)) or seen[-1])
    monkeypatch.setattr("jax.make_array_from_single_device_arrays", lambda shape, sharding, arrays: arrays)
    own = load.filled(
        found.source, found.names.parts["stacks.0.blocks.0.ffn.experts.w_down"], Half(target), lambda n: None
    )
    n, E, F, D = target.shape
    assert {x.shape for x in own} == {(n, E // 4, F // 2, D)} and len(own) == 4
    assert sum(x.nbytes for x in seen) == 4 * prod(target.shape) // 2 == sum(np.asarray(x).nbytes for x in own)
