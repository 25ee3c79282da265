"""Configuration: strict TOML files that extend one another, overrides, validation. The keys are in `schema`.

`load("tiny_switch", ["train.steps=10"])` reads configs/tiny_switch.toml, applies the overrides and returns a
`Config`, or raises `ConfigError` naming every wrong key, the reason and the remedy.
`python -m moe_jax.config` prints the reference of all keys, which is configs/README.md.
"""

import dataclasses
import json
import types
import typing
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import TypeAdapter, ValidationError

from moe_jax.files import File, chain, config_names, named_in, nearest, set_in
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
    "config_names",
    "load",
    "nearest",
    "override",
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
        out = f", or {path}={UNSET} for none" if _means_unset(loc, given) else ""
        return Problem(path, f"is {shown}", f"{nearest(str(given), options)}use one of {', '.join(options)}{out}")
    rule = WANTED.get(kind, error["msg"].removeprefix("Input should be "))
    wanted = rule if kind in WANTED or rule.startswith("a ") else f"a value {rule}"
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


def require(settings: ModelConfig | MoEConfig, name: str) -> None:
    """Refuse settings built in Python that a file could not hold: values out of range, or that contradict one another.

    Raises:
        ConfigError: every problem, its keys beginning with `name`.
    """
    if problems := _foreign(settings, MoEConfig if not isinstance(settings, ModelConfig) else ModelConfig, name):
        raise ConfigError(*problems)
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
    tree: dict = {"name": Path(name).stem}
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


TOP_K = {"switch": 1, "gshard": 2}
GROUPED = ("deepseek_v2", "deepseek_v3")
BIASED = ("softmax_topk", *GROUPED)


def check_moe(moe: MoEConfig, prefix: str = "model.moe") -> list[Problem]:
    """Impossible combinations inside the mixture of experts."""
    out: list[Problem] = []

    def no(name: str, reason: str, remedy: str) -> None:
        out.append(Problem(f"{prefix}.{name}", reason, remedy))

    kind = moe.router.kind
    if moe.top_k > moe.experts:
        no("top_k", f"{moe.top_k} choices among {moe.experts} experts", f"set it to {moe.experts} or less")
    if moe.top_k != TOP_K.get(kind, moe.top_k):
        want = TOP_K[kind]
        why = f"is {moe.top_k}, and the {kind} router picks {want}"
        no("top_k", why, f"set top_k={want} or router.kind=softmax_topk")
    if moe.capacity_factor is None and moe.overflow == "error":
        no("overflow", "is 'error', and a layer without capacity_factor never overflows", "leave it at drop")
    _check_router(moe, no)
    _check_groups_of_experts(moe, no)
    _check_balance(moe, no)
    if kind == "expert_choice":
        _check_expert_choice(moe, no)
    if moe.dispatch == "ragged" and moe.expert_dropout:
        why = f"is {moe.expert_dropout}, and ragged dispatch has no slots to draw the noise for"
        no("expert_dropout", why, "set dispatch=gather, or expert_dropout=0")
    return out


Refuse = Callable[[str, str, str], None]


def _check_router(moe: MoEConfig, no: Refuse) -> None:
    """Gates, second experts and noise against the kind of router."""
    kind, norm = moe.router.kind, moe.router.normalize
    always_one = kind in ("topk_softmax", "noisy_topk")
    normalized = norm in ("before", "after") or (kind == "deepseek_v3" and norm is None)
    if moe.top_k == 1 and kind not in ("hash", "expert_choice") and (always_one or normalized):
        why = "a gate normalised over one choice is always 1 and gives the router no gradient"
        if always_one:
            no("router.kind", why, "set router.kind=switch or top_k=2")
        else:
            no("router.normalize", why, "set router.kind=switch, router.normalize=none or top_k=2")
    if always_one and norm in ("none", "before"):
        why = "softmax over the chosen logits is normalised already"
        no("router.normalize", why, "leave it unset, or set it to after")
    if kind in ("hash", "expert_choice") and norm is not None:
        why = f"the {kind} router does not normalise its gates"
        no("router.normalize", why, "leave it unset")
    if kind != "gshard" and moe.router.second != "always":
        no("router.second", f"is {moe.router.second!r} with the {kind} router", "set router.kind=gshard")
    if (kind != "gshard" or moe.router.second != "random") and moe.router.threshold != RouterConfig.threshold:
        why = f"is {moe.router.threshold:g}, and only a gshard router that keeps the second expert at random has one"
        no("router.threshold", why, "take it out, or set router.kind=gshard and router.second=random")
    if moe.router.gate_width is not None and moe.router.gate != "mlp":
        no("router.gate_width", f"is {moe.router.gate_width} with a linear gate", "set router.gate=mlp")
    if kind == "hash":
        learned = [n for n in ("gate", "jitter") if getattr(moe.router, n) not in ("linear", 0.0)]
        learned += [n for n in ("z_loss", "balance_loss", "sequence_loss", "device_loss") if getattr(moe, n)]
        for name in learned:
            where = f"router.{name}" if name in ("gate", "jitter") else name
            no(where, "has no effect on the hash router, which learns nothing", "leave it out")
    if moe.router.force_std != RouterConfig.force_std and moe.router.force != "biased":
        no("router.force_std", f"is {moe.router.force_std:g} without router.force=biased", "set router.force=biased")


