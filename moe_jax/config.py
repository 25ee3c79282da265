"""Configuration: strict TOML files that extend one another, overrides, validation. The keys are in `schema`.

`load("tiny_switch", ["train.steps=10"])` reads configs/tiny_switch.toml, applies the overrides and returns a
`Config`, or raises `ConfigError` naming every wrong key, the reason and the remedy.
`python -m moe_jax.config` prints the reference of all keys, which is configs/README.md.
"""

import dataclasses
import json
import types
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import TypeAdapter, ValidationError

from moe_jax.checks import check, check_exchange, check_model, check_moe, require_decoding
from moe_jax.files import File, chain, config_names, named_in, nearest, set_in
from moe_jax.refused import ConfigError, Problem, Refused
from moe_jax.schema import (
    Config,
    DataConfig,
    EncoderConfig,
    LatentConfig,
    MeshConfig,
    ModelConfig,
    MoEConfig,
    OptimizerConfig,
    RopeConfig,
    RouterConfig,
    TrainConfig,
)

__all__ = [
    "Config",
    "ConfigError",
    "DataConfig",
    "EncoderConfig",
    "LatentConfig",
    "MeshConfig",
    "ModelConfig",
    "MoEConfig",
    "OptimizerConfig",
    "Problem",
    "Refused",
    "RopeConfig",
    "RouterConfig",
    "TrainConfig",
    "check_exchange",
    "config_names",
    "load",
    "nearest",
    "override",
    "require_decoding",
]

UNSET = "unset"
NOTHING = ("none", "null", "nil", "")  # what people write for a value that is not set


# Strict loading


def _dataclass_in(hint: Any) -> Any:
    """The dataclass in a type such as `MoEConfig | None`."""
    options = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    return next((t for t in options if dataclasses.is_dataclass(t)), None)


def type_at(path: Sequence[str]) -> Any:
    """The type of the key at `path`; None if there is no such key."""
    hint: Any = Config
    for name in path:
        table = _dataclass_in(hint)
        hint = typing.get_type_hints(table, include_extras=True).get(name) if table is not None else None
    return hint


def admits_unset(path: Sequence[str]) -> bool:
    """Whether the key at `path` may be left without a value."""
    return types.NoneType in typing.get_args(type_at(path))


def keys_at(path: Sequence[str]) -> list[str]:
    """The known keys of the table at `path`."""
    table: Any = Config
    for name in path:
        hint = typing.get_type_hints(table).get(name)
        inner = _dataclass_in(hint) if hint is not None else None
        if inner is None:
            return []
        table = inner
    return [f.name for f in dataclasses.fields(table)]


def all_keys() -> list[tuple[str, Any, dataclasses.Field]]:
    """Every leaf key of a config with its type and field, depth first."""
    rows = []

    def walk(table: Any, prefix: str) -> None:
        hints = typing.get_type_hints(table, include_extras=True)
        for f in dataclasses.fields(table):
            inner = _dataclass_in(hints[f.name])
            if inner is None:
                rows.append((prefix + f.name, hints[f.name], f))
            else:
                walk(inner, f"{prefix}{f.name}.")

    walk(Config, "")
    return rows


WANTED = {  # what a value is not, where pydantic's own words are those of a parser
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "bool_type": "true or false",
    "string_type": "text",
    "tuple_type": "a list",
    "dataclass_type": "a table of keys",
}


BRANCHES = ("bool", "constrained-int")


def _quoted(path: str, given: Any) -> str:
    """How to write a number or a truth value that is meant as text: unquoted, TOML reads 2024 as a number."""
    if not isinstance(given, (int, float)) or len(str(given)) >= 80:
        return ""
    return f", with quotes inside quotes: '{path}=\"{json.dumps(given)}\"'"


def _place(error: Any) -> list[str]:
    """The path of the key that a pydantic error is about, without which of several types was tried."""
    loc = [str(part) for part in error["loc"]]
    return loc[:-1] if loc and (loc[-1] in BRANCHES or loc[-1].startswith("literal[")) else loc


def _wanted(error: Any) -> tuple[str, str]:
    """What a value is not, and what to give instead."""
    kind = error["type"]
    rule = WANTED.get(kind, error["msg"].removeprefix("Input should be "))
    return rule, rule if kind in WANTED or rule.startswith("a ") else f"a value {rule}"


def _problems(errors: Sequence[Any]) -> list[Problem]:
    """pydantic's errors in our words; of a key of several types it has one for each, and we one."""
    by_key: dict[tuple[str, ...], list[Any]] = {}
    for error in errors:
        by_key.setdefault(tuple(_place(error)), []).append(error)
    out = []
    for loc, same in by_key.items():
        named = next((x for x in same if x["type"] == "literal_error"), None)
        others = [x for x in same if x is not named]
        out += [_no_option(loc, named, others)] if named else [_problem(loc, x) for x in others]
    return out


