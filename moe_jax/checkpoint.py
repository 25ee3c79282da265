"""Checkpoints: a working folder of ours, asynchronous saves, restores on any mesh. All of Orbax is behind this file.

    WORKDIR/moe_jax.json            the marker: this folder is ours
    WORKDIR/checkpoints/STEP/       one step: `state` as Orbax writes it, and complete.json

complete.json is written last and removed first, so that a process killed at any moment leaves complete steps, and
folders that count as nothing until the next save removes them. It holds the `info` given to `save`, the leaves with a
checksum each, and the files. A step is checked before Orbax opens it, because Orbax loads flipped bits in silence and
reports what it does notice with tracebacks and warnings from other threads.
"""

import json
import logging
import os
import re
import shutil
import zlib
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tensorstore as ts
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding, PartitionSpec, Sharding
from orbax.checkpoint import v1 as ocp

from moe_jax.config import Problem, Refused
from moe_jax.terminal import run_wanted
from moe_jax.workdir import COMPLETE, MARKER

FORMAT = 1
SHOWN = 5  # mismatched leaves named in a message

# Orbax logs dozens of lines a save through absl, and a traceback for each failure that is raised here anyway. Only its
# records are dropped: absl belongs to other libraries too, and the root logger to the program.
logging.getLogger("absl").addFilter(lambda record: "orbax" not in Path(record.pathname).parts)


class CheckpointFailed(Exception):
    """A checkpoint could not be written, through no fault of the input (exit code 1)."""


# Working folders


def _refuse(reason: str, remedy: str, name: str = "--workdir") -> Refused:
    return Refused(Problem(name, reason, remedy))


def _no_checkpoint(folder: Path, name: str = "--workdir") -> Refused:
    return _refuse(f"{folder} holds no complete checkpoint", "train first: moe-jax train CONFIG --workdir DIR", name)


def _check_marker(path: Path, name: str = "--workdir") -> None:
    """Refuses a marker that is not readable or was written by a newer format."""
    try:
        found = json.loads((path / MARKER).read_text())["format"]
        known = 1 <= found <= FORMAT
    except (OSError, ValueError, TypeError, KeyError) as e:
        remedy = "restore that file, or use another folder"
        raise _refuse(f"{path / MARKER} is damaged: {_reason(e)}", remedy, name) from None
    if not known:
        why = f"{path} has format {found}, and this version reads up to {FORMAT}"
        raise _refuse(why, "use the version of moe-jax that wrote it, or another folder", name)


def check_workdir(path: str | Path) -> None:
    """Whether a run can live in `path`: a folder of ours, an empty one, or one that can be made. Writes nothing.

    Raises:
        Refused: a file, a folder that cannot be created or written, or a folder with foreign contents.
    """
    path = Path(path).absolute()
    try:
        str(path).encode()
    except UnicodeEncodeError:  # the library below the checkpoints cannot write there
        raise _refuse(f"{str(path)!a} is not UTF-8", "use a folder whose name is") from None
    above = path
    while not os.path.lexists(above):
        above = above.parent
    if not above.is_dir():
        why = f"{path} is a file" if above == path else f"{path} cannot be created: {above} is not a folder"
        raise _refuse(why, "name a folder")
    # Root passes os.access everywhere; a filesystem mounted read-only refuses root as well.
    if os.statvfs(above).f_flag & os.ST_RDONLY or not os.access(above, os.R_OK | os.W_OK | os.X_OK):
        why = "cannot be written" if above == path else f"cannot be created: {above} cannot be written"
        raise _refuse(f"{path} {why}", "use a folder that you can write")
    if above != path:
        return
    if os.path.lexists(path / MARKER):
        _check_marker(path)
    elif others := sorted(p.name for p in path.iterdir() if p.name != f".{MARKER}"):
        shown = ", ".join(others[:3]) + (", ..." if len(others) > 3 else "")
        why = f"{path} is not a folder of moe-jax: it holds {shown} and no {MARKER}"
        raise _refuse(why, "use a new or an empty folder")


def claim_workdir(path: str | Path) -> None:
    """Create the folder and its marker; does nothing to a folder of ours."""
    path = Path(path)
    check_workdir(path)
    if jax.process_index() != 0 or (path / MARKER).exists():
        return
    try:
        path.mkdir(parents=True, exist_ok=True)
        _write(path / MARKER, {"format": FORMAT, "moe_jax": version("moe-jax")})
    except OSError as e:
        raise _refuse(f"{path} cannot be created: {e.strerror}", "use a folder that you can write") from None


