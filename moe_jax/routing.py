"""Routers: router logits to a `Routing`. Pure functions on arrays; no Flax, no mesh.

A router is one function and one row of `ROUTERS`. Each takes float32 logits `[..., S, E]` and its settings and returns
the chosen experts, best first, their gates and the probabilities that the balance loss uses. Noise comes in as uniform
numbers drawn from an explicit key by `draw`; without it a router is deterministic, as in evaluation. Experts are chosen
by their logits, which keep their order where probabilities underflow.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from moe_jax.config import MoEConfig


class Routing(NamedTuple):
    """Which experts each token chose. Shapes have any leading dimensions, usually G groups."""

    expert: jax.Array  # [..., S, K] int32, best first
    gate: jax.Array  # [..., S, K] float32, 0 where not valid
    valid: jax.Array  # [..., S, K] bool, False: padding, or a second expert that was not kept
    prob: jax.Array  # [..., S, E] float32
    logits: jax.Array  # [..., S, E] float32


class Noise(NamedTuple):
    """Uniform numbers in [0, 1), with the leading dimensions of the logits; None where nothing is drawn."""

    second: jax.Array | None  # [..., S] (gshard random) or [..., S, E] (gshard sample)
    priority: jax.Array | None  # [..., S, K]


QUIET = Noise(None, None)


def draw(key: jax.Array | None, moe: MoEConfig, shape: tuple[int, ...]) -> Noise:
    """The noise for logits of `shape` [S, E] of one group; nothing without a key."""
    if key is None:
        return QUIET
    S, E = shape
    second_key, priority_key = jax.random.split(key)
    second = None
    if moe.router.kind == "gshard" and moe.router.second != "always":
        second = jax.random.uniform(second_key, (S,) if moe.router.second == "random" else (S, E))
    priority = jax.random.uniform(priority_key, (S, moe.top_k)) if moe.priority == "random" else None
    return Noise(second, priority)


def pick(values: jax.Array, index: jax.Array) -> jax.Array:
    """values [..., E] at index [..., K]."""
    return jnp.take_along_axis(values, index, axis=-1)


def normalized(gate: jax.Array) -> jax.Array:
    """Gates [..., K] divided by their sum."""
    return gate / (gate.sum(-1, keepdims=True) + 1e-9)  # 1e-9 as in mesh-tensorflow's top-2 gating


def switch(logits, moe: MoEConfig, uniform=None):
    """Top-1; the gate is the softmax probability, which carries the router's gradient (Fedus et al. 2021, eq. 1-2)."""
    prob = jax.nn.softmax(logits)
    expert = jnp.argmax(logits, -1, keepdims=True)  # [..., S, 1]
    return expert, pick(prob, expert), jnp.ones(expert.shape, bool), prob


def gshard(logits, moe: MoEConfig, uniform=None):
    """Top-2 with normalised gates (Lepikhin et al. 2020, Algorithm 1).

    The second expert is kept always, at random with probability min(1, g2 / threshold), or sampled in proportion to
    its weight by the Gumbel-max trick. Without `uniform` (evaluation) it is the second best and always kept.
    """
    prob = jax.nn.softmax(logits)
    first = jnp.argmax(logits, -1, keepdims=True)  # [..., S, 1]
    experts = jax.lax.broadcasted_iota(jnp.int32, logits.shape, logits.ndim - 1)
    score = logits
    if moe.router.second == "sample" and uniform is not None:
        score = logits - jnp.log(-jnp.log(jnp.clip(uniform, 1e-20, 1.0 - 1e-7)))  # logits + Gumbel noise
    second = jnp.argmax(jnp.where(experts == first, -jnp.inf, score), -1, keepdims=True)
    expert = jnp.concatenate([first, second], -1)  # [..., S, 2]
    gate = pick(prob, expert)
    share = normalized(gate)
    keep = jnp.ones(expert.shape, bool)
    if moe.router.second == "random" and uniform is not None:
        keep = keep.at[..., 1].set(uniform < share[..., 1] / moe.router.threshold)
    return expert, share if moe.router.normalize in (None, "before") else gate, keep, prob


def topk_softmax(logits, moe: MoEConfig, uniform=None):
    """Softmax over the K chosen logits (Jiang et al. 2024, Mixtral, section 2.1)."""
    value, expert = jax.lax.top_k(logits, moe.top_k)  # [..., S, K]
    return expert, jax.nn.softmax(value), jnp.ones(expert.shape, bool), jax.nn.softmax(logits)


def softmax_topk(logits, moe: MoEConfig, uniform=None):
    """The K best of the softmax over all experts (Muennighoff et al. 2024, OLMoE); normalised if asked."""
    prob = jax.nn.softmax(logits)
    expert = jax.lax.top_k(logits, moe.top_k)[1]  # [..., S, K]
    gate = pick(prob, expert)
    if moe.router.normalize == "before":
        gate = normalized(gate)
    return expert, gate, jnp.ones(expert.shape, bool), prob


ROUTERS = {"switch": switch, "gshard": gshard, "topk_softmax": topk_softmax, "softmax_topk": softmax_topk}


def route(logits: jax.Array, moe: MoEConfig, mask: jax.Array | None = None, noise: Noise = QUIET):
    """Route tokens to experts.

    Args:
        logits: [..., S, E], computed in float32.
        mask: [..., S] bool, False for padding, which gets no expert.
        noise: from `draw`; empty in evaluation.
    Returns:
        Routing with expert, gate and valid [..., S, K], prob and logits [..., S, E].
    """
    logits = logits.astype(jnp.float32)
    expert, gate, valid, prob = ROUTERS[moe.router.kind](logits, moe, noise.second)
    if mask is not None:
        valid = valid & mask[..., None]
    return Routing(expert.astype(jnp.int32), jnp.where(valid, gate, 0.0), valid, prob, logits)
