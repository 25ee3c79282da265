"""What a dispatcher costs, and which one to use: rules from measurements, each with its reason. No arrays, no JAX.

One-hot products cost in proportion to the tokens of a group and nothing else does: (dispatch + combine) / experts =
2*2*K*S*f*D / (2*m*K*f*D*F) of a token's multiplications, with m = 2 or 3 matrices an expert; E, K, f and D cancel.
"""

from fractions import Fraction
from math import ceil
from typing import NamedTuple

from moe_jax.config import ModelConfig, MoEConfig
from moe_jax.schema import GATED

EINSUM_LIMIT = 0.25  # overhead that a group size is chosen for
DROPLESS_GROUP = 128  # without a limit the group size changes no result, and small groups have small masks
TPU_LIMIT = 0.125  # below it the one-hot products of a TPU are as fast as index tables: S <= F/8 with two matrices


class Choice(NamedTuple):
    """A dispatcher, and why, in one sentence."""

    dispatch: str
    reason: str


class Groups(NamedTuple):
    """A group size for one-hot dispatch with its predicted cost."""

    size: int
    overhead: float
    formula: str


def matrices(ffn: str) -> int:
    """Matrices of a feed-forward network of a kind."""
    return 3 if ffn in GATED else 2


def einsum_overhead(group: int, d_ff: int, matrices: int) -> float:
    """Multiplications of one-hot dispatch and combine in units of those of the experts: 2S/(mF)."""
    return 2 * group / (matrices * d_ff)


def formula(group: int, d_ff: int, matrices: int) -> str:
    """The rule with its numbers, as it is printed."""
    rule = "S/F" if matrices == 2 else f"2S/({matrices}F)"
    numbers = f"{group}/{d_ff}" if matrices == 2 else f"2*{group}/({matrices}*{d_ff})"
    return f"one-hot cost / expert cost = {rule} = {numbers} = {einsum_overhead(group, d_ff, matrices):.3g}"


def einsum_groups(length: int, d_ff: int, matrices: int, limit: float = EINSUM_LIMIT) -> Groups:
    """The largest group size that divides the sequence and keeps the overhead within the limit, 1 at the least."""
    fits = (s for s in range(length, 1, -1) if length % s == 0 and einsum_overhead(s, d_ff, matrices) <= limit)
    size = next(fits, 1)
    return Groups(size, einsum_overhead(size, d_ff, matrices), formula(size, d_ff, matrices))


def choose(platform: str, *, experts: int, top_k: int, d_ff: int, matrices: int, group: int, dropless: bool) -> Choice:
    """The dispatcher for a layer.

    Args:
        platform: `cpu`, `gpu` or `tpu`.
        matrices: of an expert, 2 or 3.
        group: tokens S of a routing group.
        dropless: whether every choice must find a place.
    """
    if dropless and experts > top_k:
        waste = f"buffers that can drop nothing hold {experts}/{top_k} times the rows in use"
        where = "" if platform != "gpu" else " (speed not measured on gpu: compare dispatch=gather)"
        return Choice("ragged", f"dropless: {waste}, sorted rows hold each once{where}")
    overhead = einsum_overhead(group, d_ff, matrices)
    if platform == "tpu" and overhead <= TPU_LIMIT:
        why = f"{formula(group, d_ff, matrices)}, within {TPU_LIMIT}: dense products are as fast as tables on TPU"
        return Choice("einsum", why)
    where = "" if platform == "cpu" else f", measured on CPU only, not on {platform}"
    why = f"index tables cost 0.01 to 0.15 of the expert products{where}"
    return Choice("gather", f"{why}; {formula(group, d_ff, matrices)}")


def dropless_group(length: int) -> int:
    """Tokens of a group where none is ever full: the largest divisor of a sequence that keeps masks small."""
    return next(s for s in range(min(length, DROPLESS_GROUP), 0, -1) if length % s == 0)


def never_full(moe: MoEConfig, factor: float | None) -> bool:
    """Whether every choice has a slot at a capacity factor, so that the size of the groups changes no result."""
    return factor is None and moe.router.kind != "expert_choice"


def group_size(moe: MoEConfig, factor: float | None, length: int, d_ff: int, matrices: int) -> int:
    """Tokens of a routing group in a call at a capacity factor.

    The setting, or one sequence; `auto` takes the part of one that keeps einsum cheap. A dropless call needs none.
    """
    if never_full(moe, factor):
        return dropless_group(length)
    if isinstance(moe.group_size, int):
        return moe.group_size
    if moe.group_size == "auto" and moe.dispatch == "einsum":
        return einsum_groups(length, d_ff, matrices).size
    return length


def for_training(platform: str, m: ModelConfig, length: int) -> Choice:
    """The dispatcher, its groups and why, of the layers of a model in training on sequences of `length` tokens."""
    moe = m.moe
    assert moe is not None
    expert = {"d_ff": moe.d_ff or m.d_ff, "matrices": matrices(m.ffn)}
    S = group_size(moe, moe.capacity_factor, length, **expert)
    C = capacity(moe, S, moe.capacity_factor)
    picked, why = settle(platform, moe, group=S, slots=C, **expert)
    groups = "" if moe.capacity_factor is None else f"groups of {S:,} tokens with {C:,} slots an expert; "
    return Choice(picked, groups + why)


def settle(platform: str, moe: MoEConfig, *, group: int, slots: int, d_ff: int, matrices: int) -> Choice:
    """The dispatcher of a call, as set or, for `auto`, as `choose` says, and why.

    Args:
        group: tokens S of a routing group.
        slots: C of an expert in it; S slots hold whatever comes.
        d_ff: hidden width of an expert, of `matrices` matrices.
    """
    if moe.dispatch == "auto":
        dropless = slots == group and not moe.expert_dropout  # sorted rows have no slots to draw dropout for
        sizes = {"experts": moe.experts, "top_k": moe.top_k, "d_ff": d_ff, "matrices": matrices, "group": group}
        return choose(platform, **sizes, dropless=dropless)
    return Choice(moe.dispatch, formula(group, d_ff, matrices) if moe.dispatch == "einsum" else "as set")


def capacity(cfg: MoEConfig, tokens: int, factor: float | None) -> int:
    """Slots C of one expert in a group of S tokens: `max(min_capacity, ceil(K*S*f/E))`, S at most; S when dropless.

    The factor is taken as the decimal that was written, so that no rounding of binary fractions adds a slot. For expert
    choice C is what an expert takes: no call can lift it.
    """
    if factor is None and cfg.router.kind == "expert_choice":
        factor = cfg.capacity_factor
    if factor is None:
        return tokens
    slots = ceil(Fraction(str(factor)) * cfg.top_k * tokens / cfg.experts)
    return min(tokens, max(cfg.min_capacity, slots))
