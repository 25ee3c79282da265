"""Dispatchers: tokens to the slots of their experts and back, behind two calls. Pure functions on arrays.

`dispatch` makes the buffers `[E, G, C, D]` that experts work on, `combine` brings weighted results home. A dispatcher
is three functions and one row of `DISPATCHERS`; `plan` holds what the other two share.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from moe_jax.capacity import Slots
from moe_jax.routing import Routing
from moe_jax.rows import Rows, gather_rows, sum_rows

# One-hot products move numbers, and must not round float32 ones on the way, as accelerators do by default.
EXACT = jax.lax.Precision.HIGHEST


def einsum_plan(routing: Routing, slots: Slots, capacity: int, dtype) -> tuple[jax.Array, jax.Array]:
    """One-hot dispatch mask and the gate of each slot (GShard, section 3.2; Mesh TensorFlow).

    Returns:
        mask [G, S, E, C] in `dtype`, 1 where token s has slot c of expert e; weight [E, G, C] float32.
    """
    E = routing.prob.shape[-1]
    to_expert = jax.nn.one_hot(routing.expert, E, dtype=dtype) * slots.kept[..., None].astype(dtype)  # [G,S,K,E]
    to_slot = jax.nn.one_hot(slots.position, capacity, dtype=dtype)  # [G,S,K,C]
    mask = jnp.einsum("gske,gskc->gsec", to_expert, to_slot)
    choices = to_expert.astype(jnp.float32)
    gate = jnp.einsum("gske,gsk->gse", choices, slots.gate, precision=EXACT)  # a token picks an expert once
    return mask, jnp.einsum("gsec,gse->egc", mask.astype(jnp.float32), gate, precision=EXACT)


def einsum_dispatch(x: jax.Array, plan: tuple[jax.Array, jax.Array]) -> jax.Array:
    """x [G, S, D] -> buffers [E, G, C, D]; empty slots are zero."""
    return jnp.einsum("gsec,gsd->egcd", plan[0], x, precision=EXACT)


def einsum_combine(y: jax.Array, plan: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Expert outputs [E, G, C, D] -> [G, S, D], weighted by the gates; zero for tokens without a slot."""
    mask, weight = plan
    # The gate multiplies slots, not the mask: its gradient is then one dense sum over D.
    weighted = (y.astype(jnp.float32) * weight[..., None]).astype(y.dtype)
    return jnp.einsum("gsec,egcd->gsd", mask, weighted, precision=EXACT)


class IndexPlan(NamedTuple):
    """Tables between choices and slots, each the other's inverse. Indices count within a group."""

    choice: jax.Array  # [G, E, C] int32, the choice s*K+k in a slot; S*K where it is empty
    slot: jax.Array  # [G, S, K] int32, the slot e*C+c of a choice; E*C where it has none
    weight: jax.Array  # [G, E, C] float32, the gate of each slot, 0 where it is empty


def gather_plan(routing: Routing, slots: Slots, capacity: int, dtype) -> IndexPlan:
    """Index tables: memory of S*K and E*C integers a group, no one-hot (MegaBlocks and Tutel use the like)."""
    G, S, K = routing.expert.shape
    E, C = routing.prob.shape[-1], capacity
    slot = jnp.where(slots.kept, routing.expert * C + slots.position, E * C)  # [G,S,K]
    group = jax.lax.broadcasted_iota(jnp.int32, (G, S * K), 0)
    entry = jax.lax.broadcasted_iota(jnp.int32, (G, S * K), 1)
    # The one scatter is of integers, S*K of them; rows of D numbers are only ever gathered.
    empty = jnp.full((G, E * C), S * K, jnp.int32)
    choice = empty.at[group, slot.reshape(G, S * K)].set(entry, mode="drop").reshape(G, E, C)
    gate = gather_rows(slots.gate.reshape(G * S * K, 1), rows(choice, slot.reshape(G, S * K, 1), 1))
    return IndexPlan(choice, slot, gate.reshape(E, G, C).swapaxes(0, 1))


