"""Stages of a pipeline: schedules, loss and every gradient equal to one device, what travels, what is refused."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import placements
import pytest
from commands import TINY, finish, in_this_process, start, write_text
from commands import rows as history
from hypothesis import given
from hypothesis import strategies as st

from moe_jax import config
from moe_jax import mesh as meshes
from moe_jax.axes import Rules
from moe_jax.collectives import read
from moe_jax.config import ConfigError, MeshConfig, TrainConfig
from moe_jax.pattern import Schedule
from moe_jax.pipeline import joined, split
from moe_jax.plan.leaves import leaves
from moe_jax.plan.traffic import traffic
from moe_jax.plan.work import Step
from moe_jax.train.state import Model
from moe_jax.train.step import lower_train_step, make_train_step

in_process = pytest.fixture(in_this_process)


@given(st.integers(1, 6), st.integers(1, 8), st.integers(1, 3))
def test_a_schedule_keeps_every_order(stages, microbatches, rounds):
    """Played through tick by tick: each stage works on one piece at a time, after the stage before it."""
    if rounds > 1 and microbatches < stages:
        return  # refused: a microbatch would be back too late
    s = Schedule(stages, microbatches, rounds)
    done: dict[tuple[int, int, int], int] = {}  # (round, stage, microbatch) -> tick
    for tick in range(s.ticks):
        for stage in range(stages):
            if 0 <= (piece := tick - stage) < rounds * microbatches:
                turn, part = divmod(piece, microbatches)
                before = (turn, stage - 1, part) if stage else (turn - 1, stages - 1, part)
                assert done.get(before, -1 if before[0] < 0 else tick) < tick
                done[turn, stage, part] = tick
    assert len(done) == rounds * stages * microbatches, "every piece of work is done"
    assert s.bubble == pytest.approx(1 - len(done) / (s.ticks * stages))


@pytest.mark.parametrize("together", [1, 2])
def test_microbatches_are_joined_as_they_were(together):
    x = jnp.arange(24).reshape(12, 2)
    with jax.set_mesh(meshes.build_mesh(MeshConfig(), jax.devices()[:1])):
        parts = split(x, 3, together, Rules())
        assert parts.shape == (3, 4, 2)
        np.testing.assert_array_equal(joined(parts, together), x)
    rows = np.asarray(parts[..., 0]) // 2 // together
    assert all(len(set(r[i : i + together])) == 1 for r in rows for i in range(0, 4, together))


# Mesh, microbatches, rounds, and the dispatcher; tests/test_exchange.py has every mesh
CELLS = {
    "with experts and tensors": (dict(stage=2, expert=2, tensor=2), 2, 1, "einsum"),
    "two rounds": (dict(stage=2, expert=2), 4, 2, "gather"),
    "rows that stages cannot share": (dict(stage=4, data=2), 3, 1, "ragged"),
}


def pipelined(axes, microbatches, rounds, dispatch):
    base = placements.config(None, layers=4)
    return dataclasses.replace(
        base,
        model=dataclasses.replace(base.model, moe=dataclasses.replace(base.model.moe, dispatch=dispatch)),
        data=dataclasses.replace(base.data, batch=placements.B * microbatches // 2),
        mesh=MeshConfig(**axes),
        train=TrainConfig(microbatches=microbatches, rounds=rounds),
    )


@functools.cache
def compiled(cfg):
    """The collectives of a train step."""
    model, mesh = Model.of(cfg), meshes.build_mesh(cfg.mesh, jax.devices()[: cfg.mesh.size])
    with jax.numpy_dtype_promotion("standard"):  # of optax
        return read(lower_train_step(model, mesh).compile().as_text(), mesh)


@pytest.mark.parametrize("name", CELLS)
def test_what_stages_pass_on(name):
    """Once a tick each way what one stage made of a microbatch; nothing else over the stages inside of the loop.

    Before and after it, the rows of embedding and head. Experts are exchanged in each tick.
    """
    axes, microbatches, rounds, dispatch = CELLS[name]
    cfg = pipelined(axes, microbatches, rounds, dispatch)
    found = compiled(cfg)
    schedule, rows = Schedule(cfg.mesh.stage, microbatches, rounds), cfg.data.batch // cfg.mesh.over(cfg.rules.batch)
    size = 4 * rows * placements.L * placements.D  # of the rows of one device
    over = [c for c in found if "stage" in c.axes and c.op != "all-reduce"]
    in_loop = [c for c in found if "stage" in c.axes and c.times > 1 and c.bytes > placements.COUNTS]
    loop = [(c.op, c.bytes, c.times) for c in in_loop]
    assert loop == 2 * [("collective-permute", size // microbatches, schedule.ticks)]
    shared = rows % cfg.mesh.stage == 0
    assert [c.bytes for c in over if c.op == "all-to-all" and c.bytes == size] == 4 * shared * [size]
    exchanges = [c for c in found if c.op == "all-to-all" and c.axes == ("expert",) and c.phase == "forward"]
    each = 4 * schedule.ticks // cfg.mesh.stage // rounds  # layers that a stage passes
    assert sum(c.times for c in exchanges) == (2 * each if cfg.mesh.expert > 1 else 0)


TWO = ["mesh.stage=2", "mesh.expert=2", "train.microbatches=2"]
EACH = ["model.layers=4", "model.moe.every=1"]
LONG = ["model.head_dim=4", "model.rope.kind=longrope", "model.rope.original_length=10", "model.rope.factor=4"]
LONG += ["model.rope.short_factors=[1,1.5]", "model.rope.long_factors=[2,8]"]  # of the rows some are long ones
TRAINED = {  # rows, the mesh, and what both runs have beside tiny_gshard
    "the issue's mesh": (8, [*TWO, "mesh.tensor=2"], []),
    "rows that stages cannot share": (
        12,
        ["mesh.stage=4", "mesh.data=2", "mesh.expert=1", "train.microbatches=3"],
        [],
    ),
    "muon": (8, [*TWO, "train.rounds=2"], [*EACH, "train.optimizer.kind=muon"]),
    "balanced over sequences": (8, TWO, [*EACH, "model.moe.balance_over=sequence", "model.moe.balance_loss=1.0"]),
    "positions by distance": (8, TWO, [*EACH, "model.positions=relative"]),
    "dropout inside experts": (8, TWO, [*EACH, *LONG, "model.moe.expert_dropout=0.4", "model.moe.shared_experts=1"]),
}


@pytest.mark.parametrize("name", TRAINED)
def test_training_is_that_of_one_device(name):
    """tiny_gshard in small, its noise included."""
    rows, axes, both = TRAINED[name]
    small = ["model.d_model=32", "model.d_ff=32", "data.length=16", "model.vocab=64", "model.layers=8"]
    losses = []
    for more in ([], axes):
        base = [*small, f"data.batch={rows}", "mesh.data=1", "mesh.expert=1", "train.sample=unset"]
        cfg = config.load("tiny_gshard", [*base, *both, *more])
        model, mesh = Model.of(cfg), meshes.build_mesh(cfg.mesh, jax.devices()[: cfg.mesh.size])
        model.validate()
        state, rng, seed = model.create(mesh), np.random.default_rng(0), jax.random.key(0)
        run = []
        with jax.set_mesh(mesh), jax.numpy_dtype_promotion("standard"):  # of optax
            step = jax.jit(make_train_step(model), out_shardings=(model.shardings(mesh), None))
            for _ in range(4):
                tokens = rng.integers(0, 64, (rows, 17)).astype(np.int32)
                ones = np.ones((rows, 16), np.int32)
                batch = {"tokens": tokens[:, :-1], "targets": tokens[:, 1:], "segments": ones}
                again = np.where(np.arange(rows) % 3 == 1, 16, 8)[:, None]  # where positions begin anew
                batch |= {"positions": (np.cumsum(ones, 1) - 1) % again, "weights": ones.astype(np.float32)}
                state, metrics = step(state, jax.tree.map(jnp.asarray, batch), seed)
                run.append((float(metrics["total_loss"]), float(metrics["grad_norm"]), int(metrics["kept"].sum())))
        losses.append(np.asarray(run, np.float64))
    np.testing.assert_allclose(losses[1], losses[0], rtol=1e-5)
    assert len(set(losses[0][:, 0])) == 4, "the comparison needs losses that differ"


def test_rounds_save_no_weights():
    """More microbatches leave more rows for the backward pass, and no layers: those of a round are looked up again."""
    sizes = []
    for microbatches in (2, 8):
        more = ["mesh.data=1", "mesh.expert=2", "mesh.stage=2", "train.rounds=2", f"train.microbatches={microbatches}"]
        small = ["model.layers=8", f"data.batch={4 * microbatches}", "data.length=16", "model.remat=full"]
        cfg = config.load("tiny_gshard", [*more, *small, "train.sample=unset"])
        model, mesh = Model.of(cfg), meshes.build_mesh(cfg.mesh, jax.devices()[:4])
        with jax.numpy_dtype_promotion("standard"):  # of optax
            sizes.append(lower_train_step(model, mesh).compile().memory_analysis().temp_size_in_bytes)
    layers = sum(4 * leaf.shard(cfg.rules, cfg.mesh) for leaf in leaves(cfg.model) if leaf.axes[0] == "layers")
    assert sizes[1] - sizes[0] < layers, "six times the layers of a device would be more"


def test_the_plan_counts_what_stages_send():
    """All-to-alls and permutes of each kind, against the compiled step."""
    for axes, microbatches, rounds, dispatch in CELLS.values():
        cfg = pipelined(axes, microbatches, rounds, dispatch)
        found = compiled(cfg)
        planned = traffic(Step(cfg, "cpu"))
        for op, over in (("collective-permute", ("stage",)), ("all-to-all", ("stage",)), ("all-to-all", ("expert",))):
            counts = placements.COUNTS if over == ("expert",) else 0
            want = sum(m.count * m.bytes for m in planned if (m.op, m.axes) == (op, over))
            got = sum(c.times * c.bytes for c in found if (c.op, c.axes) == (op, over) and c.bytes > counts)
            assert got == want, (axes, op, over, got, want)


def test_a_run_in_rounds_is_read_on_any_mesh(tmp_path):
    """Trained by the command on four stages' shares of layers, evaluated on its own mesh and on one device."""
    four = ["model.layers=4", "mesh.data=1", "mesh.stage=2", "train.rounds=2", "train.microbatches=2", "train.steps=2"]
    small = [x for x in TINY if not x.startswith(("model.layers", "train.steps"))]
    argv = ["train", *small, "model.moe.every=1", *four, f"data.path={write_text(tmp_path)}"]
    code, _, err = finish(start(*argv, "--workdir", tmp_path / "run", cwd=tmp_path))
    assert code == 0 and "pipeline of 2 stages: 5 ticks a step, bubble (S-1)/(R*M+S-1) = 20.0%" in err, err
    losses = []
    for mesh in ([], ["mesh.stage=1", "mesh.expert=1"]):
        code, out, err = finish(start("eval", tmp_path / "run", *mesh, "--json", cwd=tmp_path))
        assert code == 0, err
        losses.append(json.loads(out.splitlines()[-1])["eval_loss"])
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)


