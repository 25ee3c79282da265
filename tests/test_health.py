"""Alarms: each ill is told once, with what to change; a sound router, and a young one that settles, is not."""

import dataclasses
import importlib.util
import json
import math
from pathlib import Path
from typing import get_args

import jax
import numpy as np
import pytest

from moe_jax import config
from moe_jax.checks import check_moe
from moe_jax.config import Config, ModelConfig, MoEConfig, RouterConfig
from moe_jax.health import YOUNG, Watch
from moe_jax.metrics import encode
from moe_jax.schema import RouterKind
from moe_jax.train.state import Model
from moe_jax.train.step import grouped

COLLAPSED = [[800, 0, 0, 0, 0, 0, 0, 0]]
SOUND = [[100, 90, 110, 95, 105, 98, 102, 100]]
STARVED = [[120, 110, 115, 0, 113, 117, 112, 113]]
MENDED = MoEConfig(balance_loss=1e-2, capacity_factor=1.25)
OLD = YOUNG + 1  # a step beyond its youth


def record(step: int, load, kept: float = 1.0, *, spread: float = 0.5, least: float = 1.0, **more) -> dict:
    """A step whose routers part probabilities by `spread` around 1/E, the least of them `least` times 1/E."""
    E, routed = len(load[0]), [sum(row) for row in load]
    lost = [n - round(kept * n) for n in routed]
    layers = {"router_entropy": [math.log(E) - spread**2 / 2] * len(load), "least_prob": [least / E] * len(load)}
    return {"step": step, "load": load, "dropped_by_layer": lost, "loss": 3.0} | layers | more


def told(moe, *steps: dict, warmup: int = 0) -> list[tuple]:
    """Kind, layer and step of the alarms of these records, over windows of 4 steps."""
    watch = Watch(moe, warmup, window=4)
    return [(a.kind, a.layer, a.step) for r in steps for a in watch.step(r)]


def steady(moe, load, kept: float = 1.0, *, first: int = 1, **more):
    """The alarms after 12 equal steps."""
    watch = Watch(moe, window=4)
    for step in range(first, first + 12):
        watch.step(record(step, load, kept, **more))
    return watch.present


@pytest.mark.parametrize(
    "load,kept,moe,kinds",
    [
        (SOUND, 1.0, MoEConfig(), []),
        ([[793, 1, 1, 1, 1, 1, 1, 1]], 1.0, MoEConfig(), [("collapse", 0)]),
        (SOUND + [[400, 395, 1, 0, 0, 2, 1, 1]], 1.0, MoEConfig(top_k=2), [("collapse", 1)]),
        (STARVED, 1.0, MoEConfig(), [("dead", 0)]),
        (SOUND * 2, 0.79, MoEConfig(capacity_factor=1.0), [("dropped", 0), ("dropped", 1)]),
        (SOUND, 0.81, MoEConfig(capacity_factor=1.0), []),
        ([[5, 3]], 1.0, MoEConfig(experts=2, top_k=2), []),  # every expert is chosen by every token
        ([[0] * 8], 1.0, MoEConfig(), []),  # nothing was routed
        ([[793, 1, 1, 1, 1, 1, 1, 1]], 1.0, MoEConfig(router=RouterConfig(force="biased")), []),  # as it was asked for
    ],
)
def test_loads(load, kept, moe, kinds):
    assert [(a.kind, a.layer) for a in steady(moe, load, kept)] == kinds


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
    (alarm,) = steady(moe, COLLAPSED)
    assert remedy in str(alarm) and "MoE layer 0: 1 of 8 experts get 100%" in str(alarm)


@pytest.mark.parametrize("kind", get_args(RouterKind))
def test_no_remedy_is_refused(kind):
    """The bias is named to routers that have one, and then the config with it is admitted."""
    top_k = 1 if kind == "switch" else 2
    moe = MoEConfig(top_k=top_k, router=RouterConfig(kind), balance_loss=0.0 if kind == "hash" else 1e-3)
    (alarm,) = steady(moe, [[400, 400, 0, 0, 0, 0, 0, 0]] if top_k == 2 else COLLAPSED)
    said = "bias_rate" in alarm.remedy
    changed = dataclasses.replace(moe, bias_rate=1e-3, balance_loss=0.0)
    assert said == (not [p for p in check_moe(changed) if p.key.endswith("bias_rate")])


