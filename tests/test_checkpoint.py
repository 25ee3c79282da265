"""Checkpoints: bit-exact on any mesh, safe against donation and kill -9, and refused by name when they do not fit."""

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec, SingleDeviceSharding

from moe_jax import checkpoint
from moe_jax.checkpoint import (
    COMPLETE,
    MARKER,
    CheckpointFailed,
    Checkpoints,
    check_workdir,
    claim_workdir,
    open_workdir,
)
from moe_jax.config import Refused

INFO = {"config": {"model": {"layers": 2}}, "position": 7, "seeds": [1, 2], "none": None, "rate": 0.1}


def mesh(*shape):
    return jax.make_mesh(shape, ("data", "expert")[: len(shape)], axis_types=(AxisType.Auto,) * len(shape))


def shardings(kind):
    """A function from shape to sharding; uneven leading sizes stay whole."""
    if kind == "single":
        return lambda shape: SingleDeviceSharding(jax.devices()[3])
    m = mesh(8) if kind == "8" else mesh(2, 4)
    axes = ("data",) if kind == "8" else ("expert", "data")

    def place(shape):
        fits = len(shape) >= 2 and shape[0] % 8 == 0 and shape[1] % 8 == 0
        return NamedSharding(m, PartitionSpec(*axes) if fits else PartitionSpec())

    return place


def state_of(kind="8", seed=0, width=16):
    rng = np.random.default_rng(seed)

    def bits(shape, dtype):
        """Every bit pattern, NaN payloads included."""
        return rng.integers(0, 256, (*shape, np.dtype(dtype).itemsize), np.uint8).view(dtype)[..., 0]

    params = {
        "embed": bits((24, width), np.float32),
        "blocks": ({"w": bits((8, 8, 5), jnp.bfloat16)}, {"w": bits((8, 8, 5), jnp.bfloat16), "b": bits((7,), "f4")}),
    }
    opt = optax.chain(optax.clip(1.0), optax.adamw(1e-3)).init(params)
    opt = jax.tree.map(lambda x: bits(x.shape, x.dtype), opt)
    key = jax.random.key_data(jax.random.key(seed))
    state = {"params": params, "opt": opt, "key": key, "step": np.int32(seed), "mask": np.array([True, False])}
    place = shardings(kind)
    return jax.tree.map(lambda x: jax.device_put(x, place(x.shape)), state)


def target_of(state, kind="8"):
    place = shardings(kind)
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place(x.shape)), state)


def raw(tree):
    """Structure and bytes, so that NaN compares equal to itself only bit for bit."""
    return jax.tree.structure(tree), [(x.shape, str(x.dtype), np.asarray(x).tobytes()) for x in jax.tree.leaves(tree)]


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "checkpoints"


def saved(folder, *steps, keep=3):
    """Checkpoints of `state_of(seed=step)`, on disk."""
    c = Checkpoints(folder, keep)
    for step in steps:
        c.save(step, state_of(seed=step), INFO | {"step": step})
    c.wait()
    return c


@pytest.mark.parametrize("to", ["8", "2x4", "single"])
@pytest.mark.parametrize("source", ["8", "2x4", "single"])
def test_round_trip_on_any_mesh(folder, source, to):
    state = state_of(source)
    c = Checkpoints(folder, 2)
    c.save(5, state, INFO)
    target = target_of(state, to)
    again, info = Checkpoints(folder, 2).restore(target) if c.wait() else c.restore(target)
    assert raw(again) == raw(state)
    assert info == INFO
    assert all(a.sharding == t.sharding for a, t in zip(*map(jax.tree.leaves, (again, target)), strict=True))


@pytest.mark.parametrize("kind", ["8", "2x4", "single"])
def test_sums_on_the_host_are_those_of_the_program(kind):
    """What an accelerator adds up, of every type, is what a CPU does: checkpoints travel between them."""
    state = state_of(kind)
    names = {"".join(map(str, path)): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(state)}
    want = [int(x) for x in jax.jit(lambda leaves: [checkpoint._bits(x) for x in leaves])(list(names.values()))]
    assert [int(x) for x in checkpoint._sums(state).values()] == want
    assert len({x.dtype for x in names.values()}) >= 5


