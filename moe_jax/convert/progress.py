"""How far a conversion is: a bar on a terminal, and a line every tenth of the way elsewhere, on standard error."""

import sys
from typing import Any, TextIO

from moe_jax.terminal import moves, size


class Bar:
    """`with Bar(total, "importing") as bar: bar(n)` for each n bytes done."""

    def __init__(self, total: int, what: str, *, quiet: bool = False, stream: TextIO | None = None):
        self.total, self.what, self.quiet, self.done = total, what, quiet, 0
        self.stream = sys.stderr if stream is None else stream
        self.bar: Any = None
        if not quiet and moves(self.stream):
            from rich.console import Console
            from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

            columns = (TextColumn(what), BarColumn(24), DownloadColumn(), TimeRemainingColumn())
            redirect = sys.stdout.isatty()  # a file or pipe there is left alone
            self.bar = Progress(*columns, console=Console(file=self.stream), transient=True, redirect_stdout=redirect)
            self.task = self.bar.add_task(what, total=total)

    def __enter__(self) -> "Bar":
        if self.bar is not None:
            self.bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.bar is not None:
            self.bar.stop()

    def __call__(self, n: int) -> None:
        """So many bytes more are done."""
        tenth, self.done = 10 * self.done // max(self.total, 1), self.done + n
        if self.bar is not None:
            self.bar.update(self.task, completed=self.done)
        elif not self.quiet and 10 * self.done // max(self.total, 1) > tenth:
            print(f"{self.what}: {size(self.done)} of {size(self.total)}", file=self.stream, flush=True)