def test_an_alarm_is_told_once_until_it_has_been_away():
    """Over windows of 4 steps: a single bad step is none, a lasting fault is one, and again after a cure."""
    loads = [SOUND, COLLAPSED, *[SOUND] * 4, *[COLLAPSED] * 9, *[SOUND] * 9, *[COLLAPSED] * 6]
    (one, _, first), (two, _, second) = told(MoEConfig(), *(record(step, load) for step, load in enumerate(loads)))
    assert (one, two) == ("collapse", "collapse") and 6 <= first <= 9 and second >= 24
    assert Watch(None).step(record(0, SOUND)) == []


@pytest.mark.parametrize("load,kind", [(COLLAPSED, "collapse"), (STARVED, "dead")])
def test_a_young_router_may_settle(load, kind):
    """Where a loss mends it: an imbalance counts once it is old, has been there from the start, or is meant."""
    settles = [record(step, SOUND if step < 5 else load) for step in range(1, 30)]
    assert told(MENDED, *settles) == []
    assert told(dataclasses.replace(MENDED, balance_loss=0.0), *settles)[-1][:2] == (kind, 0)
    assert told(MENDED, *(record(step, load) for step in range(1, 30))) == [(kind, 0, 4)]
    assert told(MENDED, *(r | record(r["step"], r["load"], least=0.2) for r in settles))[-1][:2] == (kind, 0)
    late = [record(r["step"] + YOUNG - 10, r["load"]) for r in settles]
    assert told(MENDED, *late) == [(kind, 0, OLD)]
    assert told(MENDED, *late, warmup=10) == [(kind, 0, OLD + 10)]


@pytest.mark.parametrize(
    "kept,factor,first,heavy",
    [(0.5, 1.25, 1, False), (0.35, 1.25, 1, True), (0.5, 1.25, OLD, True), (0.75, 0.75, 1, True)],
)
def test_drops_of_a_young_run(kept, factor, first, heavy):
    """Until its loads settle more than half may be dropped; with fewer slots than choices no settling helps."""
    found = steady(dataclasses.replace(MENDED, capacity_factor=factor), SOUND, kept, first=first)
    assert [a.kind for a in found] == ["dropped"] * heavy
    warming = told(MENDED, *(record(step, SOUND, 0.35) for step in range(1, 30)), warmup=30)
    assert warming == [], "in warm-up nothing is learned yet"
    assert all(f"(now {factor:g})" in a.remedy and f"{1 - kept:.0%} of" in a.text for a in found)


@pytest.mark.parametrize(
    "spreads,first,uniform",
    [
        ([0.005] * 12, 1, True),  # as good as equal, from the start
        ([0.0] * 12, 1, True),
        ([0.0] * 8 + [5e-4] * 4, 1, True),  # as float32 rounds
        ([0.001 * 1.2**i for i in range(12)], 1, False),  # it has begun to learn
        ([0.05] * 12, 1, False),  # small, as a young router is
        ([0.05] * 12, OLD, True),  # and still so
        ([0.05 * 1.2**i for i in range(12)], OLD, False),
        ([0.01] * 5 + [0.05] * 12, OLD, True),  # it once began to learn, and stopped
        ([0.3] * 12, OLD, False),  # it prefers experts, and stays
    ],
)
@pytest.mark.parametrize("load", [SOUND, COLLAPSED])  # of equal scores the first expert is taken: its cause is told
def test_uniform_routers(spreads, first, uniform, load):
    steps = [record(first + i, load, spread=s) for i, s in enumerate(spreads)]
    kinds = {kind for kind, *_ in told(MENDED, *steps[3:])}
    assert kinds >= {"uniform"} if uniform else "uniform" not in kinds
    assert "uniform" not in {kind for kind, *_ in told(MENDED, *steps, warmup=first + 20)}  # nothing to have learned
    hashed = MoEConfig(router=RouterConfig("hash"))
    assert "uniform" not in {kind for kind, *_ in told(hashed, *steps)}
    if uniform and load is COLLAPSED:
        watch = Watch(MENDED, window=4)
        assert [a.kind for r in steps[3:] for a in watch.step(r)][-1] == "uniform"
        assert [a.kind for a in watch.present] == ["uniform"]
        assert "lower model.moe.balance_loss (now 0.01)" in watch.present[0].remedy


