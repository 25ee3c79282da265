"""The transformer: its pattern of layers, its parts put together by hand, invariants, and decoding."""

import functools
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given
from hypothesis import strategies as st
from test_layers import ACTS, count, f64, filled, numbers

from moe_jax import mesh
from moe_jax.axes import Rules
from moe_jax.config import ConfigError, LatentConfig, MeshConfig, ModelConfig, MoEConfig, RouterConfig
from moe_jax.layers.attention import Context
from moe_jax.layers.block import Block
from moe_jax.layers.moe import Experts, MoELayer
from moe_jax.model import Transformer
from moe_jax.pattern import pattern
from moe_jax.routing import route

MOE = MoEConfig(experts=4, top_k=2, d_ff=12, every=2, capacity_factor=1.0, min_capacity=1)
TINY = ModelConfig(vocab=13, layers=4, d_model=16, d_ff=24, heads=4, kv_heads=2, max_length=32, moe=MOE)
TOKENS = jnp.asarray(np.random.default_rng(5).integers(0, 13, (4, 12)), jnp.int32)


def transformer(m, rules=None):
    return filled(lambda: Transformer(m, rules=rules, rngs=nnx.Rngs(params=0)))


def shapes(m):
    """The model's parameters by path, as shapes: nothing is allocated."""
    model = nnx.eval_shape(lambda: Transformer(m, rngs=nnx.Rngs(params=0)))
    return {"/".join(map(str, path)): leaf for path, leaf in nnx.to_flat_state(nnx.state(model, nnx.Param))}


# The pattern of layers


@pytest.mark.parametrize(
    "kinds, want",
    [
        ("d", [("d", 1)]),
        ("dddd", [("d", 4)]),
        ("dmdmdm", [("dm", 3)]),
        ("dmmm", [("d", 1), ("m", 3)]),
        ("ddmddm", [("ddm", 2)]),
        ("ddmd", [("d", 2), ("md", 1)]),
    ],
)
def test_pattern_examples(kinds, want):
    assert pattern(tuple(kinds)) == [(tuple(period), n) for period, n in want]


@given(st.integers(1, 70), st.integers(1, 8), st.integers(0, 8))
def test_pattern_expands_to_the_layers(layers, every, first_dense):
    m = ModelConfig(layers=layers, moe=MoEConfig(every=every, first_dense=first_dense))
    kinds = m.layer_kinds
    runs = m.runs
    assert sum((period * n for period, n in runs), ()) == kinds
    assert len(runs) <= 3
    assert sum((period * n for period, n in replace(m, stack_above=layers).runs), ()) == kinds
    # every layer after the first dense ones counts, and every n-th is MoE: the definition, counted
    places = [i for i, kind in enumerate(kinds) if kind == "moe"]
    assert places == list(range(first_dense + every - 1, layers, every))


# Parts put together by hand


def one(stack, i):
    """Period i of a stack, its parameters no longer stacked."""
    graph, state = nnx.split(stack)
    return nnx.merge(graph, jax.tree.map(lambda leaf: leaf[i], state))


def context(tokens, segments=None):
    segments = jnp.ones(tokens.shape, jnp.int32) if segments is None else segments
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    return Context(positions, segments, segments > 0, tokens, None)


@pytest.mark.parametrize("norm", ["layer", "rms"])
@pytest.mark.parametrize("order", ["pre", "post"])
def test_block_is_its_parts(norm, order):
    m = replace(TINY, norm=norm, norm_order=order, moe=None)
    block = filled(lambda: Block(m, "dense", None, nnx.Rngs(params=0)))
    x, ctx = numbers(2, 12, 16), context(TOKENS[:2])

    @jax.jit
    def both(x):
        def attention(h):
            return block.attention(h, ctx)[0]

        if order == "pre":
            h = x + attention(block.attention_norm(x))
            want = h + block.ffn(block.ffn_norm(h))
        else:
            h = block.attention_norm(x + attention(x))
            want = block.ffn_norm(h + block.ffn(h))
        return want, block(x, ctx, train=False, keys=None, cache=None, capacity_factor=None)

    want, (got, stats, cache) = both(x)
    np.testing.assert_allclose(got, want, atol=1e-6)
    assert stats is None and cache is None
    if order == "post" and norm == "layer":  # the output of a LayerNorm, in NumPy
        last = (f64(got) - f64(block.ffn_norm.bias[...])) / f64(block.ffn_norm.scale[...])
        np.testing.assert_allclose(last.mean(-1), 0, atol=1e-5)
        np.testing.assert_allclose(last.var(-1), 1, atol=1e-3)


