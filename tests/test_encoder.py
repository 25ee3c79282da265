"""A decoder with an encoder: against float64 by hand, token by token; what reads what; decoding; the text in front."""

import functools
import math
from dataclasses import replace
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from commands import check_refusal, write_text
from flax import nnx
from test_layers import complex_rotary, f64, filled, numbers

from moe_jax import mesh as meshes
from moe_jax.config import (
    Config,
    ConfigError,
    DataConfig,
    EncoderConfig,
    MeshConfig,
    ModelConfig,
    MoEConfig,
    Refused,
    RouterConfig,
    load,
)
from moe_jax.generate import Generator, Sampling
from moe_jax.layers.attention import whole_attention
from moe_jax.layers.distances import Distances, bucket
from moe_jax.layers.positions import sinusoidal
from moe_jax.model import Transformer
from moe_jax.train.loop import Run
from moe_jax.train.state import Model, Weights
from moe_jax.train.step import moved
from moe_jax.train.upcycling import check_model
from moe_jax.upcycle import upcycle

pytestmark = pytest.mark.usefixtures("inside")
T5 = ModelConfig(
    vocab=13,
    layers=2,
    d_model=16,
    d_ff=24,
    heads=4,
    head_dim=6,
    max_length=160,
    positions="relative",
    ffn="relu",
    encoder=EncoderConfig(layers=3),
)
MOE = MoEConfig(experts=4, top_k=1, d_ff=12, every=2, capacity_factor=None)
RNG = np.random.default_rng(3)
INPUTS = RNG.integers(0, 13, (3, 150)).astype(np.int32)  # longer than the distances that T5 tells apart
TOKENS = RNG.integers(0, 13, (3, 9)).astype(np.int32)


def transformer(m):
    return filled(lambda: Transformer(m, rngs=nnx.Rngs(params=0)))


# Positions by distance


@pytest.mark.parametrize("both_ways", [True, False])
def test_buckets_are_those_of_t5(both_ways):
    """Raffel et al. 2020, section 2.1: one bucket each for small distances, then by logarithm, the last from 128 on."""
    buckets = 16 if both_ways else 32
    exact = buckets // 2

    def behind(n):
        if n < exact:
            return n
        begins = [exact * (128 / exact) ** (k / (buckets - exact)) for k in range(1, buckets - exact)]
        return exact + sum(n >= begin * (1 - 1e-12) for begin in begins)

    distances = np.arange(-300, 301)
    got = bucket(jnp.asarray(distances), both_ways)
    want = [behind(n) if n >= 0 else (16 + behind(-n) if both_ways else 0) for n in distances.tolist()]
    np.testing.assert_array_equal(got, want)
    assert set(want) == (set(range(32)) - {16} if both_ways else set(range(32)))


@pytest.mark.parametrize("buckets, limit", [(32, 128), (16, 40), (8, 20), (32, 512)])
def test_buckets_are_those_of_transformers(buckets, limit, transformers):
    """Also of other numbers than T5's."""
    import torch

    theirs = transformers.models.t5.modeling_t5.T5Attention._relative_position_bucket
    distances = np.arange(-700, 701)
    for both_ways in (True, False):
        want = theirs(torch.tensor(-distances), both_ways, buckets, limit)
        np.testing.assert_array_equal(bucket(jnp.asarray(distances), both_ways, buckets, limit), want)


def test_examples_of_buckets():
    """Keys ahead are in the second half of an encoder's buckets: by hand from the formula."""
    distances = jnp.asarray([0, 1, 7, 8, 15, 16, 31, 32, 64, 127, 128, 1000])
    assert bucket(distances, True).tolist() == [0, 1, 7, 8, 9, 10, 11, 12, 14, 15, 15, 15]
    assert bucket(-distances[1:], True).tolist() == [17, 23, 24, 25, 26, 27, 28, 30, 31, 31, 31]
    assert bucket(distances, False).tolist() == [0, 1, 7, 8, 15, 16, 21, 21, 26, 31, 31, 31]


# The model by hand


def rms(x, scale):
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6) * f64(scale)


