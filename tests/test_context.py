"""Rows split over shards: their order, exact attention over them, and what travels for it."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import NamedSharding

from moe_jax import mesh as meshes
from moe_jax.axes import Rules
from moe_jax.collectives import read
from moe_jax.config import Config, DataConfig, LatentConfig, MeshConfig, ModelConfig, MoEConfig
from moe_jax.generate import Generator, Sampling
from moe_jax.layers.context import split_attention
from moe_jax.layers.moe import MoELayer
from moe_jax.model import Transformer
from moe_jax.rules import spec
from moe_jax.sequence import Cut, balanced, places, restored
from moe_jax.train.state import Model, Weights

B, J, R, L, N = 2, 2, 3, 24, 4


def close(got, want, name=""):
    """Within 1e-5 of the largest entry."""
    assert np.abs(got - want).max() <= 1e-5 * np.abs(want).max(), name


# The order of the tokens


@pytest.mark.parametrize("n", [1, 2, 3, 5])
def test_every_shard_has_the_same_work(n):
    """A token of place p sees p + 1 keys: over the tokens of a shard that adds up to the same for all shards."""
    length = 6 * n
    order = places(length, n)
    assert sorted(order) == list(range(length))
    work = (order + 1).reshape(n, -1).sum(1)
    assert len(set(work.tolist())) == 1 and work.sum() == length * (length + 1) // 2
    x = jnp.arange(2 * length * 3).reshape(2, length, 3)
    np.testing.assert_array_equal(balanced(x, n), np.asarray(x)[:, order])
    np.testing.assert_array_equal(restored(balanced(x, n), n), x)
    np.testing.assert_array_equal(restored(balanced(x.swapaxes(0, 1), n, 0), n, 0), x.swapaxes(0, 1))


def test_pieces_of_a_shard():
    """Shard i of n holds pieces i and 2n-1-i."""
    assert places(8, 2).tolist() == [0, 1, 6, 7, 2, 3, 4, 5]
    assert places(6, 3).tolist() == [0, 5, 1, 4, 2, 3]


@pytest.mark.parametrize("experts", [("expert",), ("expert", "context"), ("data", "expert"), ("context", "data")])
@pytest.mark.parametrize("size", [2, 4])
def test_groups_are_those_of_one_device(size, experts):
    """Each group has neighbouring tokens of one row, each lies in one shard, and nothing is sent to cut them."""
    config = MeshConfig(data=2, expert=2, context=2)
    mesh, rules = meshes.build_mesh(config), Rules(experts=experts)
    rows, length, n = 8, 16, 2
    number = jnp.arange(rows * length).reshape(rows, length)  # tokens, counted over rows in their own order
    with jax.set_mesh(mesh):
        cut = Cut(rules, rows, length, size, n)
        x = jax.device_put(balanced(number, n), NamedSharding(mesh, spec((rules.batch, rules.length))))
        run = jax.jit(cut.groups).lower(x).compile()
        groups, back = run(x), jax.jit(lambda x: cut.whole(cut.groups(x)))(x)
        keys = jax.random.split(jax.random.key(0), rows * length // size)
        moved = jax.jit(cut.keys)(keys)
    assert read(run.as_text(), mesh) == []
    assert groups.sharding.is_equivalent_to(NamedSharding(mesh, spec((rules.groups, ()))), 2)
    got = np.asarray(groups)
    np.testing.assert_array_equal(np.sort(got[:, 0]), np.arange(0, rows * length, size))
    np.testing.assert_array_equal(got, got[:, :1] + np.arange(size)[None])
    np.testing.assert_array_equal(back, x)
    # the key of a group is the one that it has on one device
    np.testing.assert_array_equal(jax.random.key_data(moved), jax.random.key_data(keys)[got[:, 0] // size])


def test_groups_over_two_expert_axes_that_span_rows():
    """Groups of several rows have another order too, where the experts' axes are not the last of the batch."""
    mesh, rules = meshes.build_mesh(MeshConfig(data=2, expert=4)), Rules(experts=("expert", "data"))
    number = jnp.arange(16 * 4).reshape(16, 4)
    with jax.set_mesh(mesh):
        cut = Cut(rules, 16, 4, 8)
        assert not cut.plain and Cut(Rules(experts=("data", "expert")), 16, 4, 8).plain
        got = np.asarray(jax.jit(cut.groups)(number))
        np.testing.assert_array_equal(jax.jit(cut.whole)(got), number)
    np.testing.assert_array_equal(got[:, 0], np.arange(8).reshape(2, 4).T.reshape(-1) * 8)


