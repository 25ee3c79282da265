"""Grouped networks against a loop over experts: values, all gradients, edges of blocks, memory, platforms."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax import grouped
from moe_jax.grouped import Weights, grouped_ffn

D, F = 6, 10


def swiglu(gate, up):
    return jax.nn.silu(gate) * up


KINDS = {"relu": jax.nn.relu, "swiglu": swiglu, "swiglu+biases": swiglu}


def by_loop(x, sizes, weights, g, act):
    """Values and gradients of sum(y * g), expert by expert."""
    y, (dx, dw) = jnp.zeros_like(g), jax.tree.map(jnp.zeros_like, (x, weights))
    start = 0
    for e, n in enumerate(sizes):
        rows = slice(start, start + n)

        def network(x, w):
            gate, up, down = (0.0 if b is None else b[None] for b in (w.b_gate, w.b_up, w.b_down))
            h = x @ w.w_up + up
            h = act(h) if w.w_gate is None else act(x @ w.w_gate + gate, h)
            return h @ w.w_down + down

        out, back = jax.vjp(network, x[rows], jax.tree.map(lambda w, e=e: w[e], weights))
        mine, theirs = back(g[rows])
        y, dx = y.at[rows].set(out), dx.at[rows].set(mine)
        dw = jax.tree.map(lambda a, b, e=e: a.at[e].set(b), dw, theirs)
        start += n
    return y, dx, dw


def made(kind, E, dtype="float32"):
    """Weights of E experts."""
    keys = jax.random.split(jax.random.key(1), 3)
    gate, up, down = (
        jax.random.normal(k, s).astype(dtype) for k, s in zip(keys, [(E, D, F), (E, D, F), (E, F, D)], strict=True)
    )
    biases: list[jax.Array] = []
    if kind.endswith("biases"):
        biases = [jax.random.normal(k, (E, n)).astype(dtype) for k, n in zip(keys, (F, F, D), strict=True)]
    return Weights(None if kind == "relu" else gate, up, down, *biases)


@functools.partial(jax.jit, static_argnums=(0, 1))
def run(block, kind, x, sizes, weights, g):
    y, back = jax.vjp(lambda x, w: grouped_ffn(x, sizes, w, KINDS[kind]), x, weights)
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


@pytest.mark.parametrize("kind,dtype", [("relu", "float32"), ("swiglu", "float32"), ("swiglu+biases", "bfloat16")])
@pytest.mark.parametrize("case", CASES)
def test_equals_a_loop(case, kind, dtype, monkeypatch):
    R, sizes, block = CASES[case]
    sizes = sizes if sum(sizes) <= R else sizes[: R // 2]
    monkeypatch.setattr(grouped, "BLOCK_LIMITS", (block, block))
    x, g = (jax.random.normal(jax.random.key(i), (R, D)).astype(dtype) for i in (2, 3))
    weights = made(kind, len(sizes), dtype)
    got = run((case, block), kind, x, jnp.asarray(sizes, jnp.int32), weights, g)
    exact = [jax.tree.map(lambda a: a.astype(jnp.float32), t) for t in (x, weights, g)]
    want = by_loop(exact[0], sizes, *exact[1:], KINDS[kind])
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert a.dtype == x.dtype
        limit = (2e-6 if dtype == "float32" else 2e-2) * max(np.abs(b).max(), 1e-9)
        np.testing.assert_allclose(np.asarray(a, np.float64), b, rtol=0, atol=limit)


UNEVEN = {  # rows, sizes
    "at once": (10, [2, 3, 0, 5]),
    "too many for that": (40, [0, 31, 0, 4]),
    "rows of no expert": (23, [4, 0, 9]),
    "nothing": (9, [0, 0, 0]),
    "everything to the last": (40, [0, 0, 40]),
    "fewer rows than experts": (3, [0, 1, 0, 2, 0]),
    "blocks of every length": (700, [8, 9, 1, 32, 33, 0, 200, 377]),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("case", UNEVEN)
def test_without_gradients(case, kind):
    """The same values, whatever lies in rows of no expert."""
    R, sizes = UNEVEN[case]
    x, weights = jax.random.normal(jax.random.key(2), (R, D)), made(kind, len(sizes))
    x = x.at[sum(sizes) :].set(jnp.nan)
    y = jax.jit(lambda x, s, w: grouped_ffn(x, s, w, KINDS[kind]))(x, jnp.asarray(sizes, jnp.int32), weights)
    want = by_loop(x, sizes, weights, jnp.zeros((R, D)), KINDS[kind])[0]
    np.testing.assert_allclose(y, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("R,E,rows", [(32, 8, 8), (32, 16, 8), (128, 8, 24), (2, 8, None), (2048, 8, None)])
def test_who_is_multiplied_at_once(R, E, rows):
    """Tokens of a batch; not a single one, whose experts are few, nor many prompts."""
    assert grouped.few_rows(R, E) == rows


@pytest.mark.parametrize("sizes,few", [([4] * 16, True), ([8] * 8 + [0] * 8, True), ([9] + [3] * 15, False)])
def test_loads_decide(sizes, few, monkeypatch):
    """All at once computes 16 experts of 8 rows, where one of 64 may be needed: not where any has more than 8."""
    monkeypatch.setattr(grouped, "at_once", lambda x, *_, **__: jnp.full_like(x, 7.0))
    x, weights = jax.random.normal(jax.random.key(2), (64, D)), made("swiglu", 16)
    y = jax.jit(lambda x, s, w: grouped_ffn(x, s, w, swiglu))(x, jnp.asarray(sizes, jnp.int32), weights)
    assert bool((y == 7.0).all()) == few
    if not few:
        np.testing.assert_allclose(y, by_loop(x, sizes, weights, jnp.zeros_like(x), swiglu)[0], rtol=1e-5, atol=1e-5)


def test_rows_of_no_expert_do_not_matter():
    """Whatever lies after the last row in use, even NaN, reaches neither result nor gradient."""
    x, g = (jnp.full((9, D), jnp.nan).at[:5].set(1.0) for _ in range(2))
    sizes, weights = jnp.asarray([2, 3], jnp.int32), made("swiglu", 2)
    y, dx, dw = run("nan", "swiglu", x, sizes, weights, g)
    assert bool((y[5:] == 0).all() & (dx[5:] == 0).all())
    for a, b in zip(
        jax.tree.leaves(dw), jax.tree.leaves(by_loop(x[:5], [2, 3], weights, g[:5], swiglu)[2]), strict=True
    ):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


def test_memory_does_not_grow_with_experts():
    """Temporaries of the gradients at 8 and 64 experts, the same rows; XLA's own product needs many times more."""

    def temporaries(E, network):
        def loss(x, w, sizes):
            return (network(x, sizes, w, jax.nn.relu) ** 2).sum()

        sizes = jax.ShapeDtypeStruct((E,), "i4")
        x, up, down = (jax.ShapeDtypeStruct(s, "f4") for s in ((512, 32), (E, 32, 48), (E, 48, 32)))
        compiled = jax.jit(jax.grad(loss, argnums=(0, 1))).lower(x, Weights(None, up, down), sizes).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    few, many = temporaries(8, grouped_ffn), temporaries(64, grouped_ffn)
    assert many <= 1.1 * few
    assert temporaries(64, lambda *a: grouped.ragged(*a)[0]) > 10 * many


