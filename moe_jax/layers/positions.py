"""Positional encodings: sinusoidal (Vaswani et al. 2017, section 3.5) and rotary (Su et al. 2021). Pure functions."""

import math

import jax
import jax.numpy as jnp
import numpy as np

from moe_jax.config import RopeConfig
from moe_jax.schema import turning


def sinusoidal(positions: jax.Array, width: int) -> jax.Array:
    """positions [...] -> [..., D] float32: PE(p, 2i) = sin(p / 10000^(2i/D)), PE(p, 2i+1) = cos of the same."""
    rate = 10000.0 ** (-jnp.arange(0, width, 2, dtype=jnp.float32) / width)  # [D/2]
    angle = jnp.einsum("...,n->...n", positions.astype(jnp.float32), rate)  # [..., D/2]
    return jnp.stack([jnp.sin(angle), jnp.cos(angle)], -1).reshape(*positions.shape, width)


def plain(width: int, theta: float, rope: RopeConfig) -> np.ndarray:
    """theta^(-2i/N) for the N/2 pairs, float64."""
    return theta ** (-2.0 * np.arange(width // 2) / width)


def linear(width: int, theta: float, rope: RopeConfig) -> np.ndarray:
    """All rates divided by the factor s (Chen et al. 2023, Position Interpolation, section 2.3)."""
    assert rope.factor is not None
    return plain(width, theta, rope) / rope.factor


def yarn(width: int, theta: float, rope: RopeConfig) -> np.ndarray:
    """Rates between 1 and 1/s of the plain ones (Peng et al. 2023, YaRN, section 3.2).

    The pair d(r) = N ln(L / 2 pi r) / (2 ln theta) turns r times in L = `original_length` tokens. The share of 1/s
    grows from 0 at d(beta_fast) to 1 at d(beta_slow), in the pairs' numbers, as in the published models, not in r.
    """
    assert rope.factor is not None and rope.original_length is not None
    turns = np.array([rope.beta_fast, rope.beta_slow])
    low, high = width * np.log(rope.original_length / (2 * math.pi * turns)) / (2 * math.log(theta))
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, width - 1)
    high += 0.001 if low == high else 0.0  # a step, without a division by zero
    share = np.clip((np.arange(width // 2) - low) / (high - low), 0.0, 1.0)
    return plain(width, theta, rope) * (1.0 - share + share / rope.factor)


def short_rates(width: int, theta: float, rope: RopeConfig) -> np.ndarray:
    """Each rate divided by a number of its own (Ding et al. 2024, LongRoPE, section 3.1), in short rows."""
    assert rope.short_factors is not None
    return plain(width, theta, rope) / np.array(rope.short_factors)


def long_rates(width: int, theta: float, rope: RopeConfig) -> np.ndarray:
    """The same in long rows."""
    assert rope.long_factors is not None
    return plain(width, theta, rope) / np.array(rope.long_factors)


RATES = {"plain": plain, "linear": linear, "yarn": yarn, "longrope": short_rates}


def rotary(
    x: jax.Array, positions: jax.Array, theta: float, rope: RopeConfig | None = None, long: jax.Array | None = None
) -> jax.Array:
    """Turn the pairs (x[i], x[i + N/2]) by positions * theta^(-2i/N), or as `rope` says.

    Args:
        x: [B, ..., L, N]; positions: [B, L].
        rope: the rates, a factor on what turns, and how many of the N do.
        long: [B] bool, rows that LongRoPE turns as long ones; None: no row is.
    """
    half = x.shape[-1] // 2 if rope is None else turning(x.shape[-1], rope.fraction) // 2
    scale: float | jax.Array = 1.0 if rope is None else rope.turned
    if rope is None:
        rate = theta ** (-jnp.arange(half, dtype=jnp.float32) / half)  # [N/2]
    else:
        rate = jnp.asarray(RATES[rope.kind](2 * half, theta, rope), jnp.float32)
    if rope is not None and long is not None:
        other = jnp.asarray(long_rates(2 * half, theta, rope), jnp.float32)
        rate = jnp.where(long[:, None], other[None], rate[None])  # [B, N/2]
        angle = positions.astype(jnp.float32)[:, :, None] * rate[:, None]  # [B, L, N/2]
        scale = jnp.where(long, rope.turned_long, rope.turned).reshape(-1, *(1,) * (x.ndim - 1))  # [B, 1.., 1, 1]
    else:
        angle = jnp.einsum("bl,n->bln", positions.astype(jnp.float32), rate)  # [B, L, N/2]
    angle = angle.reshape(x.shape[0], *(1,) * (x.ndim - 3), *angle.shape[1:])  # [B, 1.., L, N/2]
    sin, cos = jnp.sin(angle), jnp.cos(angle)
    if isinstance(scale, jax.Array) or scale != 1.0:
        sin, cos = sin * scale, cos * scale
    a, b = x[..., :half].astype(jnp.float32), x[..., half : 2 * half].astype(jnp.float32)
    turned = jnp.concatenate([a * cos - b * sin, b * cos + a * sin], -1).astype(x.dtype)
    return turned if 2 * half == x.shape[-1] else jnp.concatenate([turned, x[..., 2 * half :]], -1)
