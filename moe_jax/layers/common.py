"""What the layers share: parameters with logical axes, products on flattened tokens, dropout, sharding constraints."""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from moe_jax.axes import Layout, Rules
from moe_jax.rules import constrain
from moe_jax.sequence import shards


def swiglu(gate: jax.Array, up: jax.Array) -> jax.Array:
    """Shazeer 2020, eq. 6."""
    return jax.nn.silu(gate) * up


def geglu(gate: jax.Array, up: jax.Array) -> jax.Array:
    """Shazeer 2020, eq. 6, with GELU by tanh."""
    return jax.nn.gelu(gate) * up


def clamped_swiglu(gate: jax.Array, up: jax.Array) -> jax.Array:
    """SwiGLU between bounds, by a sigmoid as steep as GELU's, of an `up` that begins at 1 (OpenAI 2025, gpt-oss)."""
    gate = jnp.minimum(gate, 7.0)
    return gate * jax.nn.sigmoid(1.702 * gate) * (jnp.clip(up, -7.0, 7.0) + 1.0)


ACTIVATIONS: dict[str, Callable] = {  # the hidden layer from the products that lead to it, the gate's first
    "relu": jax.nn.relu,
    "gelu": jax.nn.gelu,
    "swiglu": swiglu,
    "geglu": geglu,
    "clamped_swiglu": clamped_swiglu,
}


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


def product(x: jax.Array, w: jax.Array, rules: Rules | None, dtype: Any = None) -> jax.Array:
    """x [B, L, D] times w [D, F] -> [B, L, F], in `dtype` or the type of x.

    Tokens are flattened first: a weight gradient over several token dimensions would transpose its cotangent. Not so
    where both are split, and no layout of the flattened ones would leave them in their places.
    """
    if shards(rules) > 1:
        return jnp.einsum("bld,df->blf", x, w.astype(x.dtype), preferred_element_type=dtype)
    flat = jnp.matmul(x.reshape(-1, x.shape[-1]), w.astype(x.dtype), preferred_element_type=dtype)
    return flat.reshape(*x.shape[:-1], w.shape[-1])


Keys = jax.Array | None
"""One random key a row [B], or None where nothing is drawn. Noise is drawn row by row, so that it does not depend on
how many rows a microbatch or a device holds."""


def row_keys(key: Keys, rows: int) -> Keys:
    """Keys [B] from one key; [B] keys and None stay what they are."""
    return key if key is None or key.ndim == 1 else jax.random.split(key, rows)


def fold(keys: Keys, number: int | jax.Array) -> Keys:
    """Other keys [B], for the purpose or layer `number`."""
    return None if keys is None else jax.vmap(lambda k: jax.random.fold_in(k, number))(keys)


def dropout(x: jax.Array, rate: float, keys: Keys, places: jax.Array | None = None) -> jax.Array:
    """Inverted dropout of x [B, L, ...]; without keys (evaluation) or rate, `x` itself.

    Args:
        places: [L] int32, the place of each token in its row, by which it draws; default 0, 1, 2, ...
    """
    if keys is None or rate == 0.0:
        return x
    places = jnp.arange(x.shape[1]) if places is None else places
    by_token = jax.vmap(lambda k: jax.vmap(lambda p: jax.random.fold_in(k, p))(places))(keys)  # [B,L]
    keep = jax.vmap(jax.vmap(lambda k: jax.random.bernoulli(k, 1.0 - rate, x.shape[2:])))(by_token)
    return jnp.where(keep, x / (1.0 - rate), jnp.zeros((), x.dtype))


def lay(
    x: jax.Array, rules: Rules | None, layout: Layout | None = None, names: tuple[str | None, ...] = ()
) -> jax.Array:
    """`x` constrained to a layout or to logical names; as it is in a layer without rules."""
    if rules is None:
        return x
    return constrain(x, rules.layout(*names) if layout is None else layout)


def between(x: jax.Array, rules: Rules | None) -> jax.Array:
    """x [B, L, D] laid out as tokens are between attention and feed-forward layers."""
    return x if rules is None else lay(x, rules, rules.stream)


def inside(x: jax.Array, rules: Rules | None) -> jax.Array:
    """x [B, L, D] laid out as attention and feed-forward layers take tokens, where that is another layout."""
    return x if rules is None or not rules.residual else lay(x, rules, names=("batch", "length", "act_embed"))


def gathered(x: jax.Array, rules: Rules | None) -> jax.Array:
    """x [B, L, D] from between the layers, as they take it. Both layouts are stated, here and in `scattered`: the
    products, and those of the gradients, would take on a part of the other one."""
    return x if rules is None or not rules.residual else inside(between(x, rules), rules)


def scattered(x: jax.Array, rules: Rules | None) -> jax.Array:
    """x [B, L, D] that a layer made, as tokens are between the layers."""
    return x if rules is None or not rules.residual else between(inside(x, rules), rules)