def test_tpu_takes_ragged_dot():
    """The program lowered for TPU holds XLA's primitive, that for other platforms a loop."""

    def loss(x, w, sizes):
        return (grouped_ffn(x, sizes, w, swiglu) ** 2).sum()

    args = jnp.ones((8, D)), made("swiglu", 2), jnp.asarray([3, 4], jnp.int32)
    traced = jax.jit(jax.grad(loss, argnums=(0, 1))).trace(*args)
    texts = {p: traced.lower(lowering_platforms=(p,)).as_text() for p in ("tpu", "cpu")}
    assert texts["tpu"].count("chlo.ragged_dot") >= 9 and "stablehlo.while" not in texts["tpu"]
    assert "ragged_dot" not in texts["cpu"] and "stablehlo.while" in texts["cpu"]


@pytest.mark.parametrize("kind", KINDS)
def test_ragged_dot_means_the_same(kind):
    """The TPU branch, run here: the same values and gradients."""
    x, g = (jax.random.normal(jax.random.key(i), (9, D)) for i in (2, 3))
    sizes, weights, act = jnp.asarray([2, 0, 5], jnp.int32), made(kind, 3), KINDS[kind]
    here, there = grouped.blocked(x, sizes, weights, act), grouped.ragged(x, sizes, weights, act)
    steps = [f(x, sizes, weights, here[1], g, act) for f in (grouped.blocked_gradients, grouped.ragged_gradients)]
    for a, b in zip(jax.tree.leaves([here, steps[0]]), jax.tree.leaves([there, steps[1]]), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-4)


def test_half_of_the_biases_is_refused():
    weights = made("swiglu+biases", 2)._replace(b_up=None)
    with pytest.raises(ValueError, match="with biases those of all matrices"):
        grouped_ffn(jnp.ones((4, D)), jnp.ones(2, jnp.int32), weights, swiglu)


@pytest.mark.parametrize("x,E", [((4, 3), 2), ((4, D), 3), ((2, 4, D), 2)])
def test_shapes_that_do_not_fit_are_refused(x, E):
    with pytest.raises(ValueError, match=r"x float32\[.*sizes int32\[2\].*are needed"):
        grouped_ffn(jnp.ones(x), jnp.ones(2, jnp.int32), made("relu", E), jax.nn.relu)
