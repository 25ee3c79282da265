"""Layers against NumPy in float64, closed forms and invariants."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from moe_jax.cache import empty_layer
from moe_jax.config import LatentConfig, ModelConfig
from moe_jax.layers.attention import Attention, Context, causal_attention
from moe_jax.layers.common import dropout, fan_in, param, row_keys
from moe_jax.layers.embed import Embedding
from moe_jax.layers.ffn import FFN
from moe_jax.layers.latent import LatentAttention
from moe_jax.layers.norm import Norm
from moe_jax.layers.positions import rotary, sinusoidal


def filled(create, seed=0):
    """The module of `create()` with NumPy numbers for parameters: nothing is compiled, and no norm is the identity."""
    rng = np.random.default_rng(seed)
    graph, state = nnx.split(nnx.eval_shape(create))

    def fill(path, leaf):
        name = next(p.key for p in reversed(path) if isinstance(getattr(p, "key", None), str))
        if name in ("scale", "bias") or name.startswith("b_"):
            return jnp.asarray((name == "scale") + 0.2 * rng.normal(size=leaf.shape), jnp.float32)
        width = leaf.shape[-3] * leaf.shape[-2] if name == "w_out" else leaf.shape[-2]
        width = leaf.shape[-3] if name in ("w_query", "w_key", "w_value") else width
        width = leaf.shape[-1] if name in ("table", "positions") else width
        return jnp.asarray(rng.normal(size=leaf.shape) / np.sqrt(width), jnp.float32)

    return nnx.merge(graph, jax.tree_util.tree_map_with_path(fill, state))


def count(module):
    """Number of parameters."""
    return sum(leaf.size for leaf in jax.tree.leaves(nnx.state(module, nnx.Param)))


def f64(x):
    return np.asarray(x, np.float64)


def numbers(*shape, seed=1):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


# Norms


@pytest.mark.parametrize("kind, parameters", [("layer", 34), ("rms", 17)])
@pytest.mark.parametrize("eps", [1e-6, 0.5])
def test_norm_equals_numpy(kind, parameters, eps):
    norm = filled(lambda: Norm(kind, 17, eps))
    assert count(norm) == parameters
    x = 3.0 * numbers(2, 5, 17) + 1.0  # a mean, so that LayerNorm and RMSNorm differ
    h = f64(x)
    if kind == "layer":
        want = (h - h.mean(-1, keepdims=True)) / np.sqrt(h.var(-1, keepdims=True) + eps)
        want = want * f64(norm.scale[...]) + f64(norm.bias[...])
    else:
        want = h / np.sqrt((h**2).mean(-1, keepdims=True) + eps) * f64(norm.scale[...])
    np.testing.assert_allclose(jax.jit(norm.__call__)(x), want, rtol=1e-5, atol=1e-5)


def test_norm_computes_in_float32():
    """In bfloat16 the mean of squares of 256 + noise would lose the noise."""
    norm = filled(lambda: Norm("layer", 64, 1e-6))
    x = (256.0 + 8.0 * numbers(3, 64)).astype(jnp.bfloat16)
    h = f64(x)
    want = (h - h.mean(-1, keepdims=True)) / h.std(-1, keepdims=True) * f64(norm.scale[...]) + f64(norm.bias[...])
    got = norm(x)
    assert got.dtype == jnp.bfloat16
    np.testing.assert_allclose(f64(got), want, rtol=2**-8, atol=2**-8)


# Positions


@pytest.mark.parametrize("width", [2, 6, 32])
def test_sinusoidal_closed_form(width):
    positions = np.array([[0, 1, 2, 7], [31, 5, 0, 64]], np.int32)
    got = jax.jit(sinusoidal, static_argnums=1)(jnp.asarray(positions), width)
    assert got.shape == (2, 4, width)
    for i in range(width // 2):
        angle = positions / 10000.0 ** (2 * i / width)
        atol = 1e-6 + 1e-7 * angle.max()  # float32 rounds the angle itself
        np.testing.assert_allclose(got[..., 2 * i], np.sin(angle), atol=atol)
        np.testing.assert_allclose(got[..., 2 * i + 1], np.cos(angle), atol=atol)


def complex_rotary(x, positions, theta):
    """Rotary positions as the product with exp(i p theta^(-2i/N)); x [B, H, L, N], positions [B, L]."""
    half = x.shape[-1] // 2
    turn = np.exp(1j * positions[:, None, :, None] * theta ** (-np.arange(half) / half))
    z = (f64(x[..., :half]) + 1j * f64(x[..., half:])) * turn
    return np.concatenate([z.real, z.imag], -1)


@pytest.mark.parametrize("theta", [100.0, 10000.0])
def test_rotary(theta):
    turn = jax.jit(rotary, static_argnums=2)
    q, k = numbers(2, 3, 5, 8), numbers(2, 3, 5, 8, seed=2)
    positions = jnp.asarray([[0, 1, 2, 3, 4], [3, 9, 4, 0, 17]])
    got = turn(q, positions, theta)
    np.testing.assert_allclose(got, complex_rotary(q, np.asarray(positions), theta), atol=5e-6)
    np.testing.assert_allclose(np.linalg.norm(got, axis=-1), np.linalg.norm(q, axis=-1), rtol=1e-6)
    np.testing.assert_array_equal(got[0, :, 0], q[0, :, 0])  # position 0 turns nothing

    def scores(shift):
        return np.einsum("bhln,bhmn->bhlm", turn(q, positions + shift, theta), turn(k, positions + shift, theta))

    np.testing.assert_allclose(scores(0), scores(23), atol=5e-5)
    moved = np.einsum("bhln,bhmn->bhlm", turn(q, positions + 1, theta), turn(k, positions, theta))
    assert np.abs(moved - scores(0)).max() > 0.1  # a difference of positions that changes does change the score


# Attention


def model(heads=4, kv_heads=None, head_dim=4, d_model=16, positions="rotary", **more):
    return ModelConfig(
        vocab=11, d_model=d_model, heads=heads, kv_heads=kv_heads, head_dim=head_dim, positions=positions, **more
    )


def numpy_attention(layer, x, positions, segments):
    """Token by token in float64: softmax over the earlier tokens of the same segment."""
    m, x = layer.m, f64(x)
    biases = [0.0 if b is None else f64(b[...])[None, :, None] for b in (layer.b_query, layer.b_key, layer.b_value)]
    matrices = (layer.w_query, layer.w_key, layer.w_value)
    q, k, v = (np.einsum("bld,dhn->bhln", x, f64(w[...])) + b for w, b in zip(matrices, biases, strict=True))
    if m.qk_norm:
        q, k = numpy_rms(q, layer.query_norm), numpy_rms(k, layer.key_norm)
    if m.positions == "rotary":
        q, k = (complex_rotary(a, positions, m.rope_theta) for a in (q, k))
    out = 0.0 if layer.b_out is None else f64(layer.b_out[...])
    return np.einsum("blhn,hnd->bld", numpy_values(q, k, v, segments), f64(layer.w_out[...])) + out


def numpy_rms(x, norm):
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + norm.eps) * f64(norm.scale[...])


def numpy_values(q, k, v, segments):
    """q [B, H, L, N], k and v [B, J, L, N] -> [B, L, H, N]."""
    B, H, L, N = q.shape
    group = H // k.shape[1]
    y = np.zeros((B, L, H, v.shape[-1]))
    for b in range(B):
        for t in range(L):
            seen = [s for s in range(t + 1) if segments[b, s] == segments[b, t]]
            for h in range(H):
                score = k[b, h // group][seen] @ q[b, h, t] / np.sqrt(N)
                weight = np.exp(score - score.max())
                y[b, t, h] = weight / weight.sum() @ v[b, h // group][seen]
    return y


def packed(L):
    """Two rows: two documents and padding; padding, one document."""
    t = np.arange(L)
    first = np.where(t < L // 3, 1, np.where(t < L - L // 8, 2, 0))
    second = np.where(t < L // 4, 0, 1)
    segments = np.stack([first, second]).astype(np.int32)
    starts = np.array([[np.flatnonzero(row == s)[0] for s in row] for row in segments])
    return segments, (t - starts).astype(np.int32)


def of_rows(positions, segments):
    """What attention has of a call."""
    positions, segments = jnp.asarray(positions), jnp.asarray(segments)
    return Context(positions, segments, segments > 0, jnp.zeros_like(segments), None)


SHAPES = {
    "mha": dict(),
    "gqa": dict(kv_heads=2),
    "mqa": dict(kv_heads=1),
    "wide": dict(heads=3, head_dim=6, d_model=8),  # H*N = 18, D = 8
    "no_positions": dict(kv_heads=2, positions="learned"),
    "norms": dict(kv_heads=2, qk_norm=True),
    "biases": dict(kv_heads=2, biases=True),
}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("L", [1, 63, 64, 65, 200])  # query blocks have 64 rows
def test_attention_equals_numpy(shape, L):
    m = model(**SHAPES[shape])
    layer = filled(lambda: Attention(m, None, nnx.Rngs(params=0)))
    H, J, N, D = m.heads, m.resolved_kv_heads, m.resolved_head_dim, m.d_model
    more = 2 * N * m.qk_norm + ((H + 2 * J) * N + D) * m.biases
    assert count(layer) == 2 * D * H * N + 2 * D * J * N + more
    segments, positions = packed(L)
    x = 2.0 * numbers(2, L, D)
    got, cache = jax.jit(layer.__call__)(x, of_rows(positions, segments))
    assert cache is None
    want = numpy_attention(layer, x, positions, segments)
    real = segments > 0
    np.testing.assert_allclose(np.asarray(got)[real], want[real], atol=2e-5)
    assert np.isfinite(got).all()  # rows of padding, too: a NaN there would poison gradients


LATENTS = {"DeepSeek-V3": LatentConfig(6, 5, 2), "no query vector": LatentConfig(None, 3, 4, value=7)}


@pytest.mark.parametrize("latent", LATENTS)
@pytest.mark.parametrize("L", [1, 65])
def test_latent_attention_equals_numpy(latent, L):
    """The keys of a head end in the one turned vector of the token, and the scores are over the root of their width."""
    m = model(latent=LATENTS[latent])
    layer = filled(lambda: LatentAttention(m, None, nnx.Rngs(params=0)))
    segments, positions = packed(L)
    x, C, N = 2.0 * numbers(2, L, m.d_model), m.latent.key_value, m.resolved_head_dim
    got, _ = jax.jit(layer.__call__)(x, of_rows(positions, segments))
    h = x = f64(x)
    if m.latent.query:
        h = numpy_rms(x @ f64(layer.w_query_down[...]), layer.query_norm)
    q = np.einsum("bld,dhn->bhln", h, f64(layer.w_query[...]))
    both = x @ f64(layer.w_down[...])
    c = numpy_rms(both[..., :C], layer.latent_norm)
    k, v = (np.einsum("blc,chn->bhln", c, f64(w[...])) for w in (layer.w_key, layer.w_value))
    turned = complex_rotary(np.repeat(both[:, None, :, C:], m.heads, 1), positions, m.rope_theta)
    q = np.concatenate([q[..., :N], complex_rotary(q[..., N:], positions, m.rope_theta)], -1)
    want = numpy_values(q, np.concatenate([k, turned], -1), v, segments)
    want = np.einsum("blhn,hnd->bld", want, f64(layer.w_out[...]))
    np.testing.assert_allclose(np.asarray(got)[segments > 0], want[segments > 0], atol=2e-5)
    assert np.isfinite(got).all()


def test_a_latent_cache_is_narrow():
    """Of a token the one vector that keys and values of all heads are made from, and the part that turns."""
    for m, kept in ((model(latent=LATENTS["DeepSeek-V3"]), 5 + 2), (model(kv_heads=2), 2 * 2 * 4)):
        cache = empty_layer(m, 1, 1, 1)
        assert cache.k.size + cache.v.size == kept == m.cached_width


def test_attention_in_eight_blocks_at_most():
    """Longer sequences get longer blocks; the result does not know."""
    m = model(heads=1, head_dim=2, d_model=2)
    layer = filled(lambda: Attention(m, None, nnx.Rngs(params=0)))
    segments, positions = packed(521)
    x = numbers(2, 521, 2)
    got, _ = jax.jit(layer.__call__)(x, of_rows(positions, segments))
    want = numpy_attention(layer, x, positions, segments)
    np.testing.assert_allclose(np.asarray(got)[segments > 0], want[segments > 0], atol=2e-5)


def test_attention_is_causal_and_stays_in_its_segment():
    layer = filled(lambda: Attention(model(kv_heads=2), None, nnx.Rngs(params=0)))
    call = jax.jit(layer.__call__)
    L, x = 65, numbers(2, 65, 16)
    positions = jnp.tile(jnp.arange(L)[None], (2, 1))
    ones = jnp.ones((2, L), jnp.int32)
    before, _ = call(x, of_rows(positions, ones))
    for t in (1, 30, 63, 64):
        after, _ = call(x.at[:, t:].add(1.0), of_rows(positions, ones))
        np.testing.assert_array_equal(after[:, :t], before[:, :t])
        assert (np.abs(after[:, t:] - before[:, t:]).max(-1) > 1e-4).all()  # the present and the later ones do change
    segments = jnp.asarray(np.repeat([1, 2, 3], [20, 25, 20])[None].repeat(2, 0), jnp.int32)
    before, _ = call(x, of_rows(positions, segments))
    after, _ = call(x.at[:, 20:45].multiply(-2.0), of_rows(positions, segments))
    np.testing.assert_array_equal(after[:, :20], before[:, :20])
    np.testing.assert_array_equal(after[:, 45:], before[:, 45:])
    assert (np.abs(after[:, 20:45] - before[:, 20:45]).max(-1) > 1e-4).all()


@pytest.mark.parametrize("N", [4, 16])
def test_attention_scale(N):
    """Scores 3 and 0 of the second token: its weight on the first is sigmoid(3 / sqrt(N))."""
    q = jnp.zeros((1, 1, 1, 2, N)).at[..., 1, 0].set(3.0)
    k = jnp.zeros((1, 1, 2, N)).at[..., 0, 0].set(1.0)
    v = jnp.zeros((1, 1, 2, N)).at[..., 0, 0].set(1.0)
    y = causal_attention(q, k, v, jnp.ones((1, 2), jnp.int32))
    assert y[0, 0, 0, 1, 0] == pytest.approx(1 / (1 + np.exp(-3 / np.sqrt(N))), abs=1e-6)


# Feed-forward


ACTS = {
    "relu": lambda h: np.maximum(h, 0),
    "gelu": lambda h: 0.5 * h * (1 + np.tanh(np.sqrt(2 / np.pi) * (h + 0.044715 * h**3))),
    "swiglu": lambda h: h / (1 + np.exp(-h)),
}


@pytest.mark.parametrize("kind, matrices", [("relu", 2), ("gelu", 2), ("swiglu", 3)])
def test_ffn_equals_numpy(kind, matrices):
    layer = filled(lambda: FFN(kind, 7, 13, None, nnx.Rngs(params=0)))
    assert count(layer) == matrices * 7 * 13
    x = 2.0 * numbers(2, 3, 7)
    h = f64(x) @ f64(layer.w_up[...])
    h = ACTS[kind](h) if kind != "swiglu" else ACTS[kind](f64(x) @ f64(layer.w_gate[...])) * h
    np.testing.assert_allclose(jax.jit(layer.__call__)(x), h @ f64(layer.w_down[...]), atol=1e-5)


def test_ffn_dropout_is_on_the_hidden_layer():
    """With one hidden unit a token's output is kept and doubled, or gone, as a whole."""
    layer = filled(lambda: FFN("relu", 4, 1, None, nnx.Rngs(params=0)))
    x = numbers(1, 64, 4)
    call = jax.jit(lambda key: layer(x, rate=0.5, keys=row_keys(key, 1)))
    whole, got = np.asarray(layer(x))[0], np.asarray(call(jax.random.key(0)))[0]
    active = np.abs(whole).max(-1) > 1e-3
    kept = np.abs(got[active]).max(-1) > 0
    assert 0 < kept.sum() < active.sum()
    np.testing.assert_allclose(got[active][kept], 2.0 * whole[active][kept], rtol=1e-5)
    np.testing.assert_array_equal(got[active][~kept], 0.0)


