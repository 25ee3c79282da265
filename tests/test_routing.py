"""Routers and slots against pinned vectors, a loop over tokens and slots, and invariants."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_jax import balance
from moe_jax.capacity import assign, by_expert, capacity
from moe_jax.config import MoEConfig, RouterConfig, check_moe
from moe_jax.routing import QUIET, Noise, draw, jittered, recorded, route, scramble

router_call = jax.jit(route, static_argnames=("moe", "slots"))
slots_call = jax.jit(assign, static_argnames=("moe",))
stats_call = jax.jit(balance.statistics, static_argnames=("moe", "rows"))


def routed(logits, mask=None, noise=QUIET, *, moe, slots, **inputs):
    """Routing, slots and statistics. Queue and sums look at few settings, so that routers share their programs."""
    priority, moe = moe.priority, replace(moe, priority="choice")
    routing = router_call(logits, moe, mask, noise, slots=slots, **inputs)._replace(chance=None)
    E, K = logits.shape[-1], routing.expert.shape[-1]
    queue = MoEConfig(experts=E, top_k=K, priority=priority)
    if moe.router.normalize == "after":
        queue = replace(queue, router=RouterConfig(normalize="after", scale=moe.router.scale))
    held = slots_call(routing, queue, slots, noise)
    counted = RouterConfig(balance="first" if balance.first_only(moe) else "all")
    return routing, held, stats_call(routing, held, replace(moe, router=counted), mask)


CASES = {
    "switch_top1_c2": (RouterConfig("switch"), 1, "choice"),
    "switch_top1_c12": (RouterConfig("switch"), 1, "choice"),
    "gshard_top2_all_before": (RouterConfig("gshard"), 2, "choice"),
    "gshard_top2_random": (RouterConfig("gshard", second="random", threshold=0.5), 2, "choice"),
    "topk2_c3_choice": (RouterConfig("topk_softmax"), 2, "choice"),
    "topk2_c3_score": (RouterConfig("softmax_topk", normalize="before"), 2, "probability"),
    "mixtral_top2_dropless": (RouterConfig("topk_softmax"), 2, "choice"),
}


@pytest.mark.parametrize("case", CASES)
def test_pinned_vectors(golden, case):
    want, (router, k, priority) = golden[case], CASES[case]
    logits = jnp.asarray(want["logits"], jnp.float32)
    moe = MoEConfig(experts=logits.shape[1], top_k=k, router=router, priority=priority)
    uniform = jnp.asarray(want["uniform"], jnp.float32) if "uniform" in want else None
    capacity = want.get("capacity", len(logits))
    routing, slots, stats = routed(logits, None, Noise(uniform, None), moe=moe, slots=capacity)
    kept = np.asarray(slots.kept)
    np.testing.assert_array_equal(routing.expert, want["index"])
    np.testing.assert_allclose(slots.gate, want["gate"], atol=1e-6)
    if "kept" in want:
        np.testing.assert_array_equal(kept, np.asarray(want["kept"], bool))
        np.testing.assert_array_equal(np.asarray(slots.position)[kept], np.asarray(want["slot"])[kept])
    if "aux_loss" in want:
        assert balance.balance_loss(stats, moe) == pytest.approx(want["aux_loss"], abs=1e-6)
    if "z_loss" in want:
        assert balance.z_loss(stats) == pytest.approx(want["z_loss"], abs=1e-6)


def test_pinned_vectors_of_deepseek_v3(golden):
    """Experts, weights, loads, the bias after a step, and the sequence-wise loss."""
    want = golden["deepseek_v3_gate"]
    logits, bias = (jnp.asarray(want[name], jnp.float32) for name in ("logits", "bias"))
    grouped = RouterConfig("deepseek_v3", groups=want["num_groups"], topk_groups=want["topk_groups"])
    router = replace(grouped, scale=want["scale"])
    moe = MoEConfig(experts=16, top_k=want["k"], router=router, bias_rate=0.001, sequence_loss=1.0)
    routing, _, stats = routed(logits, moe=moe, slots=16, bias=bias)
    np.testing.assert_array_equal(np.sort(routing.expert, -1), want["index_sorted"])
    dense = np.zeros((16, 16))
    np.put_along_axis(dense, np.asarray(routing.expert), np.asarray(routing.gate), -1)
    np.testing.assert_allclose(dense, want["dense_weight"], atol=1e-6)
    np.testing.assert_array_equal(stats.load, want["load"])
    np.testing.assert_allclose(balance.updated_bias(bias, stats.load, moe), want["new_bias"], atol=1e-7)
    sequences = jnp.asarray(want["sequence_loss_logits"], jnp.float32)
    _, _, stats = routed(sequences, moe=moe, slots=16, bias=bias)
    assert balance.sequence_loss(stats, moe) == pytest.approx(want["sequence_loss"], abs=1e-6)


def test_pinned_vectors_of_deepseek_v2(golden):
    """Experts and the losses of experts, devices and communication."""
    want = golden["deepseek_v2_losses"]
    D, logits = want["num_devices"], jnp.asarray(want["logits"], jnp.float32)
    router = RouterConfig("deepseek_v2", groups=D, topk_groups=want["limit"])
    coefficients = {"balance_loss": 1.0, "device_loss": 1.0, "communication_loss": 1.0}
    moe = MoEConfig(logits.shape[1], want["k"], router=router, balance_devices=D, **coefficients)
    routing, _, stats = routed(logits, moe=moe, slots=8)
    np.testing.assert_array_equal(routing.expert, want["index"])
    got = balance.losses(stats, moe)
    for name, key in (("balance_loss", "expert"), ("device_loss", "device"), ("communication_loss", "communication")):
        assert got[name] == pytest.approx(want[key], abs=1e-6), name


def test_pinned_vectors_of_expert_choice(golden):
    """The tokens of each expert with their gates, and how many experts each token has."""
    want = golden["expert_choice_c6"]
    logits = jnp.asarray(want["logits"], jnp.float32)
    moe = MoEConfig(4, 2, router=RouterConfig("expert_choice"), capacity_factor=1.0)
    assert capacity(moe, len(logits), None) == want["capacity"]
    _, slots, _ = routed(logits, moe=moe, slots=want["capacity"])
    gate, kept = np.zeros((12, 4)), np.zeros((12, 4), bool)
    for e, (tokens, gates) in enumerate(zip(want["token"], want["gate"], strict=True)):
        gate[tokens, e], kept[tokens, e] = gates, True
    np.testing.assert_array_equal(slots.kept, kept)
    np.testing.assert_array_equal(kept.sum(1), want["experts_per_token"])
    np.testing.assert_allclose(slots.gate, gate, atol=1e-6)


# 200 random cases of every router against the loop

ROUTERS = {
    "switch": RouterConfig("switch"),
    "gshard": RouterConfig("gshard"),
    "gshard-random": RouterConfig("gshard", second="random", threshold=0.3),
    "gshard-sample": RouterConfig("gshard", second="sample"),
    "gshard-none": RouterConfig("gshard", normalize="none"),
    "topk_softmax": RouterConfig("topk_softmax"),
    "softmax_topk": RouterConfig("softmax_topk"),
    "softmax_topk-before": RouterConfig("softmax_topk", normalize="before"),
    "softmax_topk-bias": RouterConfig("softmax_topk"),
    "noisy_topk": RouterConfig("noisy_topk"),
    "deepseek_v2": RouterConfig("deepseek_v2", scale=16.0),
    "deepseek_v2-sumk": RouterConfig("deepseek_v2", group_score="sumk"),
    "deepseek_v3-bias": RouterConfig("deepseek_v3", scale=2.5),
    "deepseek_v3-max": RouterConfig("deepseek_v3", group_score="max"),
    "expert_choice": RouterConfig("expert_choice"),
    "hash": RouterConfig("hash"),
}
K_OF = {1: 1, 2: 2, 8: 4, 128: 8, 2048: 4}
GROUPS = {8: (4, 2), 128: (8, 4), 2048: (16, 2)}  # groups of experts, and how many a token may use
SIZES = {1: (20, 7), 2: (40, 11), 8: (80, 31), 128: (60, 13), 2048: (20, 5)}  # groups of tokens and their size: 220


def setting(name, E, **more):
    """The config of a router for E experts."""
    router = ROUTERS[name]
    k = {"switch": 1, "gshard": 2}.get(router.kind, min(K_OF.get(E, 2), E))
    if name.startswith("deepseek") and E in GROUPS:
        router = replace(router, groups=GROUPS[E][0], topk_groups=GROUPS[E][1])
    elif router.group_score is not None:
        router = replace(router, group_score=None)
    if router.kind == "expert_choice":
        more = {"capacity_factor": 1.0} | more
    return MoEConfig(experts=E, top_k=k, router=router, bias_rate=0.0 if name.endswith("bias") else None, **more)


def sample(name, E, lead, S, seed=0):
    """(logits, mask, noise, other inputs of `route`): a third of the groups with ties; padding from none to all."""
    rng = np.random.default_rng(seed)
    router = ROUTERS[name]
    logits = rng.normal(size=(lead, S, E)).astype(np.float32)
    if router.kind == "expert_choice":  # equal tokens; equal logits would not make equal sums of exponentials
        logits[::3, S // 2 :] = logits[::3, : S - S // 2]
    else:
        logits[::3] = np.round(logits[::3]) + 0.0  # no -0.0, which a sort puts below 0.0
    padding = np.array([0.0, 0.3, 0.9, 1.0])[rng.integers(0, 4, lead)]
    mask = rng.random((lead, S)) >= padding[:, None]
    shape = {"random": (lead, S), "sample": (lead, S, E)}.get(router.second)
    noise = None if shape is None else rng.random(shape).astype(np.float32)
    inputs = {}
    if name.endswith("bias"):
        inputs["bias"] = (0.3 * rng.normal(size=E)).astype(np.float32)
    if router.kind == "noisy_topk":
        noise = rng.normal(size=logits.shape).astype(np.float32)
        inputs["spread"] = rng.uniform(0.1, 2.0, logits.shape).astype(np.float32)
    if router.kind == "hash":
        inputs["ids"] = rng.integers(0, 2**17, (lead, S)).astype(np.int32)
    return logits, mask, noise, inputs


def group(case, g):
    """Group g of a `sample`."""
    logits, mask, noise, inputs = case
    noise = None if noise is None else noise[g]
    return logits[g], mask[g], noise, {k: v if k == "bias" else v[g] for k, v in inputs.items()}


def wanted(moe, logits, mask, noise, inputs, slots, **more):
    """The loop's choices of one group."""
    K = moe.experts if moe.router.kind == "expert_choice" else moe.top_k
    return oracle.choose(logits, moe.router, K, mask=mask, noise=noise, slots=slots, **inputs, **more)