def rows(choice: jax.Array, slot: jax.Array, K: int) -> Rows:
    """Tables of a group as tables over all rows: [G, E, C] and [G, S, K] -> sources [E*G*C] and homes [G*S, K]."""
    G, E, C = choice.shape
    _, S, width = slot.shape
    group = jax.lax.broadcasted_iota(jnp.int32, choice.shape, 0)
    source = jnp.where(choice < S * K, choice // K + group * S, G * S)  # [G,E,C]
    group = jax.lax.broadcasted_iota(jnp.int32, slot.shape, 0)
    home = jnp.where(slot < E * C, slot // C * (G * C) + group * C + slot % C, E * G * C)  # [G,S,K]
    return Rows(source.swapaxes(0, 1).reshape(-1), home.reshape(G * S, width))


def gather_dispatch(x: jax.Array, plan: IndexPlan) -> jax.Array:
    """x [G, S, D] -> buffers [E, G, C, D]; empty slots are zero."""
    (G, S, D), (_, E, C) = x.shape, plan.choice.shape
    tables = rows(plan.choice, plan.slot, plan.slot.shape[-1])
    return gather_rows(x.reshape(G * S, D), tables).reshape(E, G, C, D)


def gather_combine(y: jax.Array, plan: IndexPlan) -> jax.Array:
    """Expert outputs [E, G, C, D] -> [G, S, D], weighted by the gates; zero for tokens without a slot."""
    (E, G, C, D), (_, S, K) = y.shape, plan.slot.shape
    # The gate multiplies slots, densely: its gradient at the tokens would be a sum over gathered rows, run by scalars.
    weighted = (y.astype(jnp.float32) * plan.weight.swapaxes(0, 1)[..., None]).astype(y.dtype)
    return sum_rows(weighted.reshape(E * G * C, D), rows(plan.choice, plan.slot, K)).reshape(G, S, D)


class RaggedPlan(NamedTuple):
    """The kept choices of all groups as rows sorted by expert."""

    rows: Rows  # tokens [G*S] to rows [R] and back
    expert: jax.Array  # [R] int32, E after the last row in use
    weight: jax.Array  # [R] float32, the gate of each row, 0 after the last one in use
    sizes: jax.Array  # [E] int32, rows of each expert


def ragged_plan(routing: Routing, slots: Slots, capacity: int) -> RaggedPlan:
    """Rows sorted by expert, then by group, token and choice; as many as choices can be kept, whatever E is.

    Args:
        capacity: C, which bounds the rows by E*C a group; S where there is no limit.
    """
    G, S, K = routing.expert.shape
    E = routing.prob.shape[-1]
    choices, R = G * S * K, G * min(S * K, E * capacity)
    expert = jnp.where(slots.kept, routing.expert, E).reshape(-1)
    entry = jax.lax.iota(jnp.int32, choices)
    by_expert, order = jax.lax.sort((expert, entry), num_keys=1, is_stable=True)
    row = jnp.zeros_like(entry).at[order].set(entry, unique_indices=True)
    home = jnp.where(slots.kept.reshape(-1), row, R)
    by_expert, order = by_expert[:R], order[:R]
    used = by_expert < E
    gate = gather_rows(slots.gate.reshape(-1, 1), Rows(jnp.where(used, order, choices), home[:, None]))
    sizes = jnp.zeros_like(entry, shape=(E,)).at[expert].add(1, mode="drop")
    rows = Rows(jnp.where(used, order // K, G * S), home.reshape(G * S, K))
    return RaggedPlan(rows, by_expert, gate[:, 0], sizes)


class Dispatcher(NamedTuple):
    """Three functions with one meaning, and whether they must see one shard of groups at a time (`shard_map`)."""

    plan: Callable[[Routing, Slots, int, Any], Any]  # (routing, slots, capacity, dtype), leading dimension G
    dispatch: Callable[[jax.Array, Any], jax.Array]  # [G, S, D] -> [E, G, C, D]
    combine: Callable[[jax.Array, Any], jax.Array]  # [E, G, C, D] -> [G, S, D]
    local: bool


DISPATCHERS = {
    "einsum": Dispatcher(einsum_plan, einsum_dispatch, einsum_combine, local=False),
    "gather": Dispatcher(gather_plan, gather_dispatch, gather_combine, local=True),
}
