"""Multi-head and grouped-query attention (Vaswani et al. 2017, section 3.2; Ainslie et al. 2023): causal, of an encoder
that sees both ways, and from a decoder to what its encoder read."""

from math import prod
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from moe_jax.axes import Rules
from moe_jax.cache import Cached, LayerCache, write
from moe_jax.config import ModelConfig, Refused
from moe_jax.kernels import Kind, case, choose, lacking, refusal
from moe_jax.layers.common import along_last, constant, fan_in, lay, param, product
from moe_jax.layers.context import split_attention
from moe_jax.layers.distances import Distances
from moe_jax.layers.fused import How, fused_attention
from moe_jax.layers.norm import Norm
from moe_jax.layers.positions import rotary
from moe_jax.pattern import first_key, query_blocks
from moe_jax.rules import current_mesh, platform
from moe_jax.sequence import shards


class Source(NamedTuple):
    """What a decoder reads."""

    segments: jax.Array  # [B, M] int32, 0 for padding
    tokens: jax.Array | None  # [B, M, D] as the encoder left them; None where a cache holds their keys and values


class Context(NamedTuple):
    """What every layer of a call shares."""

    positions: jax.Array  # [B, L] int32
    segments: jax.Array  # [B, L] int32, 0 for padding; of attention alone, which needs whole rows of them
    mask: jax.Array  # [B, L] bool, segments > 0; an array of its own, to be split like the tokens
    tokens: jax.Array  # [B, L] int32
    cached: Cached | None  # None without a cache
    places: jax.Array | None = None  # [L] int32 of tokens in the order of `sequence.balanced`; None in their own
    distances: Distances | None = None  # of relative positions, whose biases are added to the scores
    source: Source | None = None  # what an encoder read
    long: jax.Array | None = None  # [B] bool, rows that LongRoPE turns as long ones; None: no row is


class Scoring(NamedTuple):
    """What a layer makes of the products of queries and keys."""

    scale: float | None = None  # their factor, default 1 / sqrt(N)
    window: int | None = None  # keys that a query sees at most, itself included
    distances: Distances | None = None  # whose biases are added
    sinks: jax.Array | None = None  # [H], a logit of each head that joins its softmax and has no value


PLAIN = Scoring()


def weighted_values(q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array, scoring: Scoring = PLAIN) -> jax.Array:
    """softmax(scale q k^T) v with the softmax in float32.

    Args:
        q: [B, J, R, L, N], R query heads to each of the J key/value heads; k, v: [B, J, M, N], whose widths may differ;
            mask: [B, L, M] bool, of the window too.
    """
    scores = jnp.einsum("bjrln,bjmn->bjrlm", q, k, preferred_element_type=jnp.float32)
    scores = scores * (fan_in(q.shape[-1]) if scoring.scale is None else scoring.scale)
    if scoring.distances is not None:
        scores = scoring.distances.added(scores)
    scores = jnp.where(mask[:, None, None], scores, -1e30)  # finite: a row of padding sees nothing, and must not be NaN
    shares = jax.nn.softmax(scores) if scoring.sinks is None else beside_sinks(scores, scoring.sinks)
    return jnp.einsum("bjrlm,bjmn->bjrln", shares.astype(v.dtype), v)


def beside_sinks(scores: jax.Array, sinks: jax.Array) -> jax.Array:
    """Softmax of scores [B, J, R, L, M] and one more of each of the H = J*R heads, without that one's share (GPT-OSS;
    Xiao et al. 2023, Attention Sinks, section 3.3): a head may attend to nothing."""
    sinks = sinks.reshape(1, *scores.shape[1:3], 1, 1)
    peak = jax.lax.stop_gradient(jnp.maximum(scores.max(-1, keepdims=True), sinks))
    p = jnp.exp(scores - peak)
    return p / (p.sum(-1, keepdims=True) + jnp.exp(sinks - peak))


