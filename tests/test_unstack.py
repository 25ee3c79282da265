"""Layers taken apart for decoding: the same model, its stacks freed; and prefill, which is a call of the whole."""

import re

import jax
import numpy as np
import pytest

from moe_jax import config, mesh
from moe_jax.generate import Generator, Sampling
from moe_jax.train.state import Model, unstack, unstacked

SMALL = ["model.d_model=32", "model.d_ff=32", "model.vocab=64", "model.stack_above=0", "model.heads=2"]
STACKS = {  # layers in stacks of one, of a period of two, and after layers that differ
    "one kind": ("tiny_mixtral", ["model.layers=3", "model.kv_heads=1"]),
    "every other": ("tiny_switch", ["model.layers=4", "model.moe.every=2"]),
    "first dense": ("tiny_deepseek", ["model.layers=4", "model.moe.d_ff=16"]),
    "windows in turn": ("tiny_mixtral", ["model.layers=4", "model.window=3", "model.full_every=2", "model.sinks=true"]),
    "an encoder": ("tiny_t5", ["model.layers=2", "model.encoder.layers=4", "model.moe.router.jitter=0"]),
}


def both(name, meshes=()):
    """A model whose layers are stacked, the same taken apart, their weights, and the mesh."""
    base, keys = STACKS[name]
    cfg = config.load(base, [*SMALL, *keys, *meshes])
    model, built = Model.of(cfg), mesh.build_mesh(cfg.mesh)
    stacked = model.create(built).weights
    kept = jax.tree.map(lambda a: jax.device_put(np.asarray(a), a.sharding), stacked)
    return model, kept, unstacked(model), unstack(model, stacked, built), stacked, built


def read(model, weights, built):
    tokens, inputs = (np.random.default_rng(i).integers(0, 64, (8, n)).astype(np.int32) for i, n in enumerate((6, 7)))
    given = {} if model.cfg.model.encoder is None else {"inputs": inputs}

    def run(weights):
        module = model.module(*weights)
        whole = module(tokens, capacity_factor=None, **given).logits
        first = module(tokens[:, :4], cache=module.empty_cache(8, 6), prefill=True, capacity_factor=None, **given)
        assert first.logits.shape == (8, 1, 64)
        then = module(tokens[:, 4:], cache=first.cache, capacity_factor=None)
        return whole, first.logits, then.logits

    with jax.set_mesh(built):
        return [np.asarray(a) for a in jax.jit(run)(weights)]


@pytest.mark.parametrize(
    "name,meshes",
    [(name, ()) for name in STACKS if name != "windows in turn"]
    + [("first dense", ["mesh.data=1", "mesh.expert=4", "mesh.tensor=2"])]
    + [("windows in turn", ["mesh.data=1", "mesh.expert=2", "mesh.fsdp=2", "mesh.tensor=2"])],
)
def test_the_same_model(name, meshes):
    model, weights, apart, layers, _given, built = both(name, meshes)
    assert any(repeats > 1 for _, repeats in (*model.cfg.model.runs, *model.cfg.model.encoder_runs))
    assert all(
        leaf.shape[0] == 1 for path, leaf in jax.tree_util.tree_leaves_with_path(layers) if "stacks" in str(path)
    )
    stacked, alone = read(model, weights, built), read(apart, layers, built)
    for a, b in zip(stacked, alone, strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5)
    whole, first, then = alone
    np.testing.assert_allclose(first[:, 0], whole[:, 3], atol=2e-5)
    np.testing.assert_allclose(then, whole[:, 4:], atol=2e-5)


def test_stacks_are_freed():
    _model, weights, _, layers, given, _ = both("every other")
    deleted = [leaf.is_deleted() for path, leaf in jax.tree_util.tree_leaves_with_path(given) if "stacks" in str(path)]
    assert deleted and all(deleted)
    assert sum(a.size for a in jax.tree.leaves(layers)) == sum(a.size for a in jax.tree.leaves(weights))


def test_a_pipeline_keeps_its_stacks():
    cfg = config.load("tiny_mixtral", [*SMALL, "model.layers=4", "mesh.data=1", "mesh.stage=2"])
    model, built = Model.of(cfg), mesh.build_mesh(cfg.mesh)
    weights = model.create(built).weights
    assert unstacked(model) is model and unstack(model, weights, built) is weights


def test_prefill_needs_an_empty_cache():
    """It sees nothing of what a cache holds: a second one gives NaN, not the logits of a text without a beginning."""
    _model, _, apart, layers, _, built = both("one kind")
    module, tokens = apart.module(*layers), np.zeros((8, 2), np.int32)
    with jax.set_mesh(built):
        with pytest.raises(ValueError, match="prefill fills a cache, and none is given"):
            module(tokens, prefill=True)
        fill = jax.jit(lambda layers, cache: apart.module(*layers)(tokens, cache=cache, prefill=True))
        first = fill(layers, module.empty_cache(8, 6))
        again = fill(layers, first.cache)
    assert np.isfinite(first.logits).all() and np.isnan(again.logits).all()


@pytest.mark.parametrize("rows", [1, 4])
def test_no_token_copies_a_cache(rows):
    """In the compiled loop over new tokens, which on CPU once copied each cache three times a token."""
    cfg = config.load("tiny_mixtral", [*SMALL, "model.layers=3", "mesh.data=1", "mesh.expert=1"])
    model, built = Model.of(cfg), mesh.build_mesh(cfg.mesh, jax.devices()[:1])
    weights = unstack(model, model.create(built).weights, built)
    generator = Generator(unstacked(model), built, 64, 64, Sampling(temperature=0.0))
    generator(weights, [np.arange(5)] * rows, 9)
    ((_, decode),) = generator.programs.values()
    loops = decode.as_text().split("\nENTRY ")[0]
    m = cfg.model
    sizes = {(rows, m.resolved_kv_heads, *last) for last in ((14, m.key_dim), (m.key_dim, 14))}
    shapes = [re.escape(f"[{','.join(map(str, s))}]") for s in sizes]
    assert any(re.search(shape, loops) for shape in shapes)
    assert not re.findall(rf"\S+ = \S*(?:{'|'.join(shapes)})\S* copy\(.*", loops)