@pytest.mark.parametrize(
    "final_norm, settings, stacked",
    [
        (True, {"capacity_factor": 0.5}, True),
        (False, {"capacity_factor": 0.5}, True),
        (True, {"capacity_factor": 0.5}, False),
        (True, {"capacity_factor": [0.25, 0.5], "top_k": [3, 2]}, True),
        (True, {"capacity_factor": [0.25, 0.5], "top_k": [3, 2]}, False),
    ],
)
def test_transformer_is_its_blocks(final_norm, settings, stacked):
    """Dense, dense, MoE, dense, MoE in several runs; settings and statistics of the MoE layers come bottom first."""
    options = [{k: v[i] if isinstance(v, list) else v for k, v in settings.items()} for i in range(2)]
    moe = replace(MOE, first_dense=1)
    m = replace(TINY, layers=5, final_norm=final_norm, tied_head=False, moe=moe, stack_above=4 if stacked else 5)
    model = transformer(m)
    assert len(model.runs) == (2 if stacked else 5) and (model.final_norm is None) != final_norm

    @jax.jit
    def both(tokens):
        ctx = context(tokens)
        x, stats = model.embedding(tokens, ctx.positions, None), []
        for stack, (_, repeats) in zip(model.stacks, model.runs, strict=True):
            for i in range(repeats):
                for block in one(stack, i).blocks:
                    own = options[len(stats)] if isinstance(block.ffn, MoELayer) else {}
                    x, routed, _ = block(x, ctx, train=False, keys=None, cache=None, **own)
                    stats += [] if routed is None else [routed.stats]
        x = model.final_norm(x) if final_norm else x
        return model.embedding.logits(x, None), stats, model(tokens, **settings)

    want, stats, got = both(TOKENS)
    np.testing.assert_allclose(got.logits, want, atol=1e-5)
    assert len(stats) == 2
    stacked = jax.tree.map(lambda *layers: np.stack(layers), *stats)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), got.stats, stacked)
    assert (got.stats.load[0] != got.stats.load[1]).any()  # so that a swap would show
    assert got.stats.tokens.tolist() == [48, 48]
    assert got.stats.routed.tolist() == [48 * own.get("top_k", 2) for own in options]
    np.testing.assert_array_equal(got.stats.load.sum(-1), got.stats.routed)
    assert (got.stats.kept < got.stats.routed).all()


@pytest.mark.parametrize("scan", [True, False])
def test_replay_of_a_model(scan):
    """Every token goes in every layer where a recorded call sent it, whichever tokens the call is on."""
    m = replace(TINY, layers=5, scan=scan, moe=replace(MOE, first_dense=1))
    graph, state = nnx.split(transformer(m))
    call = jax.jit(lambda tokens, past: nnx.merge(graph, state)(tokens, replay=past, record=True))
    first = call(TOKENS, None)
    assert first.record.expert.shape == (2, 4, 12, 2) == first.record.gate.shape
    assert (first.record.expert[0] != first.record.expert[1]).any()  # so that a swap of layers would show
    again, other = (call(tokens, first.record.expert) for tokens in (TOKENS, TOKENS[::-1]))
    np.testing.assert_allclose(again.logits, first.logits, atol=1e-5)
    np.testing.assert_array_equal(other.record.expert, first.record.expert)
    assert (call(TOKENS[::-1], None).record.expert != first.record.expert).any()
    assert not np.allclose(other.record.gate, first.record.gate)


def test_kept_are_the_loads_cut_at_the_capacity():
    """One group of 48 tokens, so the drops follow from the loads: routed = kept + dropped, exactly."""
    m = replace(TINY, moe=replace(MOE, group_size=48))
    stats = jax.jit(functools.partial(transformer(m), capacity_factor=0.5))(TOKENS).stats
    load, slots = np.asarray(stats.load), 48 * 2 * 0.5 / 4
    np.testing.assert_array_equal(stats.routed - stats.kept, np.maximum(load - slots, 0).sum(-1))
    np.testing.assert_array_equal(stats.routed, 96)
    assert load.shape == (2, 4)


# Loops and recomputation


