"""Sequences split over mesh axes: which shard holds which tokens of a row, and the groups that are cut from them.

In causal attention late tokens do more work than early ones. So a row of L tokens is cut into 2n pieces, of which shard
i of n holds pieces i and 2n-1-i: every shard has as much work (Dubey et al. 2024, Llama 3, section 3.3.2).
"""

import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from moe_jax.axes import Axes, Rules
from moe_jax.rules import by_hand, constrain, current_mesh, spec


def shards(rules: Rules | None) -> int:
    """Shards n of a row over the current mesh; 1 without rules."""
    return 1 if rules is None else math.prod(current_mesh().shape.get(a, 1) for a in rules.length)


def balanced(x: jax.Array, n: int, axis: int = 1) -> jax.Array:
    """`x` with the 2n pieces of an axis in the order 0, 2n-1, 1, 2n-2, ...: two for each of n shards."""
    if n == 1:
        return x
    head, tail = x.shape[:axis], x.shape[axis + 1 :]
    pieces = x.reshape(*head, 2, n, -1, *tail)
    early, late = (jax.lax.index_in_dim(pieces, i, axis, keepdims=False) for i in (0, 1))  # [..., n, L/2n, ...]
    return jnp.stack([early, jnp.flip(late, axis)], axis + 1).reshape(x.shape)


def restored(x: jax.Array, n: int, axis: int = 1) -> jax.Array:
    """The inverse of `balanced`."""
    if n == 1:
        return x
    head, tail = x.shape[:axis], x.shape[axis + 1 :]
    pieces = x.reshape(*head, n, 2, -1, *tail)
    early, late = (jax.lax.index_in_dim(pieces, i, axis + 1, keepdims=False) for i in (0, 1))
    return jnp.concatenate([early, jnp.flip(late, axis)], axis).reshape(x.shape)


def places(length: int, n: int) -> np.ndarray:
    """The place [L] in its row of each token in the order of `balanced`."""
    order = np.arange(length, dtype=np.int32)
    if n == 1:
        return order
    early, late = order.reshape(2, n, -1)
    return np.stack([early, late[::-1]], 1).reshape(-1)


def ordered(x: jax.Array, rules: Rules | None, n: int) -> jax.Array:
    """Small arrays [B, L, ...], such as token ids, in the order of `balanced`; rows stay whole, and none is sent."""
    if n == 1 or rules is None:
        return x
    return constrain(balanced(x, n), (rules.batch, *((),) * (x.ndim - 1)))


@dataclass(frozen=True)
class Cut:
    """Rows [B, L] cut into groups [G, S], each inside a shard.

    Groups of S tokens, or of several whole rows, are those of one device whatever the mesh. Their order is not: first
    come the mesh axes of `Rules.groups`, then rows, then places.
    """

    rules: Rules | None
    rows: int  # B
    length: int  # L
    size: int  # S
    balance: int = 1  # shards n for which rows are in the order of `balanced`; 1: in their own

    @property
    def plain(self) -> bool:
        """Whether the groups are rows in their order, cut without a thought of the mesh."""
        if self.rules is None:
            return True
        sizes = current_mesh().shape
        wide = [tuple(a for a in axes if sizes.get(a, 1) > 1) for axes in (self.rules.batch, self.rules.groups)]
        return wide[0] == wide[1]

    def groups(self, x: jax.Array, last: Axes = ()) -> jax.Array:
        """[B, L, ...] -> [G, S, ...]; `last` are the mesh axes of the last of more than two dimensions."""
        if self.rules is None or self.plain:
            return x.reshape(-1, self.size, *x.shape[2:])
        rest = ((),) * (x.ndim - 3) + (last,) * (x.ndim > 2)
        home, away = (self.rules.batch, self.rules.length, *rest), (self.rules.groups, (), *rest)
        local = lambda x: x.reshape(-1, self.size, *x.shape[2:])  # noqa: E731
        return by_hand(local, in_specs=spec(home), out_specs=spec(away))(x)

    def whole(self, x: jax.Array, last: Axes = ()) -> jax.Array:
        """[G, S, ...] -> [B, L, ...], the inverse of `groups`."""
        if self.rules is None or self.plain:
            return x.reshape(self.rows, self.length, *x.shape[2:])
        rest = ((),) * (x.ndim - 3) + (last,) * (x.ndim > 2)
        home, away = (self.rules.batch, self.rules.length, *rest), (self.rules.groups, (), *rest)
        length = self.length // shards(self.rules)
        local = lambda x: x.reshape(-1, length, *x.shape[2:])  # noqa: E731
        return by_hand(local, in_specs=spec(away), out_specs=spec(home))(x)

    def keys(self, keys: jax.Array) -> jax.Array:
        """Random keys of groups [G], given in the order of one device, in the order of the groups."""
        if self.plain:
            return keys
        numbers = jax.random.key_data(keys)  # [G, 2]
        each = max(1, self.length // self.size)  # groups of a row
        numbers = numbers.reshape(-1, each, numbers.shape[-1])
        numbers = ordered(numbers, self.rules, self.balance)
        one = Cut(self.rules, numbers.shape[0], each, 1)
        return jax.random.wrap_key_data(one.groups(numbers)[:, 0], impl=jax.random.key_impl(keys))

    def places(self) -> jax.Array:
        """The place [L] of each token in its row's own order."""
        return jnp.asarray(places(self.length, self.balance))

    def regroup(self, x: jax.Array) -> jax.Array:
        """Groups of any other size [G', S', ...], in the order of one device, as these groups [G, S, ...]."""
        return self.groups(balanced(x.reshape(self.rows, self.length, *x.shape[2:]), self.balance))
