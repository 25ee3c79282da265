"""How input is refused: the reasons, each with its remedy, and values as people write them."""

from dataclasses import dataclass
from typing import Any


def written(value: Any) -> str:
    """A value as a config and the command line take it."""
    if value is None or isinstance(value, bool):
        return {None: "unset", True: "true", False: "false"}[value]
    return f"{value}"


@dataclass(frozen=True)
class Problem:
    """One reason to refuse an input: the key (or file), what is wrong, what to do."""

    key: str
    reason: str
    remedy: str
    origin: str = ""  # "in FILE", where that is known

    def __str__(self) -> str:
        origin = f" ({self.origin})" if self.origin else ""
        return f"{self.key}: {self.reason}{origin}\n    remedy: {self.remedy}"


class Refused(Exception):
    """Input that cannot be used. One message, exit code 2 on the command line; nothing was written."""

    def __init__(self, *problems: Problem):
        self.problems = problems
        super().__init__("\n".join(str(p) for p in problems))


class ConfigError(Refused):
    """A configuration that cannot be used."""