def test_restart_keeps_the_newest_and_saves_no_step_twice(folder):
    assert not folder.exists() and Checkpoints(folder, 3).steps() == [] and not folder.exists()
    saved(folder, 1, 2, 10, 9, keep=3)
    c = Checkpoints(folder, 2)  # another process with another keep
    assert c.steps() == [2, 9, 10]
    assert c.info(9)["step"] == 9 and c.info()["step"] == 10
    c.save(10, state_of(seed=99), INFO)
    c.save(11, state_of(seed=11), INFO)
    c.wait()
    assert c.steps() == [10, 11]
    assert raw(c.restore(target_of(state_of()), 10)[0]) == raw(state_of(seed=10))
    with pytest.raises(Refused, match=r"no checkpoint 2\n.*use one of: 10, 11"):
        c.restore(target_of(state_of()), 2)
    saved(folder, 12, keep=None)
    assert c.steps() == [10, 11, 12]


def test_arrays_may_be_overwritten_at_once(folder):
    """A donated buffer is reused by the next step while the save still runs."""
    place = shardings("2x4")
    big = {"params": {"w": jnp.arange(2**20, dtype=jnp.float32).reshape(1024, 1024)}, "n": jnp.int32(1)}
    state = jax.tree.map(lambda x: jax.device_put(x, place(x.shape)), big)
    wanted, target = raw(state), target_of(state, "2x4")
    step = jax.jit(lambda s: jax.tree.map(lambda x: x * 0 - 1, s), donate_argnums=0)
    c = Checkpoints(folder, 2)
    c.save(1, state, INFO)
    assert c._running is not None
    for _ in range(5):
        state = step(state)
    jax.block_until_ready(state)
    jax.tree.map(lambda x: x.delete(), state)
    assert raw(c.restore(target)[0]) == wanted


class State(NamedTuple):
    opt: Any
    params: Any


class Weights(NamedTuple):
    params: Any
    bias: Any


@pytest.mark.parametrize("kind", ["dict", "NamedTuple"])
def test_only_the_parameters(folder, kind):
    state = state_of()
    c = Checkpoints(folder, 1)
    c.save(0, state if kind == "dict" else State(state["opt"], state["params"]), INFO)
    c.wait()
    params = Checkpoints(folder).restore_weights(Weights(target_of(state["params"], "2x4"), {})).params
    assert raw(params) == raw(state["params"])
    other = target_of(state_of(width=32)["params"])
    with pytest.raises(Refused, match=r"params/embed: checkpoint \[24,16\] float32, model \[24,32\] float32"):
        Checkpoints(folder).restore_weights(Weights(other, {}))


def test_mismatch_is_refused_by_name(folder):
    saved(folder, 0)
    state = state_of()
    state["params"]["embed"] = jnp.zeros((4, 16))
    state["params"]["blocks"] = ({"w": jnp.zeros((8, 8, 5))}, {"w": state["params"]["blocks"][1]["w"]})
    state["new"] = jnp.zeros(3)
    with pytest.raises(Refused) as e:
        Checkpoints(folder).restore(target_of(state))
    for line in (
        "4 of ",
        "params/embed: checkpoint [24,16] float32, model [4,16] float32",
        "params/blocks/0/w: checkpoint [8,8,5] bfloat16, model [8,8,5] float32",
        "params/blocks/1/b: checkpoint [7] float32, model absent",
        "new: checkpoint absent, model [3] float32",
        "remedy: use the config saved in the checkpoint, or another --workdir",
    ):
        assert line in str(e.value)
    with pytest.raises(Refused, match=r"and \d+ more\n"):
        Checkpoints(folder).restore({"params": target_of(state["params"])})


def files(step):
    return sorted(str(p.relative_to(step)) for p in step.rglob("*") if p.is_file())


def harm_each_file(folder, harm):
    """What a restore of step 2 says when one file is harmed, for each of its files."""
    target, wanted, outcome = target_of(state_of()), raw(state_of(seed=2)), {}
    for name in files(folder / "2"):
        path = folder / "2" / name
        before = path.read_bytes()
        if not before:  # nothing to damage
            continue
        harm(path, before)
        if name == COMPLETE and not path.exists():  # then it is no step
            assert Checkpoints(folder).steps() == [1]
        else:
            try:
                assert raw(Checkpoints(folder).restore(target)[0]) == wanted
                assert "/ocdbt.process_" in name and path.stat().st_size == len(
                    before
                )  # an index that Orbax merged into another
            except Refused as e:
                outcome[name] = str(e)
        path.write_bytes(before)
    return outcome


def flip(path, data, at=0.5):
    i = int(len(data) * at)
    path.write_bytes(data[:i] + bytes([data[i] ^ 0x10]) + data[i + 1 :])


