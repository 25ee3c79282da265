"""Exact causal attention over rows that are split over mesh axes: keys and values gathered, or passed round a ring.

Shard i of n holds pieces i and 2n-1-i of a row (`sequence.balanced`), its early and its late half. To the keys of shard
j they need: late queries the early keys of every j; and early to early where j < i, late to late where j > i. So each
shard multiplies two blocks for every other one and three for its own, two of these half masked: all have the same work.
The softmax is summed up block by block, and its gradient recomputes the blocks, so that no shard ever holds more
scores than one block's (Liu et al. 2023, Ring Attention; Dao 2023, FlashAttention-2, Algorithms 1 and 2).
"""

from functools import partial
from math import prod
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from moe_jax.axes import Axes, Rules
from moe_jax.layers.common import fan_in
from moe_jax.rules import by_hand, current_mesh, spec


class How(NamedTuple):
    """What is the same for every shard and block."""

    kind: str  # `gather` or `ring`
    scale: float  # of the scores
    window: int | None = None  # keys that a query sees at most, itself included


class Sums(NamedTuple):
    """A softmax under way, of one half or stacked of both."""

    out: jax.Array  # [B, J, R, c, N] float32, sum of exp(score - peak) times values
    total: jax.Array  # [B, J, R, c] float32, sum of exp(score - peak)
    peak: jax.Array  # [B, J, R, c] float32, largest score so far


def scores(q: jax.Array, k: jax.Array, mask: jax.Array, scale: float) -> jax.Array:
    """q [B, J, R, c, N], k [B, J, c, N], mask [B, c, c] -> [B, J, R, c, c] float32."""
    s = jnp.einsum("bjrln,bjmn->bjrlm", q, k, preferred_element_type=jnp.float32) * scale
    return jnp.where(mask[:, None, None], s, -1e30)


def sink(sinks: jax.Array | None, q: jax.Array) -> Sums | None:
    """Where the softmax of q [B, J, R, c, N] begins: at nothing, or at the sinks [J, R], whose values are 0."""
    if sinks is None:
        return None
    out = jnp.zeros_like(q, jnp.float32)
    peak = out[..., 0] + sinks[None, ..., None].astype(jnp.float32)
    return Sums(out, jnp.ones_like(peak), peak)


def add(sums: Sums | None, q: jax.Array, kv: jax.Array, mask: jax.Array, how: How) -> Sums:
    """The sums with one more block of keys and values kv [2, B, J, c, N]; the first one must show each row a key."""
    s = scores(q, kv[0], mask, how.scale)
    peak = s.max(-1) if sums is None else jnp.maximum(sums.peak, s.max(-1))
    p = jnp.exp(s - peak[..., None])
    out = jnp.einsum("bjrlm,bjmn->bjrln", p.astype(kv.dtype), kv[1], preferred_element_type=jnp.float32)
    total = p.sum(-1)
    if sums is not None:
        before = jnp.exp(sums.peak - peak)
        out, total = out + sums.out * before[..., None], total + sums.total * before
    return Sums(out, total, peak)


class Late(NamedTuple):
    """What the gradient needs of one half, or stacked of both: queries, cotangents, their products, normalisers."""

    q: jax.Array  # [B, J, R, c, N]
    g: jax.Array  # [B, J, R, c, N], gradient of the output
    delta: jax.Array  # [B, J, R, c] float32, sum over N of g times output
    log_sum: jax.Array  # [B, J, R, c] float32, log of the sum of exp(score)


def pull(h: Late, kv: jax.Array, mask: jax.Array, how: How) -> tuple[jax.Array, jax.Array]:
    """Gradients of one block at its queries [B, J, R, c, N] and at its keys and values [2, B, J, c, N], float32."""
    product = partial(jnp.einsum, preferred_element_type=jnp.float32)
    p = jnp.exp(scores(h.q, kv[0], mask, how.scale) - h.log_sum[..., None])  # [B,J,R,c,c]
    ds = p * (product("bjrln,bjmn->bjrlm", h.g, kv[1]) - h.delta[..., None]) * how.scale
    p, ds = p.astype(kv.dtype), ds.astype(kv.dtype)
    dk, dv = product("bjrlm,bjrln->bjmn", ds, h.q), product("bjrlm,bjrln->bjmn", p, h.g)
    return product("bjrlm,bjmn->bjrln", ds, kv[0]), jnp.stack([dk, dv])


def at(tree: Any, half: int | jax.Array) -> Any:
    return jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, half, 0, keepdims=False), tree)


