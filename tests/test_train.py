"""Training: losses against plain definitions, invariance to microbatches and mesh, optimizers and their sharding."""

import dataclasses
from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import optax
import oracle
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from moe_jax import config
from moe_jax import mesh as meshes
from moe_jax.balance import Stats
from moe_jax.checkpoint import Checkpoints
from moe_jax.collectives import read
from moe_jax.config import OptimizerConfig
from moe_jax.generate import Generator, Sampling
from moe_jax.train import optimizer
from moe_jax.train.state import Model, State, Weights
from moe_jax.train.step import cross_entropy, lower_train_step, make_eval_step, make_train_step, moved, total_loss

SMALL = [
    "model.moe.capacity_factor=0.6",
    "model.moe.min_capacity=1",
    "model.layers=2",
    "model.d_model=16",
    "model.d_ff=24",
    "model.heads=2",
    "model.vocab=40",
    "model.moe.experts=4",
    "data.length=12",
    "data.batch=16",
]


def small(*more: str, name: str = "tiny_gshard") -> config.Config:
    return config.load(name, [*SMALL, *more])


def batch_of(cfg: config.Config, padding: bool = True) -> dict[str, np.ndarray]:
    """Random tokens in two segments a row, with padding at the end of some rows."""
    rng = np.random.default_rng(0)
    B, L = cfg.data.batch, cfg.data.length
    tokens = rng.integers(0, cfg.model.vocab, (B, L + 1)).astype(np.int32)
    segments = np.where(np.arange(L) < 5, 1, 2)[None].repeat(B, 0).astype(np.int32)
    if padding:
        segments[np.arange(L)[None] >= rng.integers(7, L + 1, B)[:, None]] = 0
    positions = np.where(np.arange(L) < 5, np.arange(L), np.arange(L) - 5)[None].repeat(B, 0).astype(np.int32)
    weights = ((segments > 0) & (np.arange(L) != 4)).astype(np.float32)
    return {"tokens": tokens[:, :-1], "targets": tokens[:, 1:], "segments": segments, "positions": positions} | {
        "weights": weights
    }


def one_step(cfg: config.Config, bias: float = 0.0) -> tuple[State, dict]:
    """A train step from the initial state on the config's mesh, everything on the host."""
    model = Model.of(cfg)
    mesh = meshes.build_mesh(cfg.mesh, jax.devices()[: cfg.mesh.size])
    state = model.create(mesh)
    state = state._replace(bias=jax.tree.map(lambda b: b + bias, state.bias))
    with jax.set_mesh(mesh):
        step = jax.jit(make_train_step(model), out_shardings=(model.shardings(mesh), None))
        state, metrics = step(state, batch_of(cfg), jax.random.key(7))
    return jax.tree.map(np.asarray, state), jax.tree.map(np.asarray, metrics)


def same(got, want, rtol=1e-5):
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(got), jax.tree.leaves(want), strict=True):
        name = jax.tree_util.keystr(path)
        if a.dtype.kind in "iu":
            np.testing.assert_array_equal(a, b, name)
        else:
            assert np.abs(a - b).max() <= rtol * max(np.abs(b).max(), 1e-6), name


ONE = ["mesh.data=1", "mesh.expert=1", "train.optimizer.kind=adafactor"]


@pytest.fixture(scope="module")
def reference():
    """One device, one microbatch, no remat. Adafactor: its first update is no bare sign of the gradient."""
    return one_step(small(*ONE))


@pytest.mark.parametrize(
    "change",
    [
        ["mesh.data=2", "mesh.expert=4"],
        ["mesh.data=2", "mesh.expert=2", "mesh.tensor=2"],
        ["mesh.fsdp=4", "mesh.expert=2"],
        ["train.microbatches=4"],
        ["train.microbatches=2", "mesh.data=2", "mesh.expert=4", "model.remat=full"],
        ["model.moe.group_size=24", "train.microbatches=2", "mesh.expert=2"],
        ["model.remat=exchange", "model.scan=false"],
        ["model.remat=dots"],
    ],
    ids=lambda c: ",".join(c),
)
def test_a_step_does_not_depend_on_how_it_is_run(reference, change):
    """Loss, gradient norm, counts and the new state: the same to 1e-5, counts exact, with noise, drops and padding."""
    if any("group_size" in c for c in change):
        reference = one_step(small(*ONE, "model.moe.group_size=24"))
    state, metrics = one_step(small(*ONE, *change))
    assert metrics["routed"] > metrics["kept"], "the test needs drops"
    same(metrics, reference[1])
    same(state.params, reference[0].params)


