"""What a step moves and how long it takes, against formulas, published examples and limits."""

import dataclasses
import json
import math
import re
from collections import Counter
from pathlib import Path

import jax
import pytest
from machines import compilable

from moe_jax import config
from moe_jax.axes import MESH_AXES
from moe_jax.plan import advice, roofline
from moe_jax.plan.compiled import compiled
from moe_jax.plan.estimate import Estimate
from moe_jax.plan.hardware import CHIPS, Wiring, parse, shaped
from moe_jax.plan.report import report
from moe_jax.plan.roofline import decode, times, utilisation
from moe_jax.plan.search import factorisations, search
from moe_jax.plan.traffic import exchange_bytes, traffic
from moe_jax.plan.work import Step
from moe_jax.refused import Refused

MEDIUM = Path(__file__).parent / "golden" / "medium.toml"
GOLDEN = json.loads((Path(__file__).parent / "golden" / "models.json").read_text())


def step_of(name, *overrides, platform="tpu"):
    return Step(config.load(name, overrides), platform)


def estimate(name, topology, *overrides):
    cfg = config.load(name, overrides)
    return Estimate(cfg, parse(topology, cfg.mesh.size))


def only(step, what):
    return [m for m in traffic(step) if m.what == what]


@pytest.mark.parametrize("data,expert,factor", [(1, 8, 1.25), (2, 4, 1.0), (4, 2, 2.0)])
def test_the_exchange_moves_the_least_that_buffers_allow(data, expert, factor):
    """f*K*T*D*b*(n-1)/n each way (GShard, section 3.3), K choices of T tokens on a device."""
    sizes = [f"mesh.data={data}", f"mesh.expert={expert}", f"model.moe.capacity_factor={factor}"]
    step = step_of("tiny_gshard", *sizes)
    T, K, D, b = 32 * 128 // (data * expert), 2, 128, 4
    (move,) = only(step, "exchange")
    assert move.sent == pytest.approx(factor * K * T * D * b * (expert - 1) / expert)
    assert move.count == 4 * 2, "two all-to-alls forward and two backward, in each of two MoE layers"


def test_published_exchange():
    """Mixtral's eight experts on eight devices, 4,096 tokens each: without a capacity factor all rows are in use."""
    sizes = ["model.moe.capacity_factor=1.0", "mesh.fsdp=1", "mesh.expert=8", "data.batch=8"]
    (move,) = only(step_of("mixtral_8x7b", *sizes), "exchange")
    assert move.sent == GOLDEN["all_to_all"]["mixtral_ep8_4096tok_bf16"]


@pytest.mark.parametrize(
    "remat,microbatches,rounds", [("none", 1, 2), ("exchange", 1, 2), ("full", 1, 3), ("dots", 1, 3), ("none", 2, 3)]
)
def test_remat_and_microbatches_repeat_the_exchange(remat, microbatches, rounds):
    step = step_of("tiny_gshard", f"model.remat={remat}", f"train.microbatches={microbatches}")
    (move,) = only(step, "exchange")
    assert move.count == 2 * rounds * microbatches * 2
    whole = step_of("tiny_gshard")
    assert exchange_bytes(step) * microbatches == exchange_bytes(whole), "parts of a batch exchange parts of it"


def test_split_sequences_gather_keys_and_values():
    """2 tensors of J*N a token of the whole sequence, in each layer; back as gradients."""
    whole, split = step_of("tiny_dense", "mesh.data=8"), step_of("tiny_dense", "mesh.data=2", "mesh.context=4")
    assert split.tokens == whole.tokens and split.rows == 4 * whole.rows
    gather, scatter = only(split, "keys and values")
    assert gather.bytes == scatter.bytes == 2 * 16 * 128 * 4 * 32 * 4 and gather.count == scatter.count == 4
    assert gather.axes == ("context",) and only(whole, "keys and values") == []
    total = sum(m.bytes * m.count for m in only(split, "gradients"))
    assert total == pytest.approx(4 * split.count.total, rel=1e-3), "the shards of a sequence share the parameters"


def test_a_hierarchical_exchange_goes_over_each_axis():
    two = ["mesh.data=2", "mesh.expert=4", 'rules.experts=["data","expert"]']
    (flat,) = only(step_of("tiny_gshard", *two), "exchange")
    slow, fast = only(step_of("tiny_gshard", *two, "model.moe.exchange=hierarchical"), "exchange")
    assert (slow.axes, fast.axes) == (("data",), ("expert",)) and slow.bytes == fast.bytes == flat.bytes
    assert flat.devices == 8 and slow.count == fast.count == flat.count


