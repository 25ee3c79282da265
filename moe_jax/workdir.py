"""The folder of a run, as a supervisor knows it that starts no JAX: its marker and lock, and what came into it since.

WORKDIR/moe_jax.json                          the marker: this folder is ours
WORKDIR/checkpoints/STEP/complete.json        written last: the step counts
"""

import contextlib
import fcntl
import shutil
import time
from collections.abc import Generator, Sequence
from pathlib import Path

from moe_jax.refused import Problem, Refused

MARKER = "moe_jax.json"
CHECKPOINTS = "checkpoints"
COMPLETE = "complete.json"
LOG = "metrics.jsonl"
PUBLISHED = "published"  # of an import: the small files of its source
LOCK_SECONDS = 5.0  # for a process that dies to let the lock go


@contextlib.contextmanager
def locked(workdir: Path) -> Generator[None]:
    """One run at a time in a workdir. The lock goes with the process, however that ends.

    Raises:
        Refused: another run holds it.
    """
    with (workdir / MARKER).open() as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            remedy = "wait until it ends, stop it, or use another --workdir"
            raise Refused(Problem("--workdir", f"another run is using {workdir}", remedy)) from None
        yield


def begun(workdir: Path) -> bool:
    """Whether a run is there: a complete checkpoint, or a log."""
    return any((workdir / CHECKPOINTS).glob(f"*/{COMPLETE}")) or (workdir / LOG).exists()


def drop(folders: Sequence[Path]) -> None:
    """Take away folders that are there and hold nothing, innermost first."""
    for path in folders:
        with contextlib.suppress(OSError):
            path.rmdir()


class Before:
    """A workdir as it was before a command that leaves a whole run in it or nothing."""

    def __init__(self, workdir: Path):
        self.workdir = workdir
        self.missing = [p for p in (workdir, *workdir.parents) if not p.exists()]  # innermost first
        self.names = {p.name for p in workdir.iterdir()} if workdir.is_dir() else set()

    def restore(self) -> None:
        """Take away what came since, unless a run is there by now, or one is under way: it holds the lock.

        Each supervisor does so once its own process has ended: what the last process wrote goes with it.
        """
        deadline = time.monotonic() + LOCK_SECONDS
        while True:
            try:
                with locked(self.workdir) if (self.workdir / MARKER).exists() else contextlib.nullcontext():
                    return self.clear()
            except FileNotFoundError:  # another supervisor was faster
                continue
            except Refused:
                if time.monotonic() > deadline:
                    return None
                time.sleep(0.1)

    def clear(self) -> None:
        """The same, at once; the marker goes last."""
        if not self.workdir.is_dir() or begun(self.workdir):
            return
        came = [p for p in self.workdir.iterdir() if p.name not in self.names]
        for path in sorted(came, key=lambda p: p.name == MARKER):
            with contextlib.suppress(OSError):  # what failed before is to be told, and a rest is no obstacle
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        drop(self.missing)
