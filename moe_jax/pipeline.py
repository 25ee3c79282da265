"""Pipeline parallelism: the layers lie on the stages of a mesh axis, and microbatches pass from stage to stage.

Every tick all stages work at once, each on another microbatch; then what they made moves on by one stage, in one
collective-permute. A stage without work computes on what lies there, and what it counted is thrown away. With several
rounds the layers are dealt out in turn, and a microbatch goes round the stages that often: the bubble shrinks by as
much, and what travels grows by as much.

    two stages, three microbatches      tick    0  1  2  3
    (GPipe, Huang et al. 2019)          stage 0 a  b  c  .
                                        stage 1 .  a  b  c
    two rounds (interleaved,            tick    0  1  2  3  4  5  6
    Narayanan et al. 2021)              stage 0 a  b  c  a' b' c' .
                                        stage 1 .  a  b  c  a' b' c'
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from math import prod
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from moe_jax.axes import Layout, Rules
from moe_jax.layers.common import lay
from moe_jax.pattern import STAGE, Schedule
from moe_jax.rules import by_hand, current_mesh, mapped_over, spec


def split(tree: Any, parts: int, together: int, rules: Rules) -> Any:
    """[B, ...] -> [m, B/m, ...]: each device keeps its rows, and rows that share a routing group stay together."""

    def one(x: jax.Array) -> jax.Array:
        rows = dealt(x, parts, together)
        return lay(rows, rules, ((), rules.batch, *(None,) * (rows.ndim - 2)))

    return jax.tree.map(one, tree)


def dealt(x: jax.Array, parts: int, together: int) -> jax.Array:
    """[B, ...] -> [m, B/m, ...], so many neighbouring rows to each microbatch in turn."""
    rows = x.reshape(-1, parts, together, *x.shape[1:]).swapaxes(0, 1)
    return rows.reshape(parts, -1, *x.shape[1:])


def joined(x: jax.Array, together: int) -> jax.Array:
    """The inverse of `dealt`."""
    parts = x.shape[0]
    return x.reshape(parts, -1, together, *x.shape[2:]).swapaxes(0, 1).reshape(-1, *x.shape[2:])


def shared(rules: Rules, rows: int) -> Rules:
    """Rules for what precedes and follows the pipeline: the stages share its rows, where these divide."""
    split = replace(rules, batch=(*rules.batch, STAGE))
    return rules if rows % prod(current_mesh().shape[a] for a in split.batch) else split


def begin(x: jax.Array, schedule: Schedule, rules: Rules) -> jax.Array:
    """Rows [B, L, D], laid out `shared` -> microbatches [S, m, B/m, L, D], which are all at the first stage."""
    outside = shared(rules, x.shape[0])

    def local(x: jax.Array) -> jax.Array:
        if outside != rules:
            pieces = jnp.concatenate([x[None], jnp.zeros((schedule.stages - 1, *x.shape), x.dtype)])
            x = jax.lax.all_to_all(pieces, STAGE, 0, 0).reshape(-1, *x.shape[1:])
        return dealt(x, schedule.microbatches, schedule.together)[None]

    layouts = spec(outside.stream), spec(((STAGE,), (), *rules.stream))
    return jax.shard_map(local, in_specs=layouts[0], out_specs=layouts[1])(x)


def end(x: jax.Array, schedule: Schedule, rules: Rules) -> jax.Array:
    """What all stages made of the microbatches [m, S, B/m, L, D] -> the last one's [B, L, D], laid out `shared`."""
    outside = shared(rules, x.shape[0] * x.shape[2])

    def local(x: jax.Array) -> jax.Array:
        x = joined(x[:, 0], schedule.together)
        if outside != rules:
            pieces = x.reshape(schedule.stages, -1, *x.shape[1:])
            return jax.lax.all_to_all(pieces, STAGE, 0, 0)[-1]
        last = jax.lax.axis_index(STAGE) == schedule.stages - 1
        return jax.lax.psum(jnp.where(last, x, jnp.zeros_like(x)), STAGE)

    layouts = spec(((), (STAGE,), *rules.stream)), spec(outside.stream)
    return jax.shard_map(local, in_specs=layouts[0], out_specs=layouts[1])(x)


def of_round(layer: Any, turn: jax.Array, layouts: list[Layout]) -> Any:
    """A layer's arrays in a round, [...], out of those of all rounds, [R, ...]; each stage looks among its own.

    Inside of what is recomputed in the backward pass: looked up before it, they would be saved in every tick.
    """
    leaves, tree = jax.tree.flatten(layer)
    if leaves[0].shape[0] == 1:
        return jax.tree.map(lambda a: a[0], layer)

    def local(leaves: list[jax.Array], turn: jax.Array) -> list[jax.Array]:
        return [jax.lax.dynamic_index_in_dim(a, turn, keepdims=False) for a in leaves]

    specs = [spec(((), *layout)) for layout in layouts], PartitionSpec()
    return jax.tree.unflatten(tree, by_hand(local, specs, [spec(layout) for layout in layouts])(leaves, turn))


