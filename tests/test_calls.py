"""One call of the layer: what it may override, what it refuses, and that padding holds nothing that counts."""

from dataclasses import replace
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from moe_jax import MeshConfig, Rules, balance, build_mesh, place
from moe_jax.config import ConfigError, MoEConfig, RouterConfig
from moe_jax.layers.moe import MoELayer
from moe_jax.routing import route
from moe_jax.train.step import Sums, report

B, L, D = 2, 8, 6
MOE = MoEConfig(experts=4, top_k=2, d_ff=8, capacity_factor=1.0, min_capacity=1)
X = jnp.asarray(np.random.default_rng(0).normal(size=(B, L, D)), jnp.float32)


def layer(**settings):
    return MoELayer(replace(MOE, **settings), D, rngs=nnx.Rngs(params=1))


@pytest.mark.parametrize("factor", [0, 0.0, -1.0, float("inf"), float("nan"), "1.0"])
def test_a_capacity_factor_that_is_none_is_refused(factor):
    with pytest.raises(ConfigError, match="capacity_factor"):
        layer()(X, capacity_factor=factor)


@pytest.mark.parametrize(
    "given,words",
    [
        (dict(mask=jnp.ones((B, L), jnp.int32)), r"int32\[2, 8\].*segments > 0"),  # segment ids: 1 & 2 is 0
        (dict(mask=jnp.ones((B, L))), r"float32\[2, 8\]"),
        (dict(mask=jnp.ones((L, B), bool)), r"bool\[8, 2\], and bool\[2, 8\] is needed"),
        (dict(tokens=jnp.ones((L, B), jnp.int32)), r"int32\[8, 2\]: give token ids"),
        (dict(tokens=jnp.ones((B, L))), r"float32\[2, 8\]: give token ids"),
        (dict(replay=jnp.zeros((B, L, 2))), r"replay is float32\[2, 8, 2\], this call's integers"),
        (dict(replay=jnp.full((B, L, 2), 9)), r"replay names experts 9 to 9, and there are 4"),
        (dict(replay=jnp.full((B, L, 2), -5)), r"replay names experts -5 to -5, and there are 4"),
    ],
)
def test_arguments_that_would_be_misread_are_refused(given, words):
    with pytest.raises(ValueError, match=words):
        layer()(X, **given)


def test_a_mask_of_the_routing_function_is_one():
    with pytest.raises(ValueError, match="segments > 0"):
        route(jnp.zeros((L, 4)), MOE, jnp.ones(L, jnp.int32))


@pytest.mark.parametrize("shape", [(0, L, D), (B, 0, D)])
def test_nothing_is_refused(shape):
    with pytest.raises(ValueError, match="holds no token"):
        layer()(jnp.zeros(shape))


@pytest.mark.parametrize("kind", ["topk_softmax", "deepseek_v3", "softmax_topk"])
def test_one_expert_in_evaluation(kind):
    """An ablation may leave one choice, of gate 1; training refuses it, for its router would learn nothing."""
    router = RouterConfig(kind=kind, normalize="before" if kind == "softmax_topk" else None)
    made = layer(router=router, capacity_factor=None)
    y, stats, record = made(X, top_k=1, record=True)
    assert int(stats.routed) == B * L and y.shape == X.shape
    np.testing.assert_allclose(record.gate, 1.0, rtol=1e-6)
    np.testing.assert_array_equal(record.expert, made(X, record=True)[2].expert[..., :1])
    with pytest.raises(ConfigError, match="gives the router no gradient"):
        made(X, top_k=1, train=True)


def test_a_replay_inside_a_program_asks_for_no_other_expert():
    """There values cannot be refused: a choice of an expert that there is not is none, and counts as none."""
    y, stats = jax.jit(lambda replay: layer()(X, replay=replay))(jnp.broadcast_to(jnp.asarray([0, 9]), (B, L, 2)))
    assert np.isfinite(y).all() and stats.routed == stats.load.sum() == B * L == stats.load[0]


@pytest.mark.parametrize("kind", [np.float32, np.float64, np.asarray, jnp.float32, jnp.asarray])
def test_numbers_of_arrays_are_numbers(kind):
    want, stats = layer()(X, capacity_factor=0.5, top_k=1)
    got, counted = layer()(X, capacity_factor=kind(0.5), top_k=np.int64(1))
    np.testing.assert_array_equal(got, want)
    assert counted.kept == stats.kept < stats.routed


@pytest.mark.parametrize("shared", [0, 1])
@pytest.mark.parametrize("dispatch", ["einsum", "gather", "ragged"])
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_padding_may_hold_anything(dispatch, bad, shared):
    """NaN where a mask says padding reaches no token, statistic or gradient of a parameter."""
    graph, state = nnx.split(layer(dispatch=dispatch, shared_experts=shared))
    mask = jnp.arange(L)[None] < jnp.asarray([[L], [3]])

    @jax.jit
    def run(state, x):
        def loss(state):
            y, stats = nnx.merge(graph, state)(x, mask=mask, train=True)
            return (y**2).sum() + balance.router_loss(stats, replace(MOE, balance_loss=1.0, z_loss=1.0)), (y, stats)

        return jax.value_and_grad(loss, has_aux=True)(state)

    want, got = run(state, X), run(state, jnp.where(mask[..., None], X, bad))
    jax.tree.map(np.testing.assert_array_equal, got, want)


def test_einsum_moves_numbers_unrounded():
    """Accelerators would round float32 operands of a product by default: tokens and gates are only moved by these."""
    made = layer(dispatch="einsum", d_ff=32)
    traced = jax.jit(jax.grad(lambda x: made(x, train=True)[0].sum())).trace(X)
    text = traced.lower(lowering_platforms=("tpu",)).as_text()
    products = [line for line in text.splitlines() if "dot_general" in line]
    moved = [line for line in products if "32x" not in line.split(":")[-1]]  # all but those of the experts
    rounded = [line for line in moved if "HIGHEST" not in line]
    assert len(moved) >= 6 and len(rounded) == 1, "that of the mask, whose zeros and ones no rounding changes"


def test_a_selection_bias_is_placed_with_the_parameters():
    mesh, rules = build_mesh(MeshConfig(data=2, expert=4)), Rules()
    made = MoELayer(replace(MOE, bias_rate=0.1), D, rules=rules, rngs=nnx.Rngs(params=1))
    place(made, mesh, rules)
    assert made.bias[...].sharding.is_fully_replicated and len(made.bias[...].sharding.device_set) == 8


@pytest.mark.parametrize("form", ["per_choice", "per_token"])
def test_the_log_says_one_at_perfect_balance(form):
    """Whatever form the loss has, the number that people read does not depend on K."""
    moe = replace(MOE, balance_loss=0.1, balance_form=form, router=RouterConfig(force="balanced"))
    made = MoELayer(moe, D, rngs=nnx.Rngs(params=1))
    made.router[...] = jnp.zeros_like(made.router[...])
    stats = jax.tree.map(lambda a: a[None], made(X)[1])
    model = SimpleNamespace(cfg=SimpleNamespace(model=SimpleNamespace(moe=moe)))
    one = jnp.ones((), jnp.int32)
    np.testing.assert_allclose(
        report(model, jnp.ones(()), Sums(jnp.ones(()), one, one, stats))["balance"], 1.0, rtol=1e-6
    )
