"""Hand-placed exchanges between shards: equal blocks, in one all-to-all or in two stages, and rows in ragged numbers.

Everything here moves data between the shards of some mesh axes. `move` stands outside `shard_map`; the rest inside.
"""

import math
from functools import partial

import jax
import jax.numpy as jnp

from moe_jax.axes import Axes, Rules
from moe_jax.rules import by_hand, current_mesh, platform, spec


def blocks(x: jax.Array, axes: Axes, kind: str) -> jax.Array:
    """Send block j of x [n, ...] to shard j; block i of the result came from shard i. Its own inverse and transpose.

    `hierarchical` sends in two stages, over the fast axis and then over the slow one of `axes`: across the slow axis a
    shard then sends few large messages, one to each peer that has its place on the fast one (Nie et al. 2022, HetuMoE;
    Rajbhandari et al. 2022, DeepSpeed-MoE).
    """
    if kind != "hierarchical":
        return jax.lax.all_to_all(x, axes, 0, 0, tiled=True)
    slow, fast = axes
    split = x.reshape(jax.lax.axis_size(slow), jax.lax.axis_size(fast), *x.shape[1:])
    split = jax.lax.all_to_all(split, fast, 1, 1, tiled=True)
    return jax.lax.all_to_all(split, slow, 0, 0, tiled=True).reshape(x.shape)


def to_experts(x: jax.Array, axes: Axes, kind: str) -> jax.Array:
    """Buffers of one shard: all experts, own groups [E, g, C, D] -> own experts, groups of all [E/n, n*g, C, D]."""
    n = jax.lax.axis_size(axes)
    E, g, C, D = x.shape
    came = blocks(x.reshape(n, E // n, g, C, D), axes, kind)  # [n, E/n, g, C, D], by sender
    return came.swapaxes(0, 1).reshape(E // n, n * g, C, D)


def to_tokens(x: jax.Array, axes: Axes, kind: str) -> jax.Array:
    """The inverse of `to_experts`."""
    n = jax.lax.axis_size(axes)
    local, G, C, D = x.shape
    by_home = x.reshape(local, n, G // n, C, D).swapaxes(0, 1)  # [n, E/n, g, C, D]
    return blocks(by_home, axes, kind).reshape(n * local, G // n, C, D)


def move(buffers: jax.Array, rules: Rules, kind: str, *, home: bool) -> jax.Array:
    """Buffers [E, G, C, D] from their groups to their experts, or `home`, in a `shard_map` around the exchange alone.

    Args:
        kind: `shard_map`, one all-to-all over all axes of the experts, or `hierarchical`, two.
    """
    axes = rules.experts
    if math.prod(current_mesh().shape[a] for a in axes) == 1:
        return buffers
    layouts = spec(rules.token_major), spec(rules.expert_major)
    function, (begin, end) = (to_tokens, layouts[::-1]) if home else (to_experts, layouts)
    return by_hand(partial(function, axes=axes, kind=kind), in_specs=begin, out_specs=end)(buffers)


def ragged(
    x: jax.Array,
    rows: int,
    starts: jax.Array,
    sizes: jax.Array,
    places: jax.Array,
    came: jax.Array,
    axes: Axes,
    most: int,
) -> jax.Array:
    """Rows x [R, D] to the n shards of `axes`, to each as many as it gets: [rows, D], zeros where none came.

    `jax.lax.ragged_all_to_all`, which sends nothing else, on TPU and GPU; CPU has none, and the same result comes from
    blocks that hold the most that a shard may send another.

    Args:
        starts, sizes: [n] int32, where the rows for each shard begin here, and their number.
        places: [n] int32, where they begin there.
        came: [n] int32, the number of rows that each shard sends here.
        most: the largest size there can be.
    """
    if platform() != "cpu":
        out = jnp.zeros_like(x, shape=(rows, *x.shape[1:]))
        name = axes[0] if len(axes) == 1 else axes
        return jax.lax.ragged_all_to_all(x, out, starts, sizes, places, came, axis_name=name)
    lanes = jnp.arange(most, dtype=jnp.int32)[None]  # [1, most]
    index = jnp.where(lanes < sizes[:, None], starts[:, None] + lanes, x.shape[0])  # [n, most]
    sent = x.at[index].get(mode="fill", fill_value=0)  # [n, most, D]
    received = jax.lax.all_to_all(sent, axes, 0, 0, tiled=True)
    where = jax.lax.all_to_all(places, axes, 0, 0, tiled=True)  # [n], where each sender's rows begin here
    target = jnp.where(lanes < came[:, None], where[:, None] + lanes, rows)  # [n, most]
    out = jnp.zeros_like(x, shape=(rows, *x.shape[1:]))
    return out.at[target].set(received, mode="drop", unique_indices=True)
