"""Grouped products: rows sorted by expert times the matrix of their expert. Pure functions on arrays.

On TPU this is `jax.lax.ragged_dot`. Elsewhere that primitive computes every row with every expert (8 times the time at
8 experts on CPU), so here blocks of rows run in a loop over the experts that have rows, each block one plain product.
Work follows the rows in use and temporaries do not grow with the number of experts.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

BLOCK_LIMITS = 32, 160  # rows of one product: fewer run slower, more are wasted on the last block of each expert

# [R, K] x [R, N] -> [E, K, N]: the ragged dimension is contracted.
WEIGHT_GRADIENT = jax.lax.RaggedDotDimensionNumbers(
    dot_dimension_numbers=(((0,), (0,)), ((), ())), lhs_ragged_dimensions=[0], rhs_group_dimensions=[]
)


class Block:
    """Some rows of one expert among R rows: from `first` on, those before `end`, `rows` of them at the most."""

    def __init__(self, first: jax.Array, end: jax.Array, rows: int, R: int):
        self.rows, self.at = rows, jnp.minimum(first, R - rows)  # the last block looks back rather than over the edge
        row = self.at + jnp.arange(rows, dtype=jnp.int32)
        self.own = ((row >= first) & (row < end))[:, None]

    def take(self, x: jax.Array) -> jax.Array:
        """The rows of x [R, D] -> [rows, D], those of other experts among them."""
        return jax.lax.dynamic_slice_in_dim(x, self.at, self.rows)

    def take_own(self, x: jax.Array) -> jax.Array:
        """The same with zeros in the rows of other experts."""
        return jnp.where(self.own, self.take(x), jnp.zeros((), x.dtype))

    def put(self, out: jax.Array, y: jax.Array) -> jax.Array:
        """out [R, F] with y [rows, F] in the expert's own rows."""
        return jax.lax.dynamic_update_slice_in_dim(out, jnp.where(self.own, y, self.take(out)), self.at, 0)


def block_rows(R: int, E: int) -> int:
    """Rows of a block: with even loads an expert's fit into one, so that few products are half empty."""
    least, most = BLOCK_LIMITS
    even = -(-5 * R // (4 * E * least)) * least  # 1.25 times the mean, in multiples of the least
    return min(R, max(least, min(most, even)))


def over_blocks(sizes: jax.Array, R: int, init: jax.Array, expert: Callable) -> jax.Array:
    """Loop over the experts with rows and, inside, over the blocks of their rows.

    Args:
        sizes: [E] int32, rows of each expert; they lie in this order.
        init: what the loop carries from expert to expert.
        expert: (e, carry, loop) -> carry. `loop(step, start)` runs step(carry, Block) -> carry over the blocks of
            expert e and returns the last carry.
    """
    rows = block_rows(R, sizes.shape[0])
    ends = jnp.cumsum(sizes)
    order = jnp.argsort(sizes == 0, stable=True)  # experts with rows first

    def one(i: jax.Array, carry: jax.Array) -> jax.Array:
        e = order[i]
        begin, end = ends[e] - sizes[e], ends[e]

        def loop(step: Callable, carry: jax.Array) -> jax.Array:
            count = (sizes[e] + rows - 1) // rows
            return jax.lax.fori_loop(0, count, lambda j, c: step(c, Block(begin + j * rows, end, rows, R)), carry)

        return expert(e, carry, loop)

    return jax.lax.fori_loop(0, (sizes > 0).sum(dtype=jnp.int32), one, init)


def wide(dtype) -> Any:
    """The type in which products are added up."""
    return jnp.float32 if dtype.itemsize < 4 else dtype


def blocked_dot(x: jax.Array, w: jax.Array, sizes: jax.Array, transposed: bool, widen: bool = False) -> jax.Array:
    """x [R, D] times w [E, D, F], or w [E, F, D] transposed -> [R, F]; rows of no expert come out zero.

    Args:
        widen: multiply and write in float32, for processors without shorter types: there each write of a block into
            a shorter array would convert the whole array.
    """
    width, dtype = w.shape[1 if transposed else 2], wide(x.dtype) if widen else x.dtype
    contract = (((1,), (1 if transposed else 0,)), ((), ()))

    def expert(e: jax.Array, out: jax.Array, loop: Callable) -> jax.Array:
        mine = w[e].astype(dtype)  # once for all blocks

        def step(out: jax.Array, block: Block) -> jax.Array:
            return block.put(out, jax.lax.dot_general(block.take(x).astype(dtype), mine, contract))

        return loop(step, out)

    return over_blocks(sizes, x.shape[0], jnp.zeros_like(x, dtype, shape=(x.shape[0], width)), expert).astype(x.dtype)


def blocked_gradient(x: jax.Array, g: jax.Array, sizes: jax.Array, widen: bool = False) -> jax.Array:
    """x [R, D] and g [R, F] -> [E, D, F], the sum over the rows of each expert, added in float32 at least."""
    total, dtype = wide(x.dtype), wide(x.dtype) if widen else x.dtype
    zero = jnp.zeros_like(x, total, shape=(x.shape[1], g.shape[1]))

    def step(carry: jax.Array, block: Block) -> jax.Array:
        mine, theirs = block.take_own(x).astype(dtype), block.take_own(g).astype(dtype)
        return carry + jax.lax.dot_general(mine, theirs, (((0,), (0,)), ((), ())), preferred_element_type=total)

    def expert(e: jax.Array, out: jax.Array, loop: Callable) -> jax.Array:
        return out.at[e].set(loop(step, zero).astype(dtype))

    out = jnp.zeros_like(x, dtype, shape=(sizes.shape[0], *zero.shape))
    return over_blocks(sizes, x.shape[0], out, expert).astype(x.dtype)


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
    return jax.lax.platform_dependent(
        x,
        w,
        sizes,
        tpu=partial(ragged_dot, transposed=transposed),
        cpu=partial(blocked_dot, transposed=transposed, widen=True),
        default=partial(blocked_dot, transposed=transposed),
    )


@jax.custom_vjp
def dot(x: jax.Array, w: jax.Array, sizes: jax.Array) -> jax.Array:
    return product(x, w, sizes, False)


def backward(saved: tuple[jax.Array, jax.Array, jax.Array], g: jax.Array) -> tuple[jax.Array, jax.Array, None]:
    """Gradients of `dot`, each a grouped product."""
    x, w, sizes = saved
    cpu = partial(blocked_gradient, widen=True)
    dw = jax.lax.platform_dependent(x, g, sizes, tpu=ragged_gradient, cpu=cpu, default=blocked_gradient)
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
