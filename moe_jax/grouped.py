"""Grouped feed-forward networks: rows sorted by expert through the network of their expert. Pure functions on arrays.

On TPU the products are `jax.lax.ragged_dot`. Elsewhere that primitive computes every row with every expert (5 to 6
times the time at 8 experts on CPU: `moe-jax bench layer --ragged-dot`), so here blocks of rows run in a loop over the
experts that have rows, each block through the whole network while it is in the processor's caches. Work follows the
rows in use and temporaries do not grow with the number of experts. Without gradients a block is as long as its expert
needs. Where all have few, as when text is made token by token, they are multiplied at once: reading the matrices is
most of that work, and a batched product reads them where they lie, while a loop copies each one first (`moe-jax bench
decode`).
"""

from collections.abc import Callable, Iterable, Sequence
from functools import partial, reduce
from math import ceil
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

BLOCK_LIMITS = 32, 160  # rows of one product: fewer run slower, more are wasted on the last block of each expert
LEVELS = 8, 32  # rows of shorter blocks, without gradients
FEW = 32  # rows of each expert up to which all experts are multiplied at once, without gradients

# [R, K] x [R, N] -> [E, K, N]: the ragged dimension is contracted.
WEIGHT_GRADIENT = jax.lax.RaggedDotDimensionNumbers(
    dot_dimension_numbers=(((0,), (0,)), ((), ())), lhs_ragged_dimensions=[0], rhs_group_dimensions=[]
)


Act = Callable[..., jax.Array]
"""The hidden layer from the products that lead to it, element by element: of one, or of a gate's and another."""
Products = tuple[jax.Array, ...]
"""Rows times the matrices that go up, [R, F] each: one, or the gate's first."""


class Weights(NamedTuple):
    """Matrices and biases of the experts, in the type of the tokens."""

    w_gate: jax.Array | None  # [E, D, F], where there is a gate
    w_up: jax.Array  # [E, D, F]
    w_down: jax.Array  # [E, F, D]
    b_gate: jax.Array | None = None  # [E, F], where there is a bias and a gate
    b_up: jax.Array | None = None  # [E, F]
    b_down: jax.Array | None = None  # [E, D]

    @property
    def up(self) -> tuple[jax.Array, ...]:
        """The matrices that go up, the gate first."""
        return (self.w_up,) if self.w_gate is None else (self.w_gate, self.w_up)

    @property
    def matrices(self) -> tuple[jax.Array, ...]:
        """All matrices, in the order of the fields."""
        return (*self.up, self.w_down)

    @property
    def biases(self) -> tuple[jax.Array, ...]:
        """The biases of `matrices`, or none."""
        return tuple(b for b in (self.b_gate, self.b_up, self.b_down) if b is not None)

    def like(self, arrays: Sequence[jax.Array]) -> "Weights":
        """Arrays in the places of these, as `matrices` and `biases` list them."""
        given = iter(arrays)
        return jax.tree.map(lambda _: next(given), self)


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


def over_blocks(sizes: jax.Array, R: int, init: Any, expert: Callable, levels: Sequence[int] = ()) -> Any:
    """Loop over the experts with rows and, inside, over the blocks of their rows.

    Args:
        sizes: [E] int32, rows of each expert; they lie in this order.
        init: what the loop carries from expert to expert.
        expert: (e, carry, loop) -> carry. `loop(step, start)` runs step(carry, Block) -> carry over the blocks of
            expert e and returns the last carry.
        levels: rows of shorter blocks, for what is left of an expert's.
    """
    longest = block_rows(R, sizes.shape[0])
    rows = [*(n for n in levels if n < longest), longest]
    ends = jnp.cumsum(sizes)
    order = jnp.argsort(sizes == 0, stable=True)  # experts with rows first

    def one(i: jax.Array, carry: Any) -> Any:
        e = order[i]
        begin, end = ends[e] - sizes[e], ends[e]

        def loop(step: Callable, carry: Any) -> Any:
            if rows[0] == R:  # the block holds all that the expert may have
                return step(carry, Block(begin, end, R, R))

            def block(state: tuple[jax.Array, Any]) -> tuple[jax.Array, Any]:
                first, carry = state
                level = sum((end - first > n).astype(jnp.int32) for n in rows[:-1])
                lengths = [lambda c, n=n: step(c, Block(first, end, n, R)) for n in rows]
                return first + jnp.asarray(rows, jnp.int32)[level], jax.lax.switch(level, lengths, carry)

            return jax.lax.while_loop(lambda state: state[0] < end, block, (begin, carry))[1]

        return expert(e, carry, loop)

    return jax.lax.fori_loop(0, (sizes > 0).sum(dtype=jnp.int32), one, init)


