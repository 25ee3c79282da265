"""One transformer layer: attention and a feed-forward layer, dense or MoE, with residuals and norms."""

from typing import Any, NamedTuple

import jax
from flax import nnx

from moe_jax.axes import Rules
from moe_jax.balance import Stats
from moe_jax.cache import LayerCache
from moe_jax.config import ModelConfig
from moe_jax.layers.attention import Attention, Context, CrossAttention
from moe_jax.layers.common import Keys, dropout, fold, gathered, scattered
from moe_jax.layers.ffn import FFN
from moe_jax.layers.latent import LatentAttention
from moe_jax.layers.moe import MoELayer, Record
from moe_jax.layers.norm import Norm


class Routed(NamedTuple):
    """What an MoE layer returns beside its output."""

    stats: Stats
    record: Record | None = None


class Block(nnx.Module):
    """pre-norm: x + f(norm(x)); post-norm: norm(x + f(x)) (Xiong et al. 2020); f times `residual_scale`.

    Args:
        kind: `dense` or `moe`.
        window: tokens that a query sees; unset: all of its sequence so far.
        both_ways: of an encoder. reads: of a decoder that has one.
    """

    def __init__(
        self,
        m: ModelConfig,
        kind: str,
        rules: Rules | None,
        rngs: nnx.Rngs,
        *,
        window: int | None = None,
        both_ways: bool = False,
        reads: bool = False,
    ):
        self.m, self.rules = m, rules
        self.attention_norm = Norm(m.norm, m.d_model, m.norm_eps)
        self.attention: Attention | LatentAttention
        if m.latent is None:
            self.attention = Attention(m, rules, rngs, both_ways, window)
        else:
            self.attention = LatentAttention(m, rules, rngs)
        self.cross_norm = Norm(m.norm, m.d_model, m.norm_eps) if reads else None
        self.cross_attention = CrossAttention(m, rules, rngs) if reads else None
        self.ffn_norm = Norm(m.norm, m.d_model, m.norm_eps)
        self.ffn: FFN | MoELayer
        if kind == "moe":
            assert m.moe is not None
            self.ffn = MoELayer(
                m.moe, m.d_model, d_ff=m.d_ff, ffn=m.ffn, biases=m.biased("ffn"), rules=rules, rngs=rngs
            )
        else:
            self.ffn = FFN(m.ffn, m.d_model, m.d_ff, rules, rngs, biases=m.biased("ffn"))

    def __call__(
        self,
        x: jax.Array,
        context: Context,
        *,
        train: bool,
        keys: Keys,
        cache: LayerCache | None,
        **options: Any,
    ) -> tuple[jax.Array, Routed | None, LayerCache | None]:
        """x [B, L, D] -> (x, what an MoE layer returns beside x, cache); `options` are those of `MoELayer`."""
        pre = self.m.norm_order == "pre"
        if train and self.m.dropout and keys is None:
            raise ValueError(f"model.dropout={self.m.dropout} draws noise in training: pass key=jax.random.key(...)")

        with jax.named_scope("attention"):
            h = gathered(self.attention_norm(x) if pre else x, self.rules)
            h, cache = self.attention(h, context, cache)
            x = self.sum(x, h, context, fold(keys, 0))
            x = x if pre else self.attention_norm(x)

        if self.cross_attention is not None and self.cross_norm is not None:
            with jax.named_scope("attention"):
                h = gathered(self.cross_norm(x) if pre else x, self.rules)
                h, cache = self.cross_attention.read(h, context, cache)
                x = self.sum(x, h, context, fold(keys, 3))
                x = x if pre else self.cross_norm(x)

        with jax.named_scope("ffn"):
            h = gathered(self.ffn_norm(x) if pre else x, self.rules)
            routed = None
            if isinstance(self.ffn, MoELayer):
                mask, key = context.mask, fold(keys, 2)
                options |= {"train": train, "balanced": context.places is not None}
                ids = {"tokens": context.tokens, "places": context.positions}
                h, *rest = self.ffn(h, mask=mask, key=key, **ids, **options)
                routed = Routed(*rest)
            else:
                h = self.ffn(h)
            x = self.sum(x, h, context, fold(keys, 1))
            x = x if pre else self.ffn_norm(x)
        return x, routed, cache

    def sum(self, x: jax.Array, h: jax.Array, context: Context, keys: Keys) -> jax.Array:
        """x [B, L, D] and what a sub-layer made of it, with its dropout and factor."""
        h = scattered(h, self.rules)
        h = h if self.m.residual_scale == 1.0 else h * self.m.residual_scale
        return x + dropout(h, self.m.dropout, keys, context.places)