def softmax(s):
    e = np.exp(s - s.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def heads(x, w, b):
    return np.einsum("ld,dhn->hln", x, f64(w)) + (0 if b is None else f64(b)[:, None])


def attended(p, x, source, mask, m, bias=None, turn=None):
    """One row [L, D] and what it reads [M, D]; mask [L, M]."""
    q, k, v = (heads(a, p[f"w_{n}"], p.get(f"b_{n}")) for a, n in ((x, "query"), (source, "key"), (source, "value")))
    if m.qk_norm:
        q, k = rms(q, p["query_norm"]["scale"]), rms(k, p["key_norm"]["scale"])
    if turn is not None:
        q, k = (complex_rotary(a[None], turn[None], m.rope_theta)[0] for a in (q, k))
    out = np.zeros((*q.shape[:-1], v.shape[-1]))
    shared = q.shape[0] // k.shape[0]
    for h in range(q.shape[0]):
        for i in range(q.shape[1]):
            seen = np.flatnonzero(mask[i])
            if len(seen):
                s = k[h // shared, seen] @ q[h, i] / math.sqrt(q.shape[-1])
                s = s if bias is None else s + f64(bias)[h, i, seen]
                out[h, i] = softmax(s) @ v[h // shared, seen]
    b = p.get("b_out")
    return np.einsum("hln,hnd->ld", out, f64(p["w_out"])) + (0 if b is None else f64(b))


def dense(p, x):
    h = x @ f64(p["w_up"]) + (0 if p.get("b_up") is None else f64(p["b_up"]))
    return np.maximum(h, 0) @ f64(p["w_down"]) + (0 if p.get("b_down") is None else f64(p["b_down"]))


def layers(stacks):
    """Parameters of each layer, bottom first."""
    for stack in stacks.values():
        repeats = next(iter(jax.tree.leaves(stack))).shape[0]
        for n in range(repeats):
            for block in stack["blocks"].values():
                yield jax.tree.map(lambda a, n=n: a[n], block)


def by_distance(table, L, M, both_ways):
    """[H, L, M], entry by entry."""
    buckets = np.asarray(bucket(jnp.asarray(np.arange(L)[:, None] - np.arange(M)), both_ways))
    return np.array([[f64(table)[buckets[i, j]] for j in range(M)] for i in range(L)]).transpose(2, 0, 1)


def by_hand(model, inputs, input_segments, tokens, segments):
    """Logits of one row in float64."""
    m, p = model.m, nnx.to_pure_dict(nnx.state(model, nnx.Param))

    def embedded(ids, table):
        x = f64(table)[ids]
        if m.positions == "learned":
            x = x + f64(p["embedding"]["positions"])[: len(ids)]
        if m.positions == "sinusoidal":
            x = x + f64(sinusoidal(jnp.arange(len(ids)), m.d_model))
        return x

    def passed(part, x, mask, both_ways, read=None):
        bias = by_distance(part["relative"], len(x), len(x), both_ways) if m.positions == "relative" else None
        turn = np.arange(len(x)) if m.positions == "rotary" else None
        pre = m.norm_order == "pre"

        def added(x, norm, f):
            return x + f(rms(x, norm["scale"])) if pre else rms(x + f(x), norm["scale"])

        for b in layers(part["stacks"]):
            x = added(x, b["attention_norm"], lambda h, b=b: attended(b["attention"], h, h, mask, m, bias, turn))
            if read is not None:
                x = added(x, b["cross_norm"], lambda h, b=b: attended(b["cross_attention"], h, *read, m))
            x = added(x, b["ffn_norm"], lambda h, b=b: dense(b["ffn"], h))
        return rms(x, part["final_norm"]["scale"]) if m.final_norm else x

    both = (input_segments[:, None] == input_segments[None]) & (input_segments[None] > 0)
    memory = passed(p["encoder"], embedded(inputs, p["encoder"].get("table", p["embedding"]["table"])), both, True)
    causal = np.tril(segments[:, None] == segments[None])
    cross = (segments[:, None] == input_segments[None]) & (input_segments[None] > 0)
    out = passed(p, embedded(tokens, p["embedding"]["table"]), causal, False, (memory, cross))
    head = p["embedding"].get("head")
    return out @ (f64(p["embedding"]["table"]).T if head is None else f64(head))


SEGMENTS = np.array([[1] * 9, [1, 1, 2, 2, 2, 3, 3, 0, 0], [2] * 9], np.int32)  # the third one's source is empty
INPUT_SEGMENTS = np.array([[1] * 150, [0] * 20 + [1] * 60 + [2] * 70, [1] * 150], np.int32)
SETTINGS = {
    "t5": {},
    "learned, biases, another embedding and head": {
        "positions": "learned",
        "biases": True,
        "tied_head": False,
        "encoder": EncoderConfig(layers=1, vocab=17),
    },
    "rotary, grouped queries, their norms, post-norm": {
        "positions": "rotary",
        "kv_heads": 2,
        "qk_norm": True,
        "norm_order": "post",
        "final_norm": False,
    },
    "sinusoidal, a layer each": {"positions": "sinusoidal", "stack_above": 9},
}


@pytest.mark.parametrize("name", SETTINGS)
def test_the_model_by_hand(name):
    model = transformer(replace(T5, **SETTINGS[name]))
    given = {"inputs": INPUTS, "input_segments": INPUT_SEGMENTS, "segments": SEGMENTS}
    got = jax.jit(lambda **a: model(TOKENS, **a).logits)(**given)
    for row in range(3):
        want = by_hand(model, INPUTS[row], INPUT_SEGMENTS[row], TOKENS[row], SEGMENTS[row])
        real = SEGMENTS[row] > 0
        np.testing.assert_allclose(np.asarray(got[row])[real], want[real], atol=2e-5 * np.abs(want).max())


def test_attention_to_nothing_is_zero():
    """Not the mean of all values, among them those of other documents."""
    q, k, v = numbers(1, 2, 1, 3, 4), numbers(1, 2, 5, 4, seed=1), numbers(1, 2, 5, 4, seed=2)
    y = whole_attention(q, k, v, jnp.asarray([[1, 2, 3]]), jnp.asarray([[1, 1, 0, 3, 3]]))
    assert np.abs(y[:, :, :, 1]).max() == 0 and (np.abs(y[:, :, :, [0, 2]]).max(-1) > 0).all()


def test_relative_positions_without_an_encoder():
    """The decoder alone has biases too, of distances back."""
    model, other = (transformer(replace(T5, encoder=None)) for _ in range(2))
    other.relative[...] = other.relative[...].at[3].add(1.0)  # three places back
    a, b = model(TOKENS).logits, other(TOKENS).logits
    np.testing.assert_array_equal(a[:, :3], b[:, :3])
    assert (np.abs(a - b)[:, 3:].max(-1) > 1e-4).all()


def test_the_gradient_of_distances():
    """By bucket, against what JAX makes of the sum."""
    table, scores = numbers(32, 4), numbers(3, 2, 2, 5, 7, seed=1)
    buckets = bucket(jnp.asarray(np.arange(5)[:, None] - np.arange(7)), True)

    def plain(table, scores):
        return jnp.sin(scores + table.T[:, buckets].reshape(1, 2, 2, 5, 7)).sum()

    def ours(table, scores):
        return jnp.sin(Distances(table, buckets, None).added(scores)).sum()

    for got, want in zip(*(jax.grad(f, (0, 1))(table, scores) for f in (ours, plain)), strict=True):
        np.testing.assert_allclose(got, want, atol=1e-5)


@pytest.mark.parametrize("read, written", [((0, 2), (1,)), ((), (0, 1)), ((1,), ())])
def test_layers_by_number_in_both_stacks(read, written):
    """Each with its own MoE layers, also none; a record of each, by their tokens."""
    moe, encoder = replace(MOE, every=1, layers=written), replace(T5.encoder, moe_layers=read)
    model = transformer(replace(T5, moe=moe, encoder=encoder))
    out = model(TOKENS, inputs=INPUTS, record=True)
    assert out.stats.routed.tolist() == [450] * len(read) + [27] * len(written)
    records = [r and r.expert.shape for r in (out.input_record, out.record)]
    assert records == [(len(n), *shape, 1) if n else None for n, shape in ((read, (3, 150)), (written, (3, 9)))]


def test_statistics_are_of_the_encoder_first():
    """By their tokens: 150 inputs a row, 9 tokens; and each stack's MoE layers by the same pattern."""
    model = transformer(replace(T5, moe=MOE, layers=4))
    stats = model(TOKENS, inputs=INPUTS).stats
    assert stats.routed.tolist() == [450, 27, 27]
    loads = np.asarray(stats.load).sum(1)
    assert loads.tolist() == [450, 27, 27]


WRONG = {
    "inputs are missing, which the encoder reads: pass": {},
    "no replay or schedule": {"inputs": INPUTS, "replay": np.zeros((1, 3, 9, 1), np.int32)},
    "161 inputs: give 1 to model.max_length=160": {"inputs": np.zeros((3, 161), np.int32)},
    "0 inputs: give 1": {"inputs": np.zeros((3, 0), np.int32)},
}


@pytest.mark.parametrize("says", WRONG)
def test_wrong_calls(says):
    with pytest.raises(ValueError, match=says):
        transformer(T5)(TOKENS, **WRONG[says])
    with pytest.raises(ValueError, match="a model without an encoder reads none"):
        transformer(replace(T5, encoder=None))(TOKENS, inputs=INPUTS)


# Decoding


@pytest.mark.parametrize(
    "more", [{}, {"positions": "rotary", "kv_heads": 2}, {"moe": MOE, "positions": "learned"}], ids=str
)
def test_decoding_equals_the_full_forward_pass(more):
    """The encoder reads once; prompts of unequal length, whose sources are so too."""
    model = transformer(replace(T5, **more))
    before = {"inputs": INPUTS, "input_segments": (np.arange(150) >= [[0], [140], [3]]).astype(np.int32)}
    whole = model(TOKENS, capacity_factor=None, **before).logits
    lengths, width = np.array([4, 1, 3]), 4
    place = lengths[:, None] - width + np.arange(width)
    prompt = np.where(place >= 0, np.take_along_axis(TOKENS, np.maximum(place, 0), 1), 0)
    cache = model.empty_cache(3, width + 5, jnp.asarray(lengths), width)
    shown = {"segments": jnp.asarray(place >= 0).astype(jnp.int32)}
    out = model(jnp.asarray(prompt), cache=cache, capacity_factor=None, **shown, **before)
    got = [out.logits[:, -1]]

    @jax.jit
    def step(token, cache):
        out = model(token, cache=cache, capacity_factor=None)
        return out.logits, out.cache

    for i in range(5):
        token = np.take_along_axis(TOKENS, lengths[:, None] + i, 1)
        logits, cache = step(token, out.cache if i == 0 else cache)
        got.append(logits[:, 0])
    for row, n in enumerate(lengths):
        np.testing.assert_allclose([g[row] for g in got], whole[row, n - 1 : n + 5], atol=1e-4, rtol=1e-4)
    with pytest.raises(ValueError, match="the cache holds what the encoder has read: leave them out"):
        model(TOKENS[:, :1], cache=cache, **before)


# Around the model


def config_of(m, **mesh):
    return Config(model=m, data=DataConfig(length=8, batch=8), mesh=MeshConfig(**mesh))


def made(model, seed=0):
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda s: (0.4 * rng.normal(size=s.shape)).astype(np.float32), model.shapes)


PROMPTS = [[3, 1, 4, 1, 5], [9], [2, 6, 5, 3, 5, 8, 9, 7, 9, 3]]
ALONE = 1  # the one that leaves an encoder nothing to read


TEXT = replace(T5, vocab=14, moe=MOE)


@functools.cache
def continued(start=None):
    """Six more tokens of each prompt, by the whole forward pass of it alone again and again; `start`: the token that a
    decoder begins with when its encoder reads all of a prompt."""
    model = Model.of(config_of(TEXT))
    run = jax.jit(lambda numbers, tokens, **given: model.module(numbers)(tokens, capacity_factor=None, **given).logits)

    def row(ids, width):  # padded at its end
        return np.array([[*ids, *[0] * (width - len(ids))]]), (np.arange(width) < len(ids))[None].astype(np.int32)

    numbers, out = made(model), []
    with jax.set_mesh(meshes.build_mesh(MeshConfig())):
        for prompt in PROMPTS:
            inputs, input_segments = row(prompt if start is not None else prompt[:-1], 10)
            text = prompt[-1:] if start is None else [start]
            for _ in range(6):
                tokens, segments = row(text, 7)
                logits = run(numbers, tokens, segments=segments, inputs=inputs, input_segments=input_segments)
                text = [*text, int(logits[0, len(text) - 1].argmax())]
            out.append(text[1:])
    return out


@pytest.mark.parametrize("mesh", [{}, {"expert": 2, "tensor": 2, "data": 2}], ids=str)
def test_text_goes_on_from_the_last_token(mesh):
    """The encoder reads the rest of a prompt, whatever shares its batch, on any mesh."""
    cfg = config_of(TEXT, **mesh)
    model, built = Model.of(cfg), meshes.build_mesh(cfg.mesh)
    weights = Weights(jax.device_put(made(model), model.weight_shardings(built).params), None)
    new = Generator(model, built, 14, 14, Sampling(temperature=0.0))(weights, [np.array(p) for p in PROMPTS], 6)
    assert new.tokens == continued()
    text = Generator(model, built, 14, 14, Sampling(temperature=0.0))
    assert text(weights, [np.array(PROMPTS[ALONE])], 6).tokens == [continued()[ALONE]]
    assert len(text(weights, [np.zeros(161, int)], 159).tokens[0]) == 159
    for length, new_tokens, says in ((162, 1, "at most 161 tokens"), (2, 160, "ask for at most 159")):
        with pytest.raises(Refused, match=says):
            text(weights, [np.zeros(length, int)], new_tokens)


def test_a_text_of_its_own():
    """The encoder reads all of a prompt, and the decoder begins with the token that the config names."""
    cfg = config_of(replace(TEXT, encoder=replace(T5.encoder, start=4)), expert=2, tensor=2, data=2)
    model, built = Model.of(cfg), meshes.build_mesh(cfg.mesh)
    weights = Weights(jax.device_put(made(model), model.weight_shardings(built).params), None)
    text = Generator(model, built, 14, 14, Sampling(temperature=0.0))
    assert text(weights, [np.array(p) for p in PROMPTS], 6).tokens == continued(4) != continued()
    with pytest.raises(Refused, match="at most 160 tokens"):
        text(weights, [np.zeros(161, int)], 1)
    with pytest.raises(Refused, match=r"the first token and 160 new ones exceed .*\n.*ask for at most 159"):
        text(weights, [np.zeros(160, int)], 160)


@pytest.mark.parametrize(
    "layers, pattern, listed",
    [(2, {}, None), (5, {"every": 2, "first_dense": 1}, None), (2, {"layers": ()}, (1, 2))],
    ids=str,
)
def test_upcycling_keeps_the_function_of_both(layers, pattern, listed):
    moe = MoEConfig(experts=4, top_k=2, d_ff=12, router=RouterConfig("topk_softmax"), **pattern)
    m = replace(T5, layers=layers, moe=moe, encoder=replace(T5.encoder, moe_layers=listed))
    dense, sparse = (Model.of(config_of(x)) for x in (m.dense, m))
    numbers = made(dense)

    def logits(model, *weights):
        return model.module(*weights)(TOKENS, inputs=INPUTS, capacity_factor=None).logits

    with jax.set_mesh(meshes.build_mesh(MeshConfig())):
        want = logits(dense, numbers)
        new = upcycle(numbers, m, "split")
        assert jax.tree.map(jnp.shape, new.params) == jax.tree.map(lambda s: s.shape, sparse.shapes)
        np.testing.assert_allclose(logits(sparse, *new), want, atol=1e-5 * np.abs(want).max())
    routers = [x for path, x in jax.tree_util.tree_leaves_with_path(new.params) if "router" in str(path)]
    columns = {tuple(row[0, ::2].tolist()) for x in routers for row in x}
    assert len(columns) == (m.layer_kinds + m.encoder_kinds).count("moe"), "each layer draws its own"


UNLIKE = {  # encoders of the dense model and of the other, and what is said
    "model.encoder: is set, and the dense model has none": (None, EncoderConfig(2)),
    "model.encoder: is not set, and the dense model has an encoder of 2 layers": (EncoderConfig(2), None),
    "model.encoder.layers: is 3, and the dense model has 2": (EncoderConfig(2), EncoderConfig(3)),
    "model.encoder.vocab: is 9, and the dense model has unset": (EncoderConfig(2), EncoderConfig(2, vocab=9)),
}


@pytest.mark.parametrize("says", UNLIKE)
def test_upcycling_to_another_encoder_is_refused(says):
    was, now = (replace(T5, encoder=encoder) for encoder in UNLIKE[says])
    with pytest.raises(Refused) as e:
        check_model(was, now)
    assert says in str(e.value) and "remedy: set " in str(e.value)
    check_model(replace(T5, encoder=EncoderConfig(2)), replace(T5, encoder=EncoderConfig(2, length=7)))


def test_selection_biases_move_by_the_loads_of_their_layers():
    """Those of the encoder by the first loads of a step."""
    moe = replace(MOE, router=RouterConfig("softmax_topk"), bias_rate=1.0, every=1)
    model = Model.of(config_of(replace(T5, moe=moe)))
    load = jnp.asarray(np.eye(4)[[0, 1, 2, 3, 0]] * 8, jnp.int32)  # three layers of the encoder, two of the decoder
    bias = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), model.bias_shapes)
    new = jax.tree.map(np.asarray, moved(model, bias, SimpleNamespace(load=load)))
    (first,), (second,) = jax.tree.leaves(new["encoder"]), jax.tree.leaves(new["stacks"])
    assert np.concatenate([first, second]).argmin(1).tolist() == [0, 1, 2, 3, 0]