@functools.cache
def loss_and_gradients(scan, remat):
    moe = replace(MOE, every=1, expert_dropout=0.1)
    m = replace(TINY, layers=2, scan=scan, remat=remat, dropout=0.1, norm="layer", moe=moe)
    graph, params = nnx.split(transformer(m))

    @jax.jit
    def run(params):
        def loss(params):
            out = nnx.merge(graph, params)(TOKENS, train=True, key=jax.random.key(0))
            log = jax.nn.log_softmax(out.logits[:, :-1])
            nll = -jnp.take_along_axis(log, TOKENS[:, 1:, None], -1).mean()
            return nll + out.stats.prob.var() + 1e-2 * out.stats.z.sum(), (out.logits, out.stats)

        return jax.value_and_grad(loss, has_aux=True)(params)

    return jax.tree.map(np.asarray, run(params))


@pytest.mark.parametrize(
    "scan, remat", [(True, "full"), (True, "dots"), (True, "exchange"), (False, "none"), (False, "exchange")]
)
def test_scan_and_remat_change_nothing(scan, remat):
    (_, (logits, stats)), gradients = loss_and_gradients(True, "none")
    (_, (other_logits, other_stats)), other = loss_and_gradients(scan, remat)
    np.testing.assert_allclose(other_logits, logits, rtol=1e-5, atol=1e-5 * np.abs(logits).max())
    np.testing.assert_array_equal(other_stats.load, stats.load)
    np.testing.assert_array_equal(other_stats.kept, stats.kept)
    assert stats.kept.sum() < stats.routed.sum()
    for a, b in zip(jax.tree.leaves(gradients), jax.tree.leaves(other), strict=True):
        assert np.abs(a).max() > 1e-6
        np.testing.assert_allclose(b, a, rtol=1e-5, atol=1e-5 * np.abs(a).max())


# Parameter counts


def component(path):
    """Which component a parameter belongs to."""
    table = {
        "embedding/table": "embed",
        "embedding/positions": "positions",
        "embedding/head": "head",
        "norm": "norms",
        "attention/": "attention",
        "router": "router",
        "experts/": "experts",
        "shared/": "shared",
        "ffn/": "ffn",
    }
    return next(name for part, name in table.items() if part in path)


def components(m):
    out = {}
    for path, leaf in shapes(m).items():
        out[component(path)] = out.get(component(path), 0) + leaf.size
    return out


def formulas(m):
    """Parameters by component, written out from the shapes of the papers."""
    D, L, H, J, N = m.d_model, m.layers, m.heads, m.resolved_kv_heads, m.resolved_head_dim
    matrices = 3 if m.ffn == "swiglu" else 2
    sparse = 0 if m.moe is None else (L - m.moe.first_dense) // m.moe.every
    out = {
        "embed": m.vocab * D,
        "positions": m.max_length * D * (m.positions == "learned"),
        "head": 0 if m.tied_head else m.vocab * D,
        "attention": L * (2 * D * H * N + 2 * D * J * N),
        "ffn": (L - sparse) * matrices * D * m.d_ff,
        "norms": (2 * L + m.final_norm) * D * (2 if m.norm == "layer" else 1),
    }
    if m.moe is not None:
        width = m.moe.d_ff or m.d_ff
        out["experts"] = sparse * m.moe.experts * matrices * D * width
        out["router"] = sparse * D * m.moe.experts
        out["shared"] = sparse * m.moe.shared_experts * matrices * D * width
    return {name: n for name, n in out.items() if n}


MODELS = {
    "dense": replace(TINY, moe=None),
    "dense_learned": replace(TINY, moe=None, positions="learned", norm="layer", ffn="relu", tied_head=False),
    "wide_heads": replace(TINY, moe=None, heads=6, kv_heads=3, head_dim=10, final_norm=False, ffn="gelu"),
    "moe": TINY,
    "moe_width_of_the_dense": replace(TINY, moe=replace(MOE, d_ff=None, every=1)),
    "first_dense": replace(TINY, layers=7, moe=replace(MOE, first_dense=2, shared_experts=3), ffn="gelu"),
}


@pytest.mark.parametrize("name", MODELS)
def test_parameter_counts(name):
    assert components(MODELS[name]) == formulas(MODELS[name])


def published(vocab, layers, d_model, heads, kv_heads, d_ff, norm="rms", tied_head=False, moe=None, **more):
    return ModelConfig(
        vocab=vocab,
        layers=layers,
        d_model=d_model,
        heads=heads,
        kv_heads=kv_heads,
        d_ff=d_ff,
        norm=norm,
        tied_head=tied_head,
        moe=moe,
        **more,
    )