def wide(dtype) -> Any:
    """The type in which products are added up."""
    return jnp.float32 if dtype.itemsize < 4 else dtype


def times(x: jax.Array, w: jax.Array, transposed: bool = False, **options: Any) -> jax.Array:
    """x [rows, D] times w [D, F], or w [F, D] transposed."""
    return jax.lax.dot_general(x, w, (((1,), (1 if transposed else 0,)), ((), ())), **options)


def blocked(
    x: jax.Array, sizes: jax.Array, weights: Weights, act: Act, widen: bool = False, keep: bool = True
) -> tuple[jax.Array, Products]:
    """The networks in blocks of rows; rows of no expert come out zero.

    Args:
        keep: return the products of the way up too, which the gradients need; else blocks are as short as they can be.
        widen: multiply and write in float32, for processors without shorter types: there each write of a block into
            a shorter array would convert the whole array.
    Returns:
        [R, D], and those products.
    """
    R, dtype, up = x.shape[0], wide(x.dtype) if widen else x.dtype, weights.up

    def expert(e: jax.Array, carry: Any, loop: Callable) -> Any:
        *mine, last = (w[e].astype(dtype) for w in weights.matrices)  # once for all blocks
        *ups, down = (b[e].astype(dtype)[None] for b in weights.biases) if weights.biases else (None,) * (len(up) + 1)

        def step(carry: Any, block: Block) -> Any:
            y, kept = carry
            rows = block.take(x).astype(dtype)
            products = [plus(times(rows, w), b).astype(x.dtype) for w, b in zip(mine, ups, strict=True)]
            y = block.put(y, plus(times(act(*products).astype(dtype), last), down))
            pairs = zip(kept, products, strict=True) if keep else ()
            return y, tuple(block.put(k, p.astype(dtype)) for k, p in pairs)

        return loop(step, carry)

    kept = tuple(jnp.zeros_like(x, dtype, shape=(R, w.shape[2])) for w in up) if keep else ()
    y, kept = over_blocks(sizes, R, (jnp.zeros_like(x, dtype), kept), expert, () if keep else LEVELS)
    return y.astype(x.dtype), tuple(k.astype(x.dtype) for k in kept)


def blocked_gradients(
    x: jax.Array, sizes: jax.Array, weights: Weights, kept: Products, g: jax.Array, act: Act, widen: bool = False
) -> tuple[jax.Array, Weights]:
    """Gradients of `blocked` in x and the weights, those of the weights added up in float32 at least."""
    total, dtype = wide(x.dtype), wide(x.dtype) if widen else x.dtype

    def expert(e: jax.Array, carry: Any, loop: Callable) -> Any:
        dx, *out = carry
        *mine, last = (w[e].astype(dtype) for w in weights.matrices)

        def step(carry: Any, block: Block) -> Any:
            dx, *sums = carry
            rows, cotangent = block.take_own(x).astype(dtype), block.take_own(g).astype(dtype)
            h, back = jax.vjp(act, *(block.take(k) for k in kept))
            steps = [d.astype(dtype) for d in back(times(cotangent, last, True).astype(h.dtype))]
            dx = block.put(dx, total_of(times(d, w, True) for d, w in zip(steps, mine, strict=True)))
            pairs = [*((rows, d) for d in steps), (h.astype(dtype), cotangent)]
            new = [times(a.T, b, preferred_element_type=total) for a, b in pairs]
            if weights.biases:  # the rows of others are zeros in the cotangent, and so in every step
                new += [b.sum(0, dtype=total) for _, b in pairs]
            return dx, *(s + n for s, n in zip(sums, new, strict=True))

        dx, *sums = loop(step, (dx, *(jnp.zeros_like(x, total, shape=o.shape[1:]) for o in out)))
        return dx, *(o.at[e].set(s.astype(dtype)) for o, s in zip(out, sums, strict=True))

    out = [jnp.zeros_like(x, dtype, shape=w.shape) for w in (*weights.matrices, *weights.biases)]
    dx, *out = over_blocks(sizes, x.shape[0], (jnp.zeros_like(x, dtype), *out), expert)
    return dx.astype(x.dtype), weights.like([o.astype(x.dtype) for o in out])


