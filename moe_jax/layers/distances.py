"""Relative positions (Raffel et al. 2020, section 2.1): a bias of each head for the distance of a query and a key."""

import math
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from moe_jax.axes import Rules
from moe_jax.config import ModelConfig
from moe_jax.rules import by_hand, spec


def bucket(
    distance: jax.Array,
    both_ways: bool,
    buckets: int = ModelConfig.distance_buckets,
    limit: int = ModelConfig.distance_limit,
) -> jax.Array:
    """The bucket of the distance of a key behind its query, int32 [...] -> [...]; by default one of the 32 of T5.

    Half of them hold one distance each, the rest grow with its logarithm up to the limit. An encoder uses one half of
    all for keys behind and one for keys ahead; a decoder sees none ahead.
    """
    buckets = buckets // 2 if both_ways else buckets
    ahead = jnp.where(distance < 0, buckets, 0) if both_ways else 0
    far = jnp.abs(distance) if both_ways else jnp.maximum(distance, 0)
    exact = buckets // 2
    share = jnp.log(jnp.maximum(far, 1).astype(jnp.float32) / exact) / math.log(limit / exact)
    grown = exact + (share * (buckets - exact)).astype(jnp.int32)
    return ahead + jnp.where(far < exact, far, jnp.minimum(grown, buckets - 1))


class Distances(NamedTuple):
    """Queries and keys by their distance, and the bias of each."""

    table: jax.Array  # [buckets, H]
    buckets: jax.Array  # [L, M] int32
    rules: Rules | None

    def rows(self, begin: int, end: int) -> "Distances":
        """Those of a block of queries, which see the keys up to its end."""
        return self._replace(buckets=self.buckets[begin:end, :end])

    def added(self, scores: jax.Array) -> jax.Array:
        """scores [B, J, R, L, M] float32 of H = J*R heads, with their biases."""
        return add(scores, self.table, self.buckets, self.rules)


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def add(scores: jax.Array, table: jax.Array, buckets: jax.Array, rules: Rules | None) -> jax.Array:
    """`Distances.added`. Its gradient is added up by bucket on each device: [buckets, H] numbers travel, not
    [H, L, M]."""
    return scores + table.T[:, buckets].reshape(1, *scores.shape[1:])


def forward(
    scores: jax.Array, table: jax.Array, buckets: jax.Array, rules: Rules | None
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    """`add`, and what its gradient needs: the bucket of each place, and the buckets that there are."""
    return add(scores, table, buckets, rules), (buckets, jnp.arange(len(table)))


def backward(rules: Rules | None, kept: tuple[jax.Array, jax.Array], g: jax.Array) -> tuple[jax.Array, jax.Array, None]:
    """Gradients at scores and table."""
    buckets, every = kept
    heads = g.reshape(g.shape[0], -1, *g.shape[-2:])  # [B,H,L,M]
    if rules is None:
        return g, by_bucket(heads, buckets, every), None

    def local(g: jax.Array, buckets: jax.Array, every: jax.Array) -> jax.Array:
        return jax.lax.psum(by_bucket(g, buckets, every), rules.batch)

    specs = spec((rules.batch, rules.act_heads, (), ())), spec(((), ())), spec(((),))
    return g, by_hand(local, in_specs=specs, out_specs=spec(((), rules.act_heads)))(heads, buckets, every), None


def by_bucket(g: jax.Array, buckets: jax.Array, every: jax.Array) -> jax.Array:
    """g [B, H, L, M] -> [buckets, H], the sums over rows and over the places of `every` bucket."""
    rows = g.sum(0)
    return jax.vmap(lambda k: jnp.where(buckets == k, rows, 0.0).sum((1, 2)))(every)


add.defvjp(forward, backward)