def test_loss_is_its_definition():
    """Mean cross entropy over weighted targets plus coefficients times the layers' balance and z-losses."""
    cfg = small(*ONE, "model.moe.balance_loss=0.3", "model.moe.z_loss=0.2")
    model, batch = Model.of(cfg), batch_of(cfg)
    mesh = meshes.build_mesh(cfg.mesh, jax.devices()[:1])
    state = model.create(mesh)
    keys = jax.random.split(jax.random.key(0), cfg.data.batch)
    with jax.set_mesh(mesh):
        total, sums = jax.jit(lambda p, b: total_loss(model, p, b, keys))(state.params, batch)
        out = model.module(state.params)(
            batch["tokens"], segments=batch["segments"], positions=batch["positions"], train=True, key=keys
        )
    logp = np.asarray(jax.nn.log_softmax(out.logits), np.float64)
    nats = -np.take_along_axis(logp, batch["targets"][..., None], -1)[..., 0]
    want = (nats * batch["weights"]).sum() / batch["weights"].sum()
    s, n = sums.stats, (batch["segments"] > 0).sum()
    f = np.asarray(s.count) / n  # GShard counts first choices
    want += 0.3 * (4 * (f * np.asarray(s.prob) / n).sum(-1)).sum() + 0.2 * (np.asarray(s.z) / n).sum()
    assert float(total) == pytest.approx(want, rel=1e-5)


def test_cross_entropy_is_optax_s():
    logits, targets = jax.random.normal(jax.random.key(0), (3, 5, 11)), jnp.arange(15).reshape(3, 5) % 11
    want = optax.softmax_cross_entropy_with_integer_labels(logits, targets)
    np.testing.assert_allclose(cross_entropy(logits, targets), want, rtol=1e-6)


def test_overfits_a_batch():
    """Forty steps on one batch: the loss falls far below chance for each optimizer."""
    for kind, rate in [("adamw", 1e-2), ("adafactor", 3e-2), ("muon", 1e-2)]:
        changes = [f"train.optimizer.kind={kind}", f"train.optimizer.learning_rate={rate}", "train.steps=40"]
        cfg = small("mesh.data=2", "mesh.expert=4", *changes, "train.optimizer.warmup=5")
        model = Model.of(cfg)
        mesh = meshes.build_mesh(cfg.mesh)
        state = model.create(mesh)
        with jax.set_mesh(mesh), jax.numpy_dtype_promotion("standard"):  # optax's Adam promotes its counter
            step = jax.jit(make_train_step(model), out_shardings=(model.shardings(mesh), None), donate_argnums=0)
            losses = []
            for _ in range(40):
                state, metrics = step(state, batch_of(cfg), jax.random.key(0))
                losses.append(float(metrics["loss"]))
        assert losses[0] == pytest.approx(np.log(40), abs=0.4), kind
        assert losses[-1] < 0.6 * losses[0], (kind, losses[-1])


@pytest.mark.parametrize("kind", ["adamw", "adafactor", "muon"])
def test_optimizer_state_is_sharded_like_its_parameters(kind):
    """Every moment of a sharded parameter is sharded over the same axes; factored ones over those that they keep."""
    cfg = small("mesh.fsdp=2", "mesh.data=1", "mesh.expert=2", "mesh.tensor=2", f"train.optimizer.kind={kind}")
    model = Model.of(cfg)
    mesh = meshes.build_mesh(cfg.mesh)
    state = model.create(mesh)
    params = {optimizer.names_of(p): x for p, x in jax.tree_util.tree_leaves_with_path(state.params)}
    matched = 0
    for path, leaf in jax.tree_util.tree_leaves_with_path(state.opt_state):
        names = optimizer.names_of(path)
        owner = next((params[names[i:]] for i in range(len(names)) if names[i:] in params), None)
        if owner is not None and leaf.shape == owner.shape and leaf.ndim > 1:
            assert leaf.sharding.is_equivalent_to(owner.sharding, leaf.ndim), names
            matched += 1
        elif owner is not None and leaf.ndim == owner.ndim - 1 and leaf.size > 64:
            shards = {s.data.size for s in leaf.addressable_shards}
            whole = {s.data.size for s in owner.addressable_shards}
            assert owner.size == max(whole) or leaf.size > max(shards), names
            matched += 1
    assert matched >= len(params) // 2
    expert = next(x for n, x in params.items() if n[-2:] == ("experts", "w_up"))
    assert expert.addressable_shards[0].data.size * 8 == expert.size