@pytest.mark.parametrize("name,E", [(name, E) for name in ROUTERS for E in SIZES if not check_moe(setting(name, E))])
def test_equals_the_loop(name, E):
    """Experts, gates, slots and drops of random groups, with ties, padding, groups of padding only, prime sizes."""
    lead, S = SIZES[E]
    moe, case = setting(name, E), sample(name, E, lead, S)
    logits, mask, noise, inputs = case
    C = max(1, S * moe.top_k // E)
    routing, slots, stats = routed(logits, mask, Noise(noise, None), moe=moe, slots=C, **inputs)
    routing, slots = jax.tree.map(np.asarray, (routing, slots))
    load, sitting = np.zeros(E, int), 0
    for g in range(lead):
        expert, gate, asked = wanted(moe, *group(case, g), C)
        np.testing.assert_array_equal(routing.expert[g], expert)
        np.testing.assert_array_equal(routing.valid[g], asked)
        np.testing.assert_allclose(routing.gate[g], gate * asked, atol=1e-6 * moe.router.scale)
        position, kept = oracle.queue(expert, asked, None, C, "choice")
        np.testing.assert_array_equal(slots.kept[g], kept)
        np.testing.assert_array_equal(slots.position[g][kept], position[kept])
        np.testing.assert_allclose(slots.gate[g], gate * kept, atol=1e-6 * moe.router.scale)
        load += np.bincount(expert[asked], minlength=E)
        sitting += kept.sum()
    np.testing.assert_array_equal(stats.load, load)
    assert (int(stats.routed), int(stats.kept)) == (load.sum(), sitting)


@pytest.mark.parametrize("priority", ["choice", "token", "probability", "batch", "random"])
def test_queues_equal_the_loop(priority):
    """Who gets a slot, and which, by every priority, in 200 groups with ties and padding."""
    moe = MoEConfig(experts=8, top_k=3, priority=priority)
    logits, mask, _, _ = sample("softmax_topk", 8, 200, 13)
    uniform = np.random.default_rng(1).random((200, 13, 3)).astype(np.float32)
    uniform[::2] = np.round(uniform[::2], 1)  # equal numbers: by token
    routing, slots, _ = routed(logits, mask, Noise(None, uniform), moe=moe, slots=4)
    routing, slots = jax.tree.map(np.asarray, (routing, slots))
    score = np.take_along_axis(routing.prob, routing.expert, -1)
    for g in range(200):
        position, kept = oracle.queue(routing.expert[g], routing.valid[g], score[g], 4, priority, uniform[g])
        np.testing.assert_array_equal(slots.kept[g], kept)
        np.testing.assert_array_equal(slots.position[g][kept], position[kept])
    assert 0 < slots.kept.sum() < routing.valid.sum()


def test_deepseek_v3_gate_is_its_own_code_in_float32():
    """The steps of `Gate.forward` of the published model.py in float32: the same experts; weights to the last bits.

    The order in which a sum is taken and the exponential are the libraries' own, so 4 units in the last place.
    """
    rng = np.random.default_rng(0)
    moe = MoEConfig(256, 8, router=RouterConfig("deepseek_v3", groups=8, topk_groups=4, scale=2.5), bias_rate=0.0)
    logits = rng.normal(size=(500, 256)).astype(np.float32)
    bias = (0.1 * rng.normal(size=256)).astype(np.float32)
    one = np.float32(1.0)
    original = one / (one + np.exp(-logits))
    scores = original + bias
    grouped = scores.reshape(500, 8, 32)
    group_scores = np.sort(grouped, -1)[..., -2:].sum(-1)
    indices = np.argsort(-group_scores, -1, kind="stable")[:, :4]
    outside = np.ones((500, 8), bool)
    np.put_along_axis(outside, indices, False, 1)
    scores = np.where(outside[..., None], -np.inf, grouped).reshape(500, 256)
    indices = np.argsort(-scores, -1, kind="stable")[:, :8]
    weights = np.take_along_axis(original, indices, 1)
    weights = weights / weights.sum(-1, keepdims=True) * np.float32(2.5)
    routing = router_call(logits, moe, bias=bias)
    np.testing.assert_array_equal(routing.expert, indices)
    assert weights.dtype == np.float32
    np.testing.assert_array_max_ulp(np.asarray(routing.gate), weights, 4)
    assert len(np.unique(indices // 32)) == 8 and max(len(set(row // 32)) for row in indices) == 4


# Invariants


@settings(max_examples=300, deadline=None)
@given(
    st.sampled_from(sorted(ROUTERS)),
    st.sampled_from(["choice", "token", "probability", "batch", "random"]),
    st.integers(1, 14),
    st.integers(0, 2**30),
)
def test_slots_are_exact(name, priority, C, seed):
    """Kept at most C an expert, every slot once, routed = kept + dropped, and nothing for padding or of it."""
    E, S = 8, 13
    if ROUTERS[name].kind == "expert_choice":
        priority, C = "choice", 3 if C < 8 else 8  # all others are refused; few programs
    moe = setting(name, E)
    moe = replace(moe, priority=priority, top_k=min(moe.top_k, 2))
    logits, mask, noise, inputs = group(sample(name, E, 2, S, seed), seed % 2)
    noise = Noise(noise, np.random.default_rng(seed).random((S, moe.top_k)).astype(np.float32))
    routing, slots, stats = jax.tree.map(np.asarray, routed(logits, mask, noise, moe=moe, slots=C, **inputs))
    kept, expert, place = slots.kept, routing.expert, slots.position
    used = list(zip(expert[kept], place[kept], strict=True))
    assert len(set(used)) == len(used), "a slot was given twice"
    assert (place[kept] < C).all()
    assert not kept[~mask].any() and not routing.valid[~mask].any()
    assert not routing.gate[~mask].any() and not slots.gate[~mask].any()
    load = np.bincount(expert[routing.valid], minlength=E)
    np.testing.assert_array_equal(stats.load, load)
    assert stats.routed == load.sum()
    assert stats.kept == np.minimum(load, C).sum(), "an expert with room dropped a token, or a full one took one"
    assert (np.bincount(expert[kept], minlength=E) == np.minimum(load, C)).all()
    # other numbers in the padding change nothing at all
    other = np.where(mask[:, None], logits, 7.0 - 3.0 * logits)
    again = jax.tree.map(np.asarray, routed(other, mask, noise, moe=moe, slots=C, **inputs))
    jax.tree.map(np.testing.assert_array_equal, again[2], stats)
    np.testing.assert_array_equal(again[1].kept, kept)
    np.testing.assert_array_equal(again[1].gate, slots.gate)


@pytest.mark.parametrize("name", ROUTERS)
def test_gradient_reaches_the_router(name):
    """Numerical gradient of a weighted sum of gates, for every kind, top-1 included; hash learns nothing."""
    moe = setting(name, 8)
    logits, _, noise, inputs = group(sample(name, 8, 2, 7, seed=4), 1)  # without ties
    noise = Noise(noise, None)
    weight = np.random.default_rng(1).normal(size=(7, 8)).astype(np.float32)

    @jax.jit
    def f(x, inputs):
        routing = route(x, moe, None, noise, slots=3, **inputs)
        return (routing.gate * jnp.take_along_axis(weight, routing.expert, -1)).sum() / moe.router.scale

    got = jax.grad(f)(jnp.asarray(logits), inputs)
    assert (float(jnp.abs(got).max()) > 1e-3) == (moe.router.kind != "hash")
    eps = 1e-2
    for s, e in [(0, 0), (2, 3), (5, 4), (6, 7)]:
        bump = np.zeros_like(logits)
        bump[s, e] = eps
        want = (f(logits + bump, inputs) - f(logits - bump, inputs)) / (2 * eps)
        assert float(got[s, e]) == pytest.approx(float(want), abs=2e-3)
    if "bias" in inputs:  # it chooses, and has no gradient
        assert not jax.grad(lambda b: f(logits, {"bias": b}))(inputs["bias"]).any()


@pytest.mark.parametrize("name", ["softmax_topk-bias", "deepseek_v3-bias"])
def test_gates_do_not_know_the_bias(name):
    """A bias common to all changes nothing; a large one chooses, and the gates are those of the plain scores."""
    moe = setting(name, 8)
    logits = sample(name, 8, 2, 31)[0][1]  # without ties
    plain = router_call(logits, moe)
    common = router_call(logits, moe, bias=jnp.full(8, 0.25))
    np.testing.assert_array_equal(common.expert, plain.expert)
    np.testing.assert_array_equal(common.gate, plain.gate)
    favoured = router_call(logits, moe, bias=jnp.where(jnp.arange(8) < 4, 9.0, 0.0))
    assert set(np.asarray(favoured.expert).ravel()) == {0, 1, 2, 3}
    want = oracle.gates_of(np.asarray(logits, np.float64), np.asarray(favoured.expert), moe.router)
    np.testing.assert_allclose(favoured.gate, want, atol=1e-6 * moe.router.scale)


# Replay and forced routing


@pytest.mark.parametrize("name", ROUTERS)
def test_replay(name):
    """A recorded routing given back is itself; on other logits it the same experts with the gates of those."""
    moe, case = setting(name, 8), sample(name, 8, 20, 13)
    logits, mask, noise, inputs = case
    first = router_call(logits, moe, mask, Noise(noise, None), slots=5, **inputs)
    chosen = recorded(first)
    again = router_call(logits, moe, mask, Noise(noise, None), slots=5, chosen=chosen, **inputs)
    for field in ("expert", "gate", "valid", "prob"):
        np.testing.assert_array_equal(getattr(again, field), getattr(first, field), field)
    other = sample(name, 8, 20, 13, seed=9)[0]
    moved = router_call(other, moe, mask, Noise(noise, None), slots=5, chosen=chosen, **inputs)
    np.testing.assert_array_equal(moved.expert, first.expert)
    np.testing.assert_array_equal(moved.valid, first.valid)
    for g in range(20):
        _, *rest = group(case, g)
        if moe.router.kind != "noisy_topk":
            rest[1] = None  # noise chose experts, and these are given
        _, gate, _ = wanted(moe, other[g], *rest, 5, replay=np.asarray(first.expert[g]))
        np.testing.assert_allclose(moved.gate[g], gate * np.asarray(first.valid[g]), atol=1e-6 * moe.router.scale)


@pytest.mark.parametrize("name", ["topk_softmax", "softmax_topk-before", "deepseek_v3-bias"])
def test_replay_of_fewer_choices(name):
    """Gates are normalised over the choices that there are; a token without any has none, and a finite gradient."""
    moe = setting(name, 8)
    logits = sample(name, 8, 2, 3)[0][1]  # without ties
    chosen = jnp.array([[2, 5, -1, -1], [-1, 0, 7, 3], [-1, -1, -1, -1]])
    gate = np.asarray(router_call(logits, moe, chosen=chosen).gate)
    for s, experts in enumerate([[2, 5], [0, 7, 3]]):
        want = oracle.gates_of(np.asarray(logits[s], np.float64), np.array(experts), moe.router)
        np.testing.assert_allclose(gate[s][np.asarray(chosen[s]) >= 0], want, atol=1e-6 * moe.router.scale)
    assert not gate[np.asarray(chosen) < 0].any()
    slope = jax.grad(lambda x: (route(x, moe, chosen=chosen).gate ** 2).sum())(jnp.asarray(logits))
    assert np.isfinite(slope).all() and slope[0].any() and not slope[2].any()


@pytest.mark.parametrize("E,K,S", [(8, 2, 13), (7, 3, 31), (2048, 8, 5), (1, 1, 4)])
def test_forced_balanced(E, K, S):
    """Loads of each group are equal to within one, tokens have K different experts, gates are the router's."""
    moe = MoEConfig(E, K, router=RouterConfig("softmax_topk", force="balanced"))
    logits = np.random.default_rng(0).normal(size=(3, S, E)).astype(np.float32)
    routing = router_call(logits, moe)
    for expert in np.asarray(routing.expert):
        assert np.ptp(np.bincount(expert.ravel(), minlength=E)) <= 1
        assert all(len(set(row)) == K for row in expert)
    np.testing.assert_allclose(routing.gate, np.take_along_axis(np.asarray(routing.prob), routing.expert, -1))


def test_forced_biased():
    """Fixed, whatever the logits; as skewed as asked: without spread uniform, and each token has different experts."""
    loads = {}
    for std in (0.0, 2.0):
        moe = MoEConfig(8, 2, router=RouterConfig("softmax_topk", force="biased", force_std=std))
        one, two = (router_call(sample("switch", 8, 2, 3001, seed)[0], moe).expert for seed in (0, 1))
        np.testing.assert_array_equal(one, two)
        np.testing.assert_array_equal(one[0], one[1])
        assert (one[..., 0] != one[..., 1]).all()
        loads[std] = np.bincount(np.asarray(one[0]).ravel(), minlength=8) / (2 * 3001 / 8)
    assert np.abs(loads[0.0] - 1.0).max() < 0.15
    assert loads[2.0].max() > 2.0 and loads[2.0].min() < 0.3


# Noise


def test_noisy_topk_probability_is_a_frequency():
    """P(x, i) against how often expert i is among the K best when only its own noise is drawn again."""
    n, K, moe = 10_000, 2, MoEConfig(5, 2, router=RouterConfig("noisy_topk"))
    rng = np.random.default_rng(0)
    logits = np.array([[2.0, 1.0, 0.0, -0.5, -2.0]], np.float32)
    spread = rng.uniform(0.5, 1.5, (1, 5)).astype(np.float32)
    fixed = rng.normal(size=(1, 5)).astype(np.float32)
    noise = np.tile(fixed, (5, n, 1))  # case i redraws column i
    for i in range(5):
        noise[i, :, i] = rng.normal(size=n)
    wide = [np.broadcast_to(a, noise.shape) for a in (logits, spread)]
    routing = router_call(wide[0], moe, None, Noise(noise, None), spread=wide[1])
    seen = [(np.asarray(routing.expert[i]) == i).any(-1).mean() for i in range(5)]
    chance = np.asarray(router_call(logits, moe, None, Noise(fixed, None), spread=spread).chance[0])
    assert np.abs(seen - chance).max() < 4 * 0.5 / np.sqrt(n)
    assert chance.min() < 0.2 and chance.max() > 0.8, "the test needs different chances"
    np.testing.assert_allclose(
        chance, oracle.chance(*(a[0].astype(float) for a in (logits, fixed, spread)), K), atol=1e-6
    )


def test_noise_is_off_in_evaluation():
    """Without a key nothing is drawn: the noisy router is the quiet one and reports no chances."""
    logits, _, noise, inputs = sample("noisy_topk", 8, 1, 31)
    moe = setting("noisy_topk", 8)
    assert draw(None, moe, (31, 8)) == Noise(None, None)
    quiet, plain = router_call(logits, moe, **inputs), router_call(logits, setting("topk_softmax", 8))
    np.testing.assert_array_equal(quiet.expert, plain.expert)
    np.testing.assert_array_equal(quiet.gate, plain.gate)
    assert quiet.chance is None
    assert (np.asarray(router_call(logits, moe, None, Noise(noise, None), **inputs).expert) != plain.expert).any()


def test_jitter():
    """Factors uniform in [0.9, 1.1], one for each number, a function of the key; none without a key."""
    x = jnp.full((100, 100), 2.0)
    y = np.asarray(jittered(x, 0.1, jax.random.key(0))) / 2.0
    assert y.min() >= 0.9 and y.max() <= 1.1 and len(np.unique(y)) > 9000
    assert y.mean() == pytest.approx(1.0, abs=4 * 0.1 / np.sqrt(3 * y.size))
    assert y.var() == pytest.approx(0.1**2 / 3, rel=0.05)
    np.testing.assert_array_equal(jittered(x, 0.1, jax.random.key(0)), y * np.float32(2.0))
    assert jittered(x, 0.1, None) is x and jittered(x, 0.0, jax.random.key(0)) is x


# Hash


def test_hash():
    """A function of the token's id alone: K different experts, equal gates, near-uniform over ids, not of logits.

    The published test vectors of MurmurHash3_x86_32 for no bytes are its finalizer of the seed.
    """
    vectors = {0x00000000: 0x00000000, 0x00000001: 0x514E28B7, 0xFFFFFFFF: 0x81F16F39}
    assert [oracle.fmix32(seed) for seed in vectors] == list(vectors.values())
    assert list(map(int, scramble(jnp.asarray(list(vectors), jnp.uint32)))) == list(vectors.values())
    moe = MoEConfig(8, 3, router=RouterConfig("hash"))
    ids = jnp.arange(8000).reshape(2, 4000)
    routing = router_call(jnp.zeros((2, 4000, 8)), moe, ids=ids)
    expert = np.asarray(routing.expert).reshape(-1, 3)
    assert all(len(set(row)) == 3 for row in expert) and (np.asarray(routing.gate) == np.float32(1 / 3)).all()
    np.testing.assert_allclose(routing.prob, 1 / 8)
    for k in range(3):
        seen = np.bincount(expert[:, k], minlength=8)
        assert ((seen - 1000.0) ** 2 / 1000.0).sum() < 24.3  # 0.1 percent point of chi-square, 7 degrees of freedom
    pairs = np.bincount(8 * expert[:-1, 0] + expert[1:, 0], minlength=64)  # neighbouring ids part
    assert ((pairs - 125.0) ** 2 / 125.0).sum() < 103.4  # likewise, 63 degrees
    order = np.random.default_rng(0).permutation(8000)
    again = router_call(jnp.ones((2, 4000, 8)), moe, ids=jnp.asarray(order).reshape(2, 4000))
    np.testing.assert_array_equal(np.asarray(again.expert).reshape(-1, 3), expert[order])
    with pytest.raises(ValueError, match="chooses by token id"):
        route(jnp.zeros((4, 8)), moe)


@pytest.mark.parametrize("second", ["random", "sample"])
def test_gshard_second_expert_frequencies(second):
    """Chi-square of the second expert's policy over 20,000 draws; fixed key, fixed answer; evaluation has no noise."""
    moe = MoEConfig(experts=4, top_k=2, router=RouterConfig("gshard", second=second, threshold=0.8))
    n = 20_000
    logits = jnp.tile(jnp.array([2.0, 1.0, 0.5, -0.5]), (n, 1))
    noise = draw(jax.random.key(0), moe, logits.shape)
    routing = route(logits, moe, noise=noise)
    p = np.asarray(jax.nn.softmax(logits[0]))
    if second == "random":
        keep = min(1.0, p[1] / (p[0] + p[1]) / 0.8)
        seen = np.array([int(routing.valid[:, 1].sum())])
        seen, want = np.append(seen, n - seen), n * np.array([keep, 1 - keep])
    else:
        seen = np.bincount(np.asarray(routing.expert[:, 1]), minlength=4)[1:]
        want = n * p[1:] / p[1:].sum()
    assert ((seen - want) ** 2 / want).sum() < 13.8  # 0.1 percent point of chi-square, 2 degrees of freedom
    again = route(logits, moe, noise=draw(jax.random.key(0), moe, logits.shape))
    np.testing.assert_array_equal(routing.expert, again.expert)
    quiet = route(logits, moe)
    assert bool(quiet.valid.all()) and set(np.asarray(quiet.expert[:, 1])) == {1}


@pytest.mark.parametrize(
    "E,k,S,f,want",
    [(8, 1, 100, 1.25, 16), (8, 2, 100, 1.1, 28), (10, 2, 100, 1.1, 22), (8, 1, 4, 0.1, 4), (8, 2, 5, 9.0, 5)],
)
def test_capacity_is_the_exact_ceiling(E, k, S, f, want):
    """ceil(K*S*f/E) of the written decimal (2*100*1.1/10 is 22, not 23), min_capacity below, the group above."""
    assert capacity(MoEConfig(experts=E, top_k=k), S, f) == want


def test_positions_need_no_room():
    """Places are counted whatever the capacity, so that a larger capacity only adds tokens."""
    moe = MoEConfig(experts=4, top_k=2)
    logits = jax.random.normal(jax.random.key(0), (50, 4))
    small, large = (routed(logits, moe=moe, slots=n)[1] for n in (5, 9))
    np.testing.assert_array_equal(large.position, small.position)
    assert int(small.kept.sum()) == 20 and int(large.kept.sum()) == 36
    assert bool((large.kept | ~small.kept).all())


def test_what_a_router_lacks_is_asked_for():
    """Token ids for hash, the size of an expert's list for expert choice: an error that says what to pass."""
    for kind, remedy in (("hash", "tokens=ids"), ("expert_choice", "slots=capacity")):
        moe = MoEConfig(experts=4, top_k=2, capacity_factor=1.0, router=RouterConfig(kind))
        with pytest.raises(ValueError, match=remedy):
            route(jnp.zeros((5, 4)), moe)


@pytest.mark.parametrize("kind", ["gshard", "topk_softmax", "softmax_topk"])
def test_choices_survive_underflow(kind):
    """Logits 200 apart: the probabilities of all but one expert are 0 in float32, and their order still counts."""
    moe = MoEConfig(experts=3, top_k=2, router=RouterConfig(kind))
    routing = route(jnp.array([[200.0, 0.0, 50.0]]), moe)
    assert routing.expert.tolist() == [[0, 2]] and bool(jnp.isfinite(routing.gate).all())


def test_small_scores_are_shares_all_the_same():
    """Sigmoids of logits about -60 are 1e-26: gates, probabilities and gradients are still those of their quotients."""
    moe = MoEConfig(experts=4, top_k=2, router=RouterConfig("deepseek_v3"), balance_loss=1e-2)
    logits = np.array([[-60.0, -61.0, -59.5, -63.0], [-80.0, -79.0, -80.5, -78.0]])

    def numbers(x):
        routing = route(x, moe)
        return routing.gate, routing.prob

    gate, prob = numbers(jnp.asarray(logits, jnp.float32))
    score = np.exp(logits)  # the sigmoid there, to 1e-26
    np.testing.assert_allclose(prob, score / score.sum(-1, keepdims=True), rtol=1e-5)
    best = -np.sort(-score, -1)[:, :2]
    np.testing.assert_allclose(gate, best / best.sum(-1, keepdims=True), rtol=1e-5)
    slopes = jax.jacobian(lambda x: numbers(x)[1])(jnp.asarray(logits[:1], jnp.float32))[0, :, 0]
    p = score[0] / score[0].sum()
    np.testing.assert_allclose(slopes, np.diag(p) - np.outer(p, p), atol=1e-6)  # those of a softmax


@pytest.mark.parametrize("experts", [3, 2**30])
def test_sorting_in_one_integer_or_two(experts):
    """Equal experts keep their order, whether expert and place fit into 32 bits together or not."""
    expert = np.random.default_rng(0).integers(0, 3, (2, 50)).astype(np.int32)
    got, order = by_expert(jnp.asarray(expert), experts)
    want = np.argsort(expert, -1, kind="stable")
    np.testing.assert_array_equal(order, want)
    np.testing.assert_array_equal(got, np.take_along_axis(expert, want, -1))
