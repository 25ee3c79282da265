"""What a run tells: metrics.jsonl and TensorBoard for programs, progress on standard error for people.

A train record is one optimizer step: `step`, `loss` (cross entropy, nats/token), `total_loss`, `balance` (1.0 is
perfect, mean over MoE layers), `z_loss`, `grad_norm`, `grad_norms` (of groups of parameters), `learning_rate`,
`tokens` (of this step), `step_seconds`, `tokens_per_second`, `routed` = `kept` + `dropped` (choices), and for each MoE
layer `load`, E counts of choices before dropping, `dropped_by_layer`, `router_entropy` (nats/token) and `least_prob`,
the mean probability of the least probable expert. A dense model leaves the MoE fields out or None. A record with
`eval_loss` is an evaluation. Beside the log, config.json holds the config of the run.
Everything here takes plain host numbers; nothing imports JAX.
"""

import json
import math
import os
import statistics
import sys
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TextIO

import numpy as np

from moe_jax.refused import Problem, Refused
from moe_jax.terminal import moves

Record = dict[str, Any]
Load = Sequence[Sequence[int]]

DEAD = 0.01  # an expert with less than this part of the fair share gets next to no gradient: it is dead

# Fields with a place of their own in TensorBoard; any other number of a train record goes to train/NAME.
TAGS = {
    "balance": "moe/balance",
    "z_loss": "moe/z_loss",
    "router_entropy": "moe/router_entropy",
    "least_prob": "moe/least_prob",
    "dropped_by_layer": "moe/dropped",
    "tokens_per_second": "speed/tokens_per_second",
    "step_seconds": "speed/step_seconds",
    "grad_norm": "optimizer/grad_norm",
    "grad_norms": "optimizer/grad_norm",
    "learning_rate": "optimizer/learning_rate",
}


# Numbers of a record


def load_max_over_mean(load: Load) -> float:
    """Busiest expert over the mean expert, averaged over layers: 1.0 is perfect, E is one expert doing everything.

    Layers without a single choice are left out; NaN when no layer is left.
    """
    rows = [np.asarray(row, float) for row in load if sum(row) > 0]
    return float(np.mean([row.max() / row.mean() for row in rows])) if rows else math.nan


def dead_experts(load: Load) -> int:
    """Experts with less than 1 percent of the fair share, over all layers that routed anything."""
    rows = [np.asarray(row, float) for row in load if sum(row) > 0]
    return sum(int((row < DEAD * row.mean()).sum()) for row in rows)


def dropped_fraction(record: Record) -> float | None:
    """Choices that found no slot, as a part of all choices; None where nothing was routed."""
    dropped, routed = record.get("dropped"), record.get("routed")
    return dropped / routed if routed and dropped is not None else None


# The log


def encode(record: Record) -> bytes:
    """One line of valid JSON: NaN and infinities become null and are named under `nonfinite`."""
    nonfinite: list[str] = []

    def clean(value: Any, name: str) -> Any:
        if hasattr(value, "tolist"):
            value = value.tolist()  # numpy scalars and arrays
        if isinstance(value, dict):
            return {k: clean(v, f"{name}.{k}" if name else str(k)) for k, v in value.items()}
        if isinstance(value, list | tuple):
            return [clean(v, f"{name}.{i}") for i, v in enumerate(value)]
        if isinstance(value, float) and not math.isfinite(value):
            nonfinite.append(name)
            return None
        return value

    out = clean(record, "")
    if nonfinite:
        out["nonfinite"] = nonfinite
    return json.dumps(out, allow_nan=False, separators=(",", ":")).encode() + b"\n"


class DamagedLog(Refused, ValueError):
    """A metrics.jsonl in which something else wrote."""

    def __init__(self, path: Path, reason: str):
        super().__init__(Problem(str(path), reason, "repair or remove that line, or train in another --workdir"))


def _lines(path: Path) -> list[tuple[bytes, Record]]:
    """Each whole line with its record. A torn last line is left out: a kill can cut one, and only the last."""
    lines = path.read_bytes().split(b"\n")
    out: list[tuple[bytes, Record]] = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
            record["step"]
        except (ValueError, TypeError, KeyError):
            if number == len(lines):
                break
            reason = f"line {number} of {len(lines)} is not a record: {line[:60]!r}; a kill can tear only the last line"
            raise DamagedLog(path, reason) from None
        out.append((line + b"\n", record))
    return out


def read_metrics(path: str | Path) -> tuple[list[Record], list[Record]]:
    """Train records and eval records of a metrics.jsonl, also of one that a live or killed run left torn at the end."""
    records = [record for _, record in _lines(Path(path))]
    return [r for r in records if "eval_loss" not in r], [r for r in records if "eval_loss" in r]


CONFIG = "config.json"


def write_config(workdir: Path, tree: Record) -> None:
    """Beside the log what it is of, for whoever reads it without a checkpoint. Replaced as a whole."""
    temporary = workdir / f"{CONFIG}.tmp"
    temporary.write_text(json.dumps(tree, indent=1) + "\n", "utf-8")
    os.replace(temporary, workdir / CONFIG)