@pytest.mark.parametrize("axes, microbatches, rounds, dispatch", [*CELLS.values(), (dict(data=4), 4, 1, "einsum")])
def test_the_plan_counts_gradients_in_every_pass(axes, microbatches, rounds, dispatch):
    """Those of layers in each tick, or microbatch of a loop, against the all-reduces of the compiled step."""
    cfg = pipelined(axes, microbatches, rounds, dispatch)
    step = Step(cfg, "cpu")
    (over,) = {
        c.axes for c in compiled(cfg) if c.op == "all-reduce" and set(c.axes) & {"data", "expert"} and c.times > 1
    }
    found = [c for c in compiled(cfg) if (c.op, c.axes, c.phase) == ("all-reduce", over, "backward") and c.times > 1]
    got = sum(c.times * c.bytes for c in found if c.bytes > placements.COUNTS and "embed" not in c.modules)
    planned = [m for m in traffic(step) if m.what == "gradients" and m.axes == over]
    tables = 0 if step.shared else step.table_passes * 4 * placements.D * (placements.VOCAB + 1)  # and a norm
    want = sum(m.count * m.bytes for m in planned) - tables
    assert got == pytest.approx(want, abs=sum(m.count for m in planned)), "a mean is rounded"
    assert sum(m.count for m in planned) == round(4 * step.turns) + (0 if step.shared else step.table_passes)


