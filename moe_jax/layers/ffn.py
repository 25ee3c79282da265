"""The dense feed-forward layer: two matrices (ReLU, GELU) or the gated three of SwiGLU (Shazeer 2020, eq. 6)."""

import jax
from flax import nnx

from moe_jax.axes import Rules
from moe_jax.layers.common import ACTIVATIONS, Keys, dropout, fan_in, lay, param, product


class FFN(nnx.Module):
    """w_down(act(w_up x)), or w_down(silu(w_gate x) * w_up x) for swiglu."""

    def __init__(self, kind: str, d_model: int, d_ff: int, rules: Rules | None, rngs: nnx.Rngs):
        self.kind, self.rules = kind, rules
        D, F = d_model, d_ff
        self.w_gate = param(rngs, (D, F), ("embed", "mlp"), fan_in(D)) if kind == "swiglu" else None
        self.w_up = param(rngs, (D, F), ("embed", "mlp"), fan_in(D))
        self.w_down = param(rngs, (F, D), ("mlp", "embed"), fan_in(F))

    def __call__(
        self, x: jax.Array, *, rate: float = 0.0, keys: Keys = None, places: jax.Array | None = None
    ) -> jax.Array:
        """x [B, L, D] -> [B, L, D]; `rate` is the dropout of the hidden layer, drawn by the tokens' `places` [L]."""
        h = product(x, self.w_up[...], self.rules)  # [B,L,F]
        act = ACTIVATIONS[self.kind]
        h = act(h) if self.w_gate is None else act(product(x, self.w_gate[...], self.rules)) * h
        h = lay(h, self.rules, names=("batch", "length", "act_mlp"))
        return product(dropout(h, rate, keys, places), self.w_down[...], self.rules)  # [B,L,D]
