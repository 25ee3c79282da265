"""Impossible combinations inside attention and its positions, as `checks` has them for all else."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

from moe_jax.refused import Problem, written
from moe_jax.schema import ModelConfig, RopeConfig, differing, turning

Refuse = Callable[[str, str, str], None]  # key, reason, remedy


def idle(table: Any, prefix: str, names: Sequence[str], why: str, remedy: str) -> list[Problem]:
    """Keys that have no effect beside the others of their table; a value that is not the default was meant to.

    Of a table among them, such as `model.rope`, the keys that someone set.
    """
    out = []
    for f in dataclasses.fields(table):
        value, key = getattr(table, f.name), f"{prefix}.{f.name}"
        if f.name not in names or value == f.default:
            continue
        given = {key: value}
        if dataclasses.is_dataclass(value):
            inner = differing(value, type(value)())
            given = {f"{key}.{name}": v for name, v in inner.items()} or {key: "set"}
        out += [Problem(k, f"is {written(v)}, and {why}", f"take it out, or {remedy}") for k, v in given.items()]
    return out


def _check_latent(m: ModelConfig, no: Refuse) -> None:
    """Latent attention has as many keys as queries, and positions in a part of their own."""
    assert m.latent is not None
    if m.kv_heads is not None:
        no("kv_heads", f"is {m.kv_heads}, and latent attention makes keys and values for each head", "take it out")
    if m.positions != "rotary":
        no("positions", f"is {m.positions!r}, and model.latent.rotary turns a part of each key", "set it to rotary")
    if m.latent.rotary % 2:
        no("latent.rotary", f"{m.latent.rotary} is odd, and rotary positions turn pairs", "use an even width")
    if m.encoder is not None:
        no("encoder", "is set, and latent attention has none to read", "take one of them out")
    for name in ("qk_norm", "biases"):
        if value := getattr(m, name):
            shown = "true" if value is True else repr(value)
            no(name, f"is {shown}, and latent attention has norms of its own and no biases", f"set model.{name}=false")
    if m.qkv_clip is not None:
        no("qkv_clip", f"is {m.qkv_clip:g}, and latent attention keeps no keys and values to hold", "take it out")


ROPE_KEYS = {  # what each kind reads, and has to be given
    "plain": ((), ()),
    "linear": (("factor",), ("factor",)),
    "yarn": (
        (
            "factor",
            "original_length",
            "beta_fast",
            "beta_slow",
            "mscale",
            "mscale_all_dim",
            "attention_factor",
            "truncate",
        ),
        ("factor", "original_length"),
    ),
    "longrope": (
        (
            "factor",
            "original_length",
            "short_factors",
            "long_factors",
            "attention_factor",
            "long_attention_factor",
        ),
        ("original_length", "short_factors", "long_factors"),
    ),
}


def _check_rope(m: ModelConfig, rope: RopeConfig, no: Refuse) -> None:
    """Rates of rotary positions, and how much of a head turns."""
    reads, needs = ROPE_KEYS[rope.kind]
    for f in dataclasses.fields(RopeConfig):
        given = getattr(rope, f.name)
        if f.name not in (*reads, "kind", "fraction") and given != f.default:
            no(f"rope.{f.name}", f"is {given}, and kind={rope.kind} has none", "take it out, or set model.rope.kind")
    for name in needs:
        if getattr(rope, name) is None:
            no(f"rope.{name}", f"is unset, and kind={rope.kind} needs it", "set it, or model.rope.kind=plain")
    if rope.kind == "yarn":
        _check_yarn(m, rope, no)
    if rope.kind == "longrope":
        _check_longrope(m, rope, no)
    if m.latent is not None and rope.fraction != 1.0:
        no("rope.fraction", f"is {rope.fraction:g}, and of latent keys latent.rotary turns", "take it out")
    elif not turning(m.resolved_head_dim, rope.fraction) and not m.resolved_head_dim % 2:
        why = f"{rope.fraction:g} of a head of {m.resolved_head_dim} are no pairs of numbers that turn"
        no("rope.fraction", why, "set it to an even number over the head width")


def _check_yarn(m: ModelConfig, rope: RopeConfig, no: Refuse) -> None:
    """The bounds of YaRN's ramp, and its scales."""
    if rope.beta_fast <= rope.beta_slow:
        why = f"is {rope.beta_fast:g}, not above beta_slow={rope.beta_slow:g}: no pair lies between fast and slow"
        no("rope.beta_fast", why, "set it above beta_slow, as 32 is above 1")
    if m.rope_theta <= 1.0:
        no("rope_theta", f"is {m.rope_theta:g}, at which all pairs turn alike or later ones faster", "set it above 1")
    scales = (rope.mscale, rope.mscale_all_dim)
    if None in scales and scales != (None, None):
        missing = "mscale" if rope.mscale is None else "mscale_all_dim"
        no(f"rope.{missing}", "is unset, and the other of mscale and mscale_all_dim is not", "set both, or none")
    if rope.attention_factor is not None and rope.mscale is not None:
        why = f"is {rope.attention_factor:g}, and mscale={rope.mscale:g} would give the same factor"
        no("rope.attention_factor", why, "take it out, or mscale and mscale_all_dim")


