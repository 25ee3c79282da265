"""The dense feed-forward layer: two matrices (ReLU, GELU), or three with a gate (Shazeer 2020)."""

import jax
from flax import nnx

from moe_jax.axes import Rules
from moe_jax.layers.common import ACTIVATIONS, Keys, along_last, constant, dropout, fan_in, lay, param, product
from moe_jax.schema import GATED


class FFN(nnx.Module):
    """w_down(act(w_up x)), or gated w_down(act(w_gate x, w_up x)); with biases if asked."""

    def __init__(
        self, kind: str, d_model: int, d_ff: int, rules: Rules | None, rngs: nnx.Rngs, *, biases: bool = False
    ):
        self.kind, self.rules = kind, rules
        D, F = d_model, d_ff
        self.w_gate = param(rngs, (D, F), ("embed", "mlp"), fan_in(D)) if kind in GATED else None
        self.w_up = param(rngs, (D, F), ("embed", "mlp"), fan_in(D))
        self.w_down = param(rngs, (F, D), ("mlp", "embed"), fan_in(F))
        self.b_gate = constant(0.0, (F,), ("mlp",)) if biases and kind in GATED else None
        self.b_up = constant(0.0, (F,), ("mlp",)) if biases else None
        self.b_down = constant(0.0, (D,), ("bias",)) if biases else None

    def __call__(
        self, x: jax.Array, *, rate: float = 0.0, keys: Keys = None, places: jax.Array | None = None
    ) -> jax.Array:
        """x [B, L, D] -> [B, L, D]; `rate` is the dropout of the hidden layer, drawn by the tokens' `places` [L]."""
        ups = [self.times(x, w, b) for w, b in ((self.w_gate, self.b_gate), (self.w_up, self.b_up)) if w is not None]
        h = ACTIVATIONS[self.kind](*ups)  # [B,L,F]
        h = lay(h, self.rules, names=("batch", "length", "act_mlp"))
        return self.times(dropout(h, rate, keys, places), self.w_down, self.b_down)  # [B,L,D]

    def times(self, x: jax.Array, w: nnx.Param, b: nnx.Param | None) -> jax.Array:
        y = product(x, w[...], self.rules)
        return y if b is None else y + along_last(b[...].astype(y.dtype), y)