def test_parameters_are_equal_on_every_mesh():
    """Created in shards, each array holds the numbers that one device would have drawn."""
    one = small(*ONE)
    many = small("mesh.fsdp=2", "mesh.data=1", "mesh.expert=2", "mesh.tensor=2", ONE[2])
    states = [Model.of(c).create(meshes.build_mesh(c.mesh, jax.devices()[: c.mesh.size])) for c in (one, many)]
    same(*(jax.tree.map(np.asarray, s.params) for s in states), rtol=1e-6)


# The selection bias

BIASED = [
    'model.moe.router={kind = "deepseek_v3"}',
    "model.moe.balance_loss=0",
    "model.moe.bias_rate=0.125",
    "model.moe.every=1",
    "model.moe.first_dense=1",
    "model.layers=3",
    "train.optimizer.weight_decay=0.5",
]


@pytest.fixture(scope="module")
def biased():
    """One step with the bias at 0.5, on one device."""
    return one_step(small(*ONE, *BIASED), bias=0.5)


@pytest.mark.parametrize("stacked", [True, False])
def test_each_layers_bias_moves_by_its_own_load(stacked):
    """Also of more than ten arrays of layers, whose names sort otherwise than the layers lie."""
    kinds = ["model.layers=24", "model.moe.every=2", "model.moe.first_dense=0"]
    model = Model.of(small(*ONE, *BIASED, *kinds, f"model.stack_above={23 if stacked else 24}"))
    load = np.random.default_rng(0).permutation(12 * 4).reshape(12, 4).astype(np.int32)
    bias = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), model.bias_shapes)
    none = jnp.zeros(())
    new = moved(model, bias, Stats(none, none, none, jnp.asarray(load), none, none, none, none))
    assert len(new["stacks"]) == (1 if stacked else 12)
    stacks = sorted(new["stacks"].items(), key=lambda item: int(item[0]))
    by_layer = np.concatenate([leaf for _, stack in stacks for leaf in jax.tree.leaves(stack)])
    want = 0.125 * np.sign(load.mean(-1, keepdims=True) - load)
    np.testing.assert_array_equal(by_layer, want)


def test_the_bias_moves_by_the_load(biased):
    """Each layer's by its own loads before dropping, exactly; no weight decay, no moments, no gradient touch it."""
    state, metrics = biased
    (bias,) = jax.tree.leaves(state.bias)
    want = [[Fraction(1, 2) + Fraction(1, 8) * m for m in oracle.moves(load.tolist())] for load in metrics["load"]]
    assert [[Fraction(float(b)) for b in row] for row in bias] == want
    assert len({tuple(row) for row in want}) == 2, "the test needs layers that differ"
    assert metrics["load"].sum() == metrics["routed"].sum() > metrics["kept"].sum()
    paths = jax.tree_util.tree_leaves_with_path((state.params, state.opt_state))
    assert not any("bias" in jax.tree_util.keystr(path) for path, _ in paths)


@pytest.mark.parametrize("change", [["train.microbatches=2"], ["mesh.data=2", "mesh.expert=2"]], ids=",".join)
def test_the_bias_moves_by_the_load_of_the_whole_step(biased, change):
    """Microbatches and shards of tokens have loads of their own; the bias moves once, by their sum."""
    state, metrics = one_step(small(*ONE, *BIASED, *change), bias=0.5)
    np.testing.assert_array_equal(metrics["load"], biased[1]["load"])
    jax.tree.map(np.testing.assert_array_equal, state.bias, biased[0].bias)


