"""The key/value cache of generation: one buffer a layer, laid out like attention."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from moe_jax.config import ModelConfig


def cached_axes(m: ModelConfig, repeats: int) -> tuple[str | None, ...]:
    """Logical axes of the keys and values of a layer, or of a stack of so many: every stage of a pipeline decodes with
    all layers."""
    return (None,) * (repeats > 1) + ("batch", None if m.latent else "kv_heads", None, None)


class LayerCache(NamedTuple):
    """Keys and values of one attention layer; of a stack of layers, with a leading axis, whose loop copies them.

    Latent attention keeps as its one key [B, 1, M, C + P] the vector of width C that keys and values of all heads are
    made from, with the part that turns; its values are empty, [B, 1, M, 0].
    """

    k: jax.Array  # [B, J, M, N]: J key/value heads, M places
    v: jax.Array  # [B, J, M, N]
    source_k: jax.Array | None = None  # the same of what an encoder read, from the first call on
    source_v: jax.Array | None = None


class Cache(NamedTuple):
    """The cache of a model. Prompts are aligned at their right end, so one place serves the whole batch."""

    layers: Any  # the model's stacks of LayerCache
    start: jax.Array  # [B] int32, first place that holds a token of the row
    filled: jax.Array  # [] int32, places filled so far
    source: jax.Array | None = None  # [B, M] int32, segments of what an encoder read: 1, and 0 for padding
    rows: jax.Array | None = None  # [MoE layers, slots] int32, of each slot of a placement (`replicas`) so far


class Cached(NamedTuple):
    """Where a call with a cache writes, and what its tokens see there."""

    visible: jax.Array | None  # [B, L, M] bool; None where nothing lies there yet, and tokens see one another alone
    place: jax.Array  # [] int32, the first place written

    def within(self, window: int | None) -> jax.Array:
        """What is visible of the last `window` places, [B, L, M] bool."""
        assert self.visible is not None
        if window is None:
            return self.visible
        queries, keys = (jnp.arange(n) for n in self.visible.shape[1:])
        return self.visible & (self.place + queries[:, None] - keys[None] < window)[None]


def empty_layer(m: ModelConfig, batch: int, places: int, repeats: int) -> LayerCache:
    """Zeros: k and v [B, J, M, N] of one layer, [repeats, B, J, M, N] of several."""

    def zeros(width: int) -> jax.Array:
        leading = (repeats,) * (repeats > 1)
        return jnp.zeros((*leading, batch, 1 if m.latent else m.resolved_kv_heads, places, width), m.dtype)

    return LayerCache(*(zeros(n) for n in ((m.cached_width, 0) if m.latent else (m.key_dim, m.value_dim))))


def places(cache: Cache) -> int:
    """Places M of a cache."""
    return cache.layers[0][0].k.shape[-2]


def write(cache: LayerCache, k: jax.Array, v: jax.Array, place: jax.Array) -> LayerCache:
    """Store k and v [B, J, L, N] from `place` on."""
    at = (0, 0, place, 0)
    return cache._replace(
        k=jax.lax.dynamic_update_slice(cache.k, k.astype(cache.k.dtype), at),
        v=jax.lax.dynamic_update_slice(cache.v, v.astype(cache.v.dtype), at),
    )