def causal_attention(
    q: jax.Array, k: jax.Array, v: jax.Array, segments: jax.Array, scoring: Scoring = PLAIN
) -> jax.Array:
    """Attention of each token to the earlier ones of its segment, in query blocks that skip the future and what lies
    before the window of their first query.

    Args:
        q: [B, J, R, L, N]; k, v: [B, J, L, N], whose widths may differ; segments: [B, L] int32, 0 for padding.
    """
    out = []
    for begin, end in query_blocks(q.shape[-2]):
        first = first_key(begin, scoring.window)
        behind = jnp.arange(begin, end)[:, None] - jnp.arange(first, end)[None]  # [rows, keys]
        near = behind >= 0 if scoring.window is None else (behind >= 0) & (behind < scoring.window)
        mask = near[None] & (segments[:, begin:end, None] == segments[:, None, first:end])  # [B, rows, keys]
        block = scoring
        if scoring.distances is not None:
            block = scoring._replace(distances=scoring.distances.rows(begin, end))
        keys, values = k[..., first:end, :], v[..., first:end, :]
        out.append(weighted_values(q[..., begin:end, :], keys, values, mask, block))
    return out[0] if len(out) == 1 else jnp.concatenate(out, axis=-2)


def whole_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    segments: jax.Array,
    seen: jax.Array,
    scoring: Scoring = PLAIN,
) -> jax.Array:
    """Attention of each token [B, L] to all of its segment among [B, M], before it and after; 0 where there is none.

    Args:
        q: [B, J, R, L, N]; k, v: [B, J, M, N]; segments: [B, L] int32 of the queries, seen: [B, M] int32 of the keys, 0
            for padding.
    """
    mask = (segments[:, :, None] == seen[:, None]) & (seen[:, None] > 0)  # [B,L,M]
    y = weighted_values(q, k, v, mask, scoring)
    return jnp.where(mask.any(-1)[:, None, None, :, None], y, jnp.zeros((), y.dtype))


def fused(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    segments: jax.Array,
    seen: jax.Array,
    kind: Kind,
    scoring: Scoring,
    m: ModelConfig,
    rules: Rules | None,
) -> jax.Array | None:
    """The attention of whole rows by a kernel, where `model.attention_kernel` and the platform that the program is
    traced for say so; else None.

    Raises:
        Refused: `fused` was asked for, and the kernel cannot do that.
    """
    where = platform()
    if m.attention_kernel == "xla" or (m.attention_kernel == "auto" and where == "cpu"):
        return None
    heads = 1 if rules is None else prod(current_mesh().shape.get(a, 1) for a in rules.act_heads)
    c = case(m, kind, q.shape[3], k.shape[2], scoring.window, heads, shards(rules))
    if choose(m.attention_kernel, where, c).kernel == "fused":
        how = How(kind, fan_in(q.shape[-1]) if scoring.scale is None else scoring.scale, scoring.window)
        return fused_attention(q, k, v, segments, seen, scoring.sinks, how, where, rules)
    if m.attention_kernel == "fused" and (why := lacking(where, c)):
        raise Refused(refusal(where, c, why))
    return None


def over_rows(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    segments: jax.Array,
    scoring: Scoring,
    m: ModelConfig,
    rules: Rules | None,
) -> jax.Array:
    """`causal_attention` of rows, by a kernel or not, also of those that are split over the mesh, which take no
    distances."""
    y = fused(q, k, v, segments, segments, "causal", scoring, m, rules)
    if y is not None:
        return y
    if rules is None or shards(rules) == 1:
        return causal_attention(q, k, v, segments, scoring)
    if scoring.distances is not None:
        raise ValueError("rules.length splits rows, whose attention adds no relative positions: build with by_rows()")
    wide = [(0, 0)] * (v.ndim - 1) + [(0, k.shape[-1] - v.shape[-1])]  # keys and values travel as one array
    sinks = None if scoring.sinks is None else scoring.sinks.reshape(q.shape[1:3])
    how = m.attention_exchange, scoring.scale, scoring.window, sinks
    y = split_attention(q, k, jnp.pad(v, wide), segments, rules, *how)
    return y[..., : v.shape[-1]]


