"""Alarms: an injected collapse, dead experts and drops are told once, with what to change; a sound router is not."""

import dataclasses
from typing import get_args

import numpy as np
import pytest

from moe_jax.checks import check_moe
from moe_jax.config import MoEConfig, RouterConfig
from moe_jax.health import Watch, examine
from moe_jax.schema import RouterKind

COLLAPSED = np.array([[800, 0, 0, 0, 0, 0, 0, 0]])
SOUND = [[100, 90, 110, 95, 105, 98, 102, 100]]


def record(step: int, load, kept: float = 1.0) -> dict:
    routed = int(np.sum(load))
    return {"step": step, "load": load, "routed": routed, "kept": round(kept * routed)}


@pytest.mark.parametrize(
    "load,kept,moe,kinds",
    [
        (SOUND, 1.0, MoEConfig(), []),
        ([[793, 1, 1, 1, 1, 1, 1, 1]], 1.0, MoEConfig(), [("collapse", 0)]),
        (SOUND + [[400, 395, 1, 0, 0, 2, 1, 1]], 1.0, MoEConfig(top_k=2), [("collapse", 1)]),
        ([[120, 110, 115, 0, 113, 117, 112, 113]], 1.0, MoEConfig(), [("dead", 0)]),
        (SOUND, 0.79, MoEConfig(capacity_factor=1.0), [("dropped", None)]),
        (SOUND, 0.81, MoEConfig(capacity_factor=1.0), []),
        ([[5, 3]], 1.0, MoEConfig(experts=2, top_k=2), []),  # every expert is chosen by every token
        ([[0] * 8], 1.0, MoEConfig(), []),  # nothing was routed
        ([[793, 1, 1, 1, 1, 1, 1, 1]], 1.0, MoEConfig(router=RouterConfig(force="biased")), []),  # as it was asked for
    ],
)
def test_examine(load, kept, moe, kinds):
    counts = record(0, load, kept)
    found = examine(np.asarray(load), counts["routed"], counts["kept"], moe)
    assert [(a.kind, a.layer) for a in found] == kinds


@pytest.mark.parametrize(
    "moe,remedy",
    [
        (MoEConfig(), "(now 0), or balance by model.moe.bias_rate=0.001"),
        (MoEConfig(balance_loss=1e-3), "(now 0.001), or balance by model.moe.bias_rate=0.001 in place of balance_loss"),
        (MoEConfig(bias_rate=1e-3), "raise model.moe.bias_rate (now 0.001)"),
        (MoEConfig(router=RouterConfig("hash")), "use a router that learns"),
    ],
)
def test_the_remedy_fits_the_settings(moe, remedy):
    (alarm,) = examine(COLLAPSED, 800, 800, moe)
    assert remedy in str(alarm) and "MoE layer 0: 1 of 8 experts get 100%" in str(alarm)


@pytest.mark.parametrize("kind", get_args(RouterKind))
def test_no_remedy_is_refused(kind):
    """The bias is named to routers that have one, and then the config with it is admitted."""
    top_k = 1 if kind == "switch" else 2
    moe = MoEConfig(top_k=top_k, router=RouterConfig(kind), balance_loss=0.0 if kind == "hash" else 1e-3)
    (alarm,) = examine(np.array([[400, 400, 0, 0, 0, 0, 0, 0]]) if top_k == 2 else COLLAPSED, 800, 800, moe)
    told = "bias_rate" in alarm.remedy
    changed = dataclasses.replace(moe, bias_rate=1e-3, balance_loss=0.0)
    assert told == (not [p for p in check_moe(changed) if p.key.endswith("bias_rate")])


def test_an_alarm_is_told_once_until_it_has_been_away():
    """Over windows of 4 steps: a single bad step is none, a lasting fault is one, and again after a cure."""
    watch = Watch(MoEConfig(), window=4)
    collapsed = [[800, 0, 0, 0, 0, 0, 0, 0]]
    told = []
    for step, load in enumerate([SOUND, collapsed, *[SOUND] * 4, *[collapsed] * 9, *[SOUND] * 9, *[collapsed] * 6]):
        told += [(step, a.kind) for a in watch.step(record(step, load))]
    assert [kind for _, kind in told] == ["collapse", "collapse"]
    assert 6 <= told[0][0] <= 9 and told[1][0] >= 24
    assert Watch(None).step(record(0, SOUND)) == []
