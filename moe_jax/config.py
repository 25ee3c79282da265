"""Configuration: strict TOML files that extend one another, overrides, validation. The keys are in `schema`.

`load("tiny_switch", ["train.steps=10"])` reads configs/tiny_switch.toml, applies the overrides and returns a
`Config`, or raises `ConfigError` naming every wrong key, the reason and the remedy.
`python -m moe_jax.config` prints the reference of all keys, which is configs/README.md.
"""

import dataclasses
import difflib
import json
import os
import tomllib
import types
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import TypeAdapter, ValidationError

from moe_jax.schema import (
    Config,
    ConfigError,
    DataConfig,
    MeshConfig,
    ModelConfig,
    MoEConfig,
    OptimizerConfig,
    Problem,
    Refused,
    RouterConfig,
    TrainConfig,
)

__all__ = [
    "Config",
    "ConfigError",
    "DataConfig",
    "MeshConfig",
    "ModelConfig",
    "MoEConfig",
    "OptimizerConfig",
    "Problem",
    "Refused",
    "RouterConfig",
    "TrainConfig",
    "load",
]


def nearest(word: str, known: Sequence[str]) -> str:
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    return f"did you mean {close[0]!r}? " if close else ""


# Files


def config_folder() -> Path:
    """The shipped configs: inside the wheel, or beside the package in a checkout."""
    inside = Path(__file__).parent / "configs"
    return inside if inside.is_dir() else Path(__file__).parent.parent / "configs"


def config_names() -> list[str]:
    return sorted(p.stem for p in config_folder().glob("*.toml"))


def find(name: str, beside: Path | None = None) -> Path:
    """The file of a config given by path or by name."""
    options = [Path(name)] if name.endswith(".toml") else []
    if beside is not None:
        options += [beside / name, beside / f"{name}.toml"]
    options.append(config_folder() / f"{name}.toml")
    for path in options:
        if os.path.isfile(path):  # False, and no error, for a name too long for the file system
            return path
    names = config_names()
    hint = nearest(name, names) + f"the shipped configs are {', '.join(names)}; or give the path of a .toml file"
    raise ConfigError(Problem(name or "config", "no such config", hint))


def read(name: str, beside: Path | None = None, above: tuple[Path, ...] = ()) -> dict:
    """A config file as nested dicts, with the files it extends merged in below it."""
    path = find(name, beside).resolve()
    if path in above:
        chain = " -> ".join(p.name for p in (*above, path))
        raise ConfigError(Problem(str(path), f"extends itself ({chain})", "take one `extends` out"))
    try:
        tree = tomllib.loads(path.read_text("utf-8"))
    except (ValueError, OSError, RecursionError) as e:  # ValueError: TOML, UTF-8, and integers of 4300 digits
        raise ConfigError(Problem(str(path), f"not readable as TOML: {e}", "mend the file at that place")) from None
    base = tree.pop("extends", None)
    if base is None:
        return tree
    if not isinstance(base, str):
        raise ConfigError(Problem("extends", f"is {base!r}", "give the name of one config as a string"))
    below = read(base, path.parent, (*above, path))
    try:
        return merge(below, tree)
    except RecursionError:
        raise ConfigError(Problem(str(path), "tables are nested too deep", "use the keys of the reference")) from None


def merge(below: dict, above: dict) -> dict:
    """Nested dicts with the values of `above` in place of those of `below`."""
    out = dict(below)
    for name, value in above.items():
        both = isinstance(value, dict) and isinstance(out.get(name), dict)
        out[name] = merge(out[name], value) if both else value
    return out


def override(tree: dict, text: str) -> dict:
    """Apply one `key.path=value`; the value is TOML, or a bare string; an empty value takes the key out."""
    path, sign, value = text.partition("=")
    names = path.strip().split(".")
    if not sign or not all(names):
        raise ConfigError(Problem(text, "not an override", "write key.path=value, for example train.steps=100"))
    out = dict(tree)
    node = out
    for name in names[:-1]:
        below = node.get(name, {})
        if not isinstance(below, dict):
            raise ConfigError(Problem(path, f"{name!r} is the value {below!r}, not a table", "shorten the key"))
        node[name] = node = dict(below)
    if value.strip() == "":
        node.pop(names[-1], None)
        return out
    try:
        node[names[-1]] = tomllib.loads(f"x = {value}")["x"]
    except (ValueError, RecursionError):
        node[names[-1]] = value.strip()
    return out


# Strict loading


def _dataclass_in(hint: Any) -> Any:
    """The dataclass in a type such as `MoEConfig | None`."""
    options = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    return next((t for t in options if dataclasses.is_dataclass(t)), None)


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


def _quoted(path: str, given: Any) -> str:
    """How to write a number or a truth value that is meant as text: unquoted, TOML reads 2024 as a number."""
    if not isinstance(given, (int, float)) or len(str(given)) >= 80:
        return ""
    return f", with quotes inside quotes: '{path}=\"{json.dumps(given)}\"'"


