"""Dropless experts: rows sorted by expert, grouped products over the rows in use, on one device or over a mesh.

Over a mesh everything runs inside one `shard_map`: rows are sorted by the shard of their expert, exchanged in buffers
that hold the worst case (a ragged all-to-all written with `all_to_all`, which every platform has), sorted by expert
among what all shards sent, multiplied, and sent home the same way.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from moe_jax.axes import Axes, Rules
from moe_jax.capacity import Slots
from moe_jax.dispatch import RaggedPlan, ragged_plan
from moe_jax.grouped import Weights, grouped_ffn
from moe_jax.layers.common import ACTIVATIONS
from moe_jax.routing import Routing
from moe_jax.rows import Rows, gather_rows, sum_rows
from moe_jax.rules import current_mesh, spec


class Exchange(NamedTuple):
    """Tables of the way from tokens over n send buffers of M rows to rows sorted by expert."""

    send: Rows  # tokens [T] to rows of the send buffers [n*M]
    weight: jax.Array  # [n*M] float32, the gate of each row sent
    sort: Rows  # rows received [n*M] to rows sorted by expert [n*M]
    sizes: jax.Array  # [E/n] int32, rows of each expert here, from all shards


def exchange(plan: RaggedPlan, n: int, axes: Axes) -> Exchange:
    """Who sends what to whom, from the counts that the n shards tell one another."""
    (R,), (T, K), E = plan.expert.shape, plan.rows.home.shape, plan.sizes.shape[0]
    local = E // n
    M = min(R, T * min(K, local))  # a token picks an expert once, so it sends a shard that many rows at the most
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

    came = jax.lax.all_to_all(by_shard, axes, 0, 0, tiled=True)  # [n,E/n], rows from each shard for each expert
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
    return Exchange(send, weight, Rows(source, target[:, None]), sizes)


def ragged_experts(
    tokens: jax.Array,
    routing: Routing,
    slots: Slots,
    weights: Weights,
    capacity: int,
    kind: str,
    n: int = 1,
    axes: Axes = (),
) -> jax.Array:
    """tokens [G, S, D] -> [G, S, D], on one device or, inside `shard_map`, on one of n shards of the experts."""
    G, S, D = tokens.shape
    with jax.named_scope("dispatch"):
        plan = ragged_plan(routing, slots, capacity)
        flat = tokens.reshape(G * S, D)
        if n == 1:
            rows, weight, sizes = plan.rows, plan.weight, plan.sizes
            x = gather_rows(flat, rows)  # [R,D]
        else:
            rows, weight, sort, sizes = exchange(plan, n, axes)
            sent = gather_rows(flat, rows)  # [n*M,D]
            x = gather_rows(jax.lax.all_to_all(sent, axes, 0, 0, tiled=True), sort)
        x = checkpoint_name(x, "dispatched")
    with jax.named_scope("experts"):
        y = grouped_ffn(x, sizes, weights, ACTIVATIONS[kind])
    with jax.named_scope("combine"):
        if n > 1:
            y = jax.lax.all_to_all(sum_rows(y, sort), axes, 0, 0, tiled=True)
        y = checkpoint_name(y, "expert_out")
        # The gate multiplies rows, densely: its gradient at the tokens would be a sum over gathered rows.
        weighted = (y.astype(jnp.float32) * weight[:, None]).astype(y.dtype)
        return sum_rows(weighted, rows).reshape(G, S, D)


def over_mesh(rules: Rules, capacity: int, kind: str) -> Callable:
    """`ragged_experts` over the current mesh: (tokens, routing, slots, weights) -> [G, S, D].

    Weights that are split over other axes than those of experts and hidden width are gathered on the way in; a hidden
    width that is split gives partial sums, added up once, at the tokens.
    """
    mesh = current_mesh()
    hidden = rules.expert_mlp
    everywhere = (*rules.batch, *(a for a in (*rules.experts, *hidden) if a not in rules.batch))
    n = 1
    for axis in rules.experts:
        n *= mesh.shape[axis]

    def vary(x: jax.Array, over: Axes) -> jax.Array:
        """What several shards share, as a value of each: the transpose adds up its gradient over them."""
        rest = tuple(a for a in everywhere if a not in over)
        return jax.lax.pcast(x, rest, to="varying") if rest else x

    def local(tokens: jax.Array, routing: Routing, slots: Slots, weights: Weights) -> jax.Array:
        weights = jax.tree.map(lambda w: vary(w, (*rules.experts, *hidden)), weights)
        y = ragged_experts(vary(tokens, rules.batch), routing, slots, weights, capacity, kind, n, rules.experts)
        rest = tuple(a for a in everywhere if a not in rules.batch)
        return jax.lax.psum(y, rest) if rest else y

    groups = spec((rules.batch,))
    up, down = spec((rules.experts, (), hidden)), spec((rules.experts, hidden, ()))

    def over_shards(tokens: jax.Array, routing: Routing, slots: Slots, weights: Weights) -> jax.Array:
        specs = (groups, groups, groups, (None if weights.w_gate is None else up, up, down))
        parts = jax.shard_map(lambda t, r, s, w: local(t, r, s, Weights(*w)), in_specs=specs, out_specs=groups)
        return parts(tokens, routing, slots, tuple(weights))

    return over_shards
