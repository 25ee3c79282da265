"""What commands tell: results on standard output, progress on standard error. Only the standard library is imported."""

import argparse
import sys


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