ROUTED = RouterConfig("topk_softmax")
PUBLISHED = {
    # Jiang et al. 2024: "8x7B"; the exact number is that of the published weight files
    "mixtral_8x7b": (
        published(32000, 32, 4096, 32, 8, 14336, moe=MoEConfig(8, 2, router=ROUTED)),
        46_702_792_704,
        dict(experts=45_097_156_608, router=1_048_576, attention=1_342_177_280, norms=266_240, head=131_072_000),
    ),
    # Dai et al. 2024: 16.4B in all, the first layer dense, 2 shared experts
    "deepseek_moe_16b": (
        published(102400, 28, 2048, 16, 16, 10944, moe=MoEConfig(64, 6, d_ff=1408, first_dense=1, shared_experts=2)),
        16_375_728_128,
        dict(experts=14_948_499_456, shared=467_140_608, ffn=67_239_936, router=3_538_944, norms=116_736),
    ),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameter_counts_of_published_models(name):
    m, total, parts = PUBLISHED[name]
    got = components(m)
    assert sum(got.values()) == total
    assert {part: got[part] for part in parts} == parts


def test_initial_parameters():
    """Layers of a stack start from different numbers, norms as the identity, routers ten times smaller."""
    graph, _ = nnx.split(nnx.eval_shape(lambda: Transformer(TINY, rngs=nnx.Rngs(params=0))))
    state = jax.jit(lambda: nnx.state(Transformer(TINY, rngs=nnx.Rngs(params=0))))()
    model = nnx.merge(graph, state)
    assert count(model) == sum(formulas(TINY).values())
    moe = model.stacks[0].blocks[1]
    up, router = np.asarray(moe.ffn.experts.w_up[...]), np.asarray(moe.ffn.router[...])
    assert up.shape == (2, 4, 16, 12) and len({e.tobytes() for layer in up for e in layer}) == 8
    assert up.std() == pytest.approx(0.88 / 4, rel=0.1)
    assert router.std() == pytest.approx(0.1 * 0.88 / 4, rel=0.2)
    np.testing.assert_array_equal(moe.ffn_norm.scale[...], 1.0)


# The MoE layer


def moe_layer(moe, ffn="swiglu", d_model=8):
    return filled(lambda: MoELayer(moe, d_model, ffn=ffn, rngs=nnx.Rngs(params=0)))


def numpy_ffn(kind, x, up, down, gate=None):
    h = f64(x) @ f64(up)
    h = ACTS[kind](h) if gate is None else ACTS[kind](f64(x) @ f64(gate)) * h
    return h @ f64(down)


@pytest.mark.parametrize("ffn", ["relu", "gelu", "swiglu"])
def test_all_experts_are_the_softmax_weighted_sum(ffn):
    layer = moe_layer(MoEConfig(experts=3, top_k=3, d_ff=5), ffn)
    x = numbers(2, 7, 8)
    e = np.exp(f64(x) @ f64(layer.router[...]))
    prob = e / e.sum(-1, keepdims=True)
    w = layer.experts
    gates = [None] * 3 if w.w_gate is None else w.w_gate[...]
    outs = [numpy_ffn(ffn, x, w.w_up[...][i], w.w_down[...][i], gates[i]) for i in range(3)]
    want = sum(prob[..., i : i + 1] * out for i, out in enumerate(outs))
    np.testing.assert_allclose(jax.jit(layer.__call__)(x)[0], want, atol=1e-5)


def test_shared_experts_see_every_token_whatever_the_router():
    layer = moe_layer(MoEConfig(experts=4, top_k=1, d_ff=5, shared_experts=2, capacity_factor=0.25, min_capacity=1))
    graph, state = nnx.split(layer)
    call = jax.jit(lambda state, x: nnx.merge(graph, state)(x, train=True)[0])
    x = numbers(2, 8, 8)
    whole = call(state, x)
    # silent routed experts: what is left is one feed-forward layer of width 2 * 5
    layer = nnx.clone(layer)
    layer.experts.w_down[...] = jnp.zeros_like(layer.experts.w_down[...])
    shared = call(nnx.state(layer), x)
    w = layer.shared
    assert w.w_up.shape == (8, 10)
    np.testing.assert_allclose(shared, numpy_ffn("swiglu", x, w.w_up[...], w.w_down[...], w.w_gate[...]), atol=1e-5)
    layer.router[...] = numbers(8, 4, seed=9)
    np.testing.assert_array_equal(call(nnx.state(layer), x), shared)
    # and the routed part is what is added
    layer = nnx.clone(nnx.merge(graph, state))
    layer.shared.w_down[...] = jnp.zeros_like(layer.shared.w_down[...])
    np.testing.assert_allclose(call(nnx.state(layer), x) + shared, whole, atol=1e-5)


def test_experts_work_on_their_own_rows():
    moe = MoEConfig(experts=3, d_ff=5)
    experts = filled(lambda: Experts(moe, "gelu", 8, 5, None, nnx.Rngs(params=0)))
    x = numbers(3, 2, 4, 8)
    want = [numpy_ffn("gelu", x[e], experts.w_up[...][e], experts.w_down[...][e]) for e in range(3)]
    np.testing.assert_allclose(jax.jit(experts.__call__)(x), np.stack(want), atol=1e-5)


def test_moe_layer_refuses():
    layer = moe_layer(MoEConfig(experts=4, top_k=2, d_ff=5, group_size=6, capacity_factor=1.0, expert_dropout=0.1))
    with pytest.raises(ValueError, match=r"moe\.group_size=6 .*B=2, L=8"):
        layer(numbers(2, 8, 8), train=True, key=jax.random.key(0))
    with pytest.raises(ValueError, match=r"pass key="):
        layer(numbers(2, 6, 8), train=True)
    with pytest.raises(ConfigError, match=r"moe\.d_ff: is unset"):
        MoELayer(MoEConfig(), 8, rngs=nnx.Rngs(params=0))
    with pytest.raises(ConfigError, match=r"9 choices among 4 experts"):
        MoELayer(MoEConfig(experts=4, top_k=9, d_ff=5), 8, rngs=nnx.Rngs(params=0))


def test_transformer_refuses():
    with pytest.raises(ConfigError, match=r"model\.kv_heads: 4 heads are not a multiple of 3"):
        Transformer(replace(TINY, kv_heads=3), rngs=nnx.Rngs(params=0))
    with pytest.raises(ValueError, match=r"model\.dropout=0\.1 .* pass key="):
        transformer(replace(TINY, dropout=0.1))(TOKENS, train=True)
    model = transformer(replace(TINY, moe=None, max_length=8))
    with pytest.raises(ValueError, match=r"12 tokens exceed model\.max_length=8"):
        model(TOKENS)
    with pytest.raises(ValueError, match=r"9 places exceeds model\.max_length=8"):
        model.empty_cache(1, 9)
    model = transformer(TINY)
    with pytest.raises(ValueError, match=r"capacity_factor lists 3 values for 2 MoE layers"):
        model(TOKENS, capacity_factor=[1.0, None, 2.0])
    with pytest.raises(ValueError, match=r"record needs as many choices in every layer"):
        model(TOKENS, top_k=[1, 2], record=True)
    with pytest.raises(ConfigError, match=r"moe\.top_k: 5 choices among 4 experts"):
        model(TOKENS, top_k=5)


# Dropout, padding


@pytest.mark.parametrize("field", ["dropout", "expert_dropout"])
def test_dropout_changes_training_only(field):
    rate = {"dropout": 0.3} if field == "dropout" else {"moe": replace(MOE, expert_dropout=0.3)}
    graph, state = nnx.split(transformer(TINY))
    dropped, _ = nnx.split(transformer(replace(TINY, **rate)))

    @jax.jit
    def run(state, key):
        plain, drop = nnx.merge(graph, state), nnx.merge(dropped, state)
        return (
            [m(TOKENS, key=key, capacity_factor=None).logits for m in (plain, drop)],
            [m(TOKENS, train=True, key=key, capacity_factor=None).logits for m in (plain, drop)],
        )

    (plain, evaluated), (trained_plain, trained) = run(state, jax.random.key(1))
    np.testing.assert_allclose(evaluated, plain, atol=1e-6)
    np.testing.assert_allclose(trained_plain, plain, atol=1e-6)
    assert np.abs(trained - plain).max() > 1e-2
    _, (_, again) = run(state, jax.random.key(1))
    _, (_, other) = run(state, jax.random.key(2))
    np.testing.assert_array_equal(again, trained)
    assert (other != trained).any()


@functools.cache
def padded_run():
    graph, state = nnx.split(transformer(replace(TINY, positions="learned")))

    @jax.jit
    def run(tokens, segments, positions):
        return nnx.merge(graph, state)(tokens, segments=segments, positions=positions, train=True)

    return run


def test_padding_changes_nothing():
    """Padding before, between and after the tokens, with a capacity that is short, and other token ids in it."""
    segments = jnp.asarray([[1] * 12, [0] * 5 + [1] * 7, [1] * 4 + [0] * 4 + [2] * 4, [1] * 9 + [0] * 3])
    positions = jnp.tile(jnp.arange(12)[None], (4, 1))
    real = np.asarray(segments) > 0
    want = padded_run()(TOKENS, segments, positions)
    got = padded_run()(jnp.where(segments > 0, TOKENS, (TOKENS + 5) % 13), segments, positions)
    np.testing.assert_array_equal(np.asarray(got.logits)[real], np.asarray(want.logits)[real])
    jax.tree.map(np.testing.assert_array_equal, want.stats, got.stats)
    assert want.stats.tokens.tolist() == [real.sum()] * 2
    assert want.stats.routed.tolist() == [2 * real.sum()] * 2
    assert (want.stats.kept < want.stats.routed).all()


def test_padding_is_as_if_it_were_not_there():
    """Rows of 12 with 8 tokens, wherever they sit, against rows of 8; dropless, as capacity knows the row's length."""
    graph, state = nnx.split(transformer(TINY))
    run = jax.jit(lambda *a: nnx.merge(graph, state)(a[0], segments=a[1], positions=a[2]))
    at = np.array([[0, 1, 2, 3, 4, 5, 6, 7], [4, 5, 6, 7, 8, 9, 10, 11], [1, 2, 4, 6, 7, 9, 10, 11]])
    short = np.asarray(TOKENS[:3, :8])
    tokens, segments, positions = (np.zeros((3, 12), np.int32) for _ in range(3))
    rows = np.arange(3)[:, None]
    tokens[rows, at], segments[rows, at], positions[rows, at] = short, 1, np.arange(8)
    want = run(jnp.asarray(short), jnp.ones((3, 8), jnp.int32), jnp.tile(jnp.arange(8)[None], (3, 1)))
    got = run(*map(jnp.asarray, (tokens, segments, positions)))
    np.testing.assert_allclose(np.asarray(got.logits)[rows, at], want.logits, atol=2e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(b, a, rtol=1e-5), want.stats, got.stats)


# Decoding

LENGTHS, WIDTH, STEPS = (5, 3, 1, 4), 5, 4


def decode_case(m, rules=None):
    """Logits of all rows by the full forward pass, and by filling a cache and then one token after another.

    Returns:
        [B, STEPS + 1, V] twice: after the prompt, and after each of the next tokens.
    """
    graph, state = nnx.split(transformer(m, rules))
    lengths = np.array(LENGTHS)
    place = lengths[:, None] - WIDTH + np.arange(WIDTH)  # prompts are aligned at their right ends
    prompt = np.where(place >= 0, np.take_along_axis(np.asarray(TOKENS), np.maximum(place, 0), 1), 0)
    after = np.take_along_axis(np.asarray(TOKENS), lengths[:, None] + np.arange(STEPS), 1)

    @jax.jit
    def run(state, tokens, prompt, after):
        model = nnx.merge(graph, state)
        whole = model(tokens, capacity_factor=None).logits
        cache = model.empty_cache(4, WIDTH + STEPS, jnp.asarray(lengths), WIDTH)
        first = model(prompt, segments=jnp.asarray(place >= 0).astype(jnp.int32), cache=cache)

        def step(cache, token):
            out = model(token[:, None], cache=cache)
            return out.cache, (out.logits[:, 0], out.cache.filled)

        _, (rest, filled) = jax.lax.scan(step, first.cache, after.T)
        return whole, first.logits[:, -1], rest, filled

    whole, first, rest, filled_places = run(state, TOKENS, jnp.asarray(prompt, jnp.int32), jnp.asarray(after))
    np.testing.assert_array_equal(filled_places, WIDTH + 1 + np.arange(STEPS))
    want = np.stack([np.asarray(whole)[b, n - 1 : n + STEPS] for b, n in enumerate(LENGTHS)])
    return want, np.concatenate([np.asarray(first)[:, None], np.asarray(rest).transpose(1, 0, 2)], 1)


@pytest.mark.parametrize("positions", ["learned", "sinusoidal", "rotary"])
@pytest.mark.parametrize("kv_heads", [None, 2])
@pytest.mark.parametrize("norm, order", [("layer", "post"), ("rms", "pre")])
def test_decoding_equals_the_full_forward_pass(positions, kv_heads, norm, order):
    m = replace(TINY, layers=2, positions=positions, kv_heads=kv_heads, norm=norm, norm_order=order, moe=None)
    want, got = decode_case(m)
    np.testing.assert_allclose(got, want, atol=1e-4, rtol=1e-4)


LATENTS = [{"kv_heads": None, "latent": c} for c in (LatentConfig(5, 6, 2, value=3), LatentConfig(None, 6, 4))]


@pytest.mark.parametrize("attention", [*LATENTS, {"qk_norm": True, "biases": True}], ids=str)
def test_decoding_with_other_attention(attention):
    want, got = decode_case(replace(TINY, layers=2, moe=None, **attention))
    np.testing.assert_allclose(got, want, atol=1e-4, rtol=1e-4)


SPARSE = replace(TINY, layers=3, moe=replace(MOE, first_dense=1, every=1))  # dense, then MoE x 2 in a loop


@functools.cache
def decoded_on_one_device(m=SPARSE):
    return decode_case(m)


@pytest.mark.parametrize("router", [None, "hash", "deepseek_v3"])
def test_decoding_of_a_mixture(router):
    """A hash router sees the ids of the tokens; a selection bias counts."""
    rate = 0.0 if router == "deepseek_v3" else None
    m = replace(SPARSE, moe=replace(SPARSE.moe, router=RouterConfig(router or "softmax_topk"), bias_rate=rate))
    want, got = decoded_on_one_device() if router is None else decode_case(m)
    np.testing.assert_allclose(got, want, atol=1e-4, rtol=1e-4)


def test_a_hash_router_sees_the_tokens():
    moe = replace(MOE, router=RouterConfig("hash"), capacity_factor=None)
    out = jax.jit(functools.partial(transformer(replace(TINY, moe=moe)), record=True))(TOKENS)
    want = route(jnp.zeros((4, 12, 4)), moe, ids=TOKENS).expert
    np.testing.assert_array_equal(out.record.expert, jnp.stack([want] * 2))
    assert len(np.unique(want[..., 0])) > 1


def test_expert_choice_does_not_decode():
    """Nor does it have a cache: a token at a time has no sequence of which experts choose."""
    m = replace(SPARSE, moe=replace(SPARSE.moe, router=RouterConfig("expert_choice", lookahead=True)))
    model = transformer(m)
    assert bool(jnp.isfinite(model(TOKENS).logits).all())
    with pytest.raises(ConfigError, match=r"model\.moe\.router\.kind: .* one token at a time\n +remedy: use"):
        model.empty_cache(4, 12)


@pytest.mark.parametrize("attention", [{}, *LATENTS], ids=str)
@pytest.mark.parametrize("axes", [dict(expert=4), dict(expert=2, tensor=2)], ids=str)
def test_decoding_on_a_mesh(axes, attention):
    """The answer is that of the full forward pass on one device."""
    m = replace(SPARSE, **attention)
    alone, _ = decoded_on_one_device(m)
    with jax.set_mesh(mesh.build_mesh(MeshConfig(**axes), jax.devices()[:4])):
        want, got = decode_case(m, Rules())
    np.testing.assert_allclose(want, alone, atol=1e-4, rtol=1e-4)
    np.testing.assert_allclose(got, alone, atol=1e-4, rtol=1e-4)


def test_a_cache_takes_any_number_of_tokens_and_refuses_to_overflow():
    """Prompts in two pieces give the logits of one; what does not fit gives NaN, not a wrong number."""
    m = ModelConfig(vocab=13, layers=2, d_model=8, d_ff=8, heads=2, max_length=16)
    model = filled(lambda: Transformer(m, rngs=nnx.Rngs(params=0)))
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 13, (2, 9)))
    whole = model(tokens).logits
    first = model(tokens[:, :4], cache=model.empty_cache(2, 9))
    second = model(tokens[:, 4:], cache=first.cache)
    np.testing.assert_allclose(jnp.concatenate([first.logits, second.logits], 1), whole, atol=1e-5)
    assert bool(jnp.isnan(model(tokens[:, :1], cache=second.cache).logits).all())