# Models


def tiny(latent: LatentConfig | None = None, **axes) -> Config:
    """A model whose groups fit into the pieces of any mesh here."""
    moe = MoEConfig(experts=4, top_k=2, d_ff=8, capacity_factor=1.0, min_capacity=1, group_size=2)
    model = ModelConfig(vocab=40, layers=2, d_model=8, d_ff=16, heads=2, max_length=32, moe=moe, latent=latent)
    return Config(model=model, mesh=MeshConfig(**axes), data=DataConfig(length=16, batch=4))


@functools.cache
def made(latent=None):
    """The model on one device, its numbers, and what it does with some tokens."""
    model, mesh = Model.of(tiny(latent)), meshes.build_mesh(MeshConfig(), jax.devices()[:1])
    state = model.create(mesh)
    numbers = jax.tree.map(lambda p: 3.0 * np.asarray(p), state.params)
    tokens = np.random.default_rng(0).integers(0, 40, (4, 16)).astype(np.int32)
    with jax.set_mesh(mesh):
        out = jax.jit(lambda w: model.module(w)(tokens, train=True, record=True))(numbers)
    new = Generator(model, mesh, 40, 40, Sampling(temperature=0.0))(Weights(numbers, None), list(tokens[:3, :5]), 4)
    return numbers, tokens, jax.tree.map(np.asarray, out), new.tokens


def test_a_call_knows_no_order():
    """Logits, the record and its replay are in the order of the call; `balanced` calls are the same in theirs."""
    numbers, tokens, want, _ = made()
    cfg = tiny(context=4, expert=2)
    model, mesh = Model.of(cfg), meshes.build_mesh(cfg.mesh)
    with jax.set_mesh(mesh):
        weights = jax.device_put(numbers, model.weight_shardings(mesh).params)
        call = jax.jit(lambda w, t, r: model.module(w)(t, train=True, record=True, replay=r))
        out = call(weights, tokens, jnp.asarray(want.record.expert))
        turned = jax.jit(lambda w, t: model.module(w)(t, train=True, balanced=True))(weights, balanced(tokens, 4))
    close(out.logits, want.logits)
    np.testing.assert_array_equal(out.record.expert, want.record.expert)
    close(out.record.gate, want.record.gate)
    close(restored(turned.logits, 4), want.logits)


SPLITS = {"context": Rules(experts=("expert", "context")), "tensor": Rules(residual=("tensor",))}
LATENT = LatentConfig(key_value=5, rotary=2, query=3)


@pytest.mark.parametrize("axis, latent", [("context", None), ("tensor", None), ("tensor", LATENT)], ids=str)
def test_text_is_that_of_one_device(axis, latent):
    """A cache holds whole rows: the shards of a row take rows of their own, those of heads share latents."""
    numbers, tokens, _, want = made(latent)
    cfg = dataclasses.replace(tiny(latent, expert=2, **{axis: 2}), rules=SPLITS[axis])
    model, mesh = Model.of(cfg), meshes.build_mesh(cfg.mesh, jax.devices()[:4])
    weights = Weights(jax.device_put(numbers, model.weight_shardings(mesh).params), None)
    assert Generator(model, mesh, 40, 40, Sampling(temperature=0.0))(weights, list(tokens[:3, :5]), 4).tokens == want