def to_heads(x: jax.Array, w: jax.Array, name: str, rules: Rules | None, bias: nnx.Param | None = None) -> jax.Array:
    """x [B, L, D] times w [D, heads, N] -> [B, heads, L, N], heads split as `name` says."""
    h = product(x, w.reshape(w.shape[0], -1), rules).reshape(*x.shape[:-1], *w.shape[1:])  # [B,L,heads,N]
    h = lay(h, rules, names=("batch", "length", name, None))
    h = h if bias is None else h + bias[...].astype(h.dtype)[None, None]
    return h.transpose(0, 2, 1, 3)


def from_heads(y: jax.Array, w: jax.Array, rules: Rules | None) -> jax.Array:
    """y [B, ..., L, N] of all heads times w [H, N, D] -> [B, L, D]."""
    B, L, N = y.shape[0], *y.shape[-2:]
    y = y.reshape(B, -1, L, N).transpose(0, 2, 1, 3)  # [B,L,H,N]
    return product(y.reshape(B, L, -1), w.reshape(-1, w.shape[-1]), rules)


class Attention(nnx.Module):
    """Projections to H query and J key/value heads of width N, attention, projection back to D. H*N is free of D.

    Args:
        both_ways: tokens see the later ones of their segment too, as in an encoder.
        window: keys that a query sees at most, itself included (Beltagy et al. 2020, section 3.1).
    """

    def __init__(
        self,
        m: ModelConfig,
        rules: Rules | None,
        rngs: nnx.Rngs,
        both_ways: bool = False,
        window: int | None = None,
    ):
        self.m, self.rules, self.both_ways, self.window = m, rules, both_ways, window
        D, H, J, N = m.d_model, m.heads, m.resolved_kv_heads, m.resolved_head_dim
        self.w_query = param(rngs, (D, H, N), ("embed", "heads", "head"), fan_in(D))
        self.w_key = param(rngs, (D, J, N), ("embed", "kv_heads", "head"), fan_in(D))
        self.w_value = param(rngs, (D, J, N), ("embed", "kv_heads", "head"), fan_in(D))
        self.w_out = param(rngs, (H, N, D), ("heads", "head", "embed"), fan_in(H * N))
        self.b_query = constant(0.0, (H, N), ("heads", "bias")) if m.biased("qkv") else None
        self.b_key = constant(0.0, (J, N), ("kv_heads", "bias")) if m.biased("qkv") else None
        self.b_value = constant(0.0, (J, N), ("kv_heads", "bias")) if m.biased("qkv") else None
        self.b_out = constant(0.0, (D,), ("bias",)) if m.biased("out") else None
        self.sinks = constant(0.0, (H,), ("heads",)) if m.sinks else None
        widths = (H * N, J * N) if m.qk_norm == "all" else (N, N)
        self.query_norm, self.key_norm = (Norm("rms", n, m.norm_eps) if m.qk_norm else None for n in widths)

    def __call__(
        self, x: jax.Array, context: Context, cache: LayerCache | None = None
    ) -> tuple[jax.Array, LayerCache | None]:
        """x [B, L, D] -> ([B, L, D], cache).

        Args:
            cache: k [B, J, N, M] and v [B, J, M, N]; keys and values are written from `context.cached.place` on, and
                the tokens attend to the places that `visible` shows there, or, where those are empty, to one another.
        """
        m, rules, segments = self.m, self.rules, context.segments
        sinks = None if self.sinks is None else self.sinks[...]
        scoring = Scoring(m.score_scale, self.window, context.distances, sinks)
        q, (k, v) = self.queries(x), self.keys_and_values(x)
        if m.positions == "rotary":
            q, k = (rotary(a, context.positions, m.rope_theta, m.rope, context.long) for a in (q, k))
        q = groups(q, k)
        cached = context.cached
        if cache is not None and cached is not None:
            cache = write(cache, k, v, cached.place)
        if cache is not None and cached is not None and cached.visible is not None:
            y = weighted_values(q, cache.k.swapaxes(2, 3), cache.v, cached.within(self.window), scoring)
        elif self.both_ways:
            y = fused(q, k, v, segments, segments, "both ways", scoring, m, rules)
            y = whole_attention(q, k, v, segments, segments, scoring) if y is None else y
        else:
            y = over_rows(q, k, v, segments, scoring, m, rules)
        return self.back(y), cache

    def queries(self, x: jax.Array) -> jax.Array:
        """x [B, L, D] -> [B, H, L, N]."""
        q = to_heads(x, self.w_query[...], "act_heads", self.rules, self.b_query)
        return self.held(q if self.query_norm is None else self.normed(self.query_norm, q))

    def keys_and_values(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        """x [B, M, D] -> twice [B, J, M, N]."""
        k = to_heads(x, self.w_key[...], "kv_heads", self.rules, self.b_key)
        v = to_heads(x, self.w_value[...], "kv_heads", self.rules, self.b_value)
        return self.held(k if self.key_norm is None else self.normed(self.key_norm, k)), self.held(v)

    def held(self, h: jax.Array) -> jax.Array:
        """h within `qkv_clip` of 0 (Muennighoff et al. 2024, OLMoE)."""
        return h if self.m.qkv_clip is None else jnp.clip(h, -self.m.qkv_clip, self.m.qkv_clip)

    def normed(self, norm: Norm, h: jax.Array) -> jax.Array:
        """h [B, heads, L, N], each head of a token for itself or all together."""
        if self.m.qk_norm != "all":
            return norm(h)
        B, heads, L, N = h.shape
        flat = norm(h.transpose(0, 2, 1, 3).reshape(B, L, heads * N))  # [B,L,heads*N]
        return flat.reshape(B, L, heads, N).transpose(0, 2, 1, 3)

    def back(self, y: jax.Array) -> jax.Array:
        """y [B, J, R, L, N] -> [B, L, D]."""
        y = from_heads(y, self.w_out[...], self.rules)
        return y if self.b_out is None else y + along_last(self.b_out[...].astype(y.dtype), y)


def groups(q: jax.Array, k: jax.Array) -> jax.Array:
    """q [B, H, L, N] by the heads of k [B, J, ...] that they share -> [B, J, R, L, N]."""
    return q.reshape(q.shape[0], k.shape[1], -1, *q.shape[2:])


class CrossAttention(Attention):
    """From the tokens of a decoder to those that its encoder read (Vaswani et al. 2017, section 3.2.3), whatever their
    order: no positions."""

    def read(
        self, x: jax.Array, context: Context, cache: LayerCache | None = None
    ) -> tuple[jax.Array, LayerCache | None]:
        """x [B, L, D] -> ([B, L, D], cache), which holds the keys and values of the source from its first call on.

        A token reads the source of its segment, and nothing where there is none.
        """
        source = context.source
        assert source is not None
        if source.tokens is not None:
            # Laid out in each layer, so that the gradients of keys and values are added up before they travel.
            k, v = self.keys_and_values(lay(source.tokens, self.rules, names=("batch", "length", "act_embed")))
            if cache is not None:
                cache = cache._replace(source_k=k.astype(cache.k.dtype), source_v=v.astype(cache.v.dtype))
        else:
            assert cache is not None and cache.source_k is not None and cache.source_v is not None
            k, v = cache.source_k, cache.source_v
        q = groups(self.queries(x), k)
        given = q, k, v, context.segments, source.segments
        scoring = Scoring(self.m.score_scale)
        y = None if cache is not None else fused(*given, "reading", scoring, self.m, self.rules)
        return self.back(whole_attention(*given, scoring) if y is None else y), cache
