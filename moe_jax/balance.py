"""Balance statistics as sums and integer counts, and the losses made from them.

Sums over tokens add up over groups, devices and microbatches; the losses divide once, over the whole step. So padding,
the mesh, microbatches and remat cannot change a loss or its gradient.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from moe_jax.capacity import Slots
from moe_jax.config import MoEConfig
from moe_jax.routing import Routing


class Stats(NamedTuple):
    """Sums over the tokens of one MoE layer (or [layers, ...] of several). Additive."""

    tokens: jax.Array  # [] int32, tokens that are not padding
    routed: jax.Array  # [] int32, choices that asked for a slot
    kept: jax.Array  # [] int32, choices that got one; routed - kept were dropped
    load: jax.Array  # [E] int32, choices per expert before dropping
    count: jax.Array  # [E] int32, choices that the balance loss counts
    prob: jax.Array  # [E] float32, sum of router probabilities
    z: jax.Array  # [] float32, sum of squared logsumexp of the router logits
    entropy: jax.Array  # [] float32, sum of the entropies of the router probabilities, nats


def count_experts(expert: jax.Array, valid: jax.Array, experts: int) -> jax.Array:
    """Number of valid choices of each expert, [..., K] -> [E] int32."""
    ids = jax.lax.broadcasted_iota(jnp.int32, (*expert.shape, experts), expert.ndim)
    hits = (expert[..., None] == ids) & valid[..., None]  # [..., K, E]
    return hits.sum(tuple(range(hits.ndim - 1)), dtype=jnp.int32)


def first_only(moe: MoEConfig) -> bool:
    """Whether the balance loss counts first choices only (GShard) or all K."""
    choice = moe.router.balance or ("first" if moe.router.kind == "gshard" else "all")
    return choice == "first"


def statistics(routing: Routing, slots: Slots, moe: MoEConfig, mask: jax.Array | None = None) -> Stats:
    """The sums of one layer over all tokens given, padding left out."""
    E = routing.prob.shape[-1]
    mask = jnp.ones(routing.prob.shape[:-1], bool) if mask is None else mask
    lead = tuple(range(routing.prob.ndim - 1))
    load = count_experts(routing.expert, routing.valid, E)
    # First choices are counted whether or not they were kept; a token's first choice is valid unless it is padding.
    count = count_experts(routing.expert[..., :1], mask[..., None], E) if first_only(moe) else load
    log_z = jax.nn.logsumexp(routing.logits, axis=-1)  # [..., S]
    surprise = jax.lax.stop_gradient(-(routing.prob * jnp.log(routing.prob + 1e-30)).sum(-1))
    return Stats(
        tokens=mask.sum(dtype=jnp.int32),
        routed=routing.valid.sum(dtype=jnp.int32),
        kept=slots.kept.sum(dtype=jnp.int32),
        load=load,
        count=count,
        prob=jnp.where(mask[..., None], routing.prob, 0.0).sum(lead),
        z=jnp.where(mask, log_z**2, 0.0).sum(),
        entropy=jnp.where(mask, surprise, 0.0).sum(),
    )


def token_count(stats: Stats) -> jax.Array:
    """Number of tokens, at least 1, as float32."""
    return jnp.maximum(stats.tokens, 1).astype(jnp.float32)


def balance_loss(stats: Stats, moe: MoEConfig) -> jax.Array:
    """Load-balance loss `E sum_i f_i P_i`, 1 at perfect balance for every K (Fedus et al. 2021, eq. 4-6).

    f_i is the share of the counted choices that expert i got, before dropping; P_i the mean probability. The gradient
    flows through P alone. Works on one layer or on [layers, ...].
    """
    tokens = token_count(stats)[..., None]  # [..., 1]
    counted = jnp.maximum(stats.count.sum(-1, keepdims=True), 1)  # K a token, or 1, or what a random policy kept
    f = stats.count.astype(jnp.float32) / counted.astype(jnp.float32)  # [..., E]
    return moe.experts * (f * stats.prob / tokens).sum(-1)


def z_loss(stats: Stats) -> jax.Array:
    """Router z-loss, the mean squared logsumexp of the logits (Zoph et al. 2022, ST-MoE, eq. 5)."""
    return stats.z / token_count(stats)


def router_loss(stats: Stats, moe: MoEConfig) -> jax.Array:
    """What the router adds to the loss: balance and z-loss with their coefficients, summed over layers."""
    return moe.balance_loss * balance_loss(stats, moe).sum() + moe.z_loss * z_loss(stats).sum()