HOPS = {  # what each part of a run has beside four layers of experts, until its steps are done
    "one round": (["mesh.stage=2"], ["mesh.stage=1", "mesh.expert=2"], ["mesh.stage=4"], ["mesh.stage=2"]),
    "two rounds": (
        ["mesh.stage=2", "train.rounds=2"],
        ["mesh.stage=1"],
        ["mesh.stage=4"],
        ["mesh.stage=2", "train.rounds=2"],
    ),
}


@pytest.mark.parametrize("name", [pytest.param("one round", marks=pytest.mark.slow), "two rounds"])
@pytest.mark.usefixtures("in_process")
def test_a_run_goes_on_with_other_stages(name, tmp_path, call):
    """Each part of it goes on from the checkpoint of the part before; the losses are those of one device throughout."""
    small = [x for x in TINY if not x.startswith(("train.steps", "train.checkpoint_every"))]
    small += [
        "train.optimizer.schedule=constant",
        "model.layers=4",
        "model.moe.every=1",
        "mesh.data=1",
        "mesh.expert=1",
        "train.microbatches=4",
    ]
    argv = ["train", *small, f"data.path={write_text(tmp_path)}", "--json", "train.checkpoint_every=2"]
    code, _, log = call(*argv, "train.steps=8", "--workdir", tmp_path / "alone")
    assert code == 0, log
    for i, mesh in enumerate(HOPS[name]):
        code, _, log = call(*argv, *mesh, f"train.steps={2 * i + 2}", "--workdir", tmp_path / "run")
        assert code == 0 and (i == 0 or f"goes on from the checkpoint at step {2 * i}\n" in log), log
    losses = [[s["loss"] for s in history(tmp_path / run)[0]] for run in ("run", "alone")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5) and len(set(losses[1])) == 8


