"""What one MoE layer sends: the collectives of its compiled programs on a mesh."""

import jax
import jax.numpy as jnp
from flax import nnx

from moe_jax import mesh as meshes
from moe_jax import place
from moe_jax.axes import Rules
from moe_jax.collectives import Collective, read
from moe_jax.config import MeshConfig, MoEConfig
from moe_jax.layers.moe import MoELayer
from moe_jax.rules import sharding


def collectives(config: MeshConfig, moe: MoEConfig, length: int, rules: Rules | None = None) -> list[list[Collective]]:
    """Those of the layer on [8, length, 32]: forward, and forward with backward."""
    rules, mesh = rules or Rules(), meshes.build_mesh(config, jax.devices()[: config.size])
    with jax.set_mesh(mesh):
        layer = MoELayer(moe, 32, rules=rules, rngs=nnx.Rngs(params=0))
        place(layer, mesh, rules)
        graph, state = nnx.split(layer)
        x = jax.device_put(jnp.ones((8, length, 32)), sharding(mesh, (rules.batch, rules.length, ())))

        def forward(state, x):
            return nnx.merge(graph, state)(x, train=True)

        def loss(state, x):
            y, stats = forward(state, x)
            return (y**2).sum() + stats.prob.sum() + stats.z

        both = jax.value_and_grad(loss, argnums=(0, 1))
        return [read(jax.jit(f).lower(state, x).compile().as_text(), mesh) for f in (forward, both)]
