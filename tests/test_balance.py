"""Balance losses against loops over tokens, their values and gradients; the selection bias against exact integers."""

from dataclasses import replace
from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_routing import group, router_call, sample, setting

from moe_jax import balance
from moe_jax.capacity import Slots
from moe_jax.config import MoEConfig, RouterConfig, check_moe
from moe_jax.routing import Noise


def sums(routing, moe, mask=None, rows=None):
    """Statistics of a routing; no loss looks at the slots."""
    return balance.statistics(routing, Slots(routing.expert, routing.valid, routing.gate), moe, mask, rows)


COEFFICIENTS = {
    "gshard-random": {"importance_loss": 1.0},
    "softmax_topk": {"importance_loss": 1.0},
    "noisy_topk": {"importance_loss": 1.0, "load_loss": 1.0},
    "deepseek_v2": {"device_loss": 1.0, "communication_loss": 1.0, "sequence_loss": 1.0},
    "deepseek_v3-bias": {"sequence_loss": 1.0},
}
CASES = [
    (name, E, more)
    for name in COEFFICIENTS
    for E in (8, 128)
    for more in ({}, {"balance_over": "sequence"}, {"balance_form": "per_token"})
    if E == 8 or not more
]


@pytest.mark.parametrize("name,E,more", CASES)
def test_losses_equal_the_loop(name, E, more):
    """Every loss of every form in 200 cases of two sequences, padded from not at all to whole."""
    moe = setting(name, E, balance_loss=1.0, z_loss=1.0, **COEFFICIENTS[name], **more)
    if moe.device_loss:
        moe = replace(moe, balance_devices=moe.router.groups)
    assert not check_moe(moe)
    cases, L = 200 if E == 8 else 20, 7 if E == 8 else 5
    logits, mask, noise, inputs = sample(name, E, 2 * cases, L)
    routing = router_call(logits, moe, mask, Noise(noise, None), **inputs)
    first = balance.first_only(moe)
    assert first == name.startswith("gshard")

    @jax.jit
    def losses(routing, mask):
        return jax.vmap(lambda r, m: balance.losses(sums(r, moe, m), moe))(*paired((routing, mask)))

    def paired(tree):
        return jax.tree.map(lambda a: a.reshape(cases, 2, *a.shape[1:]), tree)

    got = {k: np.asarray(v) for k, v in losses(routing, jnp.asarray(mask)).items()}
    assert set(got) == {"balance_loss", "z_loss"} | set(COEFFICIENTS[name])
    gate, expert, asked = (np.asarray(a) for a in (routing.gate, routing.expert, routing.valid))
    prob = oracle.probabilities(np.asarray(logits, np.float64), moe.router)
    counted = (expert[..., :1], asked[..., :1]) if first else (expert, asked)
    for c in range(cases):
        two = slice(2 * c, 2 * c + 2)
        p, e, a, g, m, x = (v[two].reshape(2 * L, *v.shape[2:]) for v in (prob, expert, asked, gate, mask, logits))
        own = (p, *(v[two].reshape(2 * L, -1) for v in counted), m)
        ranked = np.array([oracle.best(row, moe.top_k) for row in x])

        def form(*arrays):
            return oracle.expert_loss(*arrays, per_token=moe.balance_form == "per_token")

        want = {
            "balance_loss": oracle.over_rows(form, 2, *own) if moe.balance_over == "sequence" else form(*own),
            "z_loss": oracle.z_loss(np.asarray(x, np.float64), m),
            "importance_loss": oracle.importance_loss(g.astype(np.float64), e, a, E),
        }
        if "sequence_loss" in got:
            every = np.tile(m[:, None], moe.top_k)
            want["sequence_loss"] = oracle.over_rows(oracle.expert_loss, 2, p, ranked, every, m)
        if "device_loss" in got:
            D, M = moe.router.groups, moe.router.topk_groups
            want["device_loss"] = oracle.device_loss(*own, D)
            want["communication_loss"] = oracle.communication_loss(p, e, a, m, D, M)
        if "load_loss" in got:
            drawn = [v[two].reshape(2 * L, E).astype(np.float64) for v in (logits, noise, inputs["spread"])]
            rows = [oracle.chance(*(v[t] for v in drawn), moe.top_k) for t in np.nonzero(m)[0]]
            want["load_loss"] = oracle.squared_cv(np.sum(rows, 0)) if rows else 0.0
        for loss, value in got.items():
            np.testing.assert_allclose(value[c], want[loss], rtol=2e-6, atol=1e-6, err_msg=f"{loss}, case {c}")