class MetricsLog:
    """Appends records to WORKDIR/metrics.jsonl and, if asked, TensorBoard scalars to WORKDIR/tensorboard.

    With `resume_step` n the lines after step n are removed, so that the file holds each train step once however
    often the run was cut. With None the run starts anew, and a log already there is kept as metrics.jsonl.old.
    """

    def __init__(self, workdir: str | Path, *, tensorboard: bool, resume_step: int | None):
        workdir = Path(workdir)
        workdir.mkdir(parents=True, exist_ok=True)
        self.path = workdir / "metrics.jsonl"
        self._last = -1 if resume_step is None else resume_step
        if self.path.exists():
            if resume_step is None:
                os.replace(self.path, self.path.with_name("metrics.jsonl.old"))
            else:
                self._truncate(resume_step)
        # Unbuffered: every line is one write to the system, so that a kill tears at most the last one.
        self._file = open(self.path, "ab", buffering=0)  # noqa: SIM115 (closed in close)
        self._board = _Board(workdir / "tensorboard", self._last + 1) if tensorboard else None

    def _truncate(self, step: int) -> None:
        temporary = self.path.with_name("metrics.jsonl.tmp")
        with open(temporary, "wb") as f:
            f.writelines(line for line, record in _lines(self.path) if record["step"] <= step)
            f.flush()
            os.fsync(f.fileno())
        os.replace(temporary, self.path)

    def _write(self, record: Record) -> None:
        line = encode(record)
        if self._file.write(line) != len(line):
            raise OSError(f"{self.path}: a line of {len(line)} bytes was written in part; is the disk full?")

    def train(self, record: Record) -> None:
        """One optimizer step; steps must rise."""
        if record["step"] <= self._last:
            raise ValueError(f"step {record['step']} comes after step {self._last}; the log holds each step once")
        self._last = record["step"]
        self._write(record)
        if self._board is not None:
            self._board.train(record)

    def eval(self, record: Record) -> None:
        """One evaluation; `eval_loss` is what tells it from a train record."""
        if "eval_loss" not in record:
            raise ValueError(f"an evaluation needs eval_loss; it has {', '.join(record)}")
        self._write(record)
        if self._board is not None:
            self._board.eval(record)

    def close(self) -> None:
        self._file.close()
        if self._board is not None:
            self._board.writer.close()
            self._board = None

    def __enter__(self) -> "MetricsLog":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class _Board:
    """TensorBoard scalars, one event a step. Events from `purge_step` on that an earlier run left are hidden."""

    def __init__(self, folder: Path, purge_step: int):
        from tensorboardX import FileWriter
        from tensorboardX.proto.event_pb2 import Event, SessionLog  # ty: ignore[missing-module-member]  # made by protoc

        # A file is named by the second, and one of the same name would be overwritten: two quick starts need a suffix.
        suffix = f".{purge_step:09d}.{os.getpid()}.{sum(1 for _ in folder.glob('events*'))}"
        self.writer = FileWriter(str(folder), max_queue=1000, flush_secs=10, filename_suffix=suffix)
        self.writer.add_event(Event(step=purge_step, file_version="brain.Event:2"))
        self.writer.add_event(Event(step=purge_step, session_log=SessionLog(status=SessionLog.START)))

    def _add(self, scalars: Record, step: int) -> None:
        from tensorboardX.proto.summary_pb2 import Summary  # ty: ignore[missing-module-member]  # made by protoc

        numbers = {tag: v for tag, v in scalars.items() if isinstance(v, int | float | np.number)}
        values = [Summary.Value(tag=tag, simple_value=float(v)) for tag, v in numbers.items()]
        self.writer.add_summary(Summary(value=values), step)

    def train(self, record: Record) -> None:
        scalars: Record = {"moe/dropped_fraction": dropped_fraction(record)}
        for name, value in record.items():
            tag = TAGS.get(name, f"train/{name}")
            if name == "load" and value:
                scalars["moe/dead_experts"] = dead_experts(value)
                scalars["moe/load_max_over_mean"] = load_max_over_mean(value)
                for i, row in enumerate(value):
                    scalars[f"moe/load_max_over_mean/layer_{i:02d}"] = load_max_over_mean([row])
            elif isinstance(value, list | tuple):
                scalars |= {f"{tag}/layer_{i:02d}": v for i, v in enumerate(value)}
            elif isinstance(value, dict):
                scalars |= {f"{tag}/{part}": v for part, v in value.items()}
            elif name != "step":
                scalars[tag] = value
        self._add(scalars, record["step"])

    def eval(self, record: Record) -> None:
        self._add({f"eval/{k.removeprefix('eval_')}": v for k, v in record.items() if k != "step"}, record["step"])


# Progress