@pytest.mark.parametrize("moe", [MoEConfig(), None])
@pytest.mark.parametrize("logged", [False, True])
def test_what_is_not_finite_is_told_at_once(moe, logged):
    """By the first step that had it, from the loop's numbers and from the log, in which they are null."""
    broken = {"loss": 3.0, "total_loss": 3.0, "grad_norm": math.inf, "grad_norms": {"experts": math.nan, "norm": 0.5}}
    steps = [record(1, SOUND), record(2, SOUND, **broken), *(record(s, COLLAPSED, loss=math.nan) for s in range(3, 12))]
    if logged:
        steps = [json.loads(encode(r)) for r in steps]
    watch = Watch(moe, window=4)
    assert [(a.kind, a.layer, a.step) for r in steps for a in watch.step(r)] == [("nonfinite", None, 2)]
    (alarm,) = watch.present
    assert alarm.step == 2 and alarm.text == "the gradient of experts is not finite"
    assert "before step 2" in alarm.remedy and ("z_loss" in alarm.remedy) == (moe is not None)
    for step in range(12, 17):  # and is over after a window of sound steps
        watch.step(record(step, SOUND))
    assert watch.present == []


@pytest.mark.parametrize("kind, more", [("softmax_topk", {}), ("noisy_topk", {"gate": "mlp"})])
def test_every_gradient_is_told_as_what_it_is(kind, more):
    """With all options on, and experts in every layer: no dense layer's group."""
    router = RouterConfig(kind, bias=True, **more)
    experts = MoEConfig(top_k=2, shared_experts=1, shared_gate=True, router=router)
    m = ModelConfig(vocab=8, layers=2, d_model=8, d_ff=8, heads=2, norm="layer", biases=True, moe=experts)
    params = Model.of(Config(model=m)).shapes
    groups = grouped(params)
    noise = {"gate_in", "noise"} if more else set()
    assert groups.keys() == {"experts", "shared", "router", "attention", "norm", "embedding"} | noise
    ffn = params["stacks"]["0"]["blocks"]["0"]["ffn"]
    assert len(groups["shared"]) == len(jax.tree.leaves(ffn["shared"])) + 1
    assert len(groups["router"]) == 2
    assert sum(map(len, groups.values())) == len(jax.tree.leaves(params))


TOOL = Path(__file__).parent.parent / "tools" / "bench_health.py"


@pytest.mark.usefixtures("inside")
def test_what_the_checks_cost_is_measured():
    """No timing is asserted: every figure is there, and the step that is compared with computes the same without."""
    spec = importlib.util.spec_from_file_location("bench_health", TOOL)
    assert spec is not None and spec.loader is not None
    bench = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(bench)
    sizes = ["layers=1", "vocab=16", "d_model=8", "d_ff=8", "heads=2", "moe.d_ff=8"]
    cfg = config.load("bench_small", [*(f"model.{s}" for s in sizes), "data.batch=2", "data.length=8"])
    steps = bench.programs(cfg)
    whole, bare = steps["step"](), steps["unchecked"]()
    assert whole.keys() - bare.keys() == set(bench.CHECKED)
    assert bare["loss"] == whole["loss"]
    report = bench.report(steps, rounds=1)
    assert [(w["layers"], w["experts"]) for w in report["watch"]] == [(4, 8), (58, 256)]
    assert len(bench.lines(json.loads(json.dumps(report)))) == 6


def test_windows_add_up():
    """The running sums are those of the last steps, and of all."""
    rng, watch, loads = np.random.default_rng(0), Watch(MoEConfig(), window=4), []
    for step in range(1, 11):
        loads.append(rng.integers(1, 50, (3, 8)))
        watch.step(record(step, loads[-1].tolist(), 0.9, least=step))
    w = watch.look(10)
    np.testing.assert_array_equal(w.load, sum(loads[-4:]))
    np.testing.assert_array_equal(w.ever, sum(loads))
    lost = [[n - round(0.9 * n) for n in load.sum(1).tolist()] for load in loads[-4:]]
    np.testing.assert_array_equal(w.dropped, np.sum(lost, 0))
    np.testing.assert_allclose(w.least, [8.5 / 8] * 3)
