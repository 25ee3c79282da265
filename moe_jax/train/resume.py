"""What makes a run safe to stop and start again: signals, the claim on a folder, and which keys may change."""

import contextlib
import fcntl
import signal
from collections.abc import Generator
from pathlib import Path
from typing import Any

from moe_jax import config
from moe_jax.checkpoint import MARKER, check_workdir, claim_workdir
from moe_jax.config import Config, Problem, Refused

FREE = ("name", "mesh.", "rules.", "train.", "model.scan", "model.remat", "model.moe.eval_capacity_factor")
"""Keys that a resumed run may change: where and how it computes, not what."""
FIXED = ("train.seed", "train.optimizer.kind")  # but not these


class Stop:
    """SIGTERM and SIGINT ask the loop to save and end; a second signal interrupts at once."""

    def __init__(self) -> None:
        self.signal: str | None = None

    def __enter__(self) -> "Stop":
        self.old = {s: signal.signal(s, self.handle) for s in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, *_: object) -> None:
        for s, handler in self.old.items():
            signal.signal(s, handler)

    def handle(self, number: int, frame: object) -> None:
        if self.signal is not None:
            raise KeyboardInterrupt
        self.signal = signal.Signals(number).name


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


def changes(saved: dict, cfg: Config) -> list[str]:
    """Keys in which a resumed run differs from the config saved with its checkpoint, in words.

    Raises:
        ConfigError: a key that would make it another run, such as the model, the data or the seed.
    """
    found = differences(saved, config.to_dict(cfg))
    changed = {k: (word(before), word(now)) for k, (before, now) in found.items()}
    fixed = [k for k in changed if not k.startswith(FREE) or k in FIXED]
    if fixed:
        remedy = "set it back, or train in another --workdir"
        began = "and the run in this workdir began with"
        why = {k: f"is {changed[k][1]}, {began} {changed[k][0]}" for k in fixed}
        raise config.ConfigError(*(Problem(k, why[k], remedy) for k in fixed))
    return [f"{k}: {before} -> {now}" for k, (before, now) in changed.items() if k != "name"]