LATENT = ["model.head_dim=64", "model.latent.query=48", "model.latent.key_value=32", "model.latent.rotary=16"]
SUMS = {  # over tensor, by what overrides
    "latents": LATENT,
    "latents, recomputed": [*LATENT, "model.remat=full", "model.moe.shared_experts=1"],
    "latents and split rows": [*LATENT, "rules.residual=['tensor']", "model.moe.shared_experts=1"],
    "latents without the queries'": [*LATENT, "model.latent.query=unset", "rules.residual=['tensor']"],
    "heads, recomputed": ["model.remat=full", "model.moe.shared_experts=1", "model.moe.dispatch=ragged"],
}


@pytest.mark.slow
@pytest.mark.parametrize("name", compilable("v5e:2x2"))
@pytest.mark.parametrize("sums", SUMS)
def test_sums_over_slices_are_those_of_the_compiler(name, sums):
    """Bytes that each kind of collective sends over tensor, but for sums of a number or two a token."""
    small = ["model.layers=2", "model.vocab=512", "model.d_model=256", "model.moe.d_ff=128", "model.moe.experts=4"]
    mesh = ["mesh.expert=2", "mesh.tensor=2", "data.batch=16"]
    cfg, cluster = config.load(str(MEDIUM), [*small, *mesh, *SUMS[sums]]), parse(name, 4)
    want, got = Counter(), Counter()
    for m in traffic(Step(cfg, cluster.platform)):
        if m.axes == ("tensor",):
            want[m.op] += m.count * m.sent
    with jax.numpy_dtype_promotion("standard"):  # AdamW of optax multiplies Python numbers with counts
        found = compiled(cfg, cluster)["collectives"]
    for r in found:
        if r["axes"] == ["tensor"]:
            got[r["op"]] += r["bytes"]
    assert got == pytest.approx(want, rel=5e-3)


def test_latents_are_made_on_every_device():
    """The narrow matrices are whole where the heads are split."""
    one, two = (step_of("tiny_dense", "model.kv_heads=unset", *LATENT, f"mesh.tensor={n}") for n in (1, 2))
    D, T, C, Q, layers = 128, one.tokens, 32 + 16, 48, 4
    narrow = 3 * 2 * T * layers * D * (Q + C)
    assert two.executed()["attn"] - narrow == (one.executed()["attn"] - narrow) / 2


def test_an_axis_of_one_device_moves_nothing():
    assert traffic(step_of("tiny_switch", "mesh.data=1", "mesh.expert=1")) == []
    assert {m.op for m in traffic(step_of("tiny_dense"))} == {"all-reduce"}


def test_data_gradients_are_all_parameters_once():
    step = step_of("tiny_dense")
    total = sum(m.bytes * m.count for m in only(step, "gradients"))
    assert total == pytest.approx(4 * step.count.total, rel=1e-3)


def test_fsdp_gathers_what_it_splits():
    """Each pass over the weights gathers all but a shard of them; gradients are scattered back."""
    step = step_of("tiny_dense", "mesh.data=1", "mesh.fsdp=8")
    gathered = sum(m.bytes * m.count for m in only(step, "weights"))
    split = step.count.total - step.count.components["norms"]
    table = step.count.components["embed"]
    assert gathered == pytest.approx(4 * (2 * (split - table) + table), rel=1e-4), "the table once a step"
    assert {m.op for m in only(step, "gradients")} == {"reduce-scatter", "all-reduce"}


@pytest.mark.parametrize("n", [2, 4, 8])
def test_a_switch_is_linear_in_latency_and_bounded_in_bandwidth(n):
    wires = Wiring(parse("h100:1x8", 8), {"expert": n})
    size = 1e9
    beta = size * (n - 1) / n / CHIPS["h100"].link
    assert wires.seconds("all-to-all", ("expert",), size) == pytest.approx(beta, rel=0.02)
    assert wires.seconds("all-to-all", ("expert",), 0.0) == pytest.approx((n - 1) * 3e-6)
    assert wires.seconds("all-reduce", ("expert",), size) == 2 * wires.seconds("all-gather", ("expert",), size)