def put(tree: Any, half: int | jax.Array, one: Any) -> Any:
    return jax.tree.map(lambda x, y: jax.lax.dynamic_update_index_in_dim(x, y, half, 0), tree, one)


def onward(tree: Any, axes: Axes) -> Any:
    """Every shard's arrays to the next one of the ring."""
    n = jax.lax.axis_size(axes)
    return jax.tree.map(lambda x: jax.lax.ppermute(x, axes, [(a, (a + 1) % n) for a in range(n)]), tree)


def seen_by(a: jax.Array, b: jax.Array, ahead: int | jax.Array, how: How) -> jax.Array:
    """Segments [B, c] of queries and keys -> [B, c, c], whether they are one and the keys lie in the window.

    Args:
        ahead: pieces of a row that the queries are ahead of the keys.
    """
    same = a[:, :, None] == b[:, None, :]
    if how.window is None:
        return same
    place = jnp.arange(a.shape[-1])
    behind = ahead * a.shape[-1] + place[:, None] - place[None]  # places that a key lies behind its query
    return same & (behind < how.window)[None]


@partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def attend(
    q: jax.Array, kv: jax.Array, sinks: jax.Array | None, segments: jax.Array, axes: Axes, how: How
) -> jax.Array:
    """Attention of one shard's two halves, inside `shard_map`.

    Args:
        q: [2, B, J, R, c, N]; kv: [2, 2, B, J, c, N], halves, then keys and values; sinks: [J, R];
            segments: [n, 2, B, c] of all.
        axes: the mesh axes of the length.
    """
    return forward(q, kv, sinks, segments, axes, how)[0]


def forward(
    q: jax.Array, kv: jax.Array, sinks: jax.Array | None, segments: jax.Array, axes: Axes, how: How
) -> tuple[jax.Array, Any]:
    """`attend`, and what its gradient needs."""
    i, n, c = jax.lax.axis_index(axes), jax.lax.axis_size(axes), q.shape[-2]
    own, last = at(segments, i), 2 * n - 1 - i  # the number of the late piece
    causal = (jnp.arange(c)[:, None] >= jnp.arange(c)[None])[None]
    early, late = (add(sink(sinks, q[h]), q[h], kv[h], seen_by(own[h], own[h], 0, how) & causal, how) for h in (0, 1))
    late = add(late, q[1], kv[0], seen_by(own[1], own[0], last - i, how), how)
    everyone = jax.lax.all_gather(kv, axes) if how.kind == "gather" else None

    def step(carry: tuple[Sums, Any], distance: jax.Array) -> tuple[Any, None]:
        sums, theirs = carry
        j = (i - distance) % n
        if everyone is None:
            theirs = onward(theirs, axes)
        block = theirs if everyone is None else at(everyone, j)
        seen, half = at(segments, j), jnp.where(j < i, 0, 1)
        sums = put(sums, 1, add(at(sums, 1), q[1], block[0], seen_by(own[1], seen[0], last - j, how), how))
        one = add(
            at(sums, half),
            at(q, half),
            at(block, half),
            seen_by(at(own, half), at(seen, half), jnp.abs(i - j), how),
            how,
        )
        return (put(sums, half, one), theirs), None

    both = jax.tree.map(lambda a, b: jnp.stack([a, b]), early, late)
    (sums, _), _ = jax.lax.scan(step, (both, kv if everyone is None else None), jnp.arange(1, n))
    out = (sums.out / sums.total[..., None]).astype(q.dtype)
    return out, (q, kv, sinks, segments, out, sums.peak + jnp.log(sums.total))


