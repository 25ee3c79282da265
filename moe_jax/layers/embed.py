"""Token embedding, positions and the head."""

import jax
import jax.numpy as jnp
from flax import nnx

from moe_jax.axes import Rules
from moe_jax.config import ModelConfig
from moe_jax.layers.common import along_last, between, constant, fan_in, gathered, inside, lay, param, product
from moe_jax.layers.positions import sinusoidal


class Embedding(nnx.Module):
    """A [V, D] table; with tied heads it also makes the logits. Learned positions are a [max_length, D] table."""

    def __init__(self, m: ModelConfig, rules: Rules | None, rngs: nnx.Rngs):
        self.m, self.rules = m, rules
        V, D = m.vocab, m.d_model
        self.table = param(rngs, (V, D), ("vocab", "embed"), fan_in(D))
        learned = m.positions == "learned"
        self.positions = param(rngs, (m.max_length, D), ("position", "embed"), 0.02) if learned else None
        self.head = None if m.tied_head else param(rngs, (D, V), ("embed", "vocab"), fan_in(D))
        self.head_bias = constant(0.0, (V,), ("vocab",)) if m.head_bias else None

    def __call__(
        self, tokens: jax.Array, positions: jax.Array, rules: Rules | None, table: nnx.Param | None = None
    ) -> jax.Array:
        """tokens, positions [B, L] int32 -> [B, L, D] in the compute type, laid out by `rules`.

        Args:
            table: [V, D] of an encoder, in place of the decoder's.
        """
        x = self.rows(self.table if table is None else table, "vocab")[tokens]  # [B,L,D]
        x = x if self.m.embed_scale == 1.0 else x * self.m.embed_scale
        if self.positions is not None:
            x = x + self.rows(self.positions, "position")[positions]
        if self.m.positions == "sinusoidal":
            x = x + sinusoidal(positions, self.m.d_model)
        return between(inside(x.astype(self.m.dtype), rules), rules)

    def rows(self, table: nnx.Param, name: str) -> jax.Array:
        """A table with whole rows: a lookup in split ones would make the partitioner replicate every token."""
        return lay(table[...], self.rules, names=(name, "act_embed"))

    def logits(self, x: jax.Array, rules: Rules | None) -> jax.Array:
        """x [B, L, D] -> [B, L, V] float32, both laid out by `rules`."""
        w = self.table[...].T if self.head is None else self.head[...]
        out = product(gathered(x, rules), w, rules, jnp.float32)
        out = out if self.head_bias is None else out + along_last(self.head_bias[...], out)
        out = out if self.m.logit_scale == 1.0 else out * self.m.logit_scale
        return lay(out, rules, names=("batch", "length", "act_vocab"))