def test_the_slow_network_decides():
    """Across hosts an all-to-all takes (n - m)/n of its bytes over the network card of each device."""
    near, far = Wiring(parse("h100:4x8", 32), {"data": 4, "expert": 8}), Wiring(parse("h100:4x8", 32), {"expert": 32})
    assert near.route(("expert",)) == ((8,), 1, 8) and far.route(("expert",)) == ((8,), 4, 32)
    assert near.route(("data",)) == ((1,), 4, 4)
    size = 1e9
    assert far.seconds("all-to-all", ("expert",), size) == pytest.approx(size * 24 / 32 / 50e9, rel=0.01)
    assert near.seconds("all-to-all", ("expert",), size) < far.seconds("all-to-all", ("expert",), size) / 5


def test_a_torus_exchanges_in_the_root_of_its_size():
    """GShard, section 4: with the bytes of a device held, a square torus takes O(sqrt D), one ring O(D)."""
    size = 1e9

    def square(side):
        return Wiring(parse(f"v5e:{side}x{side}", 0), {"expert": side * side}).seconds("all-to-all", ("expert",), size)

    assert square(16) == pytest.approx(2 * square(4), rel=0.01), (
        "4 times the side; 16 closes to rings of twice the links"
    )
    v5p = [Wiring(parse(f"v5p:{s}x{s}x{s}", 0), {"expert": s**3}) for s in (4, 8, 16)]
    each = [w.seconds("all-to-all", ("expert",), size) for w in v5p]
    assert each[1] / each[0] == pytest.approx(2, rel=0.01) and each[2] / each[1] == pytest.approx(2, rel=0.01)
    line = Wiring(parse("v5p:8x8x8", 0), {"data": 64, "expert": 8})
    assert line.seconds("all-to-all", ("expert",), size) == pytest.approx(size * 8 / (8 * CHIPS["v5p"].link), rel=0.01)


def test_mesh_axes_share_out_the_torus():
    wires = Wiring(parse("v5p:8x8x4", 0), {"data": 8, "fsdp": 4, "expert": 8})
    sides = wires.sides
    assert math.prod(sides["expert"]) == 8 and math.prod(sides["fsdp"]) == 4 and math.prod(sides["data"]) == 8
    slices = Wiring(parse("v5e:4x4*2", 0), {"data": 2, "expert": 16})
    assert slices.route(("data",)) == ((), 2, 2) and slices.route(("expert",))[1] == 1


@pytest.mark.parametrize("name,devices,shape", [("v5p", 64, (4, 4, 4)), ("v5e", 32, (4, 8)), ("h100", 64, (8, 8))])
def test_a_number_of_devices_takes_an_even_shape(name, devices, shape):
    assert shaped(name, devices) == shape
    assert parse(name, devices).devices == devices


def test_a_chip_of_tpu7x_is_two_devices():
    assert parse("tpu7x:2x2x1", 0).devices == 8
    with pytest.raises(Refused, match="hosts hold 2x2 chips"):
        parse("tpu7x", 7)


def test_decoding_touches_the_experts_that_the_batch_draws():
    """E*(1 - (1 - K/E)^n): one token touches K, many all."""
    few = estimate("mixtral_8x7b", "h100:1x1", "mesh.fsdp=1", "mesh.expert=1", "data.batch=1")
    many = estimate("mixtral_8x7b", "h100:1x1", "mesh.fsdp=1", "mesh.expert=1", "data.batch=256")
    assert decode(few.step, few.cluster).experts == pytest.approx(2)
    assert decode(many.step, many.cluster).experts == pytest.approx(8)
    c = few.step.count
    read = decode(few.step, few.cluster).weights
    assert read == 2 * (c.active - c.components["embed"]), "bfloat16, and one row of the table is nothing"


@pytest.mark.parametrize("name", ["mixtral_8x7b", "moe_175b_wide"])
def test_split_widths_are_read_whole(name):
    """Parameters split by mesh.fsdp are gathered for their products: nothing is decoded faster than with copies."""
    each = ["mesh.expert=1", 'rules.embed=["fsdp"]', "data.batch=64", "train.microbatches=1"]
    split, copied = (estimate(name, "h100:1x8", *each, *m) for m in (["mesh.fsdp=8"], ["mesh.fsdp=1", "mesh.data=8"]))
    assert decode(split.step, split.cluster) == decode(copied.step, copied.cluster)
    saved = 7 / 8 * 32 / copied.cluster.chip.hbm_speed  # seconds a parameter, of AdamW alone
    less = times(copied.step, copied.cluster).memory - times(split.step, split.cluster).memory
    assert less == pytest.approx(saved * split.step.count.total, rel=1e-3)