def backward(axes: Axes, how: How, saved: Any, g: jax.Array) -> tuple[jax.Array, jax.Array, Any, None]:
    """Gradients at q, kv and sinks, by the same walk. What a block gives to another shard's keys travels on with them,
    or is added up at the end."""
    q, kv, sinks, segments, out, log_sum = saved
    i, n, c = jax.lax.axis_index(axes), jax.lax.axis_size(axes), q.shape[-2]
    own, last = at(segments, i), 2 * n - 1 - i  # the number of the late piece
    causal = (jnp.arange(c)[:, None] >= jnp.arange(c)[None])[None]
    halves = Late(q, g, (g.astype(jnp.float32) * out.astype(jnp.float32)).sum(-1), log_sum)
    first = [pull(at(halves, h), kv[h], seen_by(own[h], own[h], 0, how) & causal, how) for h in (0, 1)]
    more, to_early = pull(at(halves, 1), kv[0], seen_by(own[1], own[0], last - i, how), how)
    dq = jnp.stack([first[0][0], first[1][0] + more])
    dkv = jnp.stack([first[0][1] + to_early, first[1][1]])
    everyone = jax.lax.all_gather(kv, axes) if how.kind == "gather" else None

    def step(carry: tuple[jax.Array, Any, jax.Array], distance: jax.Array) -> tuple[Any, None]:
        dq, theirs, dkv = carry
        j = (i - distance) % n
        if everyone is None:
            theirs, dkv = onward((theirs, dkv), axes)
        block = theirs if everyone is None else at(everyone, j)
        seen, half = at(segments, j), jnp.where(j < i, 0, 1)
        to_late, to_early = pull(at(halves, 1), block[0], seen_by(own[1], seen[0], last - j, how), how)
        to_half, to_same = pull(
            at(halves, half), at(block, half), seen_by(at(own, half), at(seen, half), jnp.abs(i - j), how), how
        )
        dq = dq.at[1].add(to_late).at[half].add(to_half)
        gained = jnp.zeros_like(to_same, shape=kv.shape).at[0].add(to_early).at[half].add(to_same)
        dkv = dkv + gained if everyone is None else dkv.at[j].add(gained)
        return (dq, theirs, dkv), None

    if everyone is None:
        (dq, _, dkv), _ = jax.lax.scan(step, (dq, kv, dkv), jnp.arange(1, n))
        dkv = onward(dkv, axes)  # after n-1 steps it is with the shard before its own
    else:
        start = put(jnp.zeros_like(dkv, shape=everyone.shape), i, dkv)
        (dq, _, dkv), _ = jax.lax.scan(step, (dq, None, start), jnp.arange(1, n))
        dkv = jax.lax.psum_scatter(dkv, axes)
    to_sinks = None
    if sinks is not None:  # a key of value 0: its probability times what the others' mean product exceeds 0 by
        share = jnp.exp(sinks[None, None, ..., None] - log_sum)  # [2,B,J,R,c]
        to_sinks = -(share * halves.delta).sum((0, 1, 4)).astype(sinks.dtype)
    return dq.astype(q.dtype), dkv.astype(kv.dtype), to_sinks, None


attend.defvjp(forward, backward)


def split_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    segments: jax.Array,
    rules: Rules,
    kind: str,
    scale: float | None = None,
    window: int | None = None,
    sinks: jax.Array | None = None,
) -> jax.Array:
    """Attention of each token to the earlier ones of its segment, rows split over `rules.length` and `balanced`.

    Heads are split over `rules.act_heads` by groups that share keys and values, or, where those are too few, within
    each group, whose keys and values are then on every shard.

    Args:
        q: [B, J, R, L, N]; k, v: [B, J, L, N]; segments: [B, L] int32, 0 for padding.
        kind: `gather` or `ring`.
        scale: of the scores; default 1 / sqrt(N). window: keys that a query sees at most, itself included.
        sinks: [J, R], logits that join each head's softmax and have no value.
    """
    how = How(kind, fan_in(q.shape[-1]) if scale is None else scale, window)
    mesh, heads = current_mesh(), rules.act_heads
    axes = tuple(a for a in rules.length if mesh.shape[a] > 1)
    shared = k.shape[1] % prod(mesh.shape[a] for a in heads) > 0

    def halves(x: jax.Array) -> jax.Array:
        return jnp.stack(jnp.split(x, 2, axis=-2))  # [..., 2c, N] -> [2, ..., c, N]

    def local(q: jax.Array, k: jax.Array, v: jax.Array, segments: jax.Array, *sinks: jax.Array) -> jax.Array:
        B, c = q.shape[0], q.shape[-2] // 2
        pieces = segments.reshape(B, -1, 2, c).transpose(1, 2, 0, 3)  # [n,2,B,c]
        kv = jnp.stack([halves(k), halves(v)], 1)
        kv = jax.lax.pcast(kv, heads, to="varying") if shared else kv
        # What all shards share varies over them from here on, and so its gradient is added up over them.
        own = [jax.lax.pcast(s, rules.tokens, to="varying") for s in sinks]
        out = attend(halves(q), kv, own[0] if own else None, pieces, axes, how)
        return jnp.concatenate([out[0], out[1]], axis=-2)

    groups, within = ((), heads) if shared else (heads, ())
    queries = spec((rules.batch, groups, within, rules.length, ()))
    keys = spec((rules.batch, groups, rules.length, ()))
    specs = [queries, keys, keys, spec((rules.batch, ()))]
    given = [q, k, v, segments]
    if sinks is not None:
        specs, given = [*specs, spec((groups, within))], [*given, sinks]
    return by_hand(local, in_specs=tuple(specs), out_specs=queries)(*given)