def _no_option(loc: Sequence[str], error: Any, others: Sequence[Any]) -> Problem:
    """A value that is none of those listed, nor of the `others`, types that the key has besides."""
    path, given = ".".join(loc), error.get("input")
    options = [o.strip("' ") for o in error["ctx"]["expected"].replace(" or ", ",").split(",")]
    if any(x["type"] == "bool_type" for x in others):
        options += ["true", "false"]
    wanted = "".join(f", or {_wanted(x)[1]}" for x in others if x["type"] != "bool_type")
    out = f", or {path}={UNSET} for none" if _means_unset(loc, given) else ""
    remedy = f"{nearest(str(given), options)}use one of {', '.join(options)}{wanted}{out}"
    return Problem(path, f"is {_shown(given)}", remedy)


def _shown(given: Any) -> str:
    return repr(given) if len(repr(given)) < 80 else repr(given)[:77] + "..."


def _problem(loc: Sequence[str], error: Any) -> Problem:
    """One pydantic error in our words."""
    path, kind, given = ".".join(loc) or "config", error["type"], error.get("input")
    shown = _shown(given)
    if kind in ("unexpected_keyword_argument", "extra_forbidden"):
        known = keys_at(loc[:-1])
        hint = nearest(loc[-1], known)
        if not hint:
            leaves = [k for k, _, _ in all_keys()]
            same = [k for k in leaves if k.split(".")[-1] == loc[-1]]
            hint = f"did you mean {same[0]!r}? " if same else ""
        where = ".".join(loc[:-1]) or "the top level"
        return Problem(path, "no such key", f"{hint}the keys of {where} are {', '.join(known)}")
    if kind == "json_invalid":  # text that is no Unicode, or tables nested too deep
        return Problem(path, f"cannot be read: {error['ctx']['error']}", "use plain TOML values")
    rule, wanted = _wanted(error)
    if _means_unset(loc, given):
        return Problem(path, f"is {shown}, which is not {rule}", f"write {path}={UNSET} for none, or give {wanted}")
    hint = _quoted(path, given) if kind == "string_type" and isinstance(error["loc"][-1], str) else ""
    return Problem(path, f"is {shown}, which is not {rule}", f"give {wanted}{hint}")


def _means_unset(path: Sequence[str], given: Any) -> bool:
    return (given is None or str(given).lower() in NOTHING) and admits_unset(path)


_ADAPTER: TypeAdapter | None = None


def _foreign(settings: Any, wanted: type, name: str) -> list[Problem]:
    """Tables of settings built in Python that are no instance of their class, such as a dict in the place of one."""
    if not isinstance(settings, wanted):
        why = f"is {settings!r:.200}, a {type(settings).__name__}, and not a {wanted.__name__}"
        keys = ", ".join(f"{k}={v!r}" for k, v in settings.items()) if isinstance(settings, dict) else "..."
        return [Problem(name, why, f"write {wanted.__name__}({keys})")]
    hints = typing.get_type_hints(wanted)
    inner = {k: (hint, _dataclass_in(hint), getattr(settings, k)) for k, hint in hints.items()}
    return [
        problem
        for k, (hint, table, value) in inner.items()
        if table is not None and (value is not None or table is hint)
        for problem in _foreign(value, table, f"{name}.{k}")
    ]


def require(settings: ModelConfig | MoEConfig, name: str, *, learns: bool = True) -> None:
    """Refuse settings built in Python that a file could not hold: values out of range, or that contradict one another.

    Args:
        learns: also refuse what would leave a router without a gradient.
    Raises:
        ConfigError: every problem, its keys beginning with `name`.
    """
    if problems := _foreign(settings, MoEConfig if not isinstance(settings, ModelConfig) else ModelConfig, name):
        raise ConfigError(*problems)
    try:
        TypeAdapter(type(settings)).validate_json(json.dumps(to_dict(settings)))
    except ValidationError as e:
        raise ConfigError(*_problems([x | {"loc": (name, *x["loc"])} for x in e.errors()])) from None
    problems = check_moe(settings, name, learns=learns) if isinstance(settings, MoEConfig) else check_model(settings)
    if problems:
        raise ConfigError(*problems)


def from_dict(tree: dict) -> Config:
    """A validated config from nested dicts, or `ConfigError` with every problem."""
    global _ADAPTER
    if _ADAPTER is None:
        _ADAPTER = TypeAdapter(Config)
    try:
        # JSON mode: tables become dataclasses and arrays tuples, while all else stays strict.
        cfg = _ADAPTER.validate_json(json.dumps(tree, default=str))
    except ValidationError as e:
        raise ConfigError(*_problems(e.errors())) from None
    except (ValueError, RecursionError) as e:
        raise ConfigError(Problem("config", f"cannot be read: {e}", "use plain TOML values")) from None
    problems = check(cfg)
    if problems:
        raise ConfigError(*problems)
    return cfg