LINEAR = ("balance_loss", "sequence_loss", "device_loss", "communication_loss")  # in P; f has no gradient


@pytest.mark.parametrize("more", [{}, {"balance_over": "sequence"}, {"balance_form": "per_token"}], ids=str)
@pytest.mark.parametrize("name", ["gshard", "deepseek_v2", "deepseek_v3-bias"])
def test_gradient_flows_through_probabilities_only(name, more):
    """sum_i f_i P_i is linear in P with constant f: it equals its gradient times P. Gates and padding have none."""
    coefficients = dict.fromkeys(LINEAR, 1.0) if name == "deepseek_v2" else {"balance_loss": 1.0, "sequence_loss": 1.0}
    moe = setting(name, 8, **coefficients, **more)
    moe = replace(moe, balance_devices=4) if moe.device_loss else moe
    case = sample(name, 8, 6, 7, seed=3)
    logits, mask, _, inputs = case
    assert 0 < mask.sum() < mask.size
    routing = router_call(logits, moe, mask, **inputs)

    def f(prob, gate, logits):
        return balance.losses(sums(routing._replace(prob=prob, gate=gate, logits=logits), moe, mask), moe)

    parts = (routing.prob, routing.gate, routing.logits)
    values, slopes = jax.jit(f)(*parts), jax.jit(jax.jacrev(f, argnums=(0, 1, 2)))(*parts)
    assert set(values) == set(coefficients)
    for loss, (prob, gate, plain) in slopes.items():
        assert float((prob * routing.prob).sum()) == pytest.approx(float(values[loss]), rel=1e-5)
        assert prob.any() and not prob[~mask].any() and not gate.any() and not plain.any()


@pytest.mark.parametrize("loss", ["importance_loss", "load_loss", "z_loss"])
def test_other_losses_have_gradients_where_there_are_tokens(loss):
    """Numerical gradient with respect to the logits of noisy_topk; exactly nothing from padding."""
    moe = setting("noisy_topk", 8, **{loss: 1.0})
    logits, _, noise, inputs = group(sample("noisy_topk", 8, 2, 7, seed=2), 1)
    mask = jnp.arange(7) < 5

    @jax.jit
    def f(x):
        return balance.router_loss(sums(router_call(x, moe, mask, Noise(noise, None), **inputs), moe, mask), moe)

    got = jax.jit(jax.grad(f))(logits)
    assert not got[5:].any()
    for s, e in [(0, 0), (2, 3), (4, 7)]:
        bump = np.zeros_like(logits)
        bump[s, e] = 1e-2
        want = (f(logits + bump) - f(logits - bump)) / 2e-2
        assert float(got[s, e]) == pytest.approx(float(want), abs=2e-3)
    assert float(jnp.abs(got).max()) > 1e-2


@pytest.mark.parametrize("K", range(1, 9))
@pytest.mark.parametrize("name", ["softmax_topk", "deepseek_v2", "deepseek_v3-max"])
def test_a_uniform_router_costs_exactly_the_coefficient(name, K):
    """Whoever is chosen: equal probabilities give each loss that promises it its coefficient."""
    moe = MoEConfig(8, K, router=replace(setting(name, 8).router, groups=1, topk_groups=None, group_score=None))
    more = {"balance_loss": 0.3, "sequence_loss": 0.05, "device_loss": 0.7, "balance_devices": 4}
    rng = np.random.default_rng(K)
    mask = rng.random((4, 11)) > 0.3
    chosen = np.argsort(rng.random((4, 11, 8)), -1)[..., :K]  # any choices at all

    @jax.jit
    def values(logits, chosen, mask):
        out = {}
        for over, form in (("step", "per_choice"), ("sequence", "per_choice"), ("step", "per_token")):
            full = replace(moe, balance_over=over, balance_form=form, **more)
            stats = sums(router_call(logits, full, mask, chosen=chosen), full, mask)
            out[over, form] = {k: getattr(full, k) * v for k, v in balance.losses(stats, full).items()}
        return out

    for (_, form), losses in values(jnp.full((4, 11, 8), 0.5), chosen, mask).items():
        times = K if form == "per_token" else 1
        assert losses["balance_loss"] == pytest.approx(0.3 * times, rel=1e-6)
        assert losses["sequence_loss"] == pytest.approx(0.05, rel=1e-6)
        assert losses["device_loss"] == pytest.approx(0.7, rel=1e-6)


