"""The cost model: its formula, the group size it picks, the dispatcher it chooses and its reason."""

import pytest
from flax import nnx

from moe_jax import cost
from moe_jax.config import ModelConfig, MoEConfig
from moe_jax.cost import choose, einsum_groups, einsum_overhead
from moe_jax.layers.moe import MoELayer


def test_overhead_is_the_ratio_of_multiplications():
    """2S/(mF), from the sizes of the products themselves."""
    S, E, K, D, F, f = 96, 7, 3, 40, 56, 1.25
    slots = K * S * f  # E*C of a group
    for matrices in (2, 3):
        dispatch_and_combine = 2 * (2 * S * slots * D)
        experts = matrices * 2 * slots * D * F
        assert einsum_overhead(S, F, matrices) == pytest.approx(dispatch_and_combine / experts)
    assert E != K


@pytest.mark.parametrize(
    "length,d_ff,matrices,size", [(4096, 512, 2, 128), (4096, 512, 3, 128), (2048, 14336, 3, 2048), (97, 16, 2, 1)]
)
def test_group_size(length, d_ff, matrices, size):
    """The largest divisor within a quarter; a prime length leaves groups of one token."""
    groups = einsum_groups(length, d_ff, matrices)
    assert groups.size == size
    assert groups.formula.endswith(f"= {groups.overhead:.3g}")


@pytest.mark.parametrize(
    "platform,options,want,why",
    [
        ("cpu", {}, "gather", "S/F = 512/2048"),
        ("gpu", {}, "gather", "measured on CPU only, not on gpu"),
        ("tpu", {}, "gather", "S/F = 512/2048"),
        ("tpu", {"group": 256}, "einsum", "S/F = 256/2048"),
        ("tpu", {"dropless": True}, "ragged", "8/2 times"),
        ("cpu", {"dropless": True, "experts": 2}, "gather", "index tables"),
        ("tpu", {"matrices": 3, "group": 384}, "einsum", "2S/(3F) = 2*384/(3*2048)"),
    ],
)
def test_choice_and_reason(platform, options, want, why):
    usual = dict(experts=8, top_k=2, d_ff=2048, matrices=2, group=512, dropless=False)
    choice = choose(platform, **(usual | options))
    assert choice.dispatch == want and why in choice.reason


def test_settled_as_set_or_by_the_model():
    """The dispatcher of a call and why: the cost of einsum, or the reason of `auto`, which looks at the slots."""

    def settled(group, slots, **settings):
        moe = MoEConfig(experts=8, top_k=2, capacity_factor=1.25, **settings)
        return cost.settle("cpu", moe, group=group, slots=slots, d_ff=512, matrices=3)

    assert settled(128, 40, dispatch="einsum") == ("einsum", cost.formula(128, 512, 3))
    assert settled(128, 40, dispatch="gather") == ("gather", "as set")
    assert settled(128, 40, dispatch="auto").dispatch == "gather"
    assert settled(128, 128, dispatch="auto").dispatch == "ragged", "a slot for every token: dropless"
    assert settled(128, 128, dispatch="auto", expert_dropout=0.1).dispatch == "gather"


@pytest.mark.parametrize(
    "setting,dispatch,factor,size",
    [
        (64, "einsum", 1.0, 64),
        (None, "einsum", 1.0, 512),
        ("auto", "einsum", 1.0, 128),
        ("auto", "gather", 1.0, 512),
        (64, "einsum", None, 128),  # never full: the setting changes no result, and small groups have small masks
    ],
)
def test_groups_of_a_setting(setting, dispatch, factor, size):
    moe = MoEConfig(group_size=setting, dispatch=dispatch)
    assert cost.group_size(moe, factor, 512, 512, 3) == size


@pytest.mark.parametrize("factor", [None, 1.0])
@pytest.mark.parametrize("dispatch", ["einsum", "auto"])
def test_what_a_run_says_is_what_its_layers_do(factor, dispatch):
    """Dispatcher, groups and slots that are printed, against those of the layer."""
    moe = MoEConfig(experts=8, top_k=2, d_ff=48, capacity_factor=factor, dispatch=dispatch)
    said = cost.for_training("cpu", ModelConfig(d_model=16, moe=moe), 256)
    layer = MoELayer(moe, 16, rngs=nnx.Rngs(params=0))
    S = layer.group_size(4, 256, factor)
    assert said.dispatch == layer.dispatch_for(moe, S, cost.capacity(moe, S, factor))
    if dispatch == "einsum":
        assert cost.formula(S, 48, 3) in said.reason
    if factor is not None:
        assert f"groups of {S} tokens with {cost.capacity(moe, S, factor)} slots" in said.reason