def _check_groups_of_experts(moe: MoEConfig, no: Refuse) -> None:
    """Group-limited routing: groups that divide and leave enough experts."""
    r = moe.router
    if r.kind not in GROUPED:
        for name in ("topk_groups", "group_score"):
            if getattr(r, name) is not None:
                no(
                    f"router.{name}",
                    f"is set with the {r.kind} router",
                    f"use one of {', '.join(GROUPED)}",
                )
        if r.groups != 1:
            no("router.groups", f"is {r.groups} with the {r.kind} router", f"use one of {', '.join(GROUPED)}, or 1")
        return
    if moe.experts % r.groups:
        no("router.groups", f"{moe.experts} experts do not divide into {r.groups} groups", "use a divisor of experts")
        return
    keep, size = r.topk_groups or r.groups, moe.experts // r.groups
    if keep > r.groups:
        no("router.topk_groups", f"{keep} groups of {r.groups}", f"set it to {r.groups} or less")
    elif keep * size < moe.top_k:
        why = f"{keep} groups of {size} experts leave {keep * size} for top_k={moe.top_k}"
        no("router.topk_groups", why, f"set it to {-(-moe.top_k // size)} or more")
    if keep < r.groups:
        measure = r.group_score or {"deepseek_v2": "max", "deepseek_v3": "sum2"}[r.kind]
        if measure == "sum2" and size < 2:
            no("router.group_score", "is the sum of two experts in groups of one", "set router.group_score=max")
        if measure == "sumk" and (moe.top_k % keep or moe.top_k // keep > size):
            why = f"top_k={moe.top_k} over {keep} groups of {size} experts is no whole number of each"
            no("router.group_score", why, "use max or sum2, or a topk_groups that divides top_k")
    elif r.group_score is not None:
        no("router.group_score", "has no effect while every group may be used", "set router.topk_groups")


def _check_balance(moe: MoEConfig, no: Refuse) -> None:
    """Losses and the bias: what they need, and what fights what."""
    kind = moe.router.kind
    steering = [n for n in ("balance_loss", "importance_loss", "load_loss", "device_loss") if getattr(moe, n)]
    if moe.bias_rate is not None:
        if kind not in BIASED:
            no(
                "bias_rate",
                f"the {kind} router has no selection bias",
                f"use one of {', '.join(BIASED)}",
            )
        if moe.bias_rate > 0 and steering:
            why = f"a moving bias and {', '.join(steering)} fight over the same loads"
            no("bias_rate", why, f"take {' and '.join(steering)} out (sequence_loss may stay), or the bias")
    elif moe.bias_update != "sign":
        no("bias_update", f"is {moe.bias_update!r} without a bias", "set bias_rate, for example 0.001")
    if moe.load_loss and kind != "noisy_topk":
        why = f"the counts of the {kind} router have no gradient"
        no("load_loss", why, "set router.kind=noisy_topk, or use balance_loss or importance_loss")
    if moe.device_loss or moe.communication_loss:
        name = "device_loss" if moe.device_loss else "communication_loss"
        if moe.balance_devices is None:
            no("balance_devices", f"is unset, and {name} needs it", "set it to the devices of the experts, mesh.expert")
    elif moe.balance_devices is not None:
        no("balance_devices", "has no effect without device_loss or communication_loss", "set one of them")
    if moe.balance_devices is not None and moe.experts % moe.balance_devices:
        why = f"{moe.experts} experts do not divide into {moe.balance_devices} groups"
        no("balance_devices", why, "use a divisor of experts")
    for name in ("balance_form", "balance_over"):
        if getattr(moe, name) != getattr(MoEConfig, name) and not moe.balance_loss:
            no(name, f"is {getattr(moe, name)!r} without a balance loss", "set balance_loss, for example 0.01")


def _check_expert_choice(moe: MoEConfig, no: Refuse) -> None:
    """Expert choice is balanced by construction and fills every slot."""
    if moe.capacity_factor is None:
        no(
            "capacity_factor",
            "is unset, and it says how many tokens an expert chooses",
            "set it to 1.0",
        )
    if moe.priority != "choice":
        no("priority", f"is {moe.priority!r}, and with expert_choice the experts decide", "leave it unset")
    if moe.overflow != "drop":
        no("overflow", f"is {moe.overflow!r}, and expert_choice never overflows", "leave it unset")
    if moe.router.force is not None:
        no("router.force", "forces the choice of tokens, and here experts choose", "use another router.kind")
    for name in ("balance_loss", "sequence_loss", "device_loss", "communication_loss", "importance_loss"):
        if getattr(moe, name):
            no(name, "has no effect: expert_choice is balanced by construction", "leave it out")


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
        if m.moe.router.kind == "expert_choice" and not m.moe.router.lookahead:
            why = "expert_choice lets later tokens decide where earlier ones go, and this model is causal"
            no("moe.router.kind", why, "use another router, or permit it with model.moe.router.lookahead=true")
        elif m.moe.router.lookahead and m.moe.router.kind != "expert_choice":
            no("moe.router.lookahead", f"has no effect on the {m.moe.router.kind} router", "leave it out")
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
        no("data.batch", f"{why} (mesh {mesh})", f"set it to a multiple of {shards * train.microbatches}")
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