def few_rows(R: int, E: int) -> int | None:
    """Rows of each expert that mostly suffice where all are multiplied at once; None where a loop is faster: where many
    experts may have no row, and where rows are many."""
    mean = R / E
    rows = 4 * ceil((mean + 2 * mean**0.5) / 4)  # loads of a random choice lie about their mean by its root
    return rows if R >= E and rows <= FEW else None


def without_gradients(x: jax.Array, sizes: jax.Array, weights: Weights, act: Act, widen: bool = False) -> jax.Array:
    """What `blocked` returns first: at once where every expert has few rows, else in blocks."""
    rows = few_rows(x.shape[0], sizes.shape[0])

    def in_blocks() -> jax.Array:
        return blocked(x, sizes, weights, act, widen, keep=False)[0]

    if rows is None or (widen and wide(x.dtype) != x.dtype):  # blocks convert the matrices one by one
        return in_blocks()
    return jax.lax.cond(sizes.max() <= rows, lambda: at_once(x, sizes, weights, act, rows), in_blocks)


def at_once(x: jax.Array, sizes: jax.Array, weights: Weights, act: Act, rows: int) -> jax.Array:
    """All experts in one batched product, each with so many rows at the most."""
    R, E = x.shape[0], sizes.shape[0]
    ends = jnp.cumsum(sizes)
    begins = ends - sizes
    lanes = begins[:, None] + jnp.arange(rows, dtype=jnp.int32)[None]  # [E,rows], at the end those of others
    mine = x.at[lanes].get(mode="clip")
    *ups, down = (b[:, None] for b in weights.biases) if weights.biases else (None,) * (len(weights.up) + 1)
    hidden = act(*(plus(mine @ w, b) for w, b in zip(weights.up, ups, strict=True)))
    y = plus(hidden @ weights.w_down, down)  # [E,rows,D]
    row = jnp.arange(R, dtype=jnp.int32)
    expert = (row[:, None] >= ends[None]).sum(1, dtype=jnp.int32)  # [R], E after the last row in use
    place = row - begins.at[expert].get(mode="clip")
    out = y.at[jnp.minimum(expert, E - 1), jnp.minimum(place, rows - 1)].get(mode="promise_in_bounds")
    return jnp.where((expert < E)[:, None], out, jnp.zeros((), out.dtype))


def total_of(arrays: Iterable[jax.Array]) -> jax.Array:
    """Their sum."""
    return reduce(jnp.add, arrays)


def plus(x: jax.Array, bias: jax.Array | None) -> jax.Array:
    """x with its bias, if there is one."""
    return x if bias is None else x + bias


def ragged_dot(x: jax.Array, w: jax.Array, sizes: jax.Array, transposed: bool = False) -> jax.Array:
    """x [R, D] times w [E, D, F], or w [E, F, D] transposed, by XLA; zero in rows of no expert."""
    y = jax.lax.ragged_dot(x, w.swapaxes(1, 2) if transposed else w, sizes)
    inside = jnp.arange(x.shape[0], dtype=jnp.int32) < sizes.sum()
    return jnp.where(inside[:, None], y, jnp.zeros((), y.dtype))


def ragged_gradient(x: jax.Array, g: jax.Array, sizes: jax.Array) -> jax.Array:
    """x [R, D] and g [R, F] -> [E, D, F], the sum over the rows of each expert, by XLA."""
    inside = (jnp.arange(x.shape[0], dtype=jnp.int32) < sizes.sum())[:, None]
    x, g = (jnp.where(inside, a, jnp.zeros((), a.dtype)) for a in (x, g))
    return jax.lax.ragged_dot_general(x, g, sizes, WEIGHT_GRADIENT)


def rows_of(bias: jax.Array, sizes: jax.Array, R: int) -> jax.Array:
    """bias [E, F] -> [R, F], that of the expert of each row; zero in rows of no expert."""
    expert = (jnp.arange(R, dtype=sizes.dtype)[:, None] >= jnp.cumsum(sizes)[None]).sum(1)
    return bias.at[expert].get(mode="fill", fill_value=0)


