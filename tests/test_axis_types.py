"""Meshes with Explicit axes: results typed with their shardings, numbers and collectives those of Auto axes.

tests/test_exchange.py holds whole train steps against one device on both.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType, Mesh

from moe_jax import config
from moe_jax import mesh as meshes
from moe_jax.axes import MESH_AXES, Rules
from moe_jax.collectives import read
from moe_jax.config import MeshConfig, MoEConfig, RouterConfig
from moe_jax.layers.moe import MoELayer
from moe_jax.model import Transformer
from moe_jax.rules import place
from moe_jax.train.state import Model
from moe_jax.train.step import make_train_step

SIZES = MeshConfig(data=2, expert=2, tensor=2)
BATCH = ("data", "fsdp", "expert")


@pytest.fixture(scope="module")
def both():
    auto = meshes.build_mesh(SIZES, jax.devices())
    return auto, Mesh(auto.devices, MESH_AXES, axis_types=(AxisType.Explicit,) * len(MESH_AXES))


def typed(x):
    """The mesh axes of each dimension, as the type says."""
    return tuple(jax.typeof(x).sharding.spec)


def explicit(mesh):
    return AxisType.Explicit in mesh.axis_types


@pytest.mark.parametrize("jitted", [True, False])
def test_a_layer(both, jitted):
    """With what it takes beside tokens, also without jit; on Auto axes a result has no type."""
    moe = MoEConfig(experts=4, top_k=2, d_ff=8, capacity_factor=1.0, router=RouterConfig("softmax_topk"))
    x = np.random.default_rng(0).normal(size=(8, 16, 12)).astype(np.float32)
    mask = np.arange(16)[None].repeat(8, 0) < 13

    def call(layer, x, mask):
        return layer(x, mask=mask, capacity_factor=0.5, record=True)

    results = []
    for mesh in both:
        layer = MoELayer(moe, 12, rules=Rules(), rngs=nnx.Rngs(params=0))
        place(layer, mesh, Rules())
        with jax.set_mesh(mesh):
            y, stats, record = (nnx.jit(call) if jitted else call)(layer, x, mask)
        assert not explicit(mesh) or (typed(y), typed(record.expert)) == ((BATCH, "context", None),) * 2
        results.append(jax.tree.map(np.asarray, (y, stats, record)))
    for got, want in zip(*map(jax.tree.leaves, results), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-6, atol=1e-7)
    assert results[0][1].kept < results[0][1].routed


def test_a_model_and_its_cache(both):
    cfg = config.load("tiny_mixtral", ["model.d_model=32", "model.d_ff=32", "model.moe.d_ff=16", "model.vocab=64"])
    tokens = np.random.default_rng(0).integers(0, 64, (8, 12)).astype(np.int32)
    results = []
    for mesh in both:
        model = Transformer(cfg.model, rules=Rules(), rngs=nnx.Rngs(params=0))
        place(model, mesh, Rules())
        with jax.set_mesh(mesh):
            cache = model.empty_cache(8, 16)
            out = nnx.jit(lambda model, tokens, cache: model(tokens, cache=cache))(model, tokens, cache)
            whole = nnx.jit(lambda model, tokens: model(tokens))(model, tokens)
        keys = out.cache.layers[0][0].k
        if explicit(mesh):
            assert typed(out.logits) == typed(whole.logits) == (BATCH, "context", "tensor")
            assert typed(keys) == (None, BATCH, "tensor", None, None)
        results.append([np.asarray(a) for a in (out.logits, whole.logits, keys)])
    for got, want in zip(*results, strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-6, atol=1e-6)


def test_an_encoder_and_its_cache(both):
    """A call that reads, and one that has read."""
    small = ["model.d_model=32", "model.d_ff=32", "model.vocab=64", "model.moe.router.jitter=0"]
    cfg = config.load("tiny_t5", small)
    tokens, inputs = (np.random.default_rng(i).integers(0, 64, (8, n)).astype(np.int32) for i, n in enumerate((5, 9)))
    results = []
    for mesh in both:
        model = Transformer(cfg.model, rules=Rules(), rngs=nnx.Rngs(params=0))
        place(model, mesh, Rules())
        with jax.set_mesh(mesh):
            first = nnx.jit(lambda m, t, c, i: m(t, cache=c, inputs=i))(model, tokens, model.empty_cache(8, 6), inputs)
            then = nnx.jit(lambda m, t, c: m(t, cache=c))(model, tokens[:, :1], first.cache)
        assert not explicit(mesh) or typed(then.cache.layers[0][0].source_k) == (BATCH, "tensor", None, None)
        results.append([np.asarray(a) for a in (first.logits, then.logits, then.cache.source)])
    for got, want in zip(*results, strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-6, atol=1e-6)


def test_a_train_step(both):
    """The same losses, the same collectives; the state keeps its types."""
    small = [
        "model.d_model=32",
        "model.d_ff=32",
        "model.moe.d_ff=16",
        "model.vocab=64",
        "data.length=16",
        "data.batch=8",
    ]
    cfg = config.load("tiny_gshard", [*small, "mesh.data=2", "mesh.expert=2", "mesh.tensor=2", "train.sample=unset"])
    model, ones = Model.of(cfg), np.ones((8, 16), np.int32)
    tokens = np.random.default_rng(0).integers(0, 64, (8, 17)).astype(np.int32)
    batch = {"tokens": tokens[:, :-1], "targets": tokens[:, 1:], "segments": ones}
    batch |= {"positions": np.cumsum(ones, 1, dtype=np.int32) - 1, "weights": ones.astype(np.float32)}
    losses, moved = [], []
    for mesh in both:
        with jax.set_mesh(mesh), jax.numpy_dtype_promotion("standard"):  # of optax
            state, run = model.create(mesh), jax.jit(make_train_step(model))
            program = run.lower(state, batch, jax.random.key(0)).compile()
            moved.append(sorted((c.op, c.axes, c.bytes) for c in read(program.as_text(), mesh) if c.op == "all-to-all"))
            for _ in range(2):
                state, metrics = run(state, jax.tree.map(jnp.asarray, batch), jax.random.key(0))
            losses.append(float(metrics["loss"]))
        if explicit(mesh):
            table = state.params["embedding"]["table"]
            assert typed(table) == ("tensor", "fsdp")
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
    assert moved[0] == moved[1] and moved[0]