def to_dict(cfg: Any) -> dict:
    """Nested dicts without unset keys: `from_dict(to_dict(c)) == c`."""

    def walk(value: Any) -> Any:
        if dataclasses.is_dataclass(value):
            pairs = ((f.name, getattr(value, f.name)) for f in dataclasses.fields(value))
            return {name: walk(v) for name, v in pairs if v is not None}
        return list(value) if isinstance(value, tuple) else value

    return walk(cfg)


def drop_unset(tree: dict, prefix: tuple[str, ...] = ()) -> dict:
    """`tree` without the keys that are "unset", where that is no value of theirs."""
    out = {}
    for name, value in tree.items():
        path = (*prefix, name)
        if value != UNSET or not admits_unset(path):
            out[name] = drop_unset(value, path) if isinstance(value, dict) else value
    return out


def override(tree: dict, text: str) -> dict:
    """Apply one `key.path=value`; the value is TOML, or a bare string; "unset" or nothing takes the key out."""
    path, value = named_in(text)
    out = value == "" or (value.strip("'\"") == UNSET and admits_unset(path))
    return set_in(tree, path, None if out else value)


def load(name: str, overrides: Sequence[str] = ()) -> Config:
    """The config of a file or name with overrides, validated.

    Raises:
        ConfigError: unknown key, wrong type, value out of range or impossible combination; names each with a remedy,
            and the file or override that says it.
    """
    files = chain(name)
    tree: dict = {"name": Path(name).name.removesuffix(".toml")}  # deepspeed_1.3b_moe_128 has no ending
    try:
        for file in files:
            tree = file.over(tree)
        tree = drop_unset(tree)
    except RecursionError:
        why = "tables are nested too deep"
        raise ConfigError(Problem(str(files[-1].path), why, "use the keys of the reference")) from None
    for text in overrides:
        tree = override(tree, text)
    try:
        return from_dict(tree)
    except ConfigError as e:
        raise ConfigError(*(_with_origin(p, files, overrides) for p in e.problems)) from None


def _with_origin(problem: Problem, files: Sequence[File], overrides: Sequence[str]) -> Problem:
    """The problem with the override or, of the chain, the one file that sets its key."""
    if any(text.partition("=")[0].strip() == problem.key for text in overrides):
        return dataclasses.replace(problem, origin="in an override")
    path = problem.key.split(".")
    setting = [file for file in files if file.sets(path)]
    return dataclasses.replace(problem, origin=f"in {setting[0]}") if len(setting) == 1 else problem


# The reference of keys


def type_name(hint: Any) -> str:
    """A type as the reference shows it: `int >= 1, or unset`."""
    if typing.get_origin(hint) is Annotated:
        base, limit = typing.get_args(hint)
        signs = {"ge": ">=", "gt": ">", "le": "<=", "lt": "<"}
        limits = [(sign, getattr(m, name, None)) for m in limit.metadata for name, sign in signs.items()]
        bounds = [f"{sign} {n}" for sign, n in limits if n is not None and n != 2**40]
        return f"{base.__name__} {', '.join(bounds)}".strip()
    if typing.get_origin(hint) is Literal:
        return " / ".join(map(str, typing.get_args(hint)))
    if isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union:
        return ", or ".join("unset" if t is type(None) else type_name(t) for t in typing.get_args(hint))
    if typing.get_origin(hint) is tuple:
        inner, _ = typing.get_args(hint)
        return "mesh axes" if inner is str else f"list of {type_name(inner)}"
    return hint.__name__


HEADING = """# Configurations

One TOML file a model or experiment; `extends = "NAME"` takes over the values of another. Every key is optional, and
`key.path=value` on the command line overrides it. Where the type says `or unset`, `key = "unset"` in a file and
`key.path=unset` on the command line take an inherited value out; `key.path=` brings back any key's default. This page
is written by `python -m moe_jax.config`.

"""


def reference() -> str:
    """All keys with type, default and meaning, as Markdown."""
    rows = ["| key | type | default | meaning |", "|---|---|---|---|"]
    for name, hint, f in all_keys():
        default = f.default if f.default is not dataclasses.MISSING else ""
        shown = "unset" if default is None else json.dumps(list(default) if isinstance(default, tuple) else default)
        rows.append(f"| `{name}` | {type_name(hint)} | `{shown}` | {f.metadata.get('doc', 'logical axis')} |")
    return "\n".join(rows) + "\n"


if __name__ == "__main__":
    print(HEADING + reference(), end="")
