"""The key/value cache of generation: one buffer a layer, laid out like attention."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from moe_jax.config import ModelConfig
from moe_jax.rules import platform


def cached_axes(m: ModelConfig, repeats: int) -> tuple[str | None, ...]:
    """Logical axes of the keys and values of a layer, or of a stack of so many: every stage of a pipeline decodes with
    all layers."""
    return (None,) * (repeats > 1) + ("batch", None if m.latent else "kv_heads", None, None)


class LayerCache(NamedTuple):
    """Keys and values of one attention layer; of a stack of layers, with a leading axis, whose loop copies them.

    Latent attention keeps as its one value [B, 1, M, C + P] the vector of width C that keys and values of all heads are
    made from, with the part that turns; its keys are empty, [B, 1, 0, M].
    """

    k: jax.Array  # [B, J, N, M]: J key/value heads; M places side by side, as scores are, which nothing turns then
    v: jax.Array  # [B, J, M, N]
    source_k: jax.Array | None = None  # [B, J, M, N] of what an encoder read, from the first call on
    source_v: jax.Array | None = None  # [B, J, M, N]


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
    """Zeros: k [B, J, N, M] and v [B, J, M, N] of one layer, with `repeats` in front of several."""
    heads = (*((repeats,) * (repeats > 1)), batch, 1 if m.latent else m.resolved_kv_heads)
    key, value = (0, m.cached_width) if m.latent else (m.key_dim, m.value_dim)
    return LayerCache(jnp.zeros((*heads, key, places), m.dtype), jnp.zeros((*heads, places, value), m.dtype))


def places(cache: Cache) -> int:
    """Places M of a cache."""
    return cache.layers[0][0].v.shape[-2]


def write(cache: LayerCache, k: jax.Array, v: jax.Array, place: jax.Array) -> LayerCache:
    """Store k and v [B, J, L, N] from `place` on."""

    def put(both: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        return (
            jax.lax.dynamic_update_slice(both[0], k.swapaxes(2, 3).astype(cache.k.dtype), (0, 0, 0, place)),
            jax.lax.dynamic_update_slice(both[1], v.astype(cache.v.dtype), (0, 0, place, 0)),
        )

    both = cache.k, cache.v
    if platform() != "cpu":
        new = put(both)
    else:  # a loop of one turn: fused with each of its readers, a write would copy the cache for each
        new = jax.lax.fori_loop(0, jnp.minimum(place + 1, 1), lambda _, both: put(both), both)
    return cache._replace(k=new[0], v=new[1])