def _problem(error: Any) -> Problem:
    """One pydantic error in our words."""
    loc = [str(part) for part in error["loc"]]
    path, kind, given = ".".join(loc) or "config", error["type"], error.get("input")
    shown = repr(given) if len(repr(given)) < 80 else repr(given)[:77] + "..."
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
    if kind == "literal_error":
        expected = error["ctx"]["expected"]
        options = [o.strip("' ") for o in expected.replace(" or ", ",").split(",")]
        return Problem(path, f"is {shown}", f"{nearest(str(given), options)}use one of {', '.join(options)}")
    rule = WANTED.get(kind, error["msg"].removeprefix("Input should be "))
    wanted = rule if kind in WANTED or rule.startswith("a ") else f"a value {rule}"
    hint = _quoted(path, given) if kind == "string_type" and isinstance(error["loc"][-1], str) else ""
    return Problem(path, f"is {shown}, which is not {rule}", f"give {wanted}{hint}")


_ADAPTER: TypeAdapter | None = None


def require(settings: ModelConfig | MoEConfig, name: str) -> None:
    """Refuse settings built in Python that a file could not hold: values out of range, or that contradict one another.

    Raises:
        ConfigError: every problem, its keys beginning with `name`.
    """
    try:
        TypeAdapter(type(settings)).validate_json(json.dumps(to_dict(settings)))
    except ValidationError as e:
        raise ConfigError(*(_problem(x | {"loc": (name, *x["loc"])}) for x in e.errors())) from None
    problems = check_moe(settings, name) if isinstance(settings, MoEConfig) else check_model(settings)
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
        raise ConfigError(*(_problem(x) for x in e.errors())) from None
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


def load(name: str, overrides: Sequence[str] = ()) -> Config:
    """The config of a file or name with overrides, validated.

    Raises:
        ConfigError: unknown key, wrong type, value out of range or impossible combination; names each with a remedy.
    """
    tree = read(name)
    tree.setdefault("name", Path(name).stem)
    for text in overrides:
        tree = override(tree, text)
    return from_dict(tree)


# Impossible combinations


def _idle(table: Any, prefix: str, names: Sequence[str], why: str, remedy: str) -> list[Problem]:
    """Keys that have no effect beside the others of their table; a value that is not the default was meant to."""
    given = {f.name: getattr(table, f.name) for f in dataclasses.fields(table) if f.name in names}
    default = {f.name: f.default for f in dataclasses.fields(table)}
    return [
        Problem(f"{prefix}.{name}", f"is {value}, and {why}", f"take it out, or {remedy}")
        for name, value in given.items()
        if value != default[name]
    ]


def check_moe(moe: MoEConfig, prefix: str = "model.moe") -> list[Problem]:
    """Impossible combinations inside the mixture of experts."""
    out = []

    def no(name: str, reason: str, remedy: str) -> None:
        out.append(Problem(f"{prefix}.{name}", reason, remedy))

    kind, norm = moe.router.kind, moe.router.normalize
    if moe.top_k > moe.experts:
        no("top_k", f"{moe.top_k} choices among {moe.experts} experts", f"set it to {moe.experts} or less")
    if kind == "switch" and moe.top_k != 1:
        no("top_k", f"is {moe.top_k}, and the switch router picks 1", "set top_k=1 or router.kind=softmax_topk")
    if kind == "gshard" and moe.top_k != 2:
        no("top_k", f"is {moe.top_k}, and the gshard router picks 2", "set top_k=2 or router.kind=softmax_topk")
    if moe.top_k == 1 and (kind == "topk_softmax" or norm in ("before", "after")):
        why = "a gate normalised over one choice is always 1 and gives the router no gradient"
        no("router.kind" if kind == "topk_softmax" else "router.normalize", why, "set router.kind=switch or top_k=2")
    if kind == "topk_softmax" and norm in ("none", "before"):
        why = "softmax over the chosen logits is normalised already"
        no("router.normalize", why, "leave it unset, or set it to after")
    if kind != "gshard" and moe.router.second != "always":
        no("router.second", f"is {moe.router.second!r} with the {kind} router", "set router.kind=gshard")
    if kind != "gshard" or moe.router.second != "random":
        why = "only a gshard router that keeps the second expert at random has a threshold"
        remedy = "set router.kind=gshard and router.second=random"
        out += _idle(moe.router, f"{prefix}.router", ["threshold"], why, remedy)
    if moe.capacity_factor is None and moe.overflow != "drop":
        why = f"is {moe.overflow!r}, and a layer without capacity_factor never overflows"
        no("overflow", why, "leave it at drop")
    if moe.expert_dropout and (moe.dispatch == "ragged" or moe.overflow == "fallback"):
        name = "ragged dispatch" if moe.dispatch == "ragged" else "overflow=fallback"
        why = f"is {moe.expert_dropout}, and the sorted rows of {name} have no slots to draw its noise for"
        no("expert_dropout", why, "set dispatch=gather and overflow=drop, or expert_dropout=0")
    if moe.overflow == "fallback" and moe.dispatch == "ragged":
        why = "is 'fallback', and ragged dispatch without capacity_factor is what it would fall back to"
        no("overflow", why, "take capacity_factor out, or set dispatch=gather")
    return out