def test_a_roofline_of_compute_alone():
    """One device, no recomputation, capacity factor 1: model FLOPs at the peak rate but for attention's squares."""
    e = estimate(
        "mixtral_8x7b",
        "h100:1x1",
        "mesh.fsdp=1",
        "mesh.expert=1",
        "model.remat=none",
        "data.batch=8",
        "model.moe.capacity_factor=1.0",
        "model.attention_kernel=xla",
    )
    t = times(e.step, e.cluster)
    flops = e.step.flops.train * 8 * 4096
    assert t.compute == pytest.approx(flops / 989.4e12, rel=0.02) and t.exposed == t.hidden == 0
    assert 0.9 < utilisation(e.step, e.cluster, t.step) <= 1
    again = estimate(
        "mixtral_8x7b",
        "h100:1x1",
        "mesh.fsdp=1",
        "mesh.expert=1",
        "model.remat=full",
        "data.batch=8",
        "model.moe.capacity_factor=1.0",
        "model.attention_kernel=xla",
    )
    assert times(again.step, again.cluster).compute == pytest.approx(t.compute * 4 / 3, rel=0.01)


def test_a_kernel_makes_the_scores_again_in_its_gradient():
    """Nine products a pair of tokens, where plain attention has six: forward 2, back 7 or 4."""
    keys = ["mixtral_8x7b", "h100:1x1", "mesh.fsdp=1", "mesh.expert=1", "model.remat=none", "data.batch=8"]
    plain, fused = (estimate(*keys, f"model.attention_kernel={k}").step.executed() for k in ("xla", "auto"))
    assert fused.pop("scores") == pytest.approx(plain.pop("scores") * 9 / 6)
    assert fused == plain


def test_one_hot_products_cost_what_the_formula_says():
    plain = step_of("tiny_gshard", "model.moe.dispatch=gather").executed()
    onehot = step_of("tiny_gshard", "model.moe.dispatch=einsum").executed()
    S, F = 128, 128
    forward = plain["experts"] / 3 * 2 * S / (3 * F)
    assert onehot["dispatch"] == pytest.approx(2 * forward), "one product back: the mask has no gradient"
    assert {k: v for k, v in onehot.items() if k != "dispatch"} == plain


WARNED = """
model.moe.dispatch        | costs 1.33                 | tiny_switch v5e:2x4 model.moe.dispatch=einsum data.length=512
mesh.fsdp                 | exceed the 85.1 GB of a100 | moe_175b_as_described a100:4x8
model.remat               | exceed                     | mixtral_8x7b h100:8x8 model.remat=none data.batch=1024
train.microbatches        | exceed                     | mixtral_8x7b h100:8x8 data.batch=2048
data.batch                | an expert gets 160 rows    | mixtral_8x7b v5p:4x4x4 data.length=64 data.batch=64
data.batch                | weights and gradients move | mixtral_8x7b h100:8x8 mesh.fsdp=64 mesh.expert=1 data.batch=64
mesh.expert               | exchange                   | mixtral_8x7b h100:8x8 EXPERTS
model.moe.capacity_factor | 50% of the choices         | tiny_switch v5e:2x4 model.moe.capacity_factor=0.5
model.moe.capacity_factor | worst case, 4.0 times      | tiny_mixtral v5e:2x4 SORTED
model.moe.group_size      | 4.0 times the choices      | mixtral_8x7b h100:8x8 model.moe.group_size=4
model.moe.router.groups   | do not lie on 3 shards     | tiny_deepseek h100:1x6 GROUPS
model.dtype               | is float32                 | mixtral_8x7b h100:8x8 model.dtype=float32
rules.expert_mlp          | slices of 64 columns       | tiny_switch v5e:2x4 mesh.expert=2 mesh.tensor=4 mesh.data=1
"""  # the key, words of the reason, and config, cluster and overrides
LONG = {
    "EXPERTS": "model.moe.experts=32 mesh.expert=32 mesh.fsdp=2 mesh.tensor=1",
    "SORTED": "model.moe.experts=64 model.moe.dispatch=ragged",
    "GROUPS": "model.moe.experts=24 mesh.data=2 mesh.expert=3 data.batch=36",
}