def clock(seconds: float) -> str:
    """0:41, 12:05, 3:00:00, 2d 03:00:00."""
    days, rest = divmod(round(seconds), 86400)
    hours, minutes, secs = rest // 3600, rest // 60 % 60, rest % 60
    if days:
        return f"{days}d {hours:02d}:{minutes:02d}:{secs:02d}"
    return f"{hours}:{minutes:02d}:{secs:02d}" if hours else f"{minutes}:{secs:02d}"


class Progress:
    """Progress for a person on standard error: a bar on a terminal, and a line every `log_every` steps anywhere.

    Args:
        steps: the last step of the run, for step/total and the time left.
        bytes_per_token: of the held-out text; with it evaluations are told in bits per byte as well.
        bigram: loss in nats/token of the bigram model on the held-out text, the baseline beside each evaluation.
        quiet: nothing at all.
        stream: in the place of standard error.
    """

    def __init__(
        self,
        steps: int,
        *,
        log_every: int = 10,
        bytes_per_token: float | None = None,
        bigram: float | None = None,
        quiet: bool = False,
        stream: TextIO | None = None,
    ):
        self.steps, self.log_every, self.quiet = steps, log_every, quiet
        self.bytes_per_token, self.bigram = bytes_per_token, bigram
        self._stream = sys.stderr if stream is None else stream
        self._seconds: deque[float] = deque(maxlen=50)
        self._started = False
        self._bar: Any = None
        if not quiet and moves(self._stream):
            self._bar, self._task = self._make_bar()

    def _make_bar(self) -> tuple[Any, Any]:
        from rich.console import Console
        from rich.progress import BarColumn, TextColumn
        from rich.progress import Progress as Bar

        columns = (TextColumn("step {task.completed}/{task.total}"), BarColumn(12), TextColumn("{task.fields[text]}"))
        # On a terminal, print() goes above the bar. A file or pipe on standard output, where the --json object goes, is
        # left alone: rich would send what is printed there to standard error.
        console = Console(file=self._stream)
        bar = Bar(*columns, console=console, transient=True, redirect_stdout=sys.stdout.isatty())
        return bar, bar.add_task("train", total=self.steps, text="first step: compiling")

    def __enter__(self) -> "Progress":
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def note(self, text: str) -> None:
        """A line of its own."""
        if self.quiet:
            return
        if self._bar is not None:
            self._bar.console.print(text, markup=False, highlight=False, soft_wrap=True)
        else:
            print(text, file=self._stream, flush=True)

    def left(self, step: int) -> str:
        """Time left, from the median of the recent steps: neither a compilation nor a pause distorts it."""
        if len(self._seconds) < 2:
            return "-"
        return clock(statistics.median_low(self._seconds) * max(0, self.steps - step))

    def step(self, record: Record) -> None:
        """One optimizer step. A line for the first of this run, every `log_every`-th and the last."""
        if self.quiet:
            return
        step, first = record["step"], not self._started
        if record.get("step_seconds") is not None:
            self._seconds.append(record["step_seconds"])
        if self._bar is not None:
            text = " ".join(" ".join(self._fields(record, brief=True)).split())  # unpadded, to fit 80 columns
            self._bar.update(self._task, completed=step, text=text)
        if first:
            self._started = True
            legend = f"{self.steps} steps; loss in nats/token"
            if record.get("balance") is not None:
                legend += "; balance 1.0 = perfect; dropped = choices that found no slot"
            self.note(legend)
        if first or step % self.log_every == 0 or step == self.steps:
            width = len(str(self.steps))
            self.note("  ".join([f"step {step:>{width}}/{self.steps}", *self._fields(record)]))

    def _fields(self, record: Record, brief: bool = False) -> list[str]:
        """The columns of a line, of fixed width; a field that the model does not have takes no column."""
        dropped = dropped_fraction(record)
        values = (
            ("loss {:6.3f}", record.get("loss"), True),
            ("(total {:6.3f})", record.get("total_loss"), False),
            ("balance {:5.2f}", record.get("balance"), True),
            ("dropped {:5.1f}%", None if dropped is None else 100 * dropped, True),
            ("grad {:7.3g}", record.get("grad_norm"), False),
            ("lr {:.1e}", record.get("learning_rate"), False),
            ("{:>9,.0f} tok/s", record.get("tokens_per_second"), True),
        )
        out = [text.format(value) for text, value, always in values if value is not None and (always or not brief)]
        return [*out, f"left {self.left(record['step'])}"]

    def eval(self, record: Record) -> None:
        """A line with the held-out loss beside the bigram model."""

        def both(nats: float) -> str:
            bits = f" ({nats / math.log(2) / self.bytes_per_token:.3f} bits/byte)" if self.bytes_per_token else ""
            return f"{nats:.3f} nats/token{bits}"

        parts = [f"eval {record['step']:>{len(str(self.steps))}}/{self.steps}", f"held-out {both(record['eval_loss'])}"]
        if record.get("eval_loss_at_capacity") is not None:
            parts.append(f"at capacity {record['eval_loss_at_capacity']:.3f}")
        if self.bigram is not None:
            parts.append(f"bigram model {both(self.bigram)}")
        self.note("  ".join(parts))
