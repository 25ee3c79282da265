"""The cost model: its formula, the group size it picks, the dispatcher it chooses and its reason."""

import pytest

from moe_jax import cost
from moe_jax.config import MoEConfig
from moe_jax.cost import choose, einsum_groups, einsum_overhead


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
        ("gpu", {}, "gather", "on gpu"),
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


def test_settings_in_words():
    """What a run says of itself: the dispatcher, the groups, and the cost or the reason."""

    def words(**settings):
        moe = MoEConfig(experts=8, top_k=2, capacity_factor=settings.pop("capacity_factor", 1.25), **settings)
        return cost.describe("cpu", moe, length=512, d_ff=512, matrices=3)

    auto = words(dispatch="einsum", group_size="auto")
    assert "dispatch einsum, groups of 128 tokens" in auto and "2*128/(3*512) = 0.167" in auto
    assert "dispatch gather, groups of 512 tokens" in words(dispatch="auto")
    assert "dispatch ragged (dropless" in words(dispatch="auto", capacity_factor=None)
    assert "dispatch gather, groups of 64 tokens" in words(dispatch="gather", group_size=64)
