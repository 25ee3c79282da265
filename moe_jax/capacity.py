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


def queue_keys(routing: Routing, priority: str, uniform: jax.Array | None) -> list[jax.Array]:
    """Sort keys [..., S, K], most significant first, that order the queue of an expert; ties by token."""
    shape = routing.expert.shape
    choice = jax.lax.broadcasted_iota(jnp.int32, shape, len(shape) - 1)
    token = jax.lax.broadcasted_iota(jnp.int32, shape, len(shape) - 2)
    score = jax.lax.stop_gradient(jnp.take_along_axis(routing.prob, routing.expert, axis=-1))
    match priority:
        case "choice":  # all first choices, then all second ones (GShard, Algorithm 1)
            return [choice]
        case "token":
            return [token]
        case "probability":
            return [-score, choice]
        case "batch":  # Riquelme et al. 2021, V-MoE: tokens by their best probability, first choices first
            return [choice, -jnp.broadcast_to(score.max(-1, keepdims=True), score.shape)]
        case "random":
            return [choice if uniform is None else uniform]  # evaluation is deterministic
    raise ValueError(f"unknown priority {priority!r}")


def places(expert: jax.Array, asks: jax.Array, keys: list[jax.Array]) -> jax.Array:
    """Place of each choice in the queue of its expert, counted from 0 over the choices that ask.

    One stable sort by expert and key, one to bring the places home: O(KS log KS) whatever E is.

    Args:
        expert, asks and each of keys: [..., S, K].
    Returns:
        [..., S, K] int32, meaningless where `asks` is False.
    """
    *lead, S, K = expert.shape
    far = jnp.iinfo(jnp.int32).max  # choices that ask for nothing queue by themselves
    flat = [k.reshape(*lead, S * K) for k in (jnp.where(asks, expert, far), *keys)]
    entry = jax.lax.broadcasted_iota(jnp.int32, flat[0].shape, len(lead))
    by_expert, *_, entry = jax.lax.sort((*flat, entry), dimension=-1, is_stable=True, num_keys=len(flat))
    rank = jax.lax.broadcasted_iota(jnp.int32, entry.shape, len(lead))
    first = jnp.concatenate([jnp.ones((*lead, 1), bool), by_expert[..., 1:] != by_expert[..., :-1]], -1)
    start = jax.lax.cummax(jnp.where(first, rank, 0), axis=len(lead))
    _, place = jax.lax.sort((entry, rank - start), dimension=-1, num_keys=1)
    return place.reshape(*lead, S, K)


def assign(routing: Routing, moe: MoEConfig, slots: int, noise: Noise = QUIET) -> Slots:
    """Give each choice a slot of its expert, or none where the expert is full.

    Args:
        slots: capacity C of an expert in a group.
    """
    place = places(routing.expert, routing.valid, queue_keys(routing, moe.priority, noise.priority))
    kept = routing.valid & (place < slots)
    if moe.priority in ("probability", "batch", "random"):  # who stays is decided; they sit down in token order
        place = places(routing.expert, kept, queue_keys(routing, "token", None))
    gate = jnp.where(kept, routing.gate, 0.0)
    if moe.router.normalize == "after":
        gate = normalized(gate) * moe.router.scale
    return Slots(place, kept, gate)


def unlimited(routing: Routing, moe: MoEConfig) -> Slots:
    """Every valid choice kept, in no place: for dispatchers that need no slots, without the sorts of `assign`."""
    gate = normalized(routing.gate) * moe.router.scale if moe.router.normalize == "after" else routing.gate
    return Slots(jnp.zeros_like(routing.expert), routing.valid, gate)
