"""Dispatchers: tokens to the slots of their experts and back, behind two calls. Pure functions on arrays.

`dispatch` makes the buffers `[E, G, C, D]` that experts work on, `combine` brings weighted results home. A dispatcher
is two functions and one row of `DISPATCHERS`; `plan` holds what they share.
"""

import jax
import jax.numpy as jnp

from moe_jax.capacity import Slots
from moe_jax.routing import Routing


def einsum_plan(routing: Routing, slots: Slots, capacity: int, dtype) -> tuple[jax.Array, jax.Array]:
    """One-hot dispatch mask and the gate of each slot (GShard, section 3.2; Mesh TensorFlow).

    Returns:
        mask [G, S, E, C] in `dtype`, 1 where token s has slot c of expert e; weight [E, G, C] float32.
    """
    E = routing.prob.shape[-1]
    to_expert = jax.nn.one_hot(routing.expert, E, dtype=dtype) * slots.kept[..., None].astype(dtype)  # [G,S,K,E]
    to_slot = jax.nn.one_hot(slots.position, capacity, dtype=dtype)  # [G,S,K,C]
    mask = jnp.einsum("gske,gskc->gsec", to_expert, to_slot)
    gate = jnp.einsum("gske,gsk->gse", to_expert.astype(jnp.float32), slots.gate)  # a token picks an expert once
    return mask, jnp.einsum("gsec,gse->egc", mask.astype(jnp.float32), gate)


def einsum_dispatch(x: jax.Array, plan: tuple[jax.Array, jax.Array]) -> jax.Array:
    """x [G, S, D] -> buffers [E, G, C, D]; empty slots are zero."""
    return jnp.einsum("gsec,gsd->egcd", plan[0], x)


def einsum_combine(y: jax.Array, plan: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Expert outputs [E, G, C, D] -> [G, S, D], weighted by the gates; zero for tokens without a slot."""
    mask, weight = plan
    # The gate multiplies slots, not the mask: its gradient is then one dense sum over D.
    weighted = (y.astype(jnp.float32) * weight[..., None]).astype(y.dtype)
    return jnp.einsum("gsec,egcd->gsd", mask, weighted)


DISPATCHERS = {"einsum": (einsum_plan, einsum_dispatch, einsum_combine)}
