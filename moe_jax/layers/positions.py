"""Positional encodings: sinusoidal (Vaswani et al. 2017, section 3.5), rotary (Su et al. 2021) and relative (Raffel et
al. 2020, section 2.1). Pure functions."""

import math

import jax
import jax.numpy as jnp

from moe_jax.schema import BUCKETS

FAR = 128  # distances from here on share the last bucket


def sinusoidal(positions: jax.Array, width: int) -> jax.Array:
    """positions [...] -> [..., D] float32: PE(p, 2i) = sin(p / 10000^(2i/D)), PE(p, 2i+1) = cos of the same."""
    rate = 10000.0 ** (-jnp.arange(0, width, 2, dtype=jnp.float32) / width)  # [D/2]
    angle = jnp.einsum("...,n->...n", positions.astype(jnp.float32), rate)  # [..., D/2]
    return jnp.stack([jnp.sin(angle), jnp.cos(angle)], -1).reshape(*positions.shape, width)


def rotary(x: jax.Array, positions: jax.Array, theta: float) -> jax.Array:
    """Turn the pairs (x[i], x[i + N/2]) by positions * theta^(-2i/N).

    Args:
        x: [B, ..., L, N]; positions: [B, L].
    """
    half = x.shape[-1] // 2
    rate = theta ** (-jnp.arange(half, dtype=jnp.float32) / half)  # [N/2]
    angle = jnp.einsum("bl,n->bln", positions.astype(jnp.float32), rate)  # [B, L, N/2]
    angle = angle.reshape(x.shape[0], *(1,) * (x.ndim - 3), *angle.shape[1:])  # [B, 1.., L, N/2]
    sin, cos = jnp.sin(angle), jnp.cos(angle)
    a, b = x[..., :half].astype(jnp.float32), x[..., half:].astype(jnp.float32)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], -1).astype(x.dtype)


def bucket(distance: jax.Array, both_ways: bool) -> jax.Array:
    """The bucket of the distance of a key behind its query, int32 [...] -> [...], of the 32 of T5.

    Half of them hold one distance each, the rest grow with its logarithm up to 128. An encoder uses one half of all for
    keys behind and one for keys ahead; a decoder sees none ahead.
    """
    buckets = BUCKETS // 2 if both_ways else BUCKETS
    ahead = jnp.where(distance < 0, buckets, 0) if both_ways else 0
    far = jnp.abs(distance) if both_ways else jnp.maximum(distance, 0)
    exact = buckets // 2
    share = jnp.log(jnp.maximum(far, 1).astype(jnp.float32) / exact) / math.log(FAR / exact)
    grown = exact + (share * (buckets - exact)).astype(jnp.int32)
    return ahead + jnp.where(far < exact, far, jnp.minimum(grown, buckets - 1))


def relative(table: jax.Array, queries: jax.Array, keys: jax.Array, both_ways: bool) -> jax.Array:
    """table [32, H], places of queries [L] and of keys [M] in their row -> [H, L, M] float32, added to the scores."""
    return table.T[:, bucket(queries[:, None] - keys[None], both_ways)]