@pytest.mark.parametrize(
    "overrides, key, words",
    [
        (["mesh.stage=3"], "mesh.stage", "needs one run of layers that splits into 3 equal shares"),
        (["mesh.stage=2", "model.moe.first_dense=1"], "mesh.stage", "model.moe.first_dense=0"),
        (["mesh.stage=2", "model.stack_above=12"], "mesh.stage", "one run of layers that splits into 2"),
        (["mesh.stage=2", 'rules.batch=["stage", "data"]'], "rules.batch", "alone there and nowhere else"),
        (["mesh.stage=2", 'rules.layers=["data"]'], "rules.layers", "alone there and nowhere else"),
        (["train.rounds=2"], "train.rounds", "mesh.stage=1 is no pipeline"),
        (["mesh.stage=2", "train.rounds=2", "model.layers=8"], "train.microbatches", "set it to 2 or more"),
        (["mesh.stage=2", "model.moe.overflow=fallback"], "model.moe.overflow", "both branches"),
        (["mesh.stage=2", "model.moe.balance_over=microbatch"], "model.moe.balance_over", "use step or sequence"),
    ],
)
def test_what_makes_no_pipeline_is_refused(overrides, key, words):
    with pytest.raises(ConfigError) as e:
        config.load("tiny_gshard", overrides)
    assert any(p.key == key and words in f"{p.reason} {p.remedy}" for p in e.value.problems), e.value