def open_workdir(path: str | Path, name: str = "DIR") -> "Checkpoints":
    """The checkpoints of a trained folder, to read. Asks JAX for no device: their number may depend on what is read.

    Args:
        name: what the command that asks calls the folder.
    Raises:
        Refused: no such folder, not one of ours, or without a complete checkpoint.
    """
    path = Path(path)
    if not path.is_dir():
        why = f"{path} is not a folder" if path.exists() else f"{path} does not exist"
        raise _refuse(why, run_wanted(path), name)
    if not (path / MARKER).exists():
        raise _refuse(f"{path} holds no {MARKER}", run_wanted(path), name)
    _check_marker(path, name)
    checkpoints = Checkpoints(path / "checkpoints")
    if not checkpoints.steps():
        raise _no_checkpoint(checkpoints.folder, name)
    return checkpoints


# Leaves


def _names(tree: Any) -> dict[str, Any]:
    """Leaves by name: `params/blocks/0/w`. Orbax stores tuples and NamedTuples under the same names."""
    flat = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in flat}


def _shape(leaf: Any) -> str:
    return f"[{','.join(map(str, leaf.shape))}] {np.dtype(leaf.dtype).name}"


def _bits(x: jax.Array) -> jax.Array:
    """The sum of a leaf's bits modulo 2^32: the same on every mesh, because the addition is exact."""
    if x.dtype == jnp.bool_:
        x = x.astype(jnp.uint8)
    word = {1: jnp.uint8, 2: jnp.uint16}.get(x.dtype.itemsize, jnp.uint32)
    return jax.lax.bitcast_convert_type(x, word).astype(jnp.uint32).sum(dtype=jnp.uint32)


def _scalar(sharding: Sharding) -> Sharding:
    """Where the checksum of a leaf lives: on all devices of the leaf."""
    return NamedSharding(sharding.mesh, PartitionSpec()) if isinstance(sharding, NamedSharding) else sharding


@cache
def _summer(shardings: tuple[Sharding, ...]) -> Any:
    """One program for all leaves. On a CPU dozens in flight take each other's threads, and all-reduces wait forever."""
    return jax.jit(lambda leaves: [_bits(x) for x in leaves], out_shardings=[_scalar(s) for s in shardings])


def _sum_on_host(leaf: jax.Array) -> np.ndarray:
    """The same of a leaf on CPUs of this process, whose program would first copy it."""
    parts = [np.asarray(s.data) for s in leaf.addressable_shards if s.replica_id == 0]
    word = {1: np.uint8, 2: np.uint16}.get(leaf.dtype.itemsize, np.uint32)
    return np.asarray(sum(int(p.view(word).sum(dtype=np.uint64)) for p in parts) % 2**32)


def _sums(tree: Any) -> dict[str, Any]:
    leaves = _names(tree)
    if all(x.is_fully_addressable and {d.platform for d in x.devices()} == {"cpu"} for x in leaves.values()):
        return {name: _sum_on_host(x) for name, x in leaves.items()}
    sums = _summer(tuple(leaf.sharding for leaf in leaves.values()))(list(leaves.values()))
    return dict(zip(leaves, sums, strict=True))


# Steps


def _reason(error: BaseException) -> str:
    """What went wrong, in one line: Orbax and asyncio wrap the reason, often several times."""
    while True:
        inner = error.exceptions[0] if isinstance(error, BaseExceptionGroup) else error.__cause__
        if inner is None:
            break
        error = inner
    line = " ".join(str(error).split()) or type(error).__name__
    # TensorStore wraps the system's reason in its own names of files, its whole specification and source lines.
    if code := re.search(r"\[os_error_code='(\d+)'", line):
        return os.strerror(int(code[1]))
    line = re.split(r" \[(?:source locations|tensorstore_spec|key)=?", line)[0]
    return line if len(line) < 300 else line[:297] + "..."


def _crc(record: dict) -> int:
    return zlib.crc32(json.dumps(record, sort_keys=True, allow_nan=False).encode())


def _checksum(path: Path) -> int:
    """CRC-32 of a file, read in pieces."""
    crc = 0
    with path.open("rb") as file:
        while piece := file.read(1 << 20):
            crc = zlib.crc32(piece, crc)
    return crc


def _files(step: Path) -> dict[str, list[int]]:
    """Size and checksum of each file: Orbax answers a damaged one with errors from several threads at once."""
    paths = sorted(p for p in step.rglob("*") if p.is_file() and p.name != COMPLETE)
    return {p.relative_to(step).as_posix(): [p.stat().st_size, _checksum(p)] for p in paths}


def _write(path: Path, record: dict) -> None:
    """Renamed into place, so that a kill cannot leave half a file."""
    draft = path.with_name(f".{path.name}")
    draft.write_text(json.dumps(record) + "\n")
    os.replace(draft, path)