def test_evaluation_and_generation_use_the_bias():
    """A large bias on two experts sends every token there, and changes the text."""
    cfg = small(*ONE, *BIASED, "mesh.expert=1")
    model, mesh = Model.of(cfg), meshes.build_mesh(cfg.mesh, jax.devices()[:1])
    state, batch = model.create(mesh), batch_of(cfg)
    loud = jax.tree_util.tree_map_with_path(
        lambda path, p: 30.0 * p if "experts" in jax.tree_util.keystr(path) else p, state.params
    )
    generator = Generator(model, mesh, 40, 40, Sampling(temperature=0.0))
    texts = []
    for favoured in ([0, 1], [2, 3]):
        bias = jax.tree.map(lambda b, f=favoured: b.at[:, jnp.array(f)].set(9.0), state.bias)
        weights = Weights(loud, bias)
        with jax.set_mesh(mesh):
            stats = jax.jit(make_eval_step(model, None))(weights, batch).stats
            assert set(np.nonzero(np.asarray(stats.load).sum(0))[0]) == set(favoured)
            tokens = np.asarray(batch["tokens"][:, :5])
            logits = jax.jit(model.module(*weights))(tokens).logits[:, -1]
        new = generator(weights, list(tokens), 2).tokens
        assert [row[0] for row in new] == np.argmax(logits, -1).tolist()
        texts.append(new)
    assert texts[0] != texts[1]


def test_the_bias_comes_back_with_the_checkpoint(tmp_path):
    """Saved after a step and restored on another mesh: the next step is the one that an unbroken run takes."""
    cfg = small(*ONE, *BIASED)
    other = small(*BIASED, "mesh.data=2", "mesh.expert=2", ONE[2])
    model, mesh = Model.of(cfg), meshes.build_mesh(cfg.mesh, jax.devices()[:1])
    with jax.set_mesh(mesh):
        step = jax.jit(make_train_step(model), out_shardings=(model.shardings(mesh), None))
        first, _ = step(model.create(mesh), batch_of(cfg), jax.random.key(7))
        second, _ = step(first, batch_of(cfg), jax.random.key(7))
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, first, {})
    checkpoints.wait()
    elsewhere = meshes.build_mesh(other.mesh, jax.devices()[:4])
    restored, _ = Checkpoints(tmp_path).restore(Model.of(other).targets(elsewhere))
    same(jax.tree.map(np.asarray, restored.bias), jax.tree.map(np.asarray, first.bias), rtol=0)
    assert all(np.asarray(b).any() for b in jax.tree.leaves(first.bias))
    restored, _ = Checkpoints(tmp_path).restore(model.targets(mesh))
    with jax.set_mesh(mesh):
        again, _ = step(restored, batch_of(cfg), jax.random.key(7))
    same(*(jax.tree.map(np.asarray, s._asdict()) for s in (again, second)), rtol=0)
    weights = Checkpoints(tmp_path).restore_weights(model.weight_targets(mesh))
    jax.tree.map(np.testing.assert_array_equal, weights.bias, first.bias)


def test_generating_with_expert_choice_is_refused():
    """Before anything is compiled or read, with the router's key and a remedy."""
    router = "model.moe.router={kind = 'expert_choice', lookahead = true}"
    cfg = small(router, "model.moe.balance_loss=0", "train.sample=")
    with pytest.raises(config.ConfigError, match=r"model\.moe\.router\.kind: .* one token at a time\n +remedy: use"):
        Generator(Model.of(cfg), None, 40, 0)


def test_schedules():
    """Warm-up, cosine and WSD at their corners, from the closed forms."""
    base = OptimizerConfig(learning_rate=2.0, warmup=10, final=0.1)
    cosine = optimizer.schedule(base, 110)
    assert float(cosine(0)) == pytest.approx(0.2) and float(cosine(9)) == pytest.approx(2.0)
    assert float(cosine(60)) == pytest.approx(0.2 + 1.8 / 2) and float(cosine(110)) == pytest.approx(0.2)
    wsd = optimizer.schedule(dataclasses.replace(base, schedule="wsd", decay=0.2), 110)
    assert float(wsd(89)) == pytest.approx(2.0) and float(wsd(100)) == pytest.approx(1.1)
    assert float(wsd(110)) == pytest.approx(0.2)
    constant = optimizer.schedule(dataclasses.replace(base, schedule="constant", warmup=0), 110)
    assert float(constant(0)) == float(constant(109)) == 2.0


def test_muon_sees_one_matrix_a_layer_and_expert():
    model = Model.of(small())
    dims = optimizer.muon_dimensions(model.axes)
    block = dims["stacks"]["0"]["blocks"]["1"]
    assert block["ffn"]["experts"]["w_up"] == optax.contrib.MuonDimensionNumbers((2,), (3,))
    assert block["ffn"]["experts"]["w_down"] == optax.contrib.MuonDimensionNumbers((2,), (3,))
    assert block["attention"]["w_query"] == optax.contrib.MuonDimensionNumbers((1,), (2, 3))
    assert block["attention"]["w_out"] == optax.contrib.MuonDimensionNumbers((1, 2), (3,))
    assert block["ffn"]["router"] is None and dims["embedding"]["table"] is None


