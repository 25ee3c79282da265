"""Causal multi-head and grouped-query attention (Vaswani et al. 2017, section 3.2; Ainslie et al. 2023)."""

import jax
import jax.numpy as jnp
from flax import nnx

from moe_jax.axes import Rules
from moe_jax.cache import Cached, LayerCache, write
from moe_jax.config import ModelConfig
from moe_jax.layers.common import along_last, constant, fan_in, lay, param, product
from moe_jax.layers.context import split_attention
from moe_jax.layers.norm import Norm
from moe_jax.layers.positions import rotary
from moe_jax.pattern import query_blocks
from moe_jax.sequence import shards


def weighted_values(q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array, width: int | None = None) -> jax.Array:
    """softmax(q k^T / sqrt(N)) v with the softmax in float32.

    Args:
        q: [B, J, R, L, N], R query heads to each of the J key/value heads; k, v: [B, J, M, N], whose widths may differ;
            mask: [B, L, M] bool.
        width: in place of N under the root.
    """
    scores = jnp.einsum("bjrln,bjmn->bjrlm", q, k, preferred_element_type=jnp.float32)
    scores = scores * fan_in(q.shape[-1] if width is None else width)
    scores = jnp.where(mask[:, None, None], scores, -1e30)  # finite: a row of padding sees nothing, and must not be NaN
    return jnp.einsum("bjrlm,bjmn->bjrln", jax.nn.softmax(scores).astype(v.dtype), v)


def causal_attention(q: jax.Array, k: jax.Array, v: jax.Array, segments: jax.Array) -> jax.Array:
    """Attention of each token to the earlier ones of its segment, in query blocks that skip the future.

    Args:
        q: [B, J, R, L, N]; k, v: [B, J, L, N], whose widths may differ; segments: [B, L] int32, 0 for padding.
    """
    out = []
    for begin, end in query_blocks(q.shape[-2]):
        causal = jnp.arange(begin, end)[:, None] >= jnp.arange(end)[None]
        mask = causal[None] & (segments[:, begin:end, None] == segments[:, None, :end])  # [B, rows, end]
        out.append(weighted_values(q[..., begin:end, :], k[..., :end, :], v[..., :end, :], mask))
    return out[0] if len(out) == 1 else jnp.concatenate(out, axis=-2)


def over_rows(
    q: jax.Array, k: jax.Array, v: jax.Array, segments: jax.Array, m: ModelConfig, rules: Rules | None
) -> jax.Array:
    """`causal_attention` of whole rows, also of those that are split over the mesh."""
    if rules is None or shards(rules) == 1:
        return causal_attention(q, k, v, segments)
    wide = [(0, 0)] * (v.ndim - 1) + [(0, k.shape[-1] - v.shape[-1])]  # keys and values travel as one array
    return split_attention(q, k, jnp.pad(v, wide), segments, rules, m.attention_exchange)[..., : v.shape[-1]]


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
    """Projections to H query and J key/value heads of width N, attention, projection back to D. H*N is free of D."""

    def __init__(self, m: ModelConfig, rules: Rules | None, rngs: nnx.Rngs):
        self.m, self.rules = m, rules
        D, H, J, N = m.d_model, m.heads, m.resolved_kv_heads, m.resolved_head_dim
        self.w_query = param(rngs, (D, H, N), ("embed", "heads", "head"), fan_in(D))
        self.w_key = param(rngs, (D, J, N), ("embed", "kv_heads", "head"), fan_in(D))
        self.w_value = param(rngs, (D, J, N), ("embed", "kv_heads", "head"), fan_in(D))
        self.w_out = param(rngs, (H, N, D), ("heads", "head", "embed"), fan_in(H * N))
        self.b_query = constant(0.0, (H, N), ("heads", "norm")) if m.biases else None
        self.b_key = constant(0.0, (J, N), ("kv_heads", "norm")) if m.biases else None
        self.b_value = constant(0.0, (J, N), ("kv_heads", "norm")) if m.biases else None
        self.b_out = constant(0.0, (D,), ("norm",)) if m.biases else None
        self.query_norm = Norm("rms", N, m.norm_eps) if m.qk_norm else None
        self.key_norm = Norm("rms", N, m.norm_eps) if m.qk_norm else None

    def __call__(
        self,
        x: jax.Array,
        positions: jax.Array,
        segments: jax.Array,
        cache: LayerCache | None = None,
        cached: Cached | None = None,
    ) -> tuple[jax.Array, LayerCache | None]:
        """x [B, L, D] -> ([B, L, D], cache).

        Args:
            positions: [B, L] int32; segments: [B, L] int32, 0 for padding. Tokens of split rows are in the order of
                `sequence.balanced`.
            cache: k and v [B, J, M, N]; keys and values are written from `cached.place` on, and the tokens attend to
                the places that `cached.visible` shows.
        """
        m, rules = self.m, self.rules
        B, L, _ = x.shape
        q = to_heads(x, self.w_query[...], "act_heads", rules, self.b_query)
        k = to_heads(x, self.w_key[...], "kv_heads", rules, self.b_key)
        v = to_heads(x, self.w_value[...], "kv_heads", rules, self.b_value)
        if self.query_norm is not None and self.key_norm is not None:
            q, k = self.query_norm(q), self.key_norm(k)
        if m.positions == "rotary":
            q, k = rotary(q, positions, m.rope_theta), rotary(k, positions, m.rope_theta)
        J = k.shape[1]
        q = q.reshape(B, J, -1, L, q.shape[-1])  # [B,J,R,L,N]
        if cache is not None and cached is not None:
            cache = write(cache, k, v, cached.place)
            y = weighted_values(q, cache.k, cache.v, cached.visible)
        else:
            y = over_rows(q, k, v, segments, m, rules)
        y = from_heads(y, self.w_out[...], rules)
        return (y if self.b_out is None else y + along_last(self.b_out[...].astype(y.dtype), y)), cache