def _check_longrope(m: ModelConfig, rope: RopeConfig, no: Refuse) -> None:
    """A number for each pair that turns, and one way to the factor on sine and cosine."""
    width = m.resolved_head_dim if m.latent is None else m.latent.rotary
    pairs = turning(width, rope.fraction) // 2
    for name in ("short_factors", "long_factors"):
        factors = getattr(rope, name)
        if factors is not None and len(factors) != pairs:
            why = f"has {len(factors)} numbers, and {pairs} pairs of a head turn"
            no(f"rope.{name}", why, "give one for each pair")
    if rope.attention_factor is not None and rope.factor is not None:
        why = f"is {rope.factor:g}, and longrope reads it only where attention_factor is unset"
        no("rope.factor", why, "take one of them out")
    if rope.attention_factor is None and rope.factor is None:
        why = "is unset, and so is factor, from which it would follow"
        no("rope.attention_factor", why, "set one of them")
    if rope.attention_factor is None and rope.original_length == 1:
        why = "is 1, from whose logarithm no factor on sine and cosine follows"
        no("rope.original_length", why, "set it to 2 or more, or model.rope.attention_factor")


def _check_window(m: ModelConfig, no: Refuse) -> None:
    """Layers that see a part of what is before them, and layers that see all."""
    if m.full_every is not None and m.window is None:
        no("full_every", f"is {m.full_every}, and without a window every layer sees all", "set model.window")
    if m.full_every == 1 and m.window is not None:
        no("full_every", f"is 1: every layer sees all, and none the window of {m.window}", "take one of them out")
    if m.window is None:
        return
    if m.full_every is not None and m.full_every > m.layers:
        why = f"is {m.full_every}, and of {m.layers} layers none comes to see all"
        no("full_every", why, f"set it to {m.layers} or less, or to unset")
    for name, there in {
        "latent": m.latent is not None,
        "encoder": m.encoder is not None,
        "positions": m.positions == "relative",
    }.items():
        if there:
            value = "'relative'" if name == "positions" else "set"
            no(name, f"is {value}, and such attention has no window (model.window={m.window})", "take one of them out")


def _check_distances(m: ModelConfig, no: Refuse) -> None:
    """Buckets of distances: half of them hold one distance each, and the limit lies beyond those."""
    halves = 1 if m.encoder is None else 2  # an encoder's keys ahead have buckets of their own
    if m.distance_buckets % halves or m.distance_buckets < 2 * halves:
        why = f"is {m.distance_buckets}, and half of those {'of each direction ' * (halves - 1)}hold one distance each"
        no("distance_buckets", why, f"use {'an even number of 4' if halves == 2 else '2'} or more")
    if m.distance_limit <= m.distance_buckets // 2:
        why = f"is {m.distance_limit}, and of {m.distance_buckets} buckets half hold one distance each"
        no("distance_limit", why, f"set it above {m.distance_buckets // 2}")


def check_attention(m: ModelConfig, no: Refuse) -> None:
    """Kinds of attention that contradict one another, or positions."""
    if m.positions == "relative":
        _check_distances(m, no)
    if m.latent is not None:
        _check_latent(m, no)
    if m.rope is not None and m.positions == "rotary":
        _check_rope(m, m.rope, no)
    _check_window(m, no)
    if m.sinks:
        for name in ("latent", "encoder"):
            if getattr(m, name) is not None:
                no(name, "is set, and such attention has no sinks (model.sinks=true)", "take one of them out")