def _context(partial: bool = False) -> ocp.Context:
    context = ocp.Context()
    # Written in place: renaming a folder is not atomic on mounted object stores, and complete.json is what counts.
    context.atomicity.mode = ocp.options.AtomicityMode.COMMIT_FILE
    # Folders made here and now: a disk that refuses them is reported by the save that asked.
    context.asynchronous.create_directories_asynchronously = False
    # Weights hardly compress, and a flipped bit must reach our checksum instead of a decoder in another thread.
    context.array.saving.use_compression = False
    context.pytree.loading.partial_load = partial
    return context


def agree(value: int) -> int:
    """Process 0's value, on every process: a shared folder may look different to each for a moment."""
    return value if jax.process_count() == 1 else int(multihost_utils.broadcast_one_to_all(np.int32(value)))


def _remove(step: Path) -> None:
    (step / COMPLETE).unlink(missing_ok=True)
    shutil.rmtree(step)


class Checkpoints:
    """The steps saved in one folder, of which the newest `keep` remain (None: all)."""

    def __init__(self, folder: str | Path, keep: int | None = None):
        self.folder = Path(folder).absolute()
        self.keep = keep
        self._running: tuple[int, Future] | None = None
        self._thread = ThreadPoolExecutor(1, "checkpoint")

    def _folders(self) -> list[Path]:
        if not self.folder.is_dir():
            return []
        return [p for p in self.folder.iterdir() if p.name.isdecimal() and p.name.isascii()]

    def steps(self) -> list[int]:
        """The complete checkpoints, oldest first."""
        return sorted(int(p.name) for p in self._folders() if (p / COMPLETE).exists())

    def newest(self) -> int:
        """The newest step. Raises `Refused` when there is none."""
        step = self.last()
        if step is None:
            raise _no_checkpoint(self.folder)
        return step

    def last(self) -> int | None:
        """The newest step, or None."""
        step = agree(max(self.steps(), default=-1))
        return None if step < 0 else step

    def save(self, step: int, state: Any, info: dict) -> None:
        """Save in the background. The arrays may be donated or overwritten once this returns; a saved step stays.

        Args:
            step: the number of the step, 0 or more.
            state: tree of `jax.Array`.
            info: what a resumed run and `eval` must know; values of JSON, finite.
        Raises:
            CheckpointFailed: this save could not start, or the one before it failed.
        """
        info = json.loads(json.dumps(info, allow_nan=False))  # a copy, and an error here if it is not JSON
        self.wait()
        if agree(step in self.steps()):
            return
        try:
            if jax.process_index() == 0:
                # No save is running: what is incomplete was left by a process that died.
                for dead in self._folders():
                    if not (dead / COMPLETE).exists():
                        shutil.rmtree(dead)
            record = {"leaves": {name: _shape(leaf) for name, leaf in _names(state).items()}, "info": info}
            sums = _sums(state)
            with _context():
                handle = ocp.save_checkpointables_async(str(self.folder / str(step)), {"state": state})
        except Exception as e:
            raise self._failed(step, e) from e
        self._running = step, self._thread.submit(self._finish, step, handle, record, sums)

    def _finish(self, step: int, handle: Any, record: dict, sums: dict) -> None:
        """In the background: wait for the data, declare the step complete, drop the oldest."""
        handle.result()
        if jax.process_index() == 0:
            folder = self.folder / str(step)
            record |= {"sums": {name: int(x) for name, x in jax.device_get(sums).items()}, "files": _files(folder)}
            _write(folder / COMPLETE, record | {"crc": _crc(record)})
            for old in self.steps()[: -self.keep] if self.keep else []:
                _remove(self.folder / str(old))

    def restate(self, step: int, info: dict) -> None:
        """Other `info` for a complete step, whose arrays stay. Only the process that writes may call it."""
        record = self._record(self._pick(step)) | {"info": json.loads(json.dumps(info, allow_nan=False))}
        _write(self.folder / str(step) / COMPLETE, record | {"crc": _crc(record)})

    def wait(self) -> None:
        """Wait for the running save. Raises `CheckpointFailed`, once for each failure."""
        if self._running is None:
            return
        (step, future), self._running = self._running, None
        try:
            future.result()
        except Exception as e:
            raise self._failed(step, e) from e

    def _failed(self, step: int, error: Exception) -> CheckpointFailed:
        kept = self.steps()
        rest = f"step {kept[-1]} is the newest complete one" if kept else "there is no complete one yet"
        return CheckpointFailed(
            f"{self.folder / str(step)}: the checkpoint was not written: {_reason(error)}\n"
            f"    remedy: make room or mend the disk, and run the same command again; {rest}"
        )

    def _pick(self, step: int | None) -> int:
        self.wait()
        if step is None:
            return self.newest()
        if step not in self.steps():
            there = ", ".join(map(str, self.steps())) or "none"
            raise Refused(Problem("step", f"{self.folder} has no checkpoint {step}", f"use one of: {there}"))
        return step

    def _damaged(self, step: int, why: str) -> Refused:
        path = self.folder / str(step)
        older = [s for s in self.steps() if s < step]
        to = f"go on from step {older[-1]}" if older else "start again: there is no older step"
        return Refused(Problem(str(path), f"the checkpoint is damaged: {why}", f"remove {path} to {to}"))

    def _unusable(self, step: int, error: Exception) -> Refused:
        """Files that this user may not read are not damaged, and nothing says to remove them."""
        if isinstance(error, PermissionError):
            path = self.folder / str(step)
            return Refused(
                Problem(str(path), f"cannot be read: {_reason(error)}", "give this user the right to read it")
            )
        return self._damaged(step, _reason(error))

    def _record(self, step: int) -> dict:
        """The contents of complete.json."""
        try:
            record = json.loads((self.folder / str(step) / COMPLETE).read_text())
            good = record.pop("crc") == _crc(record)
        except (OSError, ValueError, TypeError, KeyError, AttributeError) as e:
            raise self._unusable(step, e) from None
        if not good:
            raise self._damaged(step, f"{COMPLETE} changed on disk")
        return record

    def _check_files(self, step: int, record: dict) -> None:
        """Refuses a step whose files are not those that were written, before Orbax opens them."""
        folder = self.folder / str(step)
        try:
            now = _files(folder)
            for name, (size, crc) in record["files"].items():
                if name not in now:
                    raise self._damaged(step, f"{name} is missing")
                if now[name] != [size, crc]:
                    why = f"has {now[name][0]} bytes instead of {size}" if now[name][0] != size else "changed on disk"
                    raise self._damaged(step, f"{name} {why}")
            # Reads the index of the arrays, which has checksums of its own.
            base = {"driver": "file", "path": f"{folder / 'state'}/"}
            ts.KvStore.open({"driver": "ocdbt", "base": base}).result().list().result()
        except (OSError, ValueError) as e:
            raise self._unusable(step, e) from None

    def info(self, step: int | None = None) -> dict:
        """The `info` saved with a step (default: the newest); no array is read."""
        return self._record(self._pick(step))["info"]

    def restore(self, target: Any, step: int | None = None) -> tuple[Any, dict]:
        """The state and info of a step (default: the newest), bit for bit, placed as `target` says.

        Args:
            target: tree of `jax.ShapeDtypeStruct` with shardings, of any mesh.
        Raises:
            Refused: no such step, a state of other names, shapes or dtypes, or damaged files.
        """
        step = self._pick(step)
        return self._load(target, step, partial=False), self.info(step)

    def restore_weights(self, target: Any, step: int | None = None) -> Any:
        """Only the fields of the state that `target`, a named tuple, has, placed as it says; nothing else is read."""
        wanted = {name: tree for name, tree in target._asdict().items() if jax.tree.leaves(tree)}
        return target._replace(**self._load(wanted, self._pick(step), partial=True))

    def _load(self, target: Any, step: int, partial: bool) -> Any:
        record = self._record(step)
        self._check(target, step, record["leaves"], partial)
        self._check_files(step, record)
        try:
            with _context(partial):
                state = ocp.load_checkpointables(str(self.folder / str(step)), {"state": target})["state"]
        except (MemoryError, jax.errors.JaxRuntimeError):  # the machine's fault, not the file's
            raise
        except Exception as e:
            raise self._unusable(step, e) from None
        now = {name: int(x) for name, x in jax.device_get(_sums(state)).items()}
        if wrong := [name for name in now if record["sums"][name] != now[name]]:
            raise self._damaged(step, f"{len(wrong)} of {len(now)} leaves changed on disk, first {wrong[0]}")
        return state

    def _check(self, target: Any, step: int, saved: dict, partial: bool) -> None:
        """Refuses a target whose leaves are not those of the checkpoint, before any array is read."""
        wanted = {name: _shape(leaf) for name, leaf in _names(target).items()}
        if partial:
            saved = {name: shape for name, shape in saved.items() if name.startswith(tuple(f"{k}/" for k in target))}
        both = sorted(saved.keys() | wanted.keys())
        pairs = [(name, saved.get(name, "absent"), wanted.get(name, "absent")) for name in both]
        wrong = [f"{name}: checkpoint {a}, model {b}" for name, a, b in pairs if a != b]
        if wrong:
            more = [f"and {len(wrong) - SHOWN} more"] if len(wrong) > SHOWN else []
            head = f"{len(wrong)} of {len(both)} leaves differ from the model"
            why = "\n    ".join([head, *wrong[:SHOWN], *more])
            remedy = "use the config saved in the checkpoint"  # only training may go elsewhere: eval reads this one
            remedy += ": take the override of model.* out" if partial else ", or another --workdir"
            raise Refused(Problem(str(self.folder / str(step)), why, remedy))