def check_model(m: ModelConfig) -> list[Problem]:
    """Impossible combinations inside the model."""
    out = []

    def no(name: str, reason: str, remedy: str) -> None:
        out.append(Problem(f"model.{name}", reason, remedy))

    if m.head_dim is None and m.d_model % m.heads:
        no("heads", f"d_model {m.d_model} is not divisible by {m.heads} heads", "set model.head_dim or change heads")
    if m.heads % m.resolved_kv_heads:
        no("kv_heads", f"{m.heads} heads are not a multiple of {m.kv_heads} key/value heads", "use a divisor of heads")
    if m.positions == "rotary" and m.resolved_head_dim % 2:
        no("head_dim", f"{m.resolved_head_dim} is odd, and rotary positions turn pairs", "use an even head_dim")
    if m.positions == "sinusoidal" and m.d_model % 2:
        no("d_model", f"{m.d_model} is odd, and sinusoidal positions come in pairs", "use an even d_model")
    if m.positions != "rotary":
        why = f"{m.positions} positions do not turn"
        out += _idle(m, "model", ["rope_theta"], why, "set model.positions=rotary")
    if m.moe is not None:
        out += check_moe(m.moe)
        if m.layers < m.moe.first_dense + m.moe.every:
            why = f"first_dense={m.moe.first_dense}, every={m.moe.every} leave no MoE layer among {m.layers}"
            no("moe.every", why, "lower model.moe.every or first_dense, or raise model.layers")
    return out


def _check_optimizer(o: OptimizerConfig) -> list[Problem]:
    """Settings of one optimizer or schedule beside another."""
    prefix = "train.optimizer"
    unused = {"adamw": [], "muon": ["eps"], "adafactor": ["b1", "b2", "eps"]}[o.kind]
    out = _idle(o, prefix, unused, f"{o.kind} has no such setting", "set train.optimizer.kind=adamw")
    if o.schedule != "wsd":
        out += _idle(
            o, prefix, ["decay"], f"the {o.schedule} schedule has no final decay", f"set {prefix}.schedule=wsd"
        )
    return out


def _check_groups(cfg: Config) -> list[Problem]:
    """Group sizes against sequences, microbatches and the mesh."""
    moe, length = cfg.model.moe, cfg.data.length
    assert moe is not None
    size = moe.group_size or length
    rows = cfg.data.batch // cfg.train.microbatches
    shards = cfg.mesh.over(cfg.rules.batch)
    if size % length and length % size:
        why = f"{size} is neither a divisor nor a multiple of data.length={length}"
        return [Problem("model.moe.group_size", why, "use a divisor or a multiple of the sequence length")]
    groups = rows * length // size
    if rows * length % size or groups % shards:
        why = f"{rows} sequences of {length} make {rows * length / size:g} groups of {size}, for {shards} token shards"
        return [Problem("model.moe.group_size", why, f"choose it so that the groups are a multiple of {shards}")]
    return []


def check(cfg: Config) -> list[Problem]:
    """Every impossible combination of a config (`rules.validate` holds the rules and the mesh against the shapes)."""
    out = check_model(cfg.model) + _check_optimizer(cfg.train.optimizer)
    mesh, data, train, moe = cfg.mesh, cfg.data, cfg.train, cfg.model.moe

    def no(name: str, reason: str, remedy: str) -> None:
        out.append(Problem(name, reason, remedy))

    shards = mesh.over(cfg.rules.batch)
    if data.batch % train.microbatches:
        no(
            "train.microbatches",
            f"batch {data.batch} does not split into {train.microbatches} parts",
            "use a divisor of data.batch",
        )
    elif (data.batch // train.microbatches) % shards:
        why = f"{data.batch} sequences in {train.microbatches} microbatches do not divide over {shards} token shards"
        no("data.batch", f"{why} (mesh {mesh})", f"use a multiple of {shards * train.microbatches}")
    elif moe is not None:
        out += _check_groups(cfg)
    if moe is not None and moe.experts % mesh.over(cfg.rules.experts):
        n = mesh.over(cfg.rules.experts)
        why = f"{moe.experts} experts do not divide over {n} expert shards"
        no("mesh.expert", why, f"use a divisor of {moe.experts}, or set model.moe.experts to a multiple of {n}")
    if moe is None and mesh.expert > 1 and "expert" not in cfg.rules.batch:
        no("mesh.expert", "a dense model has no experts to split", "set mesh.expert=1")
    if data.length > cfg.model.max_length:
        no("data.length", f"{data.length} exceeds model.max_length={cfg.model.max_length}", "raise model.max_length")
    return out


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
    return "mesh axes" if typing.get_origin(hint) is tuple else hint.__name__


HEADING = """# Configurations

One TOML file a model or experiment; `extends = "NAME"` takes over the values of another. Every key is optional, and
`key.path=value` on the command line overrides it. This page is written by `python -m moe_jax.config`.

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
