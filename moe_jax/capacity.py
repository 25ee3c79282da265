"""Capacity: who gets a slot of an expert, in exact integers. Pure functions on arrays; no Flax, no mesh."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from moe_jax.config import MoEConfig
from moe_jax.cost import capacity as capacity
from moe_jax.routing import QUIET, Noise, Routing, normalized


class Slots(NamedTuple):
    """Where each choice goes in its expert's buffer."""

    position: jax.Array  # [..., S, K] int32, slot of the expert; meaningless where not kept
    kept: jax.Array  # [..., S, K] bool: valid, and the place is within the capacity
    gate: jax.Array  # [..., S, K] float32, 0 where not kept


def queue(routing: Routing, priority: str, uniform: jax.Array | None) -> jax.Array:
    """Choices s*K+k in the order in which they are served, [..., S*K] int32; ties by token."""
    *lead, S, K = routing.expert.shape
    n = S * K
    entry = jnp.broadcast_to(jnp.arange(n, dtype=jnp.int32), (*lead, n))
    if priority == "random":
        if uniform is not None:
            return in_order([uniform], entry)
        priority = "choice"  # evaluation is deterministic
    if priority == "choice":  # all first choices, then all second ones (GShard, Algorithm 1)
        return entry % S * K + entry // S
    if priority == "token":
        return entry
    score = jax.lax.stop_gradient(jnp.take_along_axis(routing.prob, routing.expert, axis=-1))
    match priority:
        case "probability":
            return in_order([-score, entry % K], entry)
        case "batch":  # Riquelme et al. 2021, V-MoE: tokens by their best probability, first choices first
            return in_order([entry % K, -jnp.broadcast_to(score.max(-1, keepdims=True), score.shape)], entry)
    raise ValueError(f"unknown priority {priority!r}")


def in_order(keys: list[jax.Array], entry: jax.Array) -> jax.Array:
    """Entries [..., n] in the order of their keys, the most significant first, then in their own."""
    keys = [k.reshape(entry.shape) for k in keys]
    return jax.lax.sort((*keys, entry), dimension=-1, is_stable=True, num_keys=len(keys))[-1]


def by_expert(expert: jax.Array, experts: int) -> tuple[jax.Array, jax.Array]:
    """Experts [..., n] sorted, and where each stood, equals in their order.

    Where they fit, expert and place are one integer, and one array is sorted instead of two.
    """
    n = expert.shape[-1]
    place = jax.lax.broadcasted_iota(jnp.int32, expert.shape, expert.ndim - 1)
    if (experts + 1) * n > jnp.iinfo(jnp.int32).max:
        by, where = jax.lax.sort((expert, place), dimension=-1, is_stable=True, num_keys=1)
        return by, where
    both = jax.lax.sort(expert * n + place, dimension=-1, is_stable=False)
    return both // n, both % n


def scattered(values: jax.Array, index: jax.Array) -> jax.Array:
    """out[..., index[..., i]] = values[..., i], for an index that names each place once."""
    return jnp.put_along_axis(jnp.zeros_like(values), index, values, axis=-1, inplace=False)


def places(expert: jax.Array, asks: jax.Array, line: jax.Array, experts: int) -> jax.Array:
    """Place of each choice in the queue of its expert, counted from 0 over the choices that ask.

    One sort by expert of the choices in line: O(KS log KS) whatever E is.

    Args:
        expert and asks: [..., S, K]; line: [..., S*K], from `queue`.
    Returns:
        [..., S, K] int32, meaningless where `asks` is False.
    """
    *lead, S, K = expert.shape
    asking = jnp.where(asks, expert, experts).reshape(*lead, S * K)  # what asks for nothing queues by itself
    sorted_experts, order = by_expert(jnp.take_along_axis(asking, line, axis=-1), experts)
    rank = jax.lax.broadcasted_iota(jnp.int32, order.shape, len(lead))
    first = jnp.concatenate([jnp.ones((*lead, 1), bool), sorted_experts[..., 1:] != sorted_experts[..., :-1]], -1)
    start = jax.lax.cummax(jnp.where(first, rank, 0), axis=len(lead))
    return scattered(rank - start, jnp.take_along_axis(line, order, axis=-1)).reshape(*lead, S, K)


def assign(routing: Routing, moe: MoEConfig, slots: int, noise: Noise = QUIET) -> Slots:
    """Give each choice a slot of its expert, or none where the expert is full.

    Args:
        slots: capacity C of an expert in a group.
    """
    E = routing.prob.shape[-1]
    place = places(routing.expert, routing.valid, queue(routing, moe.priority, noise.priority), E)
    kept = routing.valid & (place < slots)
    if moe.priority in ("probability", "batch", "random"):  # who stays is decided; they sit down in token order
        place = places(routing.expert, kept, queue(routing, "token", None), E)
    gate = jnp.where(kept, routing.gate, 0.0)
    if moe.router.normalize == "after":
        gate = normalized(gate) * moe.router.scale
    return Slots(place, kept, gate)


def unlimited(routing: Routing, moe: MoEConfig) -> Slots:
    """Every valid choice kept, in no place: for dispatchers that need no slots, without the sorts of `assign`."""
    gate = normalized(routing.gate) * moe.router.scale if moe.router.normalize == "after" else routing.gate
    return Slots(jnp.zeros_like(routing.expert), routing.valid, gate)
