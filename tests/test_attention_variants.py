"""Attention as published models vary it, against NumPy in float64, on meshes, and decoded a token at a time."""

import functools
import math
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from test_encoder import layers, rms, softmax
from test_layers import f64, filled
from test_rope import proved_by_transformers, rates

from moe_jax import config, place
from moe_jax import mesh as meshes
from moe_jax.axes import Rules
from moe_jax.cache import empty_layer
from moe_jax.collectives import read
from moe_jax.config import ConfigError, LatentConfig, MeshConfig, ModelConfig, MoEConfig, RopeConfig, from_dict
from moe_jax.layers.attention import Scoring, causal_attention
from moe_jax.layers.context import split_attention
from moe_jax.model import Transformer
from moe_jax.plan.leaves import leaves
from moe_jax.plan.traffic import traffic
from moe_jax.plan.work import Step
from moe_jax.sequence import balanced, restored
from moe_jax.train.state import Model

L = 70  # two blocks of queries
SMALL = ModelConfig(vocab=13, layers=4, d_model=16, d_ff=24, heads=4, kv_heads=2, head_dim=6, max_length=80)
LONG = RopeConfig("longrope", original_length=7, short_factors=(1.0, 1.2, 1.5), long_factors=(1.0, 2.5, 6.0))
LONG = replace(LONG, attention_factor=1.1, long_attention_factor=1.3)
VARIANTS = {
    "sliding": {"window": 5},
    "alternate": {"window": 5, "full_every": 2},
    "sinks": {"sinks": True, "kv_heads": 4},
    "biases of queries, keys and values": {"biases": "qkv"},
    "biases of attention": {"biases": "attention", "window": 5},
    "a norm over all heads": {"qk_norm": "all", "biases": "qkv"},
    "held queries, keys and values": {"qkv_clip": 0.7, "qk_norm": True},
    "a scale": {"attention_scale": 0.9},
    "YaRN of a part": {"rope": RopeConfig("yarn", factor=4.0, original_length=32, fraction=1 / 3), "head_dim": 12},
    "LongRoPE": {"rope": replace(LONG, original_length=40)},  # of the rows the second is a long one
    "sinks and a window": {"sinks": True, "window": 1, "full_every": 2, "stack_above": 4},
}


def transformer(m, rules=None):
    return filled(lambda: Transformer(m, rules=rules, rngs=nnx.Rngs(params=0)))


