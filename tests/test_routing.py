"""Routers, slots and balance against pinned vectors, a loop over tokens and slots, and invariants."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_jax import balance
from moe_jax.capacity import assign, capacity
from moe_jax.config import MoEConfig, RouterConfig
from moe_jax.routing import Noise, draw, route


@functools.partial(jax.jit, static_argnames="moe")
def routed(logits, mask, noise, *, moe, slots):
    """Routing, slots and statistics in one program."""
    routing = route(logits, moe, mask, noise)
    slots = assign(routing, moe, slots, noise)
    return routing, slots, balance.statistics(routing, slots, moe, mask)


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
    routing = route(logits, moe, noise=Noise(uniform, None))
    slots = assign(routing, moe, want.get("capacity", len(logits)), Noise(uniform, None))
    kept = np.asarray(slots.kept)
    np.testing.assert_array_equal(routing.expert, want["index"])
    np.testing.assert_allclose(slots.gate, want["gate"], atol=1e-6)
    if "kept" in want:
        np.testing.assert_array_equal(kept, np.asarray(want["kept"], bool))
        np.testing.assert_array_equal(np.asarray(slots.position)[kept], np.asarray(want["slot"])[kept])
    stats = balance.statistics(routing, slots, moe)
    if "aux_loss" in want:
        assert balance.balance_loss(stats, moe) == pytest.approx(want["aux_loss"], abs=1e-6)
    if "z_loss" in want:
        assert balance.z_loss(stats) == pytest.approx(want["z_loss"], abs=1e-6)


ROUTERS = [
    RouterConfig("switch"),
    RouterConfig("gshard"),
    RouterConfig("gshard", second="random", threshold=0.3),
    RouterConfig("gshard", second="sample"),
    RouterConfig("gshard", normalize="none"),
    RouterConfig("topk_softmax"),
    RouterConfig("softmax_topk"),
    RouterConfig("softmax_topk", normalize="before"),
]


def choices(router: RouterConfig) -> list[int]:
    return {"switch": [1], "gshard": [2]}.get(router.kind, [2, 3])


@pytest.mark.parametrize(
    "router,priority",
    [(r, "choice") for r in ROUTERS]
    + [(r, p) for r in (ROUTERS[2], ROUTERS[-1]) for p in ("token", "probability", "batch", "random")],
    ids=lambda p: p if isinstance(p, str) else f"{p.kind}-{p.second}-{p.normalize}",
)
def test_equals_the_loop(router, priority):
    """Random groups: one plain, one with ties and padding, one all padding; experts, gates, positions and drops."""
    rng = np.random.default_rng(0)
    for E, S in [(8, 31)] if priority != "choice" else [(3, 7), (128, 17)]:
        for k in choices(router)[-1:]:
            moe = MoEConfig(experts=E, top_k=k, router=router, priority=priority)
            logits = rng.normal(size=(3, S, E)).astype(np.float32)
            logits[1] = np.round(logits[1]) + 0.0  # ties; no -0.0, which a sort puts below 0.0
            mask = rng.random((3, S)) > np.array([[0.0], [0.3], [1.0]])
            keys = jax.random.split(jax.random.key(int(rng.integers(1 << 30))), 3)
            noise = jax.vmap(lambda k, moe=moe, shape=logits.shape[1:]: draw(k, moe, shape))(keys)
            C = capacity(moe, S, 1.0)
            routing, slots, _ = routed(jnp.asarray(logits), jnp.asarray(mask), noise, moe=moe, slots=C)
            for g in range(3):
                second = None if noise.router is None else np.asarray(noise.router[g])
                expert, gate, asked = oracle.choose(
                    logits[g],
                    router.kind,
                    k,
                    normalize=router.normalize,
                    second=router.second,
                    threshold=router.threshold,
                    uniform=second,
                )
                np.testing.assert_array_equal(routing.expert[g], expert)
                asked &= mask[g][:, None]
                np.testing.assert_array_equal(routing.valid[g], asked)
                score = np.take_along_axis(np.asarray(routing.prob[g]), expert, -1)
                priorities = None if noise.priority is None else np.asarray(noise.priority[g])
                position, kept = oracle.queue(expert, asked, score, C, priority, priorities)
                np.testing.assert_array_equal(slots.kept[g], kept)
                np.testing.assert_array_equal(np.asarray(slots.position[g])[kept], position[kept])
                np.testing.assert_allclose(slots.gate[g], gate * kept, atol=1e-6)


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from([37]),
    st.sampled_from([1, 2, 8, 2048]),
    st.sampled_from([3]),
    st.sampled_from(["choice", "probability"]),
    st.sampled_from([0.1, 0.9, 1.25, 3.0]),
    st.integers(0, 2**30),
)
def test_slots_are_exact(S, E, k, priority, factor, seed):
    k = min(k, E)
    moe = MoEConfig(experts=E, top_k=k, priority=priority)
    rng = np.random.default_rng(seed)
    mask = rng.random(S) > 0.2
    logits = jnp.asarray(rng.normal(size=(S, E)), jnp.float32)
    C = capacity(moe, S, factor)
    routing, slots, stats = routed(logits, jnp.asarray(mask), Noise(None, None), moe=moe, slots=C)
    kept, expert, place = (np.asarray(a) for a in (slots.kept, routing.expert, slots.position))
    used = list(zip(expert[kept], place[kept], strict=True))
    assert len(set(used)) == len(used), "a slot was given twice"
    assert all(place[kept] < C)
    assert not kept[~mask].any()
    wanted = np.bincount(expert[mask].ravel(), minlength=E)
    np.testing.assert_array_equal(stats.load, wanted)
    assert int(stats.routed) == wanted.sum() == k * mask.sum()
    assert int(stats.kept) == np.minimum(wanted, C).sum(), "an expert with room dropped a token, or a full one took one"


@pytest.mark.parametrize("E,k", [(4, 1), (8, 2), (8, 8), (128, 4)])
def test_uniform_router_gives_loss_one(E, k):
    """Every expert equally often and equally probable: the loss is 1 for every K; collapse gives E / K."""
    moe = MoEConfig(experts=E, top_k=k, router=RouterConfig("softmax_topk"))
    logits = 1e-7 * jnp.stack([jnp.roll(jnp.arange(E, dtype=jnp.float32), i) for i in range(E)])
    _, _, stats = routed(logits, None, Noise(None, None), moe=moe, slots=E)
    assert balance.balance_loss(stats, moe) == pytest.approx(1.0, abs=1e-5)
    collapsed = jnp.zeros((16, E)).at[:, :k].set(50.0)
    _, _, stats = routed(collapsed, None, Noise(None, None), moe=moe, slots=16)
    assert balance.balance_loss(stats, moe) == pytest.approx(E / k, rel=1e-5)


@pytest.mark.parametrize("router", ROUTERS, ids=lambda r: f"{r.kind}-{r.second}-{r.normalize}")
def test_gradient_reaches_the_router(router):
    """Numerical gradient of a weighted sum of gates, for every kind, top-1 included."""
    k = choices(router)[0]
    moe = MoEConfig(experts=5, top_k=k, router=router)
    logits = jax.random.normal(jax.random.key(1), (6, 5))
    weight = jax.random.normal(jax.random.key(2), (6, k))
    noise = draw(jax.random.key(3), moe, logits.shape)

    def f(x):
        return (route(x, moe, noise=noise).gate * weight).sum()

    got = jax.grad(f)(logits)
    assert float(jnp.abs(got).max()) > 1e-3
    eps = 1e-2
    for s, e in [(0, 0), (2, 3), (5, 4)]:
        bump = jnp.zeros_like(logits).at[s, e].set(eps)
        want = (f(logits + bump) - f(logits - bump)) / (2 * eps)
        assert float(got[s, e]) == pytest.approx(float(want), abs=2e-3)


def test_balance_gradient_flows_through_probabilities_only():
    """d loss / d logits = E/T^2 sum_i count_i/K dP_i/dlogits, with the counts constant (Switch, eq. 4)."""
    moe = MoEConfig(experts=4, top_k=2)
    logits = jax.random.normal(jax.random.key(0), (9, 4))

    def f(x):
        r = route(x, moe)
        return balance.balance_loss(balance.statistics(r, assign(r, moe, 9), moe), moe)

    count = np.bincount(np.asarray(route(logits, moe).expert).ravel(), minlength=4) / (2 * 9)
    want = jax.grad(lambda x: 4 * (jnp.asarray(count, jnp.float32)[None] * jax.nn.softmax(x)).sum() / 9)(logits)
    np.testing.assert_allclose(jax.grad(f)(logits), want, atol=1e-7)


def test_statistics_add_up_and_leave_padding_out():
    moe = MoEConfig(experts=4, top_k=2)
    logits = jax.random.normal(jax.random.key(0), (2, 11, 4))
    mask = jnp.arange(11)[None] < jnp.array([[11], [7]])

    def stats(x, m):
        return routed(x, m, Noise(None, None), moe=moe, slots=3)[2]

    whole = stats(logits, mask)
    parts = jax.tree.map(lambda a, b: a + b, stats(logits[:1], mask[:1]), stats(logits[1:, :7], mask[1:, :7]))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), whole, parts)
    assert int(whole.tokens) == 18 and int(whole.routed) == 36


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
    small, large = (routed(logits, None, Noise(None, None), moe=moe, slots=n)[1] for n in (5, 9))
    np.testing.assert_array_equal(large.position, small.position)
    assert int(small.kept.sum()) == 20 and int(large.kept.sum()) == 36
    assert bool((large.kept | ~small.kept).all())


@pytest.mark.parametrize("kind", ["gshard", "topk_softmax", "softmax_topk"])
def test_choices_survive_underflow(kind):
    """Logits 200 apart: the probabilities of all but one expert are 0 in float32, and their order still counts."""
    moe = MoEConfig(experts=3, top_k=2, router=RouterConfig(kind))
    routing = route(jnp.array([[200.0, 0.0, 50.0]]), moe)
    assert routing.expert.tolist() == [[0, 2]] and bool(jnp.isfinite(routing.gate).all())