REFUSED = {
    "mesh.stage": ["mesh.stage=2", "train.microbatches=2"],
    "model.encoder": ["mesh.context=2"],
    "model.positions": ["mesh.context=2", "model.encoder="],
    "model.encoder.length": ["model.encoder.length=513"],
    "model.moe.group_size": ["model.encoder.length=96", "model.moe.group_size=64"],
    "model.encoder.layers": ["model.encoder.layers=0"],
    "rules.residual": ["mesh.tensor=2", 'rules.residual=["tensor"]', "model.encoder.length=33"],
    "model.moe.every": ["model.layers=1", "model.encoder.layers=1"],
    "model.encoder.moe_layers": ["model.moe.every=1", "model.moe.layers=[0]"],
    "model.moe.layers": ["model.moe.every=1", "model.moe.layers=[]", "model.encoder.moe_layers=[]"],
    "model.encoder.start": ["model.encoder.start=512"],
    "model.distance_buckets": ["model.distance_buckets=7"],
    "model.distance_limit": ["model.distance_limit=16"],
}


@pytest.mark.parametrize("key", REFUSED)
def test_refused_settings(key):
    """Also what has no effect, and layers that are not there."""
    with pytest.raises(ConfigError) as e:
        load("tiny_t5", ["mesh.data=1", *REFUSED[key]])
    assert key in {p.key for p in e.value.problems} and all(p.remedy for p in e.value.problems)


