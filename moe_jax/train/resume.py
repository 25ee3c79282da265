"""What makes a run safe to stop and start again: signals, the claim on a folder, and which keys may change."""

import contextlib
import importlib.metadata
import os
import secrets
import select
import signal
import socket
import threading
import time
from collections.abc import Callable, Generator, Iterable
from pathlib import Path
from typing import Any

import jax
from jax.experimental import multihost_utils

from moe_jax import config
from moe_jax.checkpoint import MARKER, Checkpoints, agree, check_workdir, claim_workdir
from moe_jax.config import Config, Problem, Refused
from moe_jax.data import Corpus

SHARED_SECONDS = 20.0  # for a shared disk to show what another process wrote
WRITTEN_BY = ("jax", "flax", "optax", "orbax-checkpoint", "moe-jax")
FREE = (
    "name",
    "mesh.",
    "rules.",
    "train.",
    "claims.",
    "data.tokenizer",  # its path: the text, which is compared by itself, knows the tokenizer by what it holds
    "model.encoder.start",  # of generation alone
    "model.scan",
    "model.remat",
    "model.attention_exchange",
    "model.attention_kernel",
    "model.moe.exchange",
    "model.moe.eval_capacity_factor",
)
"""Keys that a resumed run may change: where and how it computes, not what it learns."""
FIXED = ("train.seed", "train.optimizer.kind")  # but not these
TEXT = ("data.path", "data.field", "data.heldout", "data.seed")  # what decides the prepared text, of one tokenizer
FIRST = (*TEXT, *FIXED, "data.batch", "data.length", "data.packing")
"""Keys that the first training of imported weights may change besides: no step of it has been made."""
SHOWN = 8  # differing keys named in a message


class Stop:
    """SIGTERM and SIGINT ask the loop to save and end; a second signal ends the process at once, with code 130.

    A thread answers, because Python runs no handler while the main one compiles.

    Args:
        say: prints a line.
    """

    SIGNALS = (signal.SIGTERM, signal.SIGINT)

    def __init__(self, say: Callable[[str], None]) -> None:
        self.say = say
        self.signal: str | None = None

    def __enter__(self) -> "Stop":
        out, into = os.pipe()
        os.set_blocking(into, False)
        self.old = {s: signal.signal(s, lambda number, frame: None) for s in self.SIGNALS}
        self.old_fd = signal.set_wakeup_fd(into, warn_on_full_buffer=False)
        self.pipe = into
        self.thread = threading.Thread(target=self.watch, args=(out,), daemon=True)
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        signal.set_wakeup_fd(self.old_fd)
        for s, handler in self.old.items():
            signal.signal(s, handler)
        os.close(self.pipe)
        self.thread.join()

    def watch(self, pipe: int) -> None:
        """Signals arrive as bytes, until the pipe is closed."""
        with open(pipe, "rb", buffering=0) as file:
            while number := file.read(1):
                if number[0] in self.SIGNALS:
                    self.handle(signal.Signals(number[0]).name)

    def handle(self, name: str) -> None:
        if self.signal is not None:
            leave(f"{name}: quits without saving; the last complete checkpoint stays")
        self.signal = name
        self.say(f"{name}: stopping after this step and saving; Ctrl-C again quits without saving")

    def at(self, step: int) -> bool:
        """Whether to stop after this step."""
        return self.signal is not None


class AgreedStop:
    """The `Stop` of several processes: after the same step, whichever of them got the SIGTERM.

    JAX carries it to all as its preemption notice; the supervisor of a process makes a SIGTERM of Ctrl-C.
    """

    def __init__(self) -> None:
        self.signal: str | None = None

    def __enter__(self) -> "AgreedStop":
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def at(self, step: int) -> bool:
        """Whether to stop after this step. Every process asks at every step."""
        if self.signal is None and multihost_utils.reached_preemption_sync_point(step):
            self.signal = "SIGTERM"
        return self.signal is not None


def leave(text: str) -> None:
    """End the process at once, with code 130. Nothing is lost: a line of the log is one write, and a checkpoint that is
    not complete counts as none. Python's own way out would wait for threads that compile, or crash in them."""
    show_cursor = "\x1b[?25h" if os.isatty(2) else ""  # which a progress bar hides
    if select.select([], [2], [], 0)[1]:  # a reader that sleeps must not keep the process
        os.write(2, f"{show_cursor}{text}\n".encode())
    os._exit(130)


@contextlib.contextmanager
def claimed(workdir: Path) -> Generator[None]:
    """Claim the workdir; if the run is refused inside, nothing that the claim created stays."""
    check_workdir(workdir)
    fresh = not (workdir / MARKER).exists()
    created = [p for p in (workdir, *workdir.parents) if not p.exists()]  # innermost first
    claim_workdir(workdir)
    try:
        yield
    except Refused:
        if fresh:
            (workdir / MARKER).unlink()
            for path in created:
                path.rmdir()
        raise


