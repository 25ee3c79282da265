"""What the layers share: parameters with logical axes, products on flattened tokens, dropout, sharding constraints."""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx

from moe_jax.axes import Layout, Rules
from moe_jax.rules import constrain

ACTIVATIONS: dict[str, Callable] = {"relu": jax.nn.relu, "gelu": jax.nn.gelu, "swiglu": jax.nn.silu}


def param(rngs: nnx.Rngs, shape: tuple[int, ...], axes: tuple[str, ...], std: float) -> nnx.Param:
    """A float32 parameter from a truncated normal, with the logical axis of each dimension in its metadata."""
    value = std * jax.random.truncated_normal(rngs.params(), -2.0, 2.0, shape, jnp.float32)
    return nnx.Param(value, axes=axes)


def constant(value: float, shape: tuple[int, ...], axes: tuple[str, ...]) -> nnx.Param:
    return nnx.Param(jnp.full(shape, value, jnp.float32), axes=axes)


def along_last(v: jax.Array, x: jax.Array) -> jax.Array:
    """v [D] with as many dimensions as x [..., D], for strict rank promotion."""
    return v.reshape((1,) * (x.ndim - 1) + v.shape)


def fan_in(width: int) -> float:
    """Standard deviation that keeps the variance of a product over `width` terms."""
    return 1.0 / math.sqrt(width)


def product(x: jax.Array, w: jax.Array) -> jax.Array:
    """x [..., D] times w [D, F] -> [..., F], in the type of x.

    Tokens are flattened first: a weight gradient over several token dimensions would transpose its cotangent.
    """
    return (x.reshape(-1, x.shape[-1]) @ w.astype(x.dtype)).reshape(*x.shape[:-1], w.shape[-1])


def dropout(x: jax.Array, rate: float, key: jax.Array | None) -> jax.Array:
    """Inverted dropout; without a key (evaluation) or rate, `x` itself."""
    if key is None or rate == 0.0:
        return x
    keep = jax.random.bernoulli(key, 1.0 - rate, x.shape)
    return jnp.where(keep, x / (1.0 - rate), jnp.zeros((), x.dtype))


def split(key: jax.Array | None, n: int) -> tuple[jax.Array | None, ...]:
    """n keys of one, or n times None."""
    return (None,) * n if key is None else tuple(jax.random.split(key, n))


def lay(
    x: jax.Array, rules: Rules | None, layout: Layout | None = None, names: tuple[str | None, ...] = ()
) -> jax.Array:
    """`x` constrained to a layout or to logical names; as it is in a layer without rules."""
    if rules is None:
        return x
    return constrain(x, rules.layout(*names) if layout is None else layout)