def test_refused_calls():
    cfg = tiny(context=2)
    with jax.set_mesh(meshes.build_mesh(cfg.mesh, jax.devices()[:2])):
        module = Transformer(cfg.model, rules=Rules(), rngs=nnx.Rngs(params=0))
        with pytest.raises(ValueError, match=r"10 tokens do not split into two pieces for each of 2 .* multiple of 4"):
            module(jnp.zeros((1, 10), int))
        whole = Transformer(cfg.model, rules=Rules().by_rows(), rngs=nnx.Rngs(params=0))
        with pytest.raises(ValueError, match=r"a cache holds whole ones: build the model with rules\.by_rows\(\)"):
            module(jnp.zeros((2, 4), int), cache=whole.empty_cache(2, 8))
        between = Transformer(cfg.model, rules=Rules(length=(), residual=("context",)), rngs=nnx.Rngs(params=0))
        with pytest.raises(ValueError, match=r"rules\.residual splits rows over 2 shards, and 5 tokens .* by_rows\(\)"):
            between(jnp.zeros((1, 5), int))
        layer = MoELayer(MoEConfig(d_ff=8, capacity_factor=1.0), 8, rules=Rules(), rngs=nnx.Rngs(params=0))
        with pytest.raises(ValueError, match=r"groups of 8 tokens do not fit into the 2 pieces of 4 .* a divisor of 4"):
            layer(jnp.zeros((1, 8, 8)), train=True)
        with pytest.raises(ValueError, match="rows of 9 tokens do not split into 2 pieces for 2 shards"):
            layer(jnp.zeros((1, 9, 8)))


# Attention


@functools.cache
def numbers():
    """Queries, keys, values, cotangents, and segments that begin inside of pieces."""
    rng = np.random.default_rng(0)
    q, k, v, g = (
        rng.normal(size=s).astype(np.float32) for s in ((B, J, R, L, N), (B, J, L, N), (B, J, L, N), (B, J, R, L, N))
    )
    segments = np.stack([np.repeat([1, 2, 0], [7, 11, 6]), np.ones(L, int)]).astype(np.int32)
    return q, k, v, g, segments


@functools.cache
def expected():
    """softmax(q k^T / sqrt(N)) v with the whole mask, in float64, and its gradients."""
    q, k, v, g, segments = numbers()
    mask = np.tril(np.ones((L, L), bool)) & (segments[:, :, None] == segments[:, None])

    def loss(q, k, v):
        s = jnp.einsum("bjrln,bjmn->bjrlm", q, k) / np.sqrt(N)
        out = jnp.einsum("bjrlm,bjmn->bjrln", jax.nn.softmax(jnp.where(mask[:, None, None], s, -jnp.inf)), v)
        return (out * g).sum(), out

    with jax.enable_x64(True), jax.numpy_dtype_promotion("standard"):
        wide = [np.asarray(x, np.float64) for x in (q, k, v)]
        (_, out), grads = jax.value_and_grad(loss, (0, 1, 2), has_aux=True)(*wide)
        return [np.asarray(x) for x in (out, *grads)]


MESHES = [
    (MeshConfig(context=4, tensor=2), Rules()),
    (MeshConfig(data=2, context=2, tensor=2), Rules()),
    (MeshConfig(data=2, context=3), Rules()),
    (MeshConfig(data=2, context=2), Rules(batch=("expert",), length=("data", "context"))),  # over two axes
    # J=2 keys and values for R=3 queries each: too few for the shards, which split the queries
    (MeshConfig(context=2, tensor=3), Rules(kv_heads=())),
]