@pytest.mark.parametrize(
    "harm",
    [
        lambda path, data: path.unlink(),
        lambda path, data: path.write_bytes(data[: len(data) // 2]),
        lambda path, data: path.write_bytes(b""),
        lambda path, data: flip(path, data, 0.02),
        lambda path, data: flip(path, data, 0.5),
        lambda path, data: flip(path, data, 0.98),
    ],
    ids=["deleted", "truncated", "emptied", "flipped near the start", "flipped", "flipped near the end"],
)
def test_damage_is_refused_and_names_step_and_remedy(folder, harm, caplog):
    saved(folder, 1, 2)
    outcome = harm_each_file(folder, harm)
    assert len(outcome) > 6
    for text in outcome.values():
        assert text.startswith(f"{folder / '2'}: the checkpoint is damaged: "), text
        assert text.endswith(f"remedy: remove {folder / '2'} to go on from step 1"), text
        assert len(text) < 1000 and "Traceback" not in text
    assert raw(Checkpoints(folder).restore(target_of(state_of()), 1)[0]) == raw(state_of(seed=1))
    assert caplog.text == ""


def test_a_wrong_bit_in_an_array_is_noticed(folder, monkeypatch):
    """Whatever the storage does: a state that is not the one that was saved is refused."""
    saved(folder, 0)
    load = checkpoint.ocp.load_checkpointables

    def wrong(*args):
        state = load(*args)["state"]
        w = state["params"]["embed"]
        bits = np.asarray(w).view(np.uint32).copy()
        bits[3, 5] ^= 1 << 7
        state["params"]["embed"] = jax.device_put(bits.view(np.float32), w.sharding)
        return {"state": state}

    monkeypatch.setattr(checkpoint.ocp, "load_checkpointables", wrong)
    with pytest.raises(Refused, match=r"leaves changed on disk, first params/embed\n.*start again: there is no older"):
        Checkpoints(folder).restore(target_of(state_of()))


def test_dead_saves_count_as_nothing_and_are_cleaned_up(folder):
    saved(folder, 1, 2)
    (folder / "2" / COMPLETE).unlink()  # a save, or a removal, that died halfway
    (folder / "3").mkdir()
    (folder / "notes").mkdir()
    c = Checkpoints(folder, 5)
    assert c.steps() == [1]
    c.save(2, state_of(seed=2), INFO)
    c.wait()
    assert sorted(p.name for p in folder.iterdir()) == ["1", "2", "notes"]
    assert raw(c.restore(target_of(state_of()))[0]) == raw(state_of(seed=2))


SAVER = """
    import sys, jax, jax.numpy as jnp
    from pathlib import Path
    from moe_jax.checkpoint import Checkpoints
    c = Checkpoints(Path(sys.argv[1]), 2)
    for step in range(10_000):
        c.save(step, {"params": jnp.full((512, 512), step, jnp.float32), "step": jnp.int32(step)}, {"step": step})
        print(step, flush=True)
"""


def test_kill_9_leaves_only_loadable_steps(folder):
    place = shardings("8")
    target = {
        "params": jax.ShapeDtypeStruct((512, 512), jnp.float32, sharding=place((512, 512))),
        "step": jax.ShapeDtypeStruct((), jnp.int32, sharding=place(())),
    }
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(SAVER), str(folder)],
        stdout=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parent.parent,
    )
    with process:
        while int(process.stdout.readline()) < 4:
            pass
        time.sleep(0.02)  # into the save of step 4 or 5
        process.send_signal(signal.SIGKILL)
    c = Checkpoints(folder, 2)
    steps = c.steps()
    assert steps and steps[-1] >= 3
    for step in steps:
        state, info = c.restore(target, step)
        assert info == {"step": step} == {"step": int(state["step"])}
        assert (np.asarray(state["params"]) == step).all()
    again = steps[-1] + 1  # what the dead process was writing
    state = jax.tree.map(lambda x: jax.device_put(np.full(x.shape, again, x.dtype), x.sharding), target)
    c.save(again, state, {"step": again})
    c.wait()
    assert c.steps() == [*steps, again][-2:]
    assert sorted(p.name for p in folder.iterdir()) == sorted(map(str, c.steps()))
    assert raw(c.restore(target)[0]) == raw(state)


