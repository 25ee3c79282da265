"""`inspect`: the exchange of every mesh at its least, no tokens or experts gathered, and what it says when they are."""

import math

import jax
import pytest
from machines import compilable

from moe_jax import config
from moe_jax import mesh as meshes
from moe_jax.axes import MESH_AXES
from moe_jax.inspect.report import inspect
from moe_jax.topology import parse, topology_mesh

LAYERS, L, D, E, K = 2, 32, 32, 8, 2
SMALL = [
    "model.vocab=64",
    f"model.layers={LAYERS}",
    f"model.d_model={D}",
    "model.d_ff=64",
    "model.heads=8",
    "model.ffn=relu",
    f"model.moe.experts={E}",
    f"model.moe.top_k={K}",
    "model.moe.every=1",
    "model.moe.capacity_factor=2.0",
    "model.moe.router.kind=softmax_topk",
    f"data.length={L}",
    "model.remat=exchange",
    "train.sample=unset",
]


def small(*more, batch=16, mesh=None):
    """Two MoE layers in a loop; 16 slots an expert and sequence are exactly K*L*f/E."""
    axes = dict.fromkeys(MESH_AXES, 1) | (mesh or {})
    return config.load(
        "tiny_switch", [*SMALL, f"data.batch={batch}", *(f"mesh.{a}={n}" for a, n in axes.items()), *more]
    )


@pytest.fixture(autouse=True)
def usual_promotion():
    """AdamW of optax multiplies Python numbers with counts."""
    with jax.numpy_dtype_promotion("standard"):
        yield


def report(cfg, **options):
    return inspect(cfg, meshes.build_mesh(cfg.mesh, jax.devices()[: cfg.mesh.size]), **options)


def exchange(found):
    return [r for r in found["collectives"] if r["op"] == "all-to-all"]


def least(shards, tokens, bytes_each=4, factor=2.0):
    """`f*K*T*D*b*(n-1)/n`, as the issue of every mixture of experts states it."""
    return factor * K * tokens * D * bytes_each * (shards - 1) / shards


def check(found, cfg, *, again=0, bytes_each=4):
    """Two all-to-alls a layer forward and two backward, `again` in between, each at the least bytes; nothing else."""
    n = cfg.mesh.expert
    tokens = cfg.data.batch * L // (cfg.mesh.data * cfg.mesh.fsdp * n)
    rows = exchange(found)
    if n == 1:
        assert rows == [] and found["least"] is None
    else:
        count = {p: sum(r["count"] for r in rows if r["phase"] == p) for p in ("forward", "recompute", "backward")}
        assert count == {"forward": 2 * LAYERS, "recompute": again * LAYERS, "backward": 2 * LAYERS}
        assert {tuple(r["axes"]) for r in rows} == {("expert",)}
        for r in rows:
            assert r["bytes"] / r["count"] == pytest.approx(least(n, tokens, bytes_each), rel=0.01)
        assert found["exchange"]["times_least"] == pytest.approx(1, rel=0.01)
    gathers = [r for r in found["collectives"] if r["op"] == "all-gather"]
    assert all(r["of"] == "weights" and r["axes"] == ["fsdp"] for r in gathers), gathers
    assert bool(gathers) == (cfg.mesh.fsdp > 1)
    assert not {r["op"] for r in found["collectives"]} & {"collective-permute", "send"}
    if found["platform"] == "cpu":
        assert found["flags"] == []
    else:
        assert {f["kind"] for f in found["flags"]} <= {"an all-reduce where a reduce-scatter would do"}


def shapes(devices):
    """Every way to lie so many devices along the four axes."""
    sizes = [n for n in range(1, devices + 1) if devices % n == 0]
    for data in sizes:
        for fsdp in sizes:
            for expert in sizes:
                if devices % (data * fsdp * expert) == 0:
                    yield {"data": data, "fsdp": fsdp, "expert": expert, "tensor": devices // (data * fsdp * expert)}


QUICK = (
    {"data": 2, "fsdp": 1, "expert": 4, "tensor": 1},
    {"data": 1, "fsdp": 2, "expert": 2, "tensor": 2},
    {"data": 1, "fsdp": 1, "expert": 8, "tensor": 1},
)
SLOW = [pytest.param(s, marks=pytest.mark.slow) for s in shapes(8) if s not in QUICK]


def ids(value):
    return " ".join(f"{a}={n}" for a, n in value.items() if n > 1) if isinstance(value, dict) else None


@pytest.mark.parametrize("mesh", [*QUICK, *SLOW], ids=ids)
def test_every_mesh_exchanges_the_least(mesh):
    """The default remat saves what was exchanged: nothing travels again."""
    cfg = small(mesh=mesh)
    check(report(cfg), cfg)


def test_all_shapes_are_tried():
    assert len(QUICK) + len(SLOW) == math.comb(3 + 3, 3), "three factors of 2 over four axes"
    assert config.ModelConfig().remat == "exchange"


AGAIN = {
    "none": (["model.remat=none"], 0),
    "full": (["model.remat=full"], 2),
    "unrolled": (["model.scan=false"], 0),
    "gather": (["model.moe.dispatch=gather"], 0),
}


@pytest.mark.parametrize("name", AGAIN)
def test_what_travels_again(name):
    overrides, again = AGAIN[name]
    cfg = small(*overrides, mesh=QUICK[0])
    check(report(cfg), cfg, again=again)


def test_the_forward_pass_alone():
    found = report(small(mesh=QUICK[0]), forward=True)
    rows = exchange(found)
    assert sum(r["count"] for r in rows) == 2 * LAYERS and {r["phase"] for r in found["collectives"]} == {"forward"}
    assert found["least"]["count"] == {"forward": 2 * LAYERS, "recompute": 0, "backward": 0}
    assert found["exchange"]["times_least"] == pytest.approx(1, rel=0.01)


# Machines that are not here

MACHINES = {
    "v5e:4x4": {"data": 4, "expert": 4},
    "v5p:2x2x2": {"fsdp": 2, "expert": 4},
    "h100:2x8": {"data": 2, "expert": 8},
}


@pytest.mark.slow
@pytest.mark.parametrize("remat", ["exchange", "full"])
@pytest.mark.parametrize("name", compilable(*MACHINES))
def test_machines_that_are_not_here_exchange_the_least(name, remat):
    topology = parse(name)
    cfg = small(f"model.remat={remat}", "model.dtype=bfloat16", mesh=MACHINES[name])
    found = inspect(cfg, topology_mesh(cfg.mesh, topology), topology=topology)
    check(found, cfg, again=2 if remat == "full" else 0, bytes_each=2)
    assert 0 < found["peak_bytes"] < found["memory_bytes"] == topology.memory
