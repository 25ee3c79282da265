"""Grouped products against a loop over experts: values, both gradients, edges of blocks, memory, platforms."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax import grouped
from moe_jax.grouped import grouped_dot

D, F = 6, 10


def by_loop(x, w, sizes, g):
    """Values and gradients of sum(y * g), expert by expert in float64."""
    x, w, g = (np.asarray(a, np.float64) for a in (x, w, g))
    y, dx, dw = np.zeros((len(x), w.shape[2])), np.zeros_like(x), np.zeros_like(w)
    start = 0
    for e, n in enumerate(sizes):
        rows = slice(start, start + n)
        y[rows], dx[rows], dw[e] = x[rows] @ w[e], g[rows] @ w[e].T, x[rows].T @ g[rows]
        start += n
    return y, dx, dw


@functools.partial(jax.jit, static_argnums=0)
def run(block, x, w, sizes, g):
    y, back = jax.vjp(lambda x, w: grouped_dot(x, w, sizes), x, w)
    return y, *back(g)


CASES = {  # rows, sizes, block
    "blocks that fit": (16, [8, 4, 4], 4),
    "edges inside blocks": (29, [3, 11, 1, 7], 4),
    "unused experts and rows": (23, [0, 5, 0, 0, 9, 0], 4),
    "nothing": (7, [0, 0], 4),
    "one expert": (13, [13], 4),
    "fewer rows than a block": (3, [1, 0, 2], 128),
    "many experts": (40, [n % 3 for n in range(41)][:40], 8),
    "everything to the last": (17, [0, 0, 17], 8),
}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("case", CASES)
def test_equals_a_loop(case, dtype, monkeypatch):
    R, sizes, block = CASES[case]
    sizes = sizes if sum(sizes) <= R else sizes[: R // 2]
    monkeypatch.setattr(grouped, "BLOCK_LIMITS", (block, block))
    keys = jax.random.split(jax.random.key(0), 3)
    shapes = (R, D), (len(sizes), D, F), (R, F)
    x, w, g = (jax.random.normal(k, s).astype(dtype) for k, s in zip(keys, shapes, strict=True))
    got = run((case, block), x, w, jnp.asarray(sizes, jnp.int32), g)
    for a, b in zip(got, by_loop(x, w, sizes, g), strict=True):
        assert a.dtype == x.dtype
        limit = (1e-6 if dtype == "float32" else 1e-2) * max(np.abs(b).max(), 1e-9)
        np.testing.assert_allclose(np.asarray(a, np.float64), b, rtol=0, atol=limit)


def test_rows_of_no_expert_do_not_matter():
    """Whatever lies after the last row in use, even NaN, reaches neither result nor gradient."""
    x = jnp.full((9, D), jnp.nan).at[:5].set(1.0)
    g = jnp.full((9, F), jnp.nan).at[:5].set(1.0)
    y, dx, dw = run("nan", x, jnp.ones((2, D, F)), jnp.asarray([2, 3], jnp.int32), g)
    assert bool((y[5:] == 0).all() & (dx[5:] == 0).all())
    np.testing.assert_array_equal(dw, np.full((2, D, F), [[[2.0]], [[3.0]]]))


def test_memory_does_not_grow_with_experts():
    """Temporaries of the gradients at 8 and 64 experts, the same rows; XLA's own product needs many times more."""

    def temporaries(E, dot):
        def loss(x, w, sizes):
            return (dot(x, w, sizes) ** 2).sum()

        shapes = [jax.ShapeDtypeStruct(s, t) for s, t in (((512, 32), "f4"), ((E, 32, 48), "f4"), ((E,), "i4"))]
        compiled = jax.jit(jax.grad(loss, argnums=(0, 1))).lower(*shapes).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    few, many = temporaries(8, grouped_dot), temporaries(64, grouped_dot)
    assert many <= 1.1 * few
    assert temporaries(64, jax.lax.ragged_dot) > 10 * many


def test_tpu_takes_ragged_dot():
    """The program lowered for TPU holds XLA's primitive, that for other platforms a loop."""

    def loss(x, w, sizes):
        return (grouped_dot(x, w, sizes) ** 2).sum()

    args = jnp.ones((8, D)), jnp.ones((2, D, F)), jnp.asarray([3, 4], jnp.int32)
    traced = jax.jit(jax.grad(loss, argnums=(0, 1))).trace(*args)
    texts = {p: traced.lower(lowering_platforms=(p,)).as_text() for p in ("tpu", "cpu")}
    assert texts["tpu"].count("chlo.ragged_dot") >= 3 and "stablehlo.while" not in texts["tpu"]
    assert "ragged_dot" not in texts["cpu"] and "stablehlo.while" in texts["cpu"]


def test_ragged_dot_means_the_same():
    """The TPU branch, run here: the same values and gradients."""
    x, w, g = (jax.random.normal(jax.random.key(i), s) for i, s in enumerate([(9, D), (3, D, F), (9, F)]))
    sizes = jnp.asarray([2, 0, 5], jnp.int32)
    np.testing.assert_allclose(
        grouped.ragged_dot(x, w, sizes, False), grouped.blocked_dot(x, w, sizes, False), rtol=1e-5, atol=1e-5
    )
    np.testing.assert_allclose(
        grouped.ragged_dot(g, w, sizes, True), grouped.blocked_dot(g, w, sizes, True), rtol=1e-5, atol=1e-5
    )
    np.testing.assert_allclose(
        grouped.ragged_gradient(x, g, sizes), grouped.blocked_gradient(x, g, sizes), rtol=1e-5, atol=1e-5
    )


def test_shapes_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match=r"x float32\[4, 3\], w float32\[2, 5, 6\]"):
        grouped_dot(jnp.ones((4, 3)), jnp.ones((2, 5, 6)), jnp.ones(2, jnp.int32))