def test_weight_decay_shrinks_matrices_alone():
    """With zero gradients a norm stays and a matrix shrinks by rate times decay."""
    model = Model.of(small("train.optimizer.weight_decay=0.5", "train.optimizer.warmup=0", "train.optimizer.clip="))
    params = jax.tree.map(lambda s: jnp.ones(s.shape), model.shapes)
    tx = model.optimizer()
    with jax.numpy_dtype_promotion("standard"):  # optax's Adam promotes its counter
        updates, _ = tx.update(jax.tree.map(jnp.zeros_like, params), tx.init(params), params)
    assert float(jnp.abs(updates["final_norm"]["scale"]).max()) == 0.0
    assert float(updates["embedding"]["table"][0, 0]) == pytest.approx(-0.5 * 3e-3)


def test_active_parameters():
    """Total and active from the shapes: K of E experts, all else counted whole."""
    cfg = small("model.tied_head=true")
    total, active = Model.of(cfg).count()
    D, F, L, E, K, V, H = 16, 128, 1, 4, 2, 40, 16
    attention, norms = 4 * D * H, 2 * D
    dense = 3 * D * 24
    rest = V * D + 2 * (attention + norms) + dense + D * E + D
    assert total == rest + L * E * 3 * D * F and active == rest + L * K * 3 * D * F


def compiled_step(cfg: config.Config):
    """The train step of a config, lowered for its mesh."""
    model = Model.of(cfg)
    mesh = meshes.build_mesh(cfg.mesh, jax.devices()[: cfg.mesh.size])
    return mesh, lower_train_step(model, mesh)


def test_the_program_does_not_grow_with_depth():
    """Layers run in a loop: 64 of them make the program of 4, so compile time is near-flat in depth."""
    sizes = []
    for layers in (4, 64):
        _, lowered = compiled_step(small(*ONE, f"model.layers={layers}"))
        sizes.append(len(lowered.as_text().splitlines()))
    assert sizes[1] == pytest.approx(sizes[0], rel=0.05)
    _, unrolled = compiled_step(small(*ONE, "model.layers=32", "model.scan=false"))
    assert len(unrolled.as_text().splitlines()) > 1.2 * sizes[0], "the measure sees layers that are not in a loop"


def test_collectives_of_a_whole_step_are_pinned():
    """One MoE layer in a loop: four all-to-alls over the expert axis, and nothing is gathered or permuted."""
    mesh, lowered = compiled_step(small("mesh.data=2", "mesh.expert=4", ONE[2]))
    found = read(lowered.compile().as_text(), mesh)
    assert [c.axes for c in found if c.op == "all-to-all"] == [("expert",)] * 4
    assert {c.op for c in found} == {"all-to-all", "all-reduce"}


@pytest.mark.parametrize("shape", [["fsdp=2", "expert=2", "tensor=2"], ["data=2", "fsdp=4"], ["fsdp=2", "expert=4"]])
def test_the_partitioner_never_replicates_an_array_as_a_last_resort(shape, capfd):
    """It would say so on standard error, for the train step as for evaluation."""
    sizes = dict(s.split("=") for s in shape)
    cfg = small(*(f"mesh.{a}={sizes.get(a, 1)}" for a in ("data", "fsdp", "expert", "tensor")), ONE[2])
    before = jax.config.jax_enable_compilation_cache
    jax.config.update("jax_enable_compilation_cache", False)  # a program out of the cache would be silent
    try:
        mesh, step = compiled_step(cfg)
        step.compile()
        model, rows = Model.of(cfg), NamedSharding(mesh, PartitionSpec(cfg.rules.batch))
        batch = {k: jax.ShapeDtypeStruct(v.shape, v.dtype, sharding=rows) for k, v in batch_of(cfg).items()}
        with jax.set_mesh(mesh):
            jax.jit(make_eval_step(model, None)).lower(model.weight_targets(mesh), batch).compile()
    finally:
        jax.config.update("jax_enable_compilation_cache", before)
    assert "rematerialization" not in capfd.readouterr().err
