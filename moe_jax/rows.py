"""Moving rows between tokens and slots: two gathers, each the other's adjoint. Pure functions on arrays.

JAX would differentiate a gather into a scatter-add, which has to mind that rows may repeat. Both tables are known here,
so that the backward pass of either direction is the other one.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

UNROLLED = 8  # choices summed one after the other; a single gather of all of them does not vectorise on CPU
SCATTER_COST = 4  # a row added by a scatter costs about so many gathered rows (CPU, float32, D=256)


class Rows(NamedTuple):
    """Which row goes where. `home` inverts `source`: each n that is not empty stands in the row of `source[n]` once."""

    source: jax.Array  # [N] int32, the token of a slot; T where the slot is empty
    home: jax.Array  # [T, K] int32, the slots of a token; N where it has fewer


def take(x: jax.Array, index: jax.Array) -> jax.Array:
    """Rows x [T, D] at index [N]; zeros where the index is T or more."""
    inside = index < x.shape[0]
    found = x.at[jnp.where(inside, index, 0)].get(mode="promise_in_bounds")  # [N,D]
    return jnp.where(inside[:, None], found, jnp.zeros((), x.dtype))


@jax.custom_vjp
def gather_rows(x: jax.Array, rows: Rows) -> jax.Array:
    """x [T, D] -> [N, D]: to each slot its token, zeros to empty slots."""
    return take(x, rows.source)


@jax.custom_vjp
def sum_rows(y: jax.Array, rows: Rows) -> jax.Array:
    """y [N, D] -> [T, D]: to each token the sum of its slots, added in float32 at least."""
    (T, K), (N, D) = rows.home.shape, y.shape
    wide = jnp.float32 if y.dtype.itemsize < 4 else y.dtype
    if K <= UNROLLED:
        total = take(y, rows.home[:, 0]).astype(wide)
        for k in range(1, K):
            total = total + take(y, rows.home[:, k]).astype(wide)
        return total.astype(y.dtype)
    if T * K > SCATTER_COST * N:  # experts choose: a token has as many homes as there are experts, nearly all empty
        zeros = jnp.zeros((T, D), wide)
        return zeros.at[rows.source].add(y.astype(wide), mode="drop").astype(y.dtype)
    return take(y, rows.home.reshape(-1)).astype(wide).reshape(T, K, D).sum(1).astype(y.dtype)


gather_rows.defvjp(lambda x, rows: (gather_rows(x, rows), rows), lambda rows, g: (sum_rows(g, rows), None))
sum_rows.defvjp(lambda y, rows: (sum_rows(y, rows), rows), lambda rows, g: (gather_rows(g, rows), None))