@pytest.mark.parametrize("line", WARNED.strip().splitlines(), ids=lambda line: line.partition("|")[0].strip())
def test_warnings_name_the_key_to_change(line):
    key, word, call = (part.strip() for part in line.split("|"))
    found = advice.warnings(estimate(*(w for part in call.split() for w in LONG.get(part, part).split())))
    assert [p.key for p in found if word in p.reason] == [key], found
    assert all(p.reason and p.remedy for p in found)


def test_a_good_mesh_warns_of_nothing():
    assert advice.warnings(estimate("moe_64x128", "v5p:8x8x4")) == []


def test_following_a_remedy_ends_its_warning():
    before = estimate("tiny_switch", "v5e:2x4", "data.length=512", "model.moe.dispatch=einsum")
    after = estimate("tiny_switch", "v5e:2x4", "data.length=512", "model.moe.dispatch=gather")
    assert "model.moe.dispatch" in {p.key for p in advice.warnings(before)}
    assert "model.moe.dispatch" not in {p.key for p in advice.warnings(after)}


FLAT = ["mesh.fsdp=1", "mesh.data=8", "mesh.expert=8", 'rules.experts=["data","expert"]', "model.moe.experts=64"]
CROSSING = {  # overrides on 8 hosts of 8 GPUs, the traffic between hosts, the remedy
    "too many experts' shards": (
        ["model.moe.experts=32", "mesh.expert=32", "mesh.fsdp=2"],
        "the exchange",
        "lower mesh.expert to 8 or less",
    ),
    "tensor inside of expert": (
        ["mesh.fsdp=1", "mesh.expert=8", "mesh.tensor=8"],
        "the exchange",
        "lower mesh.tensor to 1",
    ),
    "experts over neighbours of the tensor axis": (
        ["mesh.fsdp=1", "mesh.expert=16", "mesh.tensor=4", "model.moe.experts=16"],
        "the exchange",
        "lower mesh.expert to 2 or less",
    ),
    "a tensor axis of more than a host": (
        ["mesh.fsdp=1", "mesh.expert=4", "mesh.tensor=16", "model.kv_heads=16"],
        "the exchange",
        "lower mesh.tensor to 2 or less",
    ),
    "two axes in one exchange": (FLAT, "the exchange", "lower mesh.data to 1"),
    "split sequences": (
        [
            "mesh.fsdp=1",
            "mesh.context=16",
            "mesh.expert=1",
            "mesh.tensor=4",
            "data.length=8192",
            "model.moe.group_size=256",
        ],
        "the keys and values",
        "lower mesh.context to 2 or less",
    ),
    "split heads": (
        ["mesh.fsdp=4", "mesh.expert=1", "mesh.tensor=16", "model.kv_heads=16"],
        "the attention sums",
        "lower mesh.tensor to 8 or less",
    ),
}


@pytest.mark.parametrize("name", CROSSING)
def test_following_a_remedy_ends_the_traffic_between_hosts(name):
    """The devices that a lowered axis sets free go to mesh.fsdp, whose traffic runs beside the computation."""
    overrides, what, remedy = CROSSING[name]
    before = estimate("mixtral_8x7b", "h100:8x8", *overrides)
    found = [p for p in advice.warnings(before) if f"{what} between hosts" in p.reason]
    assert found and {p.remedy for p in found} == {remedy}
    (axis, size) = re.fullmatch(r"lower mesh\.(\w+) to (\d+)(?: or less)?", remedy).groups()
    mesh = before.cfg.mesh
    free = getattr(mesh, axis) // int(size)
    after = [*overrides, f"mesh.{axis}={size}", f"mesh.fsdp={mesh.fsdp * free}"]
    last = {o.partition("=")[0]: o for o in after}
    again = estimate("mixtral_8x7b", "h100:8x8", *last.values())
    assert again.cfg.mesh.size == 64 and all(p.key == f"mesh.{axis}" for p in found)
    assert not [p for p in advice.warnings(again) if f"{what} between hosts" in p.reason]


