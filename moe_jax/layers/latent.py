"""Latent attention (DeepSeek-V2, arXiv:2405.04434, section 2.1): keys and values of all heads from one vector."""

import jax
import jax.numpy as jnp
from flax import nnx

from moe_jax.axes import Rules
from moe_jax.cache import LayerCache, write
from moe_jax.config import ModelConfig
from moe_jax.layers.attention import Context, Scoring, from_heads, over_rows, to_heads, weighted_values
from moe_jax.layers.common import fan_in, lay, param, product
from moe_jax.layers.norm import Norm
from moe_jax.layers.positions import rotary


class LatentAttention(nnx.Module):
    """Queries, keys and values from vectors of width `query` and C = `key_value`, each behind an RMSNorm.

    A query and a key have N numbers of their head and P that turn with the position; those P of the keys are one vector
    for all heads. Training makes all keys and values. With a cache, which holds C + P numbers a token, queries and
    outputs go through the matrices of keys and values instead: (q W_k) c = q (W_k c).
    """

    def __init__(self, m: ModelConfig, rules: Rules | None, rngs: nnx.Rngs):
        assert m.latent is not None
        self.m, self.rules, self.latent = m, rules, m.latent
        D, H, N, P, C, Q = m.d_model, m.heads, m.resolved_head_dim, m.latent.rotary, m.latent.key_value, m.latent.query
        self.w_query_down = param(rngs, (D, Q), ("embed", "latent"), fan_in(D)) if Q else None
        self.query_norm = Norm("rms", Q, m.norm_eps) if Q else None
        source, width = ("latent_embed", Q) if Q else ("embed", D)
        self.w_query = param(rngs, (width, H, N + P), (source, "heads", "head"), fan_in(width))
        self.w_down = param(rngs, (D, C + P), ("embed", "latent"), fan_in(D))
        self.latent_norm = Norm("rms", C, m.norm_eps)
        self.w_key = param(rngs, (C, H, N), ("latent_embed", "heads", "head"), fan_in(C))
        self.w_value = param(rngs, (C, H, m.value_dim), ("latent_embed", "heads", "head"), fan_in(C))
        self.w_out = param(rngs, (H, m.value_dim, D), ("heads", "head", "embed"), fan_in(H * m.value_dim))

    def __call__(
        self, x: jax.Array, context: Context, cache: LayerCache | None = None
    ) -> tuple[jax.Array, LayerCache | None]:
        """x [B, L, D] -> ([B, L, D], cache), which is as `LayerCache` says."""
        m, rules, N, C = self.m, self.rules, self.m.resolved_head_dim, self.latent.key_value
        scoring, h = Scoring(m.score_scale), x
        if self.w_query_down is not None and self.query_norm is not None:
            h = self.query_norm(self.narrow(x, self.w_query_down[...]))
        q = to_heads(h, self.w_query[...], "act_heads", rules)  # [B,H,L,N+P]
        turned = rotary(q[..., N:], context.positions, m.rope_theta, m.rope, context.long)  # [B,H,L,P]
        both = self.narrow(x, self.w_down[...])  # [B,L,C+P]
        c = self.latent_norm(both[..., :C])
        shared = rotary(both[..., C:], context.positions, m.rope_theta, m.rope, context.long)  # [B,L,P]
        cached = context.cached
        if cache is not None and cached is not None:
            token = jnp.concatenate([c, shared], -1)[:, None]  # [B,1,L,C+P]
            cache = write(cache, token[..., :0], token, cached.place)
        if cache is not None and cached is not None and cached.visible is not None:
            through = jnp.einsum("bhln,chn->bhlc", q[..., :N], self.w_key[...].astype(q.dtype))
            q = jnp.concatenate([through, turned], -1)[:, None]  # [B,1,H,L,C+P]
            y = weighted_values(q, cache.v, cache.v[..., :C], cached.visible, scoring)[:, 0]  # [B,H,L,C]
            y = jnp.einsum("bhlc,chv->bhlv", y, self.w_value[...].astype(y.dtype))
        else:
            k, v = (to_heads(c, w[...], "act_heads", rules) for w in (self.w_key, self.w_value))
            k = jnp.concatenate([k, jnp.broadcast_to(shared[:, None], (*k.shape[:-1], shared.shape[-1]))], -1)
            q = jnp.concatenate([q[..., :N], turned], -1)[:, :, None]  # [B,H,1,L,N+P]
            y = over_rows(q, k, v, context.segments, scoring, m, rules)
        return from_heads(y, self.w_out[...], rules), cache

    def narrow(self, x: jax.Array, w: jax.Array) -> jax.Array:
        """x [B, L, D] times w [D, C] -> [B, L, C], both whole on every device that shares a token.

        Left to itself, the partitioner splits w over what splits the heads, on its way to where it is whole.
        """
        w = lay(w.astype(x.dtype), self.rules, names=(None, "latent"))
        return lay(product(x, w, self.rules), self.rules, names=("batch", "length", "latent"))