@pytest.mark.parametrize("kind", ["gather", "ring"])
@pytest.mark.parametrize("config, rules", MESHES, ids=str)
def test_split_attention_is_exact(config, rules, kind):
    """Outputs and gradients, with segments, padding and grouped queries: those of the whole softmax in float64."""
    q, k, v, g, segments = numbers()
    n, mesh = config.over(rules.length), meshes.build_mesh(config, jax.devices()[: config.size])

    def loss(q, k, v):
        q, k, v = balanced(q, n, 3), balanced(k, n, 2), balanced(v, n, 2)
        out = restored(split_attention(q, k, v, balanced(segments, n), rules, kind), n, 3)
        return (out * g).sum(), out

    with jax.set_mesh(mesh):
        (_, out), grads = jax.jit(jax.value_and_grad(loss, (0, 1, 2), has_aux=True))(q, k, v)
    for name, got, want in zip(("out", "q", "k", "v"), (out, *grads), expected(), strict=True):
        close(got, want, name)


@pytest.mark.parametrize("context", [1, 2])
def test_one_head_of_keys_on_every_tensor_shard(context):
    """Multi-query attention: its queries are split, its keys and values copied, with whole rows and with split ones."""
    base = tiny()
    model = dataclasses.replace(base.model, kv_heads=1)
    state = Model.of(dataclasses.replace(base, model=model)).create(meshes.build_mesh(MeshConfig(), jax.devices()[:1]))
    numbers = jax.tree.map(lambda p: 1.5 * np.asarray(p), state.params)
    tokens = np.random.default_rng(0).integers(0, 40, (4, 16)).astype(np.int32)
    results = []
    for cfg in (base, tiny(context=context, tensor=2, expert=2)):
        cfg = dataclasses.replace(cfg, model=model, rules=Rules(kv_heads=()))
        made, mesh = Model.of(cfg), meshes.build_mesh(cfg.mesh, jax.devices()[: cfg.mesh.size])
        made.validate()

        def loss(weights, made=made):
            logits = made.module(weights)(tokens, train=True).logits
            return (logits**2).mean(), logits

        with jax.set_mesh(mesh):
            weights = jax.device_put(numbers, made.weight_shardings(mesh).params)
            results.append(jax.jit(jax.value_and_grad(loss, has_aux=True))(weights))
    jax.tree.map(close, *(jax.tree.map(np.asarray, r) for r in reversed(results)))


@pytest.mark.parametrize("kind", ["gather", "ring"])
def test_what_travels_for_attention(kind):
    """Keys and values alone: gathered once, gradients summed once; or round a ring, one step a loop, and home."""
    n = 4
    mesh = meshes.build_mesh(MeshConfig(context=n, tensor=2))
    q, k, v, g, segments = numbers()
    heads = ("tensor",)
    where = spec(((), heads, (), ("context",), ())), spec(((), heads, ("context",), ()))

    def loss(q, k, v):
        return (split_attention(q, k, v, jnp.asarray(segments), Rules(), kind) * g).sum()

    with jax.set_mesh(mesh):
        q, k, v = (jax.device_put(x, NamedSharding(mesh, s)) for x, s in ((q, where[0]), (k, where[1]), (v, where[1])))
        g = jax.device_put(g, NamedSharding(mesh, where[0]))
        forward = jax.jit(lambda q, k, v: split_attention(q, k, v, jnp.asarray(segments), Rules(), kind))
        texts = [f.lower(q, k, v).compile().as_text() for f in (forward, jax.jit(jax.grad(loss, (0, 1, 2))))]
    programs = [[(c.op, c.axes, c.bytes) for c in read(text, mesh)] for text in texts]
    own = 2 * 4 * B * (J // 2) * (L // n) * N  # float32 keys and values of one shard
    if kind == "gather":
        moved = ("all-gather", ("context",), n * own)
        assert programs[0] == [moved]
        assert programs[1] == [moved, ("reduce-scatter", ("context",), own)]
    else:
        moved = ("collective-permute", ("context",), own)
        assert programs[0] == [moved]  # in a loop of n - 1
        assert programs[1] == 4 * [moved]  # keys and values; both and their gradients; gradients home
