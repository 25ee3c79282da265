"""`inspect`: the exchange of every mesh at its least, no tokens or experts gathered, and what it says when they are."""

import dataclasses
import json
import math

import jax
import jax.numpy as jnp
import pytest
from commands import finish, start
from machines import compilable

from moe_jax import config
from moe_jax import mesh as meshes
from moe_jax.axes import MESH_AXES
from moe_jax.cli import main
from moe_jax.collectives import Collective
from moe_jax.inspect.compile import TooLarge
from moe_jax.inspect.flags import Seen, flags
from moe_jax.inspect.least import least_exchange
from moe_jax.inspect.report import inspect
from moe_jax.inspect.show import lines
from moe_jax.layers.common import lay
from moe_jax.layers.embed import Embedding
from moe_jax.layers.moe import MoELayer
from moe_jax.plan.traffic import traffic
from moe_jax.plan.work import Step
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


SHARES = {
    "of the exchange": ['rules.act_exchange=["tensor"]'],
    "of all activations": ['rules.act_embed=["tensor"]', *(f"rules.{n}=[]" for n in ("vocab", "mlp", "expert_mlp"))],
}


@pytest.mark.parametrize("name", SHARES)
def test_split_rows_and_shares_of_tokens(name):
    """Half of the tokens on each shard of a row, half of their width from each tensor shard; keys may be gathered."""
    more = [f"rules.{n}=[]" for n in ("heads", "kv_heads", "act_heads", "act_mlp", "act_vocab")]
    overrides = SHARES[name] + (more if name == "of all activations" else [])
    cfg = small("model.moe.group_size=8", *overrides, mesh={"expert": 2, "context": 2, "tensor": 2})
    found = report(cfg)
    rows = exchange(found)
    assert sum(r["count"] for r in rows) == 4 * LAYERS and {tuple(r["axes"]) for r in rows} == {("expert",)}
    for r in rows:
        assert r["bytes"] / r["count"] == pytest.approx(least(2, cfg.data.batch * L // 4) / 2, rel=0.01)
    assert found["exchange"]["times_least"] == pytest.approx(1, rel=0.01)
    assert found["flags"] == [] or name == "of all activations"  # whose norms and routers gather the width


def test_two_stages():
    """1/2 of the buffer over data and 3/4 over expert, each way, in each layer."""
    cfg = small('rules.experts=["data","expert"]', "model.moe.exchange=hierarchical", mesh=QUICK[0])
    found = report(cfg, forward=True)
    buffer = 2.0 * K * cfg.data.batch * L / 8 * D * 4
    assert found["exchange"]["bytes"] == found["least"]["total_bytes"] == 2 * LAYERS * buffer * (1 / 2 + 3 / 4)
    assert list(found["least"]["stages"]) == [2, 4]
    assert "the mean of 2 stages" in "\n".join(lines(found)) and "n=2, 4" in "\n".join(lines(found))


def test_the_least_of_a_large_model():
    """f*K*T*D*b*(n-1)/n of 4,096 tokens a device over 32 shards, in 64 layers, as the header of its config says."""
    least = least_exchange(config.load("moe_64x128"), "tpu")
    assert least.bytes_each_way == 1.25 * 8 * 4096 * 4096 * 2 * 31 / 32 == 325_058_560
    assert least.count == {"forward": 128, "recompute": 0, "backward": 128}


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
@pytest.mark.parametrize("remat", ["exchange", pytest.param("full", marks=pytest.mark.sweep)])
@pytest.mark.parametrize("name", compilable(*MACHINES))
def test_machines_that_are_not_here_exchange_the_least(name, remat):
    topology = parse(name)
    cfg = small(f"model.remat={remat}", "model.dtype=bfloat16", mesh=MACHINES[name])
    found = inspect(cfg, topology_mesh(cfg.mesh, topology), topology=topology)
    check(found, cfg, again=2 if remat == "full" else 0, bytes_each=2)
    assert 0 < found["peak_bytes"] < found["memory_bytes"] == topology.memory


ADDED = {  # to a sum over tensor, before its rows are split
    "nothing": [],
    "biases": ["model.biases=true"],
    "a shared expert": ["model.moe.shared_experts=1"],
    "both, and a dense layer": ["model.biases=true", "model.moe.shared_experts=1", "model.moe.first_dense=1"],
    "both, to sorted rows": ["model.biases=true", "model.moe.shared_experts=1", "model.moe.dispatch=ragged"],
    "both, in a recomputed layer": ["model.biases=true", "model.moe.shared_experts=1", "model.remat=full"],
}


@pytest.mark.slow
@pytest.mark.parametrize("name", compilable("v5e:2x2"))
@pytest.mark.parametrize("added", [pytest.param(a, marks=[pytest.mark.sweep] * (len(ADDED[a]) == 1)) for a in ADDED])
def test_rows_split_between_the_layers(name, added):
    """Sums are scattered and each layer gathers what it takes, as often and as much as the plan says."""
    topology, peaks = parse(name), []
    for residual in ("[]", '["tensor"]'):
        mesh = {"expert": 2, "tensor": 2}
        cfg = small(f"rules.residual={residual}", "model.dtype=bfloat16", *ADDED[added], mesh=mesh)
        found = inspect(cfg, topology_mesh(cfg.mesh, topology), topology=topology)
        peaks.append(found["peak_bytes"])
    inside = {"attention", "ffn", "shared_experts"}
    over = [r for r in found["collectives"] if r["axes"] == ["tensor"] and set(r["module"].split("+")) <= inside]
    sums = ("split rows", "attention sums", "feed-forward sums", "shared experts' sums", "expert sums")
    step = Step(cfg, topology.platform)
    planned = [m for m in traffic(step) if m.axes == ("tensor",) and m.what in sums]
    for op in ("all-gather", "reduce-scatter"):
        rows, meant = [r for r in over if r["op"] == op], [m for m in planned if m.op == op]
        assert sum(r["bytes"] for r in rows) == sum(m.count * m.sent for m in meant) > 0  # some are sent as one
    assert not [r for r in over if r["op"] == "all-reduce" and r["bytes"] >= r["count"] * step.tokens * D]
    assert peaks[1] < peaks[0]


@pytest.mark.slow
@pytest.mark.parametrize("experts", ['["expert"]', '["expert","context"]'])
@pytest.mark.parametrize("name", compilable("v5e:2x2"))
def test_split_rows_exchange_the_least(name, experts):
    """Two all-to-alls a layer and pass, of the tokens of a piece of a row; gathered are keys and values alone."""
    topology, mesh = parse(name), {"expert": 2, "context": 2}
    more = [f"rules.experts={experts}", "model.moe.group_size=8", "model.dtype=bfloat16"]
    cfg = small(*more, mesh=mesh)
    found = inspect(cfg, topology_mesh(cfg.mesh, topology), topology=topology)
    rows, step, axes = exchange(found), Step(cfg, "tpu"), tuple(cfg.rules.experts)
    assert {(tuple(r["axes"]), r["phase"], r["count"]) for r in rows} == {
        (axes, phase, LAYERS) for phase in ("forward", "backward")
    }
    assert found["exchange"]["count"] == {"forward": 2 * LAYERS, "recompute": 0, "backward": 2 * LAYERS}
    tokens = cfg.data.batch * L // 4
    assert {r["bytes"] for r in rows} == {LAYERS * least(cfg.mesh.over(axes), tokens, 2)}
    assert found["exchange"]["times_least"] == 1 and found["flags"] == []
    moving = [r for r in found["collectives"] if r["op"] not in ("all-to-all", "all-reduce")]
    assert {(r["op"], *r["axes"], r["module"]) for r in moving} == {
        ("all-gather", "context", "attention"),
        ("reduce-scatter", "context", "attention"),
    }
    planned = sum(m.count * m.sent for m in traffic(step) if (m.what, m.op) == ("keys and values", "all-gather"))
    assert sum(r["bytes"] for r in moving if r["op"] == "all-gather") == planned


@pytest.mark.slow
@pytest.mark.parametrize("name", compilable("v5e:2x2"))
def test_an_encoder_exchanges_the_least(name):
    """Its tokens and the decoder's, twice as many; heads are added up as often as the plan says, also between."""
    topology, mesh = parse(name), {"expert": 2, "tensor": 2}
    more = ["model.encoder.layers=2", f"model.encoder.length={L // 2}", "model.positions=relative"]
    cfg = small(*more, "model.dtype=bfloat16", mesh=mesh)
    found = inspect(cfg, topology_mesh(cfg.mesh, topology), topology=topology)
    each = [LAYERS * least(2, cfg.data.batch // 2 * length, 2) for length in (L, L // 2)]
    assert found["exchange"]["count"] == {"forward": 4 * LAYERS, "recompute": 0, "backward": 4 * LAYERS}
    assert found["exchange"]["bytes"] == 4 * sum(each)
    assert found["exchange"]["times_least"] == 1 and found["flags"] == []
    biases = [r["bytes"] for r in found["collectives"] if r["axes"] == ["expert"] and "attention" in r["module"]]
    assert 0 < sum(biases) < 4 * LAYERS * cfg.model.heads // 2 * L * L, "gradients of [32, H], and not of [H, L, M]"
    sums = [m for m in traffic(Step(cfg, topology.platform)) if m.what == "attention sums"]
    rows = [r for r in found["collectives"] if r["module"] == "attention" and r["axes"] == ["tensor"]]
    assert {r["op"] for r in rows} == {"all-reduce"}
    assert sum(r["bytes"] for r in rows) == sum(m.count * m.sent for m in sums)


@pytest.mark.parametrize("name", compilable("v5e:1x1"))
def test_what_does_not_fit_is_told(name):
    """The embedding alone has 2**32 numbers of 4 bytes, and the chip 16 GiB."""
    cfg = config.load("tiny_dense", ["mesh.data=1", "model.vocab=4194304", "model.d_model=1024", "model.layers=1"])
    with pytest.raises(TooLarge, match=r"exceeds available HBM \(15\.75G\)[\s\S]*remedy: name a larger topology"):
        inspect(cfg, topology_mesh(cfg.mesh, parse(name)), topology=parse(name))


# Flags


def kinds(found):
    return {f["kind"] for f in found["flags"]}


def test_gathered_tokens_are_flagged(monkeypatch):
    """Only the experts' side of the exchange laid out: the compiler gathers on the way, and the flag says so."""

    def one_side(self, buffers, *, to_experts):
        return lay(buffers, self.rules, self.rules.expert_major)

    monkeypatch.setattr(MoELayer, "exchange", one_side)
    found = report(small(mesh=QUICK[2]), forward=True)
    flag = next(f for f in found["flags"] if f["kind"] == "tokens are gathered")
    assert "all-gather over expert" in flag["what"] and "rules.experts" in flag["remedy"] and flag["bytes"] > 0
    said = "\n".join(lines(found))
    assert f"exchange: no all-to-all was found: least {2 * LAYERS} forward\n" in said and "times the least" not in said


WEIGHT = "state.params['stacks']['0']['blocks']['0']['ffn']['experts']['w_up']"
AXES = {"stacks.0.blocks.0.ffn.experts.w_up": ("layers", "experts", "expert_embed", "expert_mlp")}
SOURCE = "jit(f)/jvp()/while/body/ffn/experts/dot_general"
# A collective of 1 MiB, and the flag that it raises with its remedy: on 64 tokens, experts over expert=4 x fsdp=2.
SINGLE = {
    "FSDP gathers": ({"op": "all-gather", "axes": ("fsdp",), "arguments": (WEIGHT,)}, None),
    "its moments": (
        {"op": "all-gather", "axes": ("fsdp",), "arguments": (f"state.opt_state[0].mu{WEIGHT[12:]}",)},
        None,
    ),
    "experts": (
        {"op": "all-gather", "axes": ("expert",), "arguments": (WEIGHT,)},
        ("expert weights are gathered", "make rules.experts a subset of rules.batch"),
    ),
    "both": (
        {"op": "all-gather", "axes": ("fsdp", "expert"), "arguments": (WEIGHT,)},
        ("expert weights are gathered", "make rules.experts a subset of rules.batch"),
    ),
    "tensor": (
        {"op": "all-gather", "axes": ("tensor",), "arguments": (WEIGHT,)},
        ("weights are gathered", "change rules.expert_mlp"),
    ),
    "tokens": ({"op": "all-gather", "axes": ("fsdp",)}, ("tokens are gathered", "rules.experts and rules.batch")),
    "tokens of attention": (
        {"op": "all-gather", "axes": ("fsdp",), "parts": ((SOURCE.replace("ffn/experts", "attention"), 1),)},
        ("tokens are gathered", "rules.act_*"),
    ),
    "numbers of groups": ({"op": "all-gather", "axes": ("fsdp",), "bytes": 128}, None),
    "token ids": (
        {"op": "all-gather", "axes": ("fsdp",), "arguments": ("batch['tokens']",)},
        ("tokens are gathered", "rules.experts and rules.batch"),
    ),
    "no tokens": ({"op": "all-gather", "axes": ("tensor",)}, None),
    "moments in muon": ({"op": "all-gather", "axes": ("fsdp",), "parts": (("jit(f)/optimizer/dot", 1),)}, None),
    "sum in whole": (
        {"op": "all-reduce", "axes": ("fsdp",), "sliced": True},
        ("an all-reduce where a reduce-scatter would do", "rules.embed, rules.expert_embed"),
    ),
    "sum": ({"op": "all-reduce", "axes": ("fsdp",)}, None),
}


@pytest.mark.parametrize("name", SINGLE)
def test_what_is_flagged(name):
    fields, want = SINGLE[name]
    made = {"bytes": 2**20, "source": SOURCE, "moved": 2**19, "times": 2, "parts": ((SOURCE, 2**20),)} | fields
    cfg = small(mesh={"fsdp": 2, "expert": 4})
    found = flags(Seen(cfg, "tpu", None, 64, AXES, [Collective(**made)], []))
    assert [f.kind for f in found] == ([] if want is None else [want[0]])
    if want is not None:
        assert want[1] in found[0].remedy and found[0].bytes == 2 * 2**19
        assert f"2 x {made['op']} over {'+'.join(made['axes'])}" in found[0].what
    assert [f.kind for f in flags(Seen(cfg, "cpu", None, 64, AXES, [Collective(**made)], []))] == [
        f.kind for f in found if "reduce-scatter" not in f.kind
    ], "a CPU has no reduce-scatter"


def test_weights_stored_over_the_replicas_are_no_flag():
    """ZeRO over `data`: the gathers are those of weights, and legitimate."""
    cfg = small("rules.embed=['data']", "rules.expert_embed=['data']", mesh=QUICK[0])
    found = report(cfg)
    gathers = [r for r in found["collectives"] if r["op"] == "all-gather"]
    assert gathers and {(r["of"], *r["axes"]) for r in gathers} == {("weights", "data")} and not found["flags"]


def test_arrays_that_the_partitioner_replicates_are_flagged(monkeypatch):
    """A lookup in a table that is split by tokens and by width: it says so on standard error.

    And says nothing when the program comes out of the cache, so it must not, even where others have used the cache."""
    monkeypatch.setattr(Embedding, "rows", lambda self, table, name: table[...])
    jax.jit(lambda x: x + 1)(jnp.ones(3))
    first = report(small(mesh=QUICK[1]), forward=True)
    jax.jit(lambda x: x + 2)(jnp.ones(3))
    found = report(small(mesh=QUICK[1]), forward=True)
    assert kinds(first) == kinds(found)
    assert "the partitioner gathers an array as a last resort" in kinds(found)


MORE = {
    "dropless": (["model.moe.capacity_factor=unset"], E / K, "set model.moe.capacity_factor"),
    "rounded up": (
        ["model.moe.capacity_factor=1.1", "model.moe.group_size=8"],
        32 / (1.1 * 16),
        "model.moe.group_size",
    ),
}


@pytest.mark.parametrize("name", MORE)
def test_more_than_the_least_is_flagged(name):
    """Dropless buffers hold S slots for each of E experts where K*S are used; 8 tokens of 2 choices at a factor of 1.1
    need 2.2 slots an expert and get the least of 4."""
    overrides, times, remedy = MORE[name]
    found = report(small(*overrides, mesh=QUICK[0]), forward=True)
    assert found["exchange"]["times_least"] == pytest.approx(times, rel=0.01)
    (flag,) = found["flags"]
    assert flag["kind"] == "the exchange moves more than it must" and remedy in flag["remedy"]


def test_sorted_rows_of_a_capacity_travel_at_the_least():
    """Nobody sends an expert more than its slots, so that no buffer of sorted rows is larger than theirs."""
    found = report(small("model.moe.dispatch=ragged", mesh=QUICK[0]), forward=True)
    assert found["exchange"]["times_least"] == pytest.approx(1, rel=0.01) and found["flags"] == []


def test_both_branches_of_a_fallback_are_no_flag():
    """Compiled are the bounded buffers and the dropless path; a step runs one of them."""
    found = report(small("model.moe.overflow=fallback", "model.moe.dispatch=gather", mesh=QUICK[0]), forward=True)
    assert found["flags"] == [] and found["exchange"]["at_most"]
    assert "at most all-to-alls" in "\n".join(lines(found))


def test_one_exchange_too_many_is_flagged():
    cfg = small("model.remat=full", mesh=QUICK[0])
    least = dataclasses.replace(least_exchange(cfg, "tpu"), recompute=0)
    each = Collective("all-to-all", ("expert",), 1, SOURCE, least.bytes_each_way, 6 * LAYERS)
    (flag,) = flags(Seen(cfg, "tpu", least, 64, AXES, [each], []))
    assert "set model.remat=exchange" in flag.remedy and "1.50 times the least" in flag.what


def test_microbatches_are_multiplied_out():
    """They are recomputed one by one: 2 more all-to-alls a layer and microbatch, each of half the tokens."""
    found = report(small("train.microbatches=2", mesh=QUICK[0]))
    count = {"forward": 4 * LAYERS, "recompute": 4 * LAYERS, "backward": 4 * LAYERS}
    assert found["exchange"]["count"] == found["least"]["count"] == count
    assert found["exchange"]["times_least"] == pytest.approx(1, rel=0.01)
    assert found["least"]["bytes_each_way"] == least(4, 16 * L / 2 / 8)


# What has nothing to exchange, and the command

PLAIN = {
    "one device": ([], {}),
    "dense": (["model.moe=unset"], {"data": 2, "fsdp": 2, "tensor": 2}),
    "experts on every device": ([], {"data": 8}),
}


@pytest.mark.parametrize("name", PLAIN)
def test_without_an_exchange(name):
    overrides, mesh = PLAIN[name]
    found = report(small(*overrides, mesh=mesh), forward=True)
    assert found["least"] is None and found["exchange"] is None and found["flags"] == []
    assert not exchange(found) and bool(found["collectives"]) == bool(mesh)
    assert found["peak_bytes"] > 0 and "a device at the peak" in "\n".join(lines(found))


def test_the_command(tmp_path):
    argv = ["inspect", "tiny_switch", *SMALL, "data.batch=16", "--forward", "--fake-devices", "8", "--json"]
    code, out, err = finish(start(*argv, cwd=tmp_path))
    assert code == 0, err
    found = json.loads(out.splitlines()[-1])
    assert {"op", "axes", "count", "bytes", "phase", "module"} <= found["collectives"][0].keys()
    assert found["mesh"] == {"data": 2, "expert": 4} and found["platform"] == "cpu"
    for column in ("op", "mesh axes", "count", "sent", "phase", "module", "least", "no flags", "compiled in"):
        assert column in err, "with --json the table is progress"
    assert list(tmp_path.iterdir()) == []


REFUSED = {
    "unknown chip": (["--topology", "v9:4x4"], "no known chip"),
    "both": (["--topology", "v5e:4x4", "--fake-devices", "8"], "--topology names others"),
    "other size": (["--topology", "h100:2x8"], "has 16 devices, and a mesh of data=2 x expert=4 needs 8"),
    "other number": (["--fake-devices", "4"], "use --fake-devices 8"),
    "typo": (["model.layer=3"], "did you mean 'layers'"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_the_command_refuses(name, capsys, monkeypatch):
    argv, words = REFUSED[name]
    monkeypatch.setenv("TF_CPP_MIN_LOG_LEVEL", "2")  # the command sets it, and must not leave it to other tests
    assert main(["inspect", "tiny_switch", *argv]) == 2
    err = capsys.readouterr().err
    assert "refused" in err and words in err and "remedy" in err