def ragged(x: jax.Array, sizes: jax.Array, weights: Weights, act: Act) -> tuple[jax.Array, Products]:
    """What `blocked` computes, by XLA's own grouped products."""
    biases = [rows_of(b, sizes, x.shape[0]) for b in weights.biases] or [None] * len(weights.matrices)
    kept = tuple(plus(ragged_dot(x, w, sizes), b) for w, b in zip(weights.up, biases[:-1], strict=True))
    return plus(ragged_dot(act(*kept), weights.w_down, sizes), biases[-1]), kept


def ragged_gradients(
    x: jax.Array, sizes: jax.Array, weights: Weights, kept: Products, g: jax.Array, act: Act
) -> tuple[jax.Array, Weights]:
    """What `blocked_gradients` computes, by XLA's own grouped products."""
    h, back = jax.vjp(act, *kept)
    steps = back(ragged_dot(g, weights.w_down, sizes, transposed=True))
    dx = total_of(ragged_dot(d, w, sizes, transposed=True) for d, w in zip(steps, weights.up, strict=True))
    pairs = [*((x, d) for d in steps), (h, g)]
    out = [ragged_gradient(a, b, sizes) for a, b in pairs]
    if weights.biases:
        one = jnp.ones_like(x, shape=(x.shape[0], 1))
        out += [ragged_gradient(one, b, sizes)[:, 0] for _, b in pairs]
    return dx, weights.like(out)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def networks(act: Act, x: jax.Array, sizes: jax.Array, weights: Weights) -> jax.Array:
    """By the means of the platform that the program is compiled for."""
    rest = partial(without_gradients, act=act)
    cpu = partial(rest, widen=True)
    return jax.lax.platform_dependent(
        x, sizes, weights, tpu=lambda *given: ragged(*given, act)[0], cpu=cpu, default=rest
    )


def forward(act: Act, x: jax.Array, sizes: jax.Array, weights: Weights) -> tuple[jax.Array, Any]:
    """`networks`, and what its gradients need."""
    tpu, rest = partial(ragged, act=act), partial(blocked, act=act)
    y, kept = jax.lax.platform_dependent(x, sizes, weights, tpu=tpu, cpu=partial(rest, widen=True), default=rest)
    return y, (x, sizes, weights, kept)


def backward(act: Act, saved: Any, g: jax.Array) -> tuple[jax.Array, None, Weights]:
    """Gradients of `networks`."""
    tpu, rest = partial(ragged_gradients, act=act), partial(blocked_gradients, act=act)
    dx, dw = jax.lax.platform_dependent(*saved, g, tpu=tpu, cpu=partial(rest, widen=True), default=rest)
    return dx, None, dw


networks.defvjp(forward, backward)


def grouped_ffn(x: jax.Array, sizes: jax.Array, weights: Weights, act: Act) -> jax.Array:
    """Rows through the network of their expert (MegaBlocks, Gale et al. 2022, section 4, without blocks of zeros).

    Args:
        x: [R, D], the rows of expert 0 first, then those of expert 1, and so on; rows after the last are ignored.
        sizes: [E] int32, rows of each expert, R in all at the most.
        weights: of all experts, in the type of x.
        act: of the products that go up, one or, with a gate, two.
    Returns:
        [R, D] in the type of x, zero after the last row in use. Differentiable once in x and the weights. Inside
        `shard_map` all arguments vary over the same mesh axes: what fewer shards hold is cast (`jax.lax.pcast`) by the
        caller, and the cast's transpose adds up its gradient.
    Raises:
        ValueError: shapes or types that do not fit.
    """
    (E, D, F), down = weights.w_up.shape, weights.w_down
    fit = x.ndim == 2 and x.shape[1] == D and down.shape == (E, F, D) and sizes.shape == (E,)
    fit = fit and [b.shape for b in weights.biases] in ([], [*[(E, F)] * len(weights.up), (E, D)])
    arrays = (*weights.matrices, *weights.biases)
    if not fit or any(w.shape != (E, D, F) for w in weights.up) or any(w.dtype != x.dtype for w in arrays):
        named = {"x": x, "w_up": weights.w_up, "w_down": down, "sizes": sizes}
        shapes = ", ".join(f"{name} {a.dtype}{list(a.shape)}" for name, a in named.items())
        why = f"{shapes}: x [R, D], w_up [E, D, F], w_down [E, F, D] of one type and sizes [E] are needed"
        raise ValueError(f"{why}, and with biases those of all matrices, [E, F] and [E, D]")
    if 0 in (*x.shape, *weights.w_up.shape):
        return jnp.zeros_like(x)
    return networks(act, x, sizes, weights)
