"""Grouped products: rows sorted by expert times the matrix of their expert. Pure functions on arrays.

On TPU this is `jax.lax.ragged_dot`. Elsewhere that primitive computes every row with every expert (8 times the time at
8 experts on CPU), so here blocks of rows run in a loop over the experts that have rows, each block one plain product.
Work follows the rows in use and temporaries do not grow with the number of experts.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

BLOCK = 128  # rows of one product: fewer run slower, more are wasted on the last block of each expert

# [R, K] x [R, N] -> [E, K, N]: the ragged dimension is contracted.
WEIGHT_GRADIENT = jax.lax.RaggedDotDimensionNumbers(
    dot_dimension_numbers=(((0,), (0,)), ((), ())), lhs_ragged_dimensions=[0], rhs_group_dimensions=[]
)


def over_blocks(sizes: jax.Array, R: int, init: jax.Array, expert: Callable, block: Callable) -> jax.Array:
    """Loop over the experts with rows and, inside, over the blocks of their rows.

    Args:
        sizes: [E] int32, rows of each expert; they lie in this order.
        init: what the loop carries from expert to expert.
        expert: (e, carry, run) -> carry; `run(init)` loops over the blocks of expert e and returns their carry.
        block: (carry, e, at, keep) -> carry, for the rows from `at`, of which `keep` [rows, 1] belong to the block.
    """
    rows = min(BLOCK, R)
    ends = jnp.cumsum(sizes)
    order = jnp.argsort(sizes == 0, stable=True)  # experts with rows first
    lane = jnp.arange(rows, dtype=jnp.int32)

    def one(i: jax.Array, carry: jax.Array) -> jax.Array:
        e = order[i]
        start, end = ends[e] - sizes[e], ends[e]

        def step(j: jax.Array, carry):
            first = start + j * rows
            at = jnp.minimum(first, R - rows)  # the last block looks back rather than over the edge
            row = at + lane
            return block(carry, e, at, ((row >= first) & (row < end))[:, None])

        return expert(e, carry, lambda init: jax.lax.fori_loop(0, (sizes[e] + rows - 1) // rows, step, init))

    return jax.lax.fori_loop(0, (sizes > 0).sum(dtype=jnp.int32), one, init)


def rows_at(x: jax.Array, at: jax.Array) -> jax.Array:
    """The block of rows of x [R, D] that begins at `at`."""
    return jax.lax.dynamic_slice_in_dim(x, at, min(BLOCK, x.shape[0]))


def blocked_dot(x: jax.Array, w: jax.Array, sizes: jax.Array, transposed: bool) -> jax.Array:
    """x [R, D] times w [E, D, F], or w [E, F, D] transposed -> [R, F]; rows of no expert come out zero."""
    width = w.shape[1 if transposed else 2]
    contract = (((1,), (1 if transposed else 0,)), ((), ()))

    def block(out: jax.Array, e: jax.Array, at: jax.Array, keep: jax.Array) -> jax.Array:
        y = jax.lax.dot_general(rows_at(x, at), w[e], contract)
        return jax.lax.dynamic_update_slice_in_dim(out, jnp.where(keep, y, rows_at(out, at)), at, 0)

    init = jnp.zeros_like(x, shape=(x.shape[0], width))
    return over_blocks(sizes, x.shape[0], init, lambda e, out, run: run(out), block)


def blocked_gradient(x: jax.Array, g: jax.Array, sizes: jax.Array) -> jax.Array:
    """x [R, D] and g [R, F] -> [E, D, F], the sum over the rows of each expert, added in float32 at least."""
    wide = jnp.float32 if x.dtype.itemsize < 4 else x.dtype
    zero = jnp.zeros_like(x, wide, shape=(x.shape[1], g.shape[1]))

    def block(total: jax.Array, e: jax.Array, at: jax.Array, keep: jax.Array) -> jax.Array:
        mine, theirs = (jnp.where(keep, rows_at(a, at), jnp.zeros((), a.dtype)) for a in (x, g))
        contract = (((0,), (0,)), ((), ()))
        return total + jax.lax.dot_general(mine, theirs, contract, preferred_element_type=wide)

    init = jnp.zeros_like(x, shape=(sizes.shape[0], *zero.shape))
    return over_blocks(sizes, x.shape[0], init, lambda e, out, run: out.at[e].set(run(zero).astype(x.dtype)), block)


def ragged_dot(x: jax.Array, w: jax.Array, sizes: jax.Array, transposed: bool) -> jax.Array:
    """The same product by XLA; what it leaves in rows of no expert is set to zero."""
    y = jax.lax.ragged_dot(x, w.swapaxes(1, 2) if transposed else w, sizes)
    inside = jnp.arange(x.shape[0], dtype=jnp.int32) < sizes.sum()
    return jnp.where(inside[:, None], y, jnp.zeros((), y.dtype))


def ragged_gradient(x: jax.Array, g: jax.Array, sizes: jax.Array) -> jax.Array:
    """The same weight gradient by XLA."""
    inside = (jnp.arange(x.shape[0], dtype=jnp.int32) < sizes.sum())[:, None]
    x, g = (jnp.where(inside, a, jnp.zeros((), a.dtype)) for a in (x, g))
    return jax.lax.ragged_dot_general(x, g, sizes, WEIGHT_GRADIENT)


def product(x: jax.Array, w: jax.Array, sizes: jax.Array, transposed: bool) -> jax.Array:
    """The grouped product by the means of the platform that the program is compiled for."""

    def tpu(x: jax.Array, w: jax.Array, sizes: jax.Array) -> jax.Array:
        return ragged_dot(x, w, sizes, transposed)

    def blocks(x: jax.Array, w: jax.Array, sizes: jax.Array) -> jax.Array:
        return blocked_dot(x, w, sizes, transposed)

    return jax.lax.platform_dependent(x, w, sizes, tpu=tpu, default=blocks)


@jax.custom_vjp
def dot(x: jax.Array, w: jax.Array, sizes: jax.Array) -> jax.Array:
    return product(x, w, sizes, False)


def backward(saved: tuple[jax.Array, jax.Array, jax.Array], g: jax.Array) -> tuple[jax.Array, jax.Array, None]:
    """Gradients of `dot`, each a grouped product."""
    x, w, sizes = saved
    dw = jax.lax.platform_dependent(x, g, sizes, tpu=ragged_gradient, default=blocked_gradient)
    return product(g, w, sizes, True), dw, None


dot.defvjp(lambda x, w, sizes: (dot(x, w, sizes), (x, w, sizes)), backward)


def grouped_dot(x: jax.Array, w: jax.Array, sizes: jax.Array) -> jax.Array:
    """Rows times the matrix of their expert (MegaBlocks, Gale et al. 2022, section 4, without blocks of zeros).

    Args:
        x: [R, D], the rows of expert 0 first, then those of expert 1, and so on; rows after the last are ignored.
        w: [E, D, F], in the type of x.
        sizes: [E] int32, rows of each expert, R in all at the most.
    Returns:
        [R, F] in the type of x, zero after the last row in use. Differentiable once in x and w. Inside `shard_map`
        the three arguments vary over the same mesh axes: what fewer shards hold is cast (`jax.lax.pcast`) by the
        caller, and the cast's transpose adds up its gradient.
    Raises:
        ValueError: shapes or types that do not fit.
    """
    if x.ndim != 2 or w.ndim != 3 or x.shape[1] != w.shape[1] or sizes.shape != w.shape[:1] or x.dtype != w.dtype:
        shapes = f"x {x.dtype}{list(x.shape)}, w {w.dtype}{list(w.shape)}, sizes {list(sizes.shape)}"
        raise ValueError(f"{shapes}: x [R, D], w [E, D, F] of one type and sizes [E] are needed")
    if 0 in (*x.shape, *w.shape):
        return jnp.zeros((x.shape[0], w.shape[2]), x.dtype)
    return dot(x, w, sizes)