NUMBERS = {
    "is [2], and the layers are numbered from 0 to 1": ["model.encoder.moe_layers=[2]"],
    "is [1, 1], and": ["model.encoder.moe_layers=[1, 1]"],
    "is [0] in a dense model": ["model.moe=", "mesh.expert=1", "model.encoder.moe_layers=[0]"],
    "rotary positions are no distances": ["model.positions=rotary", "model.distance_limit=64"],
}


@pytest.mark.parametrize("says", NUMBERS)
def test_numbers_of_layers_and_distances(says):
    with pytest.raises(ConfigError) as e:
        load("tiny_t5", ["mesh.data=1", *NUMBERS[says]])
    assert says in str(e.value)


def test_latent_attention_has_no_encoder():
    with pytest.raises(ConfigError, match=r"model\.encoder: is set, and latent attention has none to read"):
        load("tiny_deepseek", ["model.encoder.layers=2"])


SMALL = ["model.d_model=16", "model.d_ff=32", "model.heads=2", "model.moe.experts=4", "model.max_length=32"]
SMALL += ["data.length=16", "model.encoder.length=24", "data.batch=8", "train.sample=th", "train.sample_tokens=8"]


@pytest.mark.parametrize(
    "read, written, of, group", [([1], [], "encoder", 24), ([], [1], "decoder", 16), ([1], [1], "decoder", 16)]
)
def test_what_is_told_of_dispatch_is_of_layers_with_experts(read, written, of, group, call):
    """Of the decoder's, where it has any, in `plan`; of each stack that has, in the first lines of `train`."""
    listed = ["model.moe.every=1", f"model.moe.layers={written}", f"model.encoder.moe_layers={read}"]
    code, report, _ = call("plan", "tiny_t5", *SMALL, *listed, "--json", "--quiet")
    assert code == 0 and (report["dispatch"]["of"], report["dispatch"]["group"]) == (of, group)
    code, out, _ = call("plan", "tiny_t5", *SMALL, *listed)
    assert code == 0 and f"dispatch of the {of} {report['dispatch']['kind']}" in out
    said = Run.dispatch(SimpleNamespace(cfg=load("tiny_t5", [*SMALL, *listed])))
    assert [f"groups of {n} tokens" in said for n in (24, 16)] == [bool(read), bool(written)]
    assert ("of the encoder" in said) == bool(read)