def hand_on(x: jax.Array, layout: Layout, n: int) -> jax.Array:
    """What each of n stages made, at the next one; the last one's at the first."""
    pairs = [(i, (i + 1) % n) for i in range(n)]
    move = partial(jax.lax.ppermute, axis_name=STAGE, perm=pairs)
    return jax.shard_map(move, in_specs=spec(layout), out_specs=spec(layout))(x)


def pipelined(
    stage: Callable[[Any, jax.Array, jax.Array, Any], tuple[jax.Array, Any]],
    layers: Any,
    layouts: list[Layout],
    x: jax.Array,
    context: Any,
    schedule: Schedule,
    rules: Rules,
) -> tuple[jax.Array, Any]:
    """All microbatches through all layers.

    Args:
        stage: (layers of one stage [n, R, ...], its round [], x [b, L, D], context of these rows) -> (x, counts
            [n, ...]); it takes those of its round by `of_round`.
        layers: of all stages, bottom first, [rounds * stages * n, ...].
        layouts: of what follows that dimension, of each array among them.
        x: [B, L, D], laid out `shared`, as the result is.
        context: what belongs to the rows, by microbatch, [m, B/m, ...].
    Returns:
        x [B, L, D], and counts [rounds * stages * n, ...], added up over the microbatches.
    """
    S, M, R, _ = schedule
    everywhere = jnp.arange(S)
    over = ((STAGE,), *rules.stream)  # [S,b,L,D]

    leaves, tree = jax.tree.flatten(layers)
    leaves = [a.reshape(R, S, -1, *a.shape[1:]) for a in leaves]
    leaves = [lay(a, rules, ((), (STAGE,), (), *rest)) for a, rest in zip(leaves, layouts, strict=True)]
    dealt = jax.tree.unflatten(tree, [jnp.moveaxis(a, 0, 2) for a in leaves])  # [S,n,R,...]

    def work(turn: jax.Array, x: jax.Array, part: jax.Array) -> tuple[jax.Array, Any]:
        token = mapped_over.set(STAGE)
        try:
            mine = jax.tree.map(lambda a: jax.vmap(lambda m, a=a: a[m], spmd_axis_name=STAGE)(part), context)
            return jax.vmap(stage, spmd_axis_name=STAGE)(dealt, turn, x, mine)
        finally:
            mapped_over.reset(token)

    def masked(choose: jax.Array, a: jax.Array, b: jax.Array) -> jax.Array:  # [S]; [S,...]
        return jnp.where(choose.reshape(-1, *(1,) * (a.ndim - 1)), a, b)

    def tick(carry: tuple[jax.Array, jax.Array, Any], t: jax.Array) -> tuple[tuple[jax.Array, jax.Array, Any], Any]:
        state, inputs, counts = carry  # [S,b,L,D]; [S,M,b,L,D], of which the first stage's count; [R,S,n,...]
        piece = t - everywhere  # [S], the how-maniest piece of work of each stage this is
        busy = (piece >= 0) & (piece < R * M)
        piece = jnp.clip(piece, 0, R * M - 1)
        turn, part = piece // M, piece % M
        moved = hand_on(state, over, S)
        if R > 1:  # what the last stage made is at the first one, M - S ticks before its turn
            slot = (t - S) % M
            inputs = inputs.at[:, slot].set(jnp.where(t >= S, moved, inputs[:, slot]))
        state = lay(masked(everywhere == 0, inputs[:, t % M], moved), rules, over)
        state, made = work(turn, state, part)

        def add(total: jax.Array, new: jax.Array) -> jax.Array:
            zero = jnp.zeros_like(new)
            return total + jnp.stack([masked(busy & (turn == r), new, zero) for r in range(R)])

        state = lay(state, rules, over)
        return (state, inputs, jax.tree.map(add, counts, made)), state

    inputs = begin(x, schedule, rules)
    empty = jnp.zeros_like(inputs[:, 0])
    _, made = jax.eval_shape(work, everywhere, empty, everywhere)
    counts = jax.tree.map(lambda s: jnp.zeros((R, *s.shape), s.dtype), made)
    (_, _, counts), states = jax.lax.scan(tick, (empty, inputs, counts), jnp.arange(schedule.ticks, dtype=jnp.int32))
    counts = jax.tree.map(lambda a: a.reshape(-1, *a.shape[3:]), counts)  # [R,S,n,...] -> [layers,...]
    return end(states[-M:], schedule, rules), counts
