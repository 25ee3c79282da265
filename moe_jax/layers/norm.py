"""LayerNorm (Ba et al. 2016) and RMSNorm (Zhang and Sennrich 2019), computed in float32."""

import jax
import jax.numpy as jnp
from flax import nnx

from moe_jax.layers.common import along_last, constant


class Norm(nnx.Module):
    """`layer`: (x - mean) / sqrt(var + eps) * scale + bias; `rms`: x / sqrt(mean(x^2) + eps) * scale."""

    def __init__(self, kind: str, width: int, eps: float):
        self.eps = eps
        self.scale = constant(1.0, (width,), ("norm",))
        self.bias = constant(0.0, (width,), ("norm",)) if kind == "layer" else None

    def __call__(self, x: jax.Array) -> jax.Array:
        """[..., D] -> [..., D] in the type of x."""
        h = x.astype(jnp.float32)
        if self.bias is not None:
            h = h - h.mean(-1, keepdims=True)
        h = h * jax.lax.rsqrt(jnp.mean(h * h, -1, keepdims=True) + self.eps) * along_last(self.scale[...], h)
        if self.bias is not None:
            h = h + along_last(self.bias[...], h)
        return h.astype(x.dtype)
