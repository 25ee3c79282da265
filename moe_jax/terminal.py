"""What commands share: names of folders, results on standard output, progress on standard error, and words for tables,
sizes and meshes.

Only the standard library is imported.
"""

import argparse
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TextIO

STOPPED = 75  # exit code of a training that a signal stopped after saving; EX_TEMPFAIL: the same command goes on


def folder(text: str) -> Path:
    """A folder's name. An empty one, such as an unset variable of a shell, is not the current folder."""
    if not text:
        raise argparse.ArgumentTypeError("is empty: name a folder; the current one is .")
    return Path(text)


def add_processes(command: argparse.ArgumentParser) -> None:
    """The flags that say which of several processes this one is."""
    group = command.add_argument_group("several processes", "each is started with the same command but for --process")
    help = "how many run together; detect: SLURM, Kubernetes or the TPU says all three (default: this one alone)"
    group.add_argument("--processes", metavar="N", help=help)
    group.add_argument("--process", type=int, metavar="I", help="which of them this one is, from 0")
    group.add_argument("--coordinator", metavar="HOST:PORT", help="where process 0 listens, the same for all")
    help = "port on the same host for JAX's own service, where a firewall must know it (default: a free one)"
    group.add_argument("--service-port", type=int, metavar="PORT", help=help)
    help = "how long to wait for the others to join, and then for JAX to start in all (default 300)"
    group.add_argument("--join-seconds", type=float, default=300.0, metavar="S", help=help)


def run_wanted(path: Path) -> str:
    """The remedy where `path` is not the folder of a run: what to name, or how published weights become one."""
    if (path / "config.json").is_file() and any(path.glob("*.safetensors")):
        return f"these are published weights: moe-jax convert import {path} WORKDIR, and name that WORKDIR"
    return "name the folder of a training run, its --workdir"


def result(args: argparse.Namespace, *lines: str) -> None:
    """What was asked for: on standard output, or beside a JSON object, which holds the same, as progress is told."""
    if args.json:
        say(args, *lines)
    else:
        print(*lines, sep="\n", flush=True)


def say(args: argparse.Namespace, *lines: str) -> None:
    """Progress, on standard error."""
    if not args.quiet:
        print(*lines, sep="\n", file=sys.stderr)


def moves(stream: TextIO) -> bool:
    """Whether a bar can be drawn there. A dumb terminal cannot move its cursor: a bar would fill the screen."""
    return stream.isatty() and os.environ.get("TERM") not in ("dumb", "unknown")


def table(head: Sequence[str], rows: Sequence[Sequence[str]], *, numbers: bool = False) -> list[str]:
    """Lines of aligned columns under their head; `numbers`: all columns but the first stand to the right."""
    widths = [max(len(r[i]) for r in [head, *rows]) for i in range(len(head))]

    def line(row: Sequence[str]) -> str:
        sides = [c.rjust(w) if numbers and i else c.ljust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True))]
        return "  " + "  ".join(sides).rstrip()

    return [line(head), line(["-" * w for w in widths]), *map(line, rows)]


def shown(token: str) -> str:
    """A token in a line: what does not print as its escape, blanks as they are told apart."""
    return "".join("␣" if c == " " else c if c.isprintable() else c.encode("unicode_escape").decode() for c in token)


def size(n: float) -> str:
    """Bytes in a unit that keeps the number short, thousands to each, as memories and links are sold."""
    for unit, one in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if n >= one:
            return f"{n / one:,.2f} {unit}"
    return f"{n:,.0f} B"


def mesh_words(sizes: Mapping[str, int]) -> str:
    """The axes that hold more than one device."""
    return " x ".join(f"{a}={n}" for a, n in sizes.items()) or "one device"
