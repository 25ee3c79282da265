"""The key/value cache of generation: one buffer a layer, laid out like attention."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from moe_jax.config import ModelConfig

CACHED = (None, "batch", "kv_heads", None, None)
"""Logical axes of the keys and values of a stack of layers: every stage of a pipeline decodes with all layers."""


class LayerCache(NamedTuple):
    """Keys and values of one attention layer; of a stack of layers, with a leading axis."""

    k: jax.Array  # [B, J, M, N]: J key/value heads, M places
    v: jax.Array  # [B, J, M, N]


class Cache(NamedTuple):
    """The cache of a model. Prompts are aligned at their right end, so one place serves the whole batch."""

    layers: Any  # the model's stacks of LayerCache
    start: jax.Array  # [B] int32, first place that holds a token of the row
    filled: jax.Array  # [] int32, places filled so far


class Cached(NamedTuple):
    """Where a call with a cache writes, and what its tokens see there."""

    visible: jax.Array  # [B, L, M] bool
    place: jax.Array  # [] int32, the first place written


def empty_layer(m: ModelConfig, batch: int, places: int, repeats: int) -> LayerCache:
    """Zeros for `repeats` layers: k and v [repeats, B, J, M, N]."""
    shape = (repeats, batch, m.resolved_kv_heads, places, m.resolved_head_dim)
    return LayerCache(jnp.zeros(shape, m.dtype), jnp.zeros(shape, m.dtype))


def places(cache: Cache) -> int:
    """Places M of a cache."""
    return cache.layers[0][0].k.shape[-2]


def write(cache: LayerCache, k: jax.Array, v: jax.Array, place: jax.Array) -> LayerCache:
    """Store k and v [B, J, L, N] from `place` on."""
    at = (0, 0, place, 0)
    return LayerCache(
        jax.lax.dynamic_update_slice(cache.k, k.astype(cache.k.dtype), at),
        jax.lax.dynamic_update_slice(cache.v, v.astype(cache.v.dtype), at),
    )
