"""Config files: found by name or path, read as TOML, laid over the ones that they extend; and single keys set."""

import difflib
import os
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moe_jax.refused import ConfigError, Problem


def nearest(word: str, known: Sequence[str]) -> str:
    """The known word that was meant, as the beginning of a remedy; nothing where none is close."""
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    return f"did you mean {close[0]!r}? " if close else ""


def config_folder() -> Path:
    """The shipped configs: inside the wheel, or beside the package in a checkout."""
    inside = Path(__file__).parent / "configs"
    return inside if inside.is_dir() else Path(__file__).parent.parent / "configs"


def config_names() -> list[str]:
    return sorted(p.stem for p in config_folder().glob("*.toml"))


def find(name: str, extended_by: Path | None = None) -> Path:
    """The file of a config given by path or by name; one that another file extends may lie beside that."""
    options = [Path(name)] if name.endswith(".toml") else []
    if extended_by is not None:
        options += [extended_by.parent / name, extended_by.parent / f"{name}.toml"]
    options.append(config_folder() / f"{name}.toml")
    for path in options:
        if os.path.isfile(path):  # False, and no error, for a name too long for the file system
            return path
    inside = os.path.join(name, "config.toml")
    if name and os.path.isfile(inside):
        raise ConfigError(Problem(name, "is a folder, not a config", f"give {inside}"))
    names = config_names()
    hint = nearest(name, names) + f"the shipped configs are {', '.join(names)}; or give the path of a .toml file"
    origin = f"`extends` in {extended_by}" if extended_by is not None else ""
    raise ConfigError(Problem(name or "config", "no such config", hint, origin))


@dataclass(frozen=True)
class File:
    """One config file and what it says itself, without the one that it extends."""

    path: Path
    tree: dict

    def __str__(self) -> str:
        """Its path, from the current folder where it lies below that."""
        here = Path.cwd()
        return str(self.path.relative_to(here) if self.path.is_relative_to(here) else self.path)

    def over(self, below: dict) -> dict:
        """The values of this file in place of those of `below`."""
        return merge(below, self.tree)

    def sets(self, path: Sequence[str]) -> bool:
        """Whether the file has the key at `path`."""
        node: Any = self.tree
        for name in path:
            if not isinstance(node, dict) or name not in node:
                return False
            node = node[name]
        return True


def chain(name: str, extended_by: tuple[Path, ...] = ()) -> list[File]:
    """The file of a config after the ones that it extends, the lowest first."""
    path = find(name, extended_by[-1] if extended_by else None).resolve()
    if path in extended_by:
        names = " -> ".join(p.name for p in (*extended_by, path))
        raise ConfigError(Problem(str(path), f"extends itself ({names})", "take one `extends` out"))
    try:
        tree = tomllib.loads(path.read_text("utf-8"))
    except (ValueError, OSError, RecursionError) as e:  # ValueError: TOML, UTF-8, and integers of 4300 digits
        raise ConfigError(Problem(str(path), f"not readable as TOML: {e}", "mend the file at that place")) from None
    base, file = tree.pop("extends", None), File(path, tree)
    if base is None:
        return [file]
    if not isinstance(base, str):
        raise ConfigError(Problem("extends", f"is {base!r}", "give the name of one config as a string", f"in {file}"))
    return [*chain(base, (*extended_by, path)), file]


def merge(below: dict, above: dict) -> dict:
    """Nested dicts with the values of `above` in place of those of `below`."""
    out = dict(below)
    for name, value in above.items():
        both = isinstance(value, dict) and isinstance(out.get(name), dict)
        out[name] = merge(out[name], value) if both else value
    return out


# Single keys


def named_in(text: str) -> tuple[list[str], str]:
    """The path of keys and the value of `key.path=value`."""
    path, sign, value = text.partition("=")
    names = path.strip().split(".")
    if not sign or not all(names):
        raise ConfigError(Problem(text, "not an override", "write key.path=value, for example train.steps=100"))
    return names, value.strip()


def set_in(tree: dict, path: Sequence[str], value: str | None) -> dict:
    """`tree` with the key at `path` set to a value in TOML, or to the text where it is none; None takes the key out."""
    out = dict(tree)
    node = out
    for name in path[:-1]:
        below = node.get(name, {})
        if not isinstance(below, dict):
            why = f"{name!r} is the value {below!r}, not a table"
            raise ConfigError(Problem(".".join(path), why, "shorten the key"))
        node[name] = node = dict(below)
    if value is None:
        node.pop(path[-1], None)
        return out
    try:
        node[path[-1]] = tomllib.loads(f"x = {value}")["x"]
    except (ValueError, RecursionError):
        node[path[-1]] = value
    return out