def test_commands(call, tmp_path):
    """Train, go on, evaluate on another mesh, generate, inspect."""
    text, folder = f"data.path={write_text(tmp_path)}", tmp_path / "run"
    argv = ["tiny_t5", *SMALL, text, "--workdir", folder]
    code, first, _ = call("train", *argv, "train.steps=3", "--json", "--quiet")
    # The last step: two MoE layers, of 8 sequences of 16 tokens and of those in front of them, 24 at the most.
    assert code == 0 and 8 * 16 < first["routed"] <= 8 * (16 + 24) and "sample" in first
    code, report, _ = call("train", *argv, "train.steps=5", "--json", "--quiet")
    assert code == 0 and report["step"] == 5
    code, found, _ = call("eval", folder, "mesh.data=1", "mesh.expert=1", "--json", "--quiet")
    assert code == 0 and found["eval_loss"] == pytest.approx(report["eval_loss"], rel=1e-5)
    code, out, _ = call("generate", folder, "--prompt", "the", "--tokens", "5", "--quiet")
    assert code == 0 and out.startswith("the")
    code, found, _ = call("inspect", "tiny_t5", *SMALL, "--json", "--quiet")
    assert code == 0 and found["exchange"]["times_least"] == 1 and found["flags"] == []
    code, found, _ = call("bench", "step", "tiny_t5", *SMALL, "--rounds", "1", "--json", "--quiet")
    assert code == 0
    code, out, err = call("train", *argv[:-1], tmp_path / "other", "model.encoder.vocab=100")
    check_refusal(code, out, err, "train", "model.encoder.vocab: 100 is smaller than the tokenizer's 257")
    short = tmp_path / "short.jsonl"
    short.write_text("".join(f'{{"text": "word {i}"}}\n' for i in range(2000)))
    code, out, err = call(
        "train", "tiny_t5", *SMALL, f"data.path={short}", "data.packing=pad", "--workdir", tmp_path / "pad"
    )
    check_refusal(code, out, err, "train", "data.packing: is 'pad', and no document is longer than a sequence")
