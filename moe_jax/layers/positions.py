"""Positional encodings: sinusoidal (Vaswani et al. 2017, section 3.5) and rotary (Su et al. 2021). Pure functions."""

import jax
import jax.numpy as jnp


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