@settings(max_examples=100, deadline=None)
@given(st.sampled_from([1, 2, 8, 128, 2048]), st.integers(1, 8), st.integers(1, 10**6), st.data())
def test_uniform_probabilities_whatever_the_counts(E, K, T, data):
    """The same from statistics: any counts, tokens and numbers of experts; collapse costs E / K times as much."""
    K = min(K, E)
    moe = MoEConfig(E, K, balance_loss=0.01)
    count = np.random.default_rng(data.draw(st.integers(0, 2**30))).multinomial(K * T, np.full(E, 1 / E))
    zero, none = jnp.zeros((), jnp.int32), jnp.zeros(())
    stats = balance.Stats(
        jnp.int32(T), zero, zero, *2 * [jnp.asarray(count, jnp.int32)], jnp.full(E, T / E), none, none
    )
    assert float(balance.router_loss(stats, moe)) == pytest.approx(0.01, rel=1e-5)
    one = jnp.asarray(np.arange(E) < K)
    collapsed = stats._replace(count=one.astype(jnp.int32) * T, prob=one.astype(jnp.float32) * (T / K))
    assert float(balance.router_loss(collapsed, moe)) == pytest.approx(0.01 * E / K, rel=1e-5)


def test_statistics_add_up_and_leave_padding_out():
    """Sums over two groups are those of each group without its padding, whatever losses ask for more sums."""
    moe = setting("deepseek_v2", 8, **dict.fromkeys((*LINEAR, "importance_loss"), 1.0), balance_over="sequence")
    moe = replace(moe, balance_devices=4)
    logits = np.random.default_rng(0).normal(size=(2, 11, 8)).astype(np.float32)
    mask = np.arange(11)[None] < np.array([[11], [7]])

    @jax.jit
    def stats(x, m):
        return sums(router_call(x, moe, m), moe, m)

    whole = stats(logits, mask)
    parts = jax.tree.map(lambda a, b: a + b, stats(logits[:1], mask[:1]), stats(logits[1:, :7], mask[1:, :7]))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), whole, parts)
    assert (int(whole.tokens), int(whole.routed), int(whole.sequences)) == (18, 72, 2)


def test_sequences_are_rows_of_the_batch():
    """Groups that cut or join sequences do not change what a sequence is."""
    moe = setting("softmax_topk", 8, balance_loss=1.0, sequence_loss=1.0, balance_over="sequence")
    logits, mask, _, _ = sample("softmax_topk", 8, 6, 12)
    values = []
    for shape in ((6, 12), (24, 3), (2, 36)):
        x, m = logits.reshape(*shape, 8), mask.reshape(shape)
        stats = sums(router_call(x, moe, m), moe, jnp.asarray(m), rows=6)
        values.append([float(v) for v in balance.losses(stats, moe).values()])
    np.testing.assert_allclose(values[1:], [values[0]] * 2, rtol=1e-6)


# The selection bias


@settings(max_examples=200, deadline=None)
@given(
    st.sampled_from([1, 2, 3, 8, 128]),
    st.sampled_from([1, 2, 5, 1000, 2**20]),
    st.sampled_from(["sign", "centred"]),
    st.integers(0, 2**30),
)
def test_bias_moves_by_exact_comparison(E, largest, update, seed):
    """Up below the mean load, down above it, still at it: the same as with fractions of Python integers."""
    rng = np.random.default_rng(seed)
    load, bias = rng.integers(0, largest + 1, E), rng.normal(size=E).astype(np.float32)
    load[rng.random(E) < 0.3] = load.sum() // E  # at the mean, or beside it
    moe = MoEConfig(E, bias_rate=0.25, bias_update=update)
    got = np.asarray(balance.updated_bias(jnp.zeros(E), jnp.asarray(load, jnp.int32), moe))
    want = [Fraction(1, 4) * m for m in oracle.moves([int(n) for n in load], update == "centred")]
    np.testing.assert_allclose(got, [float(w) for w in want], atol=1e-7)
    if update == "sign":
        assert [Fraction(float(g)) for g in got] == want
    moved = np.asarray(balance.updated_bias(jnp.asarray(bias), jnp.asarray(load, jnp.int32), moe))
    np.testing.assert_array_equal(moved, bias + got)


def test_bias_of_several_layers_and_rate_zero():
    """Layers move by their own loads; rate 0 keeps the bias as it is."""
    load, bias = jnp.array([[3, 1, 2], [0, 0, 9]]), jnp.full((2, 3), 0.5)
    moe = MoEConfig(3, router=RouterConfig("deepseek_v3"), bias_rate=0.25)
    np.testing.assert_array_equal(balance.updated_bias(bias, load, moe), [[0.25, 0.75, 0.5], [0.75, 0.75, 0.25]])
    np.testing.assert_array_equal(balance.updated_bias(bias, load, replace(moe, bias_rate=0.0)), bias)
