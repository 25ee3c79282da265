"""config.json read strictly: each field is asked for by name, and what cannot be kept is refused by name."""

import math
from collections.abc import Sequence
from typing import Any

from moe_jax.refused import Problem, Refused

NOTHING = (None, False, 0, 0.0, [], {})
MOST_EXPERTS = 2**16  # of a layer: each is laid out by itself before a file is read


class Fields:
    """The fields of a config.json, in the form of transformers 5 (rope_parameters, dtype) or the older one.

    Problems are collected; `done` raises them together.
    """

    def __init__(self, config: dict[str, Any]):
        self.config = config
        self.problems: list[Problem] = []
        self.prefix = "config.json: "

    def no(self, name: str, reason: str, remedy: str) -> None:
        """A field that cannot be used."""
        self.problems.append(Problem(self.prefix + name, reason, remedy))

    def inner(self, name: str, table: dict[str, Any]) -> "Fields":
        """The fields of a table, whose problems are among these."""
        out = Fields(table)
        out.problems, out.prefix = self.problems, f"{self.prefix}{name}."
        return out

    def done(self) -> None:
        """Raise what was found. Raises `Refused`."""
        if self.problems:
            raise Refused(*self.problems)

    def named(self, *names: str) -> str:
        """The name that is there, of several for the same; the first where none is."""
        there = [n for n in names if self.config.get(n) is not None]
        if len({repr(self.config[n]) for n in there}) > 1:
            both = " and ".join(f"{n}={self.config[n]!r}" for n in there)
            self.no(there[0], f"{both} say different things", "keep one of them")
        return there[0] if there else names[0]

    def count(self, *names: str, default: int | None = None, least: int = 1, most: int = 2**40) -> int:
        """A whole number; needed where there is no default."""
        name = self.named(*names)
        value = self.config.get(name)
        value = default if value is None else value
        if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
            why = "is missing" if value is None else f"is {value!r:.80}"
            self.no(name, why, f"give a whole number of {least} to {most}")
            return least
        return value

    def experts(self, *names: str) -> int:
        """The number of routed experts."""
        return self.count(*names, most=MOST_EXPERTS)

    def maybe(self, *names: str, absent: int | None = None) -> int | None:
        """A whole number that may be null; `absent`: what it is where it is not there at all."""
        name = self.named(*names)
        if name not in self.config:
            return absent
        return None if self.config[name] is None else self.count(*names)

    def number(self, name: str, default: float | None = None) -> float:
        """A number above 0."""
        return self.positive(name, self.config.get(name), default)

    def positive(self, name: str, value: Any, default: float | None = None) -> float:
        """A value that may have come from a table."""
        value = default if value is None else value
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
            self.no(name, "is missing" if value is None else f"is {value!r:.80}", "give a number above 0")
            return 1.0
        return float(value)

    def numbers(self, name: str) -> list[float]:
        """A list of numbers above 0."""
        value = self.config.get(name)
        if not isinstance(value, list) or not value:
            self.no(name, "is missing" if value is None else f"is {value!r:.80}", "give a list of numbers")
            return []
        return [self.positive(f"{name}[{i}]", x) for i, x in enumerate(value)]

    def amount(self, name: str, default: float) -> float:
        """A number of 0 or more."""
        value = self.config.get(name)
        return 0.0 if value == 0 and not isinstance(value, bool) else self.positive(name, value, default)

    def truth(self, name: str, default: bool) -> bool:
        """True or false."""
        value = self.config.get(name)
        value = default if value is None else value
        if not isinstance(value, bool):
            self.no(name, f"is {value!r:.80}", "give true or false")
        return bool(value)

    def only(self, name: str, allowed: Sequence[Any], why: str) -> Any:
        """A field that has no other value here; absent, it is the first of those."""
        value = self.config.get(name, allowed[0])
        if value not in allowed:
            self.no(name, f"is {value!r:.80}, and {why}", f"give {' or '.join(map(repr, allowed))}")
        return value

    def off(self, names: Sequence[str], why: str = "there is no such thing here") -> None:
        """Fields that have to be absent, null, false or 0."""
        for name in names:
            if (value := self.config.get(name)) not in NOTHING:
                self.no(name, f"is {value!r:.80}, and {why}", "use a model without it")

    def listed(self, name: str, length: int | None = None) -> list[Any]:
        """A list, of that length where one is named; empty where it is not there."""
        value = self.config.get(name) or []
        if not isinstance(value, list):
            self.no(name, f"is {value!r:.80}", "give a list")
            return []
        if value and length not in (None, len(value)):
            self.no(name, f"has {len(value)} entries for {length} layers", "give one for each layer")
            return []
        return value

    def table(self, *names: str) -> tuple[str, dict[str, Any]]:
        """A table, empty where it is not there, and its name."""
        name = self.named(*names)
        value = self.config.get(name) or {}
        if not isinstance(value, dict):
            self.no(name, f"is {value!r:.80}", "give a table")
            return name, {}
        return name, value