@pytest.mark.parametrize("rate", [0.1, 0.5])
def test_dropout(rate):
    drop = jax.jit(dropout, static_argnums=1)
    x, keys = 1.0 + numbers(100, 20, 20) ** 2, row_keys(jax.random.key(3), 100)
    assert dropout(x, rate, None) is x
    assert dropout(x, 0.0, keys) is x
    y = np.asarray(drop(x, rate, keys))
    kept = y != 0
    np.testing.assert_allclose(y[kept], np.asarray(x)[kept] / (1 - rate), rtol=1e-6)
    spread = np.sqrt(rate * (1 - rate) / y.size)  # of the share kept, binomial
    assert abs(kept.mean() - (1 - rate)) < 5 * spread
    assert y.mean() == pytest.approx(float(x.mean()), rel=0.03)
    np.testing.assert_array_equal(drop(x, rate, keys), y)
    # a row's draw is its key's alone, so that microbatches and devices cannot change it; other keys, other draws
    np.testing.assert_array_equal(drop(x[::-1], rate, keys[::-1])[::-1], y)
    assert ((np.asarray(drop(x, rate, row_keys(jax.random.key(4), 100))) != 0) != kept).any((1, 2)).all()


# Embedding and head


@pytest.mark.parametrize("positions", ["rotary", "learned", "sinusoidal"])
@pytest.mark.parametrize("tied", [True, False])
def test_embedding_and_head(positions, tied):
    V, D, P = 11, 16, 9
    m = model(positions=positions, tied_head=tied, max_length=P)
    layer = filled(lambda: Embedding(m, None, nnx.Rngs(params=0)))
    assert count(layer) == V * D * (1 if tied else 2) + P * D * (positions == "learned")
    tokens, at = np.array([[3, 0, 10], [1, 1, 5]]), np.array([[0, 1, 2], [6, 8, 0]], np.int32)
    want = f64(layer.table[...])[tokens]
    if positions == "learned":
        want = want + f64(layer.positions[...])[at]
    if positions == "sinusoidal":
        angle = at[..., None] / 10000.0 ** (np.arange(0, D, 2) / D)
        want[..., 0::2] += np.sin(angle)
        want[..., 1::2] += np.cos(angle)
    got = jax.jit(lambda t, p: layer(t, p, None))(jnp.asarray(tokens), jnp.asarray(at))
    np.testing.assert_allclose(got, want, atol=2e-6)
    x = numbers(2, 3, D)
    head = f64(layer.table[...]).T if tied else f64(layer.head[...])
    np.testing.assert_allclose(jax.jit(lambda x: layer.logits(x, None))(x), f64(x) @ head, atol=1e-5)


def test_logits_are_float32_in_a_bfloat16_model():
    layer = filled(lambda: Embedding(model(dtype="bfloat16"), None, nnx.Rngs(params=0)))
    x = layer(jnp.asarray([[3, 0, 10]]), jnp.zeros((1, 3), jnp.int32), None)
    assert x.dtype == jnp.bfloat16
    logits = layer.logits(x, None)  # not jitted: the compiler may keep more precision than was asked for
    assert logits.dtype == jnp.float32
    want = f64(x) @ f64(layer.table[...].astype(jnp.bfloat16)).T
    np.testing.assert_allclose(logits, want, atol=1e-5)  # sums in float32: bfloat16 ones would be off by 1e-2


@pytest.mark.parametrize("shape, width", [((64, 4, 8), 64), ((512, 16), 512)])
def test_initial_spread(shape, width):
    """Parameters start as a normal of deviation 1 / sqrt(fan-in), cut at two deviations."""
    w = np.asarray(param(nnx.Rngs(params=0), shape, ("embed",) * len(shape), fan_in(width))[...])
    assert np.abs(w).max() <= 2 / np.sqrt(width)
    assert w.std() == pytest.approx(0.8796 / np.sqrt(width), rel=0.05)  # 0.8796: the cut normal's deviation