def test_hosts_of_one_device_hold_no_group():
    found = advice.warnings(estimate("mixtral_8x7b", "h100:8x1", "mesh.fsdp=1"))
    assert [p.remedy for p in found if "the exchange between hosts" in p.reason] == ["lower mesh.expert to 1"]


def test_an_exchange_in_two_stages_is_meant_to_cross_hosts():
    e = estimate("mixtral_8x7b", "h100:8x8", *FLAT, "model.moe.exchange=hierarchical")
    assert any(t.far and t.move.what == "exchange" for t in times(e.step, e.cluster).moves)
    assert not [p for p in advice.warnings(e) if "between hosts" in p.reason]


def test_a_bubble_names_microbatches_that_the_batch_has():
    mesh = ["mesh.stage=2", "mesh.fsdp=4", "mesh.expert=1"]
    e = estimate("mixtral_8x7b", "h100:1x8", *mesh, "train.microbatches=2")
    (found,) = [p for p in advice.warnings(e) if p.key == "train.microbatches"]
    assert found.reason.startswith("33% of the 3 ticks")
    (enough,) = re.findall(r"raise it to (\d+)", found.remedy)
    e = estimate("mixtral_8x7b", "h100:1x8", *mesh, f"train.microbatches={enough}")
    assert e.step.schedule.bubble <= 0.1 and not [p for p in advice.warnings(e) if p.key == "train.microbatches"]
    e = estimate("mixtral_8x7b", "h100:1x8", *mesh, "train.microbatches=2", "data.batch=16")
    assert any("raise data.batch" in p.remedy for p in advice.warnings(e))


def test_every_mesh_is_tried_once():
    found = [tuple(f.values()) for f in factorisations(8)]
    assert len(found) == len(set(found)) == math.comb(3 + len(MESH_AXES) - 1, 3) and all(
        math.prod(f) == 8 for f in found
    )


def test_the_search_ranks_by_step_time_and_says_why_others_are_out():
    cfg = config.load("mixtral_8x7b")
    found = search(cfg, parse("v5p", 64))
    assert len(found) == len(list(factorisations(64, MESH_AXES[1:])))
    good = [c for c in found if not c.reason]
    assert good and good == sorted(good, key=lambda c: c.seconds) and all(c.mesh.size == 64 for c in found)
    reasons = {tuple(c.mesh.sizes.items()): c.reason for c in found if c.reason}
    assert "memory" in reasons[("data", 64),]
    assert "8 experts do not divide over 64" in reasons[("expert", 64),]
    planned = dataclasses.replace(cfg, mesh=good[0].mesh)
    assert report(Estimate(planned, parse("v5p", 64)))["step_seconds"] == good[0].seconds


def test_the_search_keeps_the_stages():
    cfg = config.load("mixtral_8x7b", ["mesh.stage=2", "mesh.fsdp=4", "train.microbatches=2"])
    found = search(cfg, parse("v5p", 64))
    assert {(c.mesh.stage, c.mesh.size) for c in found} == {(2, 64)} and not found[0].reason
    with pytest.raises(Refused, match=r"mesh.stage: is 2, and 1 devices do not split into as many stages"):
        search(cfg, parse("h100:1x1", 1))


def test_money_is_time_by_devices_by_price():
    e = estimate("mixtral_8x7b", "h100:8x8")
    out = report(e, tokens=10**12, price=3.0)
    run = out["run"]
    assert run["steps"] == pytest.approx(10**12 / (128 * 4096))
    assert run["device_hours"] == pytest.approx(run["steps"] * out["step_seconds"] * 64 / 3600)
    assert run["dollars"] == pytest.approx(3 * run["device_hours"])
    assert roofline.money(e.step, e.cluster, 1.0, 10**12, None).dollars is None


@pytest.mark.parametrize("mesh", ["mesh.data=8", "mesh.fsdp=8"])
def test_copies_of_the_state_need_no_devices(mesh):
    """16 bytes a parameter over 84.9 GB, whatever the mesh of the config holds more than once."""
    e = estimate("mixtral_8x7b", "h100:1x8", "mesh.fsdp=1", "mesh.expert=1", mesh)
    (found,) = [p for p in advice.warnings(e) if p.key == "mesh.fsdp"]
    assert "(all split, at least 9 devices)" in found.remedy
    assert math.ceil(16 * e.step.count.total / 84.94e9) == 9