def turn(x, positions, m):
    """x [heads, L, N] with the pairs of its first numbers turned."""
    if m.rope is not None and m.rope.kind == "longrope":
        length = positions.max() + 1
        width, rate = x.shape[-1], np.array(rates(m.rope, x.shape[-1], m.rope_theta, length))
        factor = m.rope.turned_long if length > m.rope.original_length else m.rope.turned
    elif m.rope is None:
        width, factor, rate = x.shape[-1], 1.0, m.rope_theta ** (-2 * np.arange(x.shape[-1] // 2) / x.shape[-1])
    else:
        width, factor = round(x.shape[-1] * m.rope.fraction), m.rope.turned
        rate = np.array(rates(m.rope, width, m.rope_theta))
    half = width // 2
    z = (x[..., :half] + 1j * x[..., half:width]) * factor * np.exp(1j * positions[:, None] * rate)
    return np.concatenate([z.real, z.imag, x[..., width:]], -1)


def attended(p, x, positions, segments, m, window):
    """One row [L, D], query by query: softmax over what its head sees, and over the sink."""
    q, k, v = (
        np.einsum("ld,dhn->hln", x, f64(p[f"w_{n}"])) + (f64(p[f"b_{n}"])[:, None] if f"b_{n}" in p else 0.0)
        for n in ("query", "key", "value")
    )
    q, k = (normed(a, p.get(f"{n}_norm"), m) for n, a in (("query", q), ("key", k)))
    if m.qkv_clip is not None:
        q, k, v = (np.clip(a, -m.qkv_clip, m.qkv_clip) for a in (q, k, v))
    q, k = (turn(a, positions, m) for a in (q, k))
    scale = m.attention_scale or 1 / math.sqrt(q.shape[-1])
    out = np.zeros_like(q)
    for h in range(len(q)):
        for i in range(len(x)):
            seen = [j for j in range(i + 1) if segments[j] == segments[i] and (window is None or i - j < window)]
            s = k[h * len(k) // len(q)][seen] @ q[h, i] * scale
            s = np.append(s, f64(p["sinks"])[h]) if "sinks" in p else s
            out[h, i] = softmax(s)[: len(seen)] @ v[h * len(k) // len(q)][seen]
    return np.einsum("hln,hnd->ld", out, f64(p["w_out"])) + (f64(p["b_out"]) if "b_out" in p else 0.0)


def normed(x, norm, m):
    """x [heads, L, N] over each head, or over all of a token's."""
    if norm is None:
        return x
    if m.qk_norm != "all":
        return rms(x, norm["scale"])
    flat = rms(x.transpose(1, 0, 2).reshape(x.shape[1], -1), norm["scale"])
    return flat.reshape(x.shape[1], x.shape[0], -1).transpose(1, 0, 2)


def by_hand(model, tokens, positions, segments):
    """Logits of one row of a dense decoder; each layer by its number sees its window or all."""
    m, p = model.m, nnx.to_pure_dict(nnx.state(model, nnx.Param))
    x = f64(p["embedding"]["table"])[tokens]
    for i, b in enumerate(layers(p["stacks"])):
        window = None if m.full_every and i % m.full_every == m.full_every - 1 else m.window
        x = x + attended(b["attention"], rms(x, b["attention_norm"]["scale"]), positions, segments, m, window)
        h, ffn = rms(x, b["ffn_norm"]["scale"]), {k: f64(v) for k, v in b["ffn"].items()}
        gate, up = (h @ ffn[f"w_{n}"] + ffn.get(f"b_{n}", 0.0) for n in ("gate", "up"))
        x = x + gate / (1 + np.exp(-gate)) * up @ ffn["w_down"] + ffn.get("b_down", 0.0)
    return rms(x, p["final_norm"]["scale"]) @ f64(p["embedding"]["table"]).T


@functools.cache
def rows():
    """Tokens, segments and positions: a packed row with padding at its end, and one document."""
    tokens = np.random.default_rng(3).integers(0, 13, (2, L)).astype(np.int32)
    segments = np.stack([np.repeat([1, 2, 0], [23, 40, 7]), np.ones(L, int)]).astype(np.int32)
    positions = np.stack([np.concatenate([np.arange(n) for n in (23, 40, 7)]), np.arange(L)]).astype(np.int32)
    return tokens, segments, positions


@pytest.mark.parametrize("name", VARIANTS)
def test_the_model_equals_numpy(name):
    """Logits of packed rows, longer than a block of queries."""
    model = transformer(replace(SMALL, **VARIANTS[name]))
    tokens, segments, positions = rows()
    got = jax.jit(lambda t, s, p: model(t, segments=s, positions=p).logits)(tokens, segments, positions)
    assert np.isfinite(got).all()
    for row in range(2):
        real = segments[row] > 0
        want = by_hand(model, tokens[row], positions[row], segments[row])
        np.testing.assert_allclose(np.asarray(got[row])[real], want[real], atol=3e-5 * np.abs(want).max())


# Biases


@pytest.mark.parametrize("biases, of", [(False, 0), ("qkv", 3), ("attention", 4), (True, 7)])
def test_which_biases_there_are(biases, of):
    """Files that say true or false read as before; a leaf of each kind in one layer."""
    made = from_dict({"model": {"biases": biases, "layers": 1}}).model
    assert made.biases is biases or made.biases == biases
    assert sum(x.name.partition(".b_")[1] == ".b_" for x in leaves(made)) == of
    assert config.override({}, f"model.biases={str(biases).lower()}") == {"model": {"biases": biases}}


# Windows


@pytest.mark.parametrize(
    "kinds, want",
    [
        ({"window": 4}, [(1, 8)]),
        ({"window": 4, "full_every": 2}, [(2, 4)]),
        ({"window": 4, "full_every": 8}, [(1, 7), (1, 1)]),
        ({"window": 4, "full_every": 4}, [(4, 2)]),
        ({"window": 4, "full_every": 2, "moe": MoEConfig(every=4)}, [(4, 2)]),
        ({"window": 4, "full_every": 2, "moe": MoEConfig(first_dense=1)}, [(1, 1), (2, 3), (1, 1)]),
        ({"window": 4, "full_every": 4, "stack_above": 8}, [(1, 1)] * 8),
    ],
)
def test_layers_that_see_differently_are_layers_of_a_period(kinds, want):
    """So that a loop runs over periods, in each of which every layer has one window."""
    m = ModelConfig(layers=8, **kinds)
    assert [(len(period), repeats) for period, repeats in m.runs] == want
    n = m.full_every or 9
    assert m.windows == tuple(None if i % n == n - 1 else 4 for i in range(8))
    spread = [w for windows, (_, repeats) in zip(m.run_windows, m.runs, strict=True) for w in windows * repeats]
    assert tuple(spread) == m.windows


@pytest.mark.parametrize("window", [1, 7, 64, 65, 1000])
def test_keys_before_the_window_are_not_multiplied(window):
    """The result of the full square with a mask, from blocks that hold no key which none of their queries sees."""
    n = 150
    q, k, v = np.random.default_rng(0).normal(size=(3, 1, 2, n, 4)).astype(np.float32)
    segments = np.repeat([[1, 2]], [100, 50], axis=1).astype(np.int32)
    program = jax.jit(
        lambda *a: causal_attention(a[0][:, :, None], *a[1:], jnp.asarray(segments), Scoring(0.7, window))
    )
    got = np.asarray(program(q, k, v))[:, :, 0]
    behind = np.arange(n)[:, None] - np.arange(n)
    mask = (behind >= 0) & (behind < window) & (segments[0][:, None] == segments[0])
    s = np.where(mask, 0.7 * np.einsum("bhln,bhmn->bhlm", *(x.astype(np.float64) for x in (q, k))), -np.inf)
    np.testing.assert_allclose(got, softmax(s) @ v, atol=1e-5)
    shapes = [
        x.aval.shape for e in jax.make_jaxpr(program)(q, k, v).jaxpr.eqns[0].params["jaxpr"].eqns for x in e.outvars
    ]
    widest = max(shape[-1] for shape in shapes if len(shape) == 5 and shape[-2] == 64)
    assert widest == min(128, 63 + window)


def test_a_windows_work_is_counted():
    """GPT-OSS: half of the layers see 128 tokens of 4096: their area is a band."""
    m = {"model.layers": 4, "model.window": 128, "model.full_every": 2, "model.max_length": 4096}
    keys = [*(f"{k}={v}" for k, v in m.items()), "data.length=4096", "train.sample=unset", "mesh.data=1"]
    whole, part = (
        Step(config.load("tiny_dense", k), "tpu")
        for k in ([*keys, "model.window=unset", "model.full_every=unset"], keys)
    )
    H, N = part.cfg.model.heads, part.cfg.model.resolved_head_dim
    band = 128 - 128 * 128 / (2 * 4096)  # keys of a query on average
    assert whole.flops.infer - part.flops.infer == 2 * 4 * H * N * (2048 - band)
    assert whole.flops.decode - part.flops.decode == 2 * 4 * H * N * (4096 - 128)
    assert part.executed()["scores"] == (whole.executed()["scores"] + part.seeing(128).executed()["scores"]) / 2
    assert [(s.cfg.model.window, kind, n) for s, kind, n in part.alike] == [(128, "dense", 2), (None, "dense", 2)]


# Sinks


def test_gradients_beside_sinks():
    """Of the softmax with one column more, also where a window leaves a query itself alone, and rows are packed."""
    q, k, v, g, sinks, segments = split_numbers()

    def loss(q, k, v, sinks):
        out = causal_attention(q, k, v, jnp.asarray(segments), Scoring(0.4, 10, None, sinks.reshape(-1)))
        return (out * g).sum(), out

    (_, out), grads = jax.jit(jax.value_and_grad(loss, (0, 1, 2, 3), has_aux=True))(q, k, v, sinks)
    for got, want in zip((out, *grads), reference(10, True), strict=True):
        np.testing.assert_allclose(got, want, atol=1e-5 * np.abs(want).max())


def test_a_large_sink_silences_a_head():
    """And the largest score of float32 does not overflow beside a small one."""
    q, k, v, _, _, segments = split_numbers()
    for sink, scale in ((80.0, 1.0), (-80.0, 1.0), (0.0, 1e4)):
        y = causal_attention(q, k, v, jnp.asarray(segments), Scoring(scale, None, None, jnp.full(6, sink)))
        assert np.isfinite(y).all() and (np.abs(y).max() < 1e-20) == (sink > 0)


@proved_by_transformers
def test_sinks_are_those_of_transformers():
    import torch
    from transformers.models.gpt_oss.modeling_gpt_oss import eager_attention_forward

    q, k, v, _, sinks, _ = split_numbers()
    module = torch.nn.Module()
    module.num_key_value_groups, module.sinks = 3, torch.tensor(sinks.reshape(-1))
    behind = np.arange(24)[:, None] - np.arange(24)
    mask = torch.tensor(np.where((behind >= 0) & (behind < 9), 0.0, -1e30)[None, None], dtype=torch.float32)
    flat = (torch.tensor(x) for x in (q.reshape(2, 6, 24, 4), k, v))
    want, _ = eager_attention_forward(module, *flat, mask, 0.4)  # [B,L,H,N]
    got = causal_attention(q, k, v, jnp.ones((2, 24), jnp.int32), Scoring(0.4, 9, None, jnp.asarray(sinks.reshape(-1))))
    np.testing.assert_allclose(got.reshape(2, 6, 24, 4).transpose(0, 2, 1, 3), want.numpy(), atol=1e-5)


STRETCHED = {"kind": "yarn", "factor": 4.0, "original_length": 32, "truncate": False}
IDLE = {"positions": "learned", "rope": STRETCHED}
REFUSED = [
    ({"biases": "qkv", "latent": {}}, "biases", "is 'qkv', and latent attention has norms of its own"),
    ({"qkv_clip": 1.0, "latent": {}}, "qkv_clip", "is 1, and latent attention keeps no keys"),
    ({"biases": "qvk"}, "biases", "did you mean 'qkv'? use one of attention, qkv"),
    ({"sinks": True, "latent": {}}, "latent", "such attention has no sinks"),
    ({"sinks": True, "encoder": {}}, "encoder", "such attention has no sinks"),
    ({"full_every": 2}, "full_every", "without a window"),
    ({"window": 8, "full_every": 1}, "full_every", "is 1: every layer sees all"),
    ({"window": 8, "full_every": 5, "layers": 4}, "full_every", "is 5, and of 4 layers none comes to see all"),
    (IDLE, "rope.factor", "is 4.0, and learned positions do not turn"),
    (IDLE, "rope.kind", "is yarn, and learned positions do not turn"),
    (IDLE, "rope.truncate", "is false, and learned positions do not turn"),
    ({"positions": "learned", "rope": {}}, "rope", "is set, and learned positions do not turn"),
    ({"window": 8, "latent": {}}, "latent", "such attention has no window (model.window=8)"),
    ({"window": 8, "encoder": {}}, "encoder", "such attention has no window"),
    ({"window": 8, "positions": "relative"}, "positions", "is 'relative', and such attention has no window"),
]


@pytest.mark.parametrize("keys, key, words", REFUSED, ids=lambda v: v if isinstance(v, str) else "")
def test_refused(keys, key, words):
    with pytest.raises(ConfigError) as e:
        from_dict({"model": keys})
    assert f"model.{key}" in [p.key for p in e.value.problems] and words in str(e.value)


# Rows split over shards


@functools.cache
def reference(window, with_sinks):
    """softmax(0.4 q k^T) v with the whole mask, in float64, and its gradients."""
    q, k, v, g, sinks, segments = split_numbers()
    sinks = sinks if with_sinks else np.full_like(sinks, -np.inf)
    behind = np.arange(24)[:, None] - np.arange(24)
    mask = (behind >= 0) & (behind < window) & (segments[:, :, None] == segments[:, None])

    def loss(q, k, v, sinks):
        s = jnp.where(mask[:, None, None], 0.4 * jnp.einsum("bjrln,bjmn->bjrlm", q, k), -jnp.inf)
        one = jnp.broadcast_to(sinks[None, ..., None, None], (*s.shape[:-1], 1))
        shares = jax.nn.softmax(jnp.concatenate([s, one], -1))[..., :-1]
        out = jnp.einsum("bjrlm,bjmn->bjrln", shares, v)
        return (out * g).sum(), out

    with jax.enable_x64(True), jax.numpy_dtype_promotion("standard"):
        wide = [np.asarray(x, np.float64) for x in (q, k, v, sinks)]
        (_, out), grads = jax.value_and_grad(loss, (0, 1, 2, 3), has_aux=True)(*wide)
        return [np.asarray(x) for x in (out, *grads)]


@functools.cache
def split_numbers():
    rng = np.random.default_rng(0)
    sizes = (2, 2, 3, 24, 4), (2, 2, 24, 4), (2, 2, 24, 4), (2, 2, 3, 24, 4), (2, 3)
    segments = np.stack([np.repeat([1, 2, 0], [7, 11, 6]), np.ones(24, int)]).astype(np.int32)
    return *(rng.normal(size=s).astype(np.float32) for s in sizes), segments


@pytest.mark.parametrize(
    "kind, window, with_sinks, sizes",
    [
        ("gather", 3, False, {"context": 4, "tensor": 2}),
        ("ring", 10, True, {"context": 4, "tensor": 2}),
        ("gather", 24, True, {"context": 2, "data": 2}),
        ("ring", 3, True, {"context": 2, "tensor": 3}),  # keys and values too few for the shards of the queries
    ],
)
def test_split_rows_see_their_window_and_sinks(kind, window, with_sinks, sizes):
    """Across the pieces of a row, which lie on several shards, and the gradients."""
    q, k, v, g, sinks, segments = split_numbers()
    n, size = sizes["context"], math.prod(sizes.values())
    mesh, rules = meshes.build_mesh(MeshConfig(**sizes), jax.devices()[:size]), Rules(kv_heads=())
    places = 4 if with_sinks else 3

    def loss(q, k, v, *sinks):
        q, k, v = balanced(q, n, 3), balanced(k, n, 2), balanced(v, n, 2)
        out = restored(split_attention(q, k, v, balanced(segments, n), rules, kind, 0.4, window, *sinks), n, 3)
        return (out * g).sum(), out

    with jax.set_mesh(mesh):
        run = jax.jit(jax.value_and_grad(loss, tuple(range(places)), has_aux=True))
        (_, out), grads = run(*(q, k, v, sinks)[:places])
    for got, want in zip((out, *grads), reference(window, with_sinks), strict=False):
        np.testing.assert_allclose(got, want, atol=1e-5 * np.abs(want).max())


# Decoding, and meshes


MOE = MoEConfig(experts=4, top_k=2, d_ff=12, first_dense=0)
SPARSE = replace(SMALL, vocab=14, layers=2, moe=MOE)
YARN = RopeConfig("yarn", factor=4.0, original_length=16, beta_fast=4.0, mscale=1.0, mscale_all_dim=0.7)
FAMILIES = {  # what is decoded, and trained, on meshes: several variants in one program
    "grouped queries": {"biases": "qkv"},
    "all heads": {"kv_heads": None, "qk_norm": "all", "attention_scale": 0.3, "qkv_clip": 1.1},
    "windows and sinks": {"window": 3, "full_every": 2, "sinks": True, "biases": "attention", "rope": LONG},
    "latent": {"kv_heads": None, "latent": LatentConfig(6, 8, 4), "rope": YARN},
}
LENGTHS, WIDTH, STEPS = np.array([5, 3, 1, 4, 5, 5, 2, 3]), 5, 6  # prompts, and tokens after them
TOKENS = np.random.default_rng(7).integers(0, 13, (8, WIDTH + STEPS)).astype(np.int32)


@functools.cache
def weights(family):
    """Numbers of a model, alike on every mesh."""
    return nnx.split(transformer(replace(SPARSE, **FAMILIES[family])))[1]


def on(sizes, family, call):
    """`call` of the model with these numbers on a mesh."""
    m = replace(SPARSE, **FAMILIES[family])
    mesh = meshes.build_mesh(MeshConfig(**sizes), jax.devices()[: math.prod(sizes.values())])
    with jax.set_mesh(mesh):
        graph, state = nnx.split(nnx.eval_shape(lambda: Transformer(m, rules=Rules(), rngs=nnx.Rngs(params=0))))
        state = jax.tree.map(lambda shape, x: x.astype(shape.dtype), state, weights(family))
        model = nnx.merge(graph, state)
        place(model, mesh, Rules())
        graph, state = nnx.split(model)
        return jax.tree.map(np.asarray, jax.jit(lambda state: call(graph, state))(state))


def decoded(graph, state):
    """Logits of all rows at once, and of a cache that is filled and then takes a token after another."""
    model = nnx.merge(graph, state)
    place = LENGTHS[:, None] - WIDTH + np.arange(WIDTH)  # prompts are aligned at their right ends
    prompt = np.where(place >= 0, np.take_along_axis(TOKENS, np.maximum(place, 0), 1), 0)
    after = np.take_along_axis(TOKENS, LENGTHS[:, None] + np.arange(STEPS), 1)
    real = jnp.asarray(np.arange(WIDTH + STEPS)[None] < LENGTHS[:, None] + STEPS).astype(jnp.int32)
    whole = model(jnp.asarray(TOKENS), segments=real, capacity_factor=None).logits
    cache = model.empty_cache(8, WIDTH + STEPS, jnp.asarray(LENGTHS), WIDTH)
    first = model(jnp.asarray(prompt), segments=jnp.asarray(place >= 0).astype(jnp.int32), cache=cache)

    def step(cache, token):
        out = model(token[:, None], cache=cache)
        return out.cache, out.logits[:, 0]

    _, rest = jax.lax.scan(step, first.cache, jnp.asarray(after.T))
    return whole, jnp.concatenate([first.logits[:, -1:], rest.transpose(1, 0, 2)], 1)


@functools.cache
def alone(family):
    """Logits of the full forward pass on one device, after the prompt and after each of the next tokens."""
    whole, got = on({"data": 1}, family, decoded)
    return np.stack([whole[b, n - 1 : n + STEPS] for b, n in enumerate(LENGTHS)]), got


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("sizes", [{"data": 1}, {"expert": 4, "tensor": 2}], ids=str)
def test_decoding_equals_the_full_forward_pass(sizes, family):
    want, got = alone(family)
    if sizes != {"data": 1}:
        _, got = on(sizes, family, decoded)
    np.testing.assert_allclose(got, want, atol=1e-4, rtol=1e-4)


def trained(graph, state):
    """Loss of packed rows with its gradients."""
    tokens, segments = jnp.asarray(TOKENS[:, :8]), jnp.asarray([[1] * 5 + [2] * 3] * 8, jnp.int32)

    def loss(params, other):
        logits = nnx.merge(graph, params, other)(tokens, segments=segments, train=True).logits
        return (jax.nn.log_softmax(logits) ** 2).mean()

    params, other = nnx.split_state(state, nnx.Param, ...)
    return jax.value_and_grad(loss)(params, other)


@functools.cache
def trained_alone(family):
    return on({"data": 1}, family, trained)


@pytest.mark.parametrize(
    "family, sizes",
    [
        ("all heads", {"fsdp": 2, "expert": 2, "tensor": 2}),
        ("windows and sinks", {"fsdp": 2, "expert": 2, "tensor": 2}),
        ("windows and sinks", {"context": 2, "expert": 2, "tensor": 2}),
    ],
)
def test_a_mesh_trains_as_one_device_does(family, sizes):
    """Also a norm over heads that two devices share, and sinks that lie with their heads, and rows that are split."""
    want, got = trained_alone(family), on(sizes, family, trained)
    flat = [dict(jax.tree_util.tree_leaves_with_path(x)) for x in (want, got)]
    assert len(flat[0]) == len(flat[1]) > 10
    for path, x in flat[0].items():
        assert np.abs(x).max() > 0, f"{path} has no gradient"
        np.testing.assert_allclose(flat[1][path], x, atol=2e-5 * np.abs(x).max(), err_msg=str(path))


def test_what_a_norm_over_all_heads_adds_up():
    """Over the devices that share the heads: for each token a sum of queries and one of keys, and their gradients'."""
    base = ["mesh.data=1", "mesh.tensor=2", "model.layers=1", "train.sample=unset", "data.length=8", "data.batch=4"]
    sent = []
    for norm in ("false", "all"):
        cfg = config.load("tiny_dense", [*base, f"model.qk_norm={norm}", "model.remat=none"])
        model, mesh = Model.of(cfg), meshes.build_mesh(cfg.mesh, jax.devices()[:2])

        def loss(weights, model=model):
            return model.module(weights)(jnp.zeros((4, 8), jnp.int32), train=True).logits.sum()

        with jax.set_mesh(mesh):
            program = jax.jit(jax.grad(loss)).lower(model.weight_targets(mesh).params).compile()
        sent.append(sum(c.bytes for c in read(program.as_text(), mesh) if c.op == "all-reduce"))
    (planned,) = [m for m in traffic(Step(cfg, "cpu")) if m.what == "norms over all heads"]
    assert planned.count * planned.bytes == sent[1] - sent[0] == 2 * 2 * 32 * 4


def test_what_deepseek_v3_keeps_of_a_token():
    """576 numbers a layer, 70,272 bytes of bfloat16 over its 61 layers."""
    m = config.load("deepseek_v3").model
    one = jax.eval_shape(lambda: empty_layer(m, 1, 1, m.layers))
    assert sum(a.size for a in jax.tree.leaves(one)) == m.cached_width * 61 == 576 * 61
    assert sum(a.size * a.dtype.itemsize for a in jax.tree.leaves(one)) == 70_272
