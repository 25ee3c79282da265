"""Dropless experts: rows sorted by expert, grouped products over the rows in use, on one device or over a mesh.

Over a mesh everything runs inside one `shard_map`: rows are sorted by the shard of their expert, exchanged, sorted by
expert among what all shards sent, multiplied, and sent home the same way. They arrive in buffers that hold the worst
case, and travel in such buffers too, or, by a ragged all-to-all, only as many as there are.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from moe_jax.axes import Axes, Rules
from moe_jax.capacity import Slots
from moe_jax.dispatch import RaggedPlan, ragged_plan
from moe_jax.exchange import blocks, ragged
from moe_jax.grouped import Weights, grouped_ffn
from moe_jax.layers.common import ACTIVATIONS
from moe_jax.routing import Routing
from moe_jax.rows import Rows, gather_rows, sum_rows
from moe_jax.rules import by_hand, current_mesh, spec


class Exchange(NamedTuple):
    """Tables of the way from tokens over n send buffers of M rows to rows sorted by expert."""

    send: Rows  # tokens [T] to rows of the send buffers [n*M]
    weight: jax.Array  # [n*M] float32, the gate of each row sent
    sort: Rows  # rows received [n*M] to rows sorted by expert [n*M]
    sizes: jax.Array  # [E/n] int32, rows of each expert here, from all shards
    starts: jax.Array  # [n] int32, where the rows for each shard begin in the plan
    sent: jax.Array  # [n] int32, rows for each shard
    came: jax.Array  # [n] int32, rows from each shard


def tables(plan: RaggedPlan, slots: int, n: int, axes: Axes, kind: str) -> Exchange:
    """Who sends what to whom, from the counts that the n shards tell one another.

    Args:
        slots: of an expert in all groups of a sender.
    """
    (R,), (T, K), E = plan.expert.shape, plan.rows.home.shape, plan.sizes.shape[0]
    local = E // n
    # A token picks an expert once, so it sends a shard that many rows at the most; an expert takes no more than slots.
    M = min(R, T * min(K, local), local * slots)
    shards, lanes = jnp.arange(n, dtype=jnp.int32)[:, None], jnp.arange(M, dtype=jnp.int32)[None]
    by_shard = plan.sizes.reshape(n, local)
    ends = jnp.cumsum(by_shard.sum(1))  # [n], in rows of the plan
    starts = ends - by_shard.sum(1)
    row = starts[:, None] + lanes  # [n,M]
    row = jnp.where(row < ends[:, None], row, R).reshape(-1)  # [n*M]
    shard = jnp.minimum(plan.expert // local, n - 1)  # [R]
    place = shard * M + jnp.arange(R, dtype=jnp.int32) - starts[shard]  # [R], in the send buffers
    home = jnp.append(place, n * M).at[plan.rows.home].get(mode="promise_in_bounds")  # [T,K]
    send = Rows(jnp.append(plan.rows.source, T).at[row].get(mode="promise_in_bounds"), home)
    used = jnp.where(plan.expert < E, place, n * M)[:, None]
    weight = gather_rows(plan.weight[:, None], Rows(row, used))[:, 0]

    came = blocks(by_shard, axes, kind)  # [n,E/n], rows from each shard for each expert
    last = jnp.cumsum(came, 1)
    # The expert of a received row: how many experts of its sender end at or before it.
    marks = jnp.zeros_like(came, shape=(n, M + 1)).at[shards, last].add(1)
    expert = jnp.cumsum(marks, 1)[:, :M]  # [n,M], E/n after the last row
    sizes = came.sum(0)
    first = jnp.cumsum(sizes) - sizes  # [E/n], in sorted rows
    begin = first[None] + jnp.cumsum(came, 0) - last  # [n,E/n], what turns a lane into a sorted row
    target = lanes + jnp.take_along_axis(begin, jnp.minimum(expert, local - 1), axis=1)
    target = jnp.where(expert < local, target, n * M).reshape(-1)  # [n*M]
    entry = jnp.arange(n * M, dtype=jnp.int32)
    source = jnp.full_like(target, n * M).at[target].set(entry, mode="drop")
    return Exchange(send, weight, Rows(source, target[:, None]), sizes, starts, by_shard.sum(1), came.sum(1))


def there_and_back(
    tokens: jax.Array, plan: RaggedPlan, slots: int, n: int, axes: Axes, kind: str
) -> tuple[jax.Array, Exchange, Rows, jax.Array, Callable[[jax.Array], jax.Array]]:
    """tokens [T, D] -> rows [n*M, D] sorted by expert at their experts, and what brings such rows home.

    Returns:
        the rows, their tables, and for the way back: tokens to rows, the gate of each row, and rows [n*M, D] of the
        experts -> rows at home.
    """
    to = tables(plan, slots, n, axes, kind)
    if kind != "ragged":
        sent = gather_rows(tokens, to.send)  # [n*M,D]

        def swap(x: jax.Array) -> jax.Array:
            return blocks(x.reshape(n, -1, x.shape[-1]), axes, kind).reshape(x.shape)

        return gather_rows(swap(sent), to.sort), to, to.send, to.weight, lambda y: swap(sum_rows(y, to.sort))
    (R,), M = plan.expert.shape, to.sort.source.shape[0] // n
    lanes = M * jnp.arange(n, dtype=jnp.int32)  # where rows from each shard begin in the buffer
    mine = M * jax.lax.axis_index(axes).astype(jnp.int32) + jnp.zeros_like(lanes)
    homes = jax.lax.all_to_all(to.starts, axes, 0, 0, tiled=True)  # where rows for here begin in the other's plan
    rows = gather_rows(tokens, plan.rows)  # [R,D]
    got = ragged(rows, n * M, to.starts, to.sent, mine, to.came, axes, M)

    def home(y: jax.Array) -> jax.Array:
        return ragged(sum_rows(y, to.sort), R, lanes, to.came, homes, to.sent, axes, M)

    return gather_rows(got, to.sort), to, plan.rows, plan.weight, home


def ragged_experts(
    tokens: jax.Array,
    routing: Routing,
    slots: Slots,
    weights: Weights,
    capacity: int,
    kind: str,
    n: int = 1,
    axes: Axes = (),
    exchange: str = "shard_map",
    share: Axes = (),
) -> jax.Array:
    """tokens [G, S, D] -> [G, S, D], on one device or, inside `shard_map`, on one of n shards of the experts.

    Args:
        share: mesh axes over which D is split while tokens travel: some of those that split the hidden width F, whose
            other axes give partial sums.
    """
    G, S, D = tokens.shape
    with jax.named_scope("dispatch"):
        plan = ragged_plan(routing, slots, capacity)
        flat = tokens.reshape(G * S, D)
        rows, weight, sizes, home = plan.rows, plan.weight, plan.sizes, None
        if n == 1:
            x = gather_rows(flat, rows)  # [R,D]
        else:
            x, to, rows, weight, home = there_and_back(flat, plan, G * capacity, n, axes, exchange)
            sizes = to.sizes
        x = checkpoint_name(x, "dispatched")
        if share:
            x = jax.lax.all_gather(x, share, axis=1, tiled=True)
    with jax.named_scope("experts"):
        y = grouped_ffn(x, sizes, weights, ACTIVATIONS[kind])
        if share:
            y = jax.lax.psum_scatter(y, share, scatter_dimension=1, tiled=True)
    with jax.named_scope("combine"):
        y = checkpoint_name(y if home is None else home(y), "expert_out")
        # The gate multiplies rows, densely: its gradient at the tokens would be a sum over gathered rows.
        weighted = (y.astype(jnp.float32) * weight[:, None]).astype(y.dtype)
        return sum_rows(weighted, rows).reshape(G, S, D)


def over_mesh(rules: Rules, capacity: int, kind: str, exchange: str) -> Callable:
    """`ragged_experts` over the current mesh: (tokens, routing, slots, weights) -> [G, S, D].

    Weights that are split over other axes than those of experts and hidden width are gathered on the way in; a hidden
    width that is split gives partial sums, added up once, at the tokens.
    """
    mesh = current_mesh()
    hidden, share = rules.expert_mlp, rules.act_exchange
    everywhere = (*rules.groups, *(a for a in (*rules.experts, *hidden) if a not in rules.groups))
    n = 1
    for axis in rules.experts:
        n *= mesh.shape[axis]

    def vary(x: jax.Array, over: Axes) -> jax.Array:
        """What several shards share, as a value of each: the transpose adds up its gradient over them."""
        rest = tuple(a for a in everywhere if a not in over)
        return jax.lax.pcast(x, rest, to="varying") if rest else x

    def local(tokens: jax.Array, routing: Routing, slots: Slots, weights: Weights) -> jax.Array:
        last = weights.b_down
        weights = jax.tree.map(lambda w: vary(w, (*rules.experts, *hidden)), weights._replace(b_down=None))
        if last is not None:
            last = vary(last, rules.experts)
            if hidden:  # slices of the hidden width give partial sums: one of them has the bias
                last = jnp.where(jax.lax.axis_index(hidden) == 0, last, jnp.zeros((), last.dtype))
            weights = weights._replace(b_down=last)
        here = (*rules.groups, *share)  # where the tokens of a shard differ
        options = {"n": n, "axes": rules.experts, "exchange": exchange, "share": share}
        y = ragged_experts(vary(tokens, here), routing, slots, weights, capacity, kind, **options)
        rest = tuple(a for a in everywhere if a not in here)
        return jax.lax.psum(y, rest) if rest else y

    groups, width = spec((rules.groups,)), spec((rules.groups, (), share))
    up, down = spec((rules.experts, (), hidden)), spec((rules.experts, hidden, ()))
    across, along = spec((rules.experts, hidden)), spec((rules.experts, ()))

    def over_shards(tokens: jax.Array, routing: Routing, slots: Slots, weights: Weights) -> jax.Array:
        layouts = zip(weights, (up, up, down, across, across, along), strict=True)
        specs = (width, groups, groups, tuple(None if w is None else layout for w, layout in layouts))
        parts = by_hand(lambda t, r, s, w: local(t, r, s, Weights(*w)), in_specs=specs, out_specs=width)
        return parts(tokens, routing, slots, tuple(weights))

    return over_shards