FULL = """
    import resource, sys, jax, jax.numpy as jnp
    from pathlib import Path
    from moe_jax.checkpoint import CheckpointFailed, Checkpoints
    c = Checkpoints(Path(sys.argv[1]), 2)
    c.save(1, {"params": jax.random.normal(jax.random.key(0), (100,))}, {})
    c.wait()
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limit[1]))
    big = {"params": jax.random.normal(jax.random.key(0), (1000, 1000))}
    c.save(2, big, {})
    try:
        c.save(3, big, {})
    except CheckpointFailed as e:
        print(e)
    resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    c.save(2, big, {})
    c.wait()
    print(c.steps())
"""


def test_a_full_disk_surfaces_at_the_next_save(folder):
    """Here files may not grow: the write fails in the background, as it does when the disk is full."""
    run = [sys.executable, "-W", "error", "-c", textwrap.dedent(FULL), str(folder)]
    out = subprocess.run(run, capture_output=True, text=True, timeout=120, cwd=Path(__file__).parent.parent)
    first, remedy, steps = out.stdout.splitlines()
    assert first == f"{folder / '2'}: the checkpoint was not written: File too large"
    assert "remedy: make room" in remedy and "step 1 is the newest complete one" in remedy
    assert steps == "[1, 2]"
    assert out.stderr == "" and out.returncode == 0


def test_a_save_that_cannot_start_fails(tmp_path):
    (tmp_path / "checkpoints").write_text("a file")
    with pytest.raises(CheckpointFailed, match=r"checkpoints/1: the checkpoint was not written: .*\n *remedy: "):
        saved(tmp_path / "checkpoints", 1)
    with pytest.raises(TypeError):
        Checkpoints(tmp_path / "new").save(1, state_of(), {"x": object()})
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoints"]


def listing(path):
    return sorted((str(p), p.lstat().st_mtime_ns) for p in path.rglob("*"))


@pytest.mark.parametrize("function", [check_workdir, claim_workdir])
def test_unusable_workdirs_are_refused_and_nothing_is_written(tmp_path, monkeypatch, function):
    (tmp_path / "file").write_text("x")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    for name, content in (("foreign", None), ("newer", '{"format": 99}'), ("broken", "{"), ("list", "[]")):
        (tmp_path / name).mkdir()
        (tmp_path / name / (MARKER if content else "thesis.tex")).write_text(content or "x")
    before = listing(tmp_path)
    cases = {
        "file": "is a file",
        "file/sub/dir": "is not a folder",
        "link/sub": "is not a folder",
        "foreign": f"holds thesis.tex and no {MARKER}",
        "newer": "has format 99",
        "broken": "is damaged",
        "list": "is damaged",
    }
    for name, why in cases.items():
        with pytest.raises(Refused) as e:
            function(tmp_path / name)
        assert str(e.value).startswith("--workdir: ") and why in str(e.value) and "remedy: " in str(e.value)
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with pytest.raises(Refused, match=r"cannot be created: .* cannot be written"):
        function(tmp_path / "a" / "b")
    assert listing(tmp_path) == before


def test_a_readonly_filesystem_is_refused(tmp_path, monkeypatch):
    real = os.statvfs(tmp_path)
    fields = list(real)
    fields[8] |= os.ST_RDONLY
    monkeypatch.setattr(os, "statvfs", lambda path: os.statvfs_result(fields))
    with pytest.raises(Refused, match="cannot be written"):
        check_workdir(tmp_path)


def test_claim_and_open(tmp_path):
    work = tmp_path / "a" / "work"
    for path, why in ((work, "does not exist"), (tmp_path, f"holds no {MARKER}"), (Path(__file__), "is not a folder")):
        with pytest.raises(Refused, match=why):
            open_workdir(path)
    check_workdir(work)
    assert not work.exists() and not work.parent.exists()
    claim_workdir(work)
    assert json.loads((work / MARKER).read_text()) == {"format": 1, "moe_jax": checkpoint.version("moe-jax")}
    before = listing(tmp_path)
    claim_workdir(work)
    check_workdir(work)
    with pytest.raises(Refused, match="holds no complete checkpoint"):
        open_workdir(work)
    assert listing(tmp_path) == before
    saved(work / "checkpoints", 4)
    assert open_workdir(work).steps() == [4]
    with pytest.raises(Refused, match="cannot be created"):
        claim_workdir("/proc/work")


def test_import_leaves_the_root_logger_alone():
    code = "import logging; r = logging.getLogger(); before = r.level, list(r.handlers)\n"
    code += "import moe_jax.checkpoint; assert r.level == before[0]"
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True, cwd=Path(__file__).parent.parent)