def check_shared(workdir: Path) -> None:
    """Hold that all processes have one workdir: each finds there what process 0 has just written.

    Raises:
        Refused: in a process that does not.
    """
    if jax.process_count() == 1:
        return
    note, number = workdir / ".shared", secrets.randbits(31)
    if jax.process_index() == 0:
        note.write_text(str(number))
    number = agree(number)
    deadline = time.monotonic() + SHARED_SECONDS
    while not note.is_file() or note.read_text() != str(number):
        if time.monotonic() > deadline:
            why = f"{workdir} on {socket.gethostname()} is not the folder of that name in which process 0 writes"
            raise Refused(Problem("--workdir", why, "give all processes a folder on a disk that all of them see"))
        time.sleep(0.1)
    multihost_utils.sync_global_devices("workdir")
    if jax.process_index() == 0:
        note.unlink()


def checkpoint_info(cfg: Config, corpus: Corpus, step: int) -> dict[str, Any]:
    """What a checkpoint says of itself: the config, the position in the data, the versions that wrote it."""
    versions = {name: importlib.metadata.version(name) for name in WRITTEN_BY}
    return {"config": config.to_dict(cfg), "data_position": step, "text": corpus.fingerprint, "versions": versions}


def differences(before: dict, now: dict, prefix: str = "") -> dict[str, tuple[Any, Any]]:
    """Keys `a.b.c` of nested dicts with the two values, None where unset; a table that one side lacks is one key."""
    out: dict[str, tuple[Any, Any]] = {}
    for k in sorted(before.keys() | now.keys()):
        a, b = before.get(k), now.get(k)
        if isinstance(a, dict) and isinstance(b, dict):
            out |= differences(a, b, f"{prefix}{k}.")
        elif a != b:
            out[prefix + k] = a, b
    return out


def word(value: Any) -> str:
    """A value of a config as messages show it."""
    if isinstance(value, dict):
        return "a table of keys"
    return "unset" if value is None else repr(value)


def changes(saved: dict[str, Any], cfg: Config) -> dict[str, str]:
    """Keys in which a run that goes on differs from the config saved with its checkpoint, each with both values.

    Args:
        saved: the info of the checkpoint; published weights that were not trained yet are `imported`.
    Raises:
        ConfigError: keys that would make it another run, such as the model, the data or the seed.
    """
    before = config.from_dict(saved["config"])
    found = differences(config.to_dict(before), config.to_dict(cfg))  # keys of today's, all of them
    changed = {k: (word(was), word(now)) for k, (was, now) in found.items()}
    imported = "imported" in saved
    fixed = [k for k in changed if not k.startswith(FREE) or k in FIXED]
    if imported:
        fixed = [k for k in fixed if k not in FIRST]
    if fixed:
        began = "the import set" if imported else "that run began with"
        lines = [f"{k}: is {changed[k][1]}, and {began} {changed[k][0]}" for k in fixed[:SHOWN]]
        lines += [f"and {len(fixed) - SHOWN} more"] if len(fixed) > SHOWN else []
        holds = "the imported weights of" if imported else "a run of"
        why = "\n    ".join([f"this folder holds {holds} {before.name}, and this would be another:", *lines])
        them = "it" if len(fixed) == 1 else "them"
        # Another --workdir has none of the published weights, and would begin with fresh ones.
        again = f"import again with {them} into another WORKDIR" if imported else "train in another --workdir"
        raise config.ConfigError(Problem("--workdir", why, f"set {them} back, or {again}"))
    return {k: f"{was} -> {now}" for k, (was, now) in changed.items() if k != "name"}


def left_behind(file: str, workdir: Path) -> str | None:
    """What to say of a new run in `workdir` whose config file lies in a folder with checkpoints, of which it has none:
    an import's config.toml, above all."""
    folder = Path(file).parent
    if not os.path.isfile(file) or not (folder / MARKER).exists() or folder.resolve() == workdir.resolve():
        return None
    steps = Checkpoints(folder / "checkpoints").steps()
    if not steps:
        return None
    return f"begins with fresh weights; to go on from step {steps[-1]} of {folder}: --workdir {folder}"


def check_renewal(changed: Iterable[str], processes: int) -> bool:
    """Whether an import's first training is of another text than was prepared. Raises `Refused` for several processes,
    which wait for one prepared text and not for the next."""
    keys = [k for k in changed if k in TEXT]
    if keys and processes > 1:
        remedy = "import again with it, or begin in one process: train.steps=1"
        raise Refused(Problem(keys[0], f"{processes} processes train on the text that the import prepared", remedy))
    return bool(keys)
