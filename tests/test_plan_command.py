"""`moe-jax plan`: what it prints and refuses, the description that contradicts itself, and no JAX on the way."""

import json
import subprocess
import sys

import pytest
from commands import ENV, ROOT, check_refusal

from moe_jax import cli
from moe_jax.plan.roofline import Timed, Times
from moe_jax.plan.traffic import Move

KEYS = {"params", "flops_per_token", "memory_per_device", "all_to_all_bytes", "warnings", "contradictions", "traffic"}
TIMED = {"step_seconds", "mfu_ceiling", "dominant", "run", "decode", "hbm_bytes", "fits"}


@pytest.fixture(autouse=True)
def as_it_is(monkeypatch):
    monkeypatch.setattr(cli, "keep_memory", lambda: None)


def test_the_json_object(call):
    code, report, err = call("plan", "tiny_switch", "--json", "--quiet")
    assert code == 0 and err == "" and report.keys() >= KEYS and not report.keys() & {"step_seconds", "run"}
    assert {"total", "active", "components"} <= report["params"].keys()
    assert sum(report["params"]["components"].values()) == report["params"]["total"] == 2_075_776
    kinds = report["memory_per_device"]
    assert kinds["peak"] == sum(n for name, n in kinds.items() if name != "peak")
    assert isinstance(report["flops_per_token"], int) and isinstance(report["all_to_all_bytes"], int)
    code, report, _ = call("plan", "tiny_switch", "--topology", "v5e:2x4", "--json")
    assert code == 0 and report.keys() >= KEYS | TIMED and report["fits"] is True
    assert 0 < report["mfu_ceiling"] < 1 and report["step_seconds"] > 0


@pytest.mark.parametrize(
    "argv", [["mixtral_8x7b", "--topology", "h100:8x8"], ["moe_175b_as_described"], ["tiny_dense"]]
)
def test_people_read_the_important_line_first(call, argv):
    code, out, err = call("plan", *argv)
    assert code == 0 and err == ""
    lines = out.splitlines()
    assert lines[0].startswith(f"{argv[0]}, mesh ")
    assert "peak" in lines[1] and ("fit" in lines[1].lower() or "--topology" in lines[1])
    assert max(map(len, lines)) <= 100
    assert ("the whole card, of which" in out) == ("h100" in lines[0] or "a100" in lines[0])


def test_what_dominates_is_the_longest():
    """Also of what goes on side by side: faster products would not shorten a step that waits for weights."""
    timed = Timed(Move("exchange", "all-to-all", ("expert",), 8, 1, 1, False), 0.5, False)
    assert Times(1.0, 0.8, 0.5, 0.9, (timed,)).dominant == "compute"
    assert Times(1.0, 1.2, 0.5, 0.9, (timed,)).dominant == "HBM"
    assert Times(1.0, 0.8, 0.5, 1.3, (timed,)).dominant == "traffic of weights and gradients"
    assert Times(0.2, 0.1, 0.5, 0.3, (timed,)).dominant == "exchange"


def test_a_key_without_a_value_is_told_of(call):
    """Such as `train.steps=$STEPS` without the variable."""
    code, _, err = call("plan", "tiny_dense", "train.steps=")
    assert code == 0 and err.startswith("train.steps: no value given, so at the default of the key")
    assert "\n    remedy: write train.steps=VALUE, or leave it out\n" in err


def test_the_description_contradicts_itself(call):
    """Five contradictions, each with the figures of both sides, and two configs in its place."""
    _, report, _ = call("plan", "moe_175b_as_described", "--json")
    found = {p["key"]: p["reason"] for p in report["contradictions"]}
    assert list(found) == ["parameters", "weights", "placement", "optimizer", "cost"]
    for key, figures in {
        "parameters": ("9,935,005,913,088", "9.94T", "194.0B", "175.0B", "22.0B"),
        "weights": ("19.87 TB", "2.72 TB"),
        "placement": ("32 expert shards", "4 stages leave 8", "16 experts"),
        "optimizer": ("87.5 GB", "40 GB", "7.3 bytes"),
        "cost": ("$4.6M", "2.3M hours", "8.2 years", "555B tokens"),
    }.items():
        assert all(f in found[key] for f in figures), found[key]
    assert all(p["remedy"] for p in report["contradictions"]) and report["fits"] is False
    large = ["mesh.data=128", "mesh.expert=32", "data.batch=65536", "--topology", "h100:512x8"]
    _, elsewhere, _ = call("plan", "moe_175b_as_described", *large, "--json")
    assert elsewhere["contradictions"] == report["contradictions"], "held against its own cluster, whatever is asked"
    totals = {c["config"]: (c["params_total"], c["params_active"]) for c in report["repaired"]}
    assert totals == {
        "moe_175b_wide": (174_640_828_416, 22_437_924_864),
        "moe_175b_deep": (175_078_966_784, 22_347_580_928),
    }


PLACES = {
    "a stage without a device": (
        ["claims.stages=64"],
        ["32 expert shards, 2048 devices in 64 stages", "leave 0 of the 32 devices"],
        "one stage, or 2048 devices",
    ),
    "more experts a device than there are": (
        ["claims.experts_per_device=1000", "claims.stages=64"],
        ["1 expert shard, 64 devices in 64 stages"],
        "one stage, or 64 devices",
    ),
    "experts that do not divide": (
        ["claims.experts_per_device=5"],
        ["26 expert shards, 104 devices in 4 stages", "leave 8 of the 32 devices a stage, so 16 experts a device"],
        "one stage, or 104 devices, or 16 experts a device",
    ),
    "no single stage": (["claims.experts_per_device=1"], ["128 expert shards"], "512 devices, or 16 experts a device"),
}


@pytest.mark.parametrize("name", PLACES)
def test_experts_and_stages_that_do_not_go_together(call, name):
    overrides, figures, remedy = PLACES[name]
    code, report, _ = call("plan", "moe_175b_as_described", *overrides, "--json")
    (found,) = [p for p in report["contradictions"] if p["key"] == "placement"]
    assert code == 0 and all(f in found["reason"] for f in figures), found["reason"]
    assert found["remedy"] == remedy


def test_experts_are_not_all_that_is_active(call):
    """120B of which 8 x 10B are experts: 40B are shared, and a token uses those and two experts, 60B in all."""
    _, report, _ = call("plan", "moe_120b_as_described", "--json")
    p = report["params"]
    assert p["total"] == pytest.approx(120e9, rel=1e-3) and p["active"] == pytest.approx(60e9, rel=1e-3)
    assert p["components"]["experts"] / 8 == pytest.approx(10e9, rel=1e-3)
    (found,) = report["contradictions"]
    assert all(figure in found["reason"] for figure in ("60.0B", "40.0B", "20.0B"))


@pytest.mark.parametrize("mesh", [[], ["mesh.expert=1", "mesh.data=32"]], ids=["split", "copied"])
@pytest.mark.parametrize("name", ["moe_175b_wide", "moe_175b_deep"])
def test_what_is_repaired_claims_nothing_and_needs_a_larger_cluster(call, name, mesh):
    """The same cluster whatever the mesh of the config copies: its devices may be split otherwise."""
    _, report, _ = call("plan", name, *mesh, "--topology", "a100:4x8", "--json")
    assert report["contradictions"] == [] and report["fits"] is False
    small = report["smallest_cluster"]
    assert small["devices"] == 64 and small["peak_bytes"] < report["hbm_bytes"]
    _, again, _ = call("plan", name, "--topology", small["topology"], "--json")
    assert again["fits"] is True and again["mesh"] == small["mesh"]


def test_search(call):
    code, report, _ = call("plan", "mixtral_8x7b", "--devices", "64", "--topology", "v5p", "--json")
    times = [c["step_seconds"] for c in report["search"]["meshes"]]
    assert code == 0 and times == sorted(times) and report["step_seconds"] == times[0]
    assert report["topology"] == "v5p:4x4x4" and report["devices"] == 64
    assert all(c["reason"] for c in report["search"]["refused"])
    code, out, _ = call("plan", "mixtral_8x7b", "--devices", "64", "--topology", "v5p")
    assert "meshes fit; the fastest" in out


def test_no_cluster_is_large_enough(call):
    """The state alone needs 1,868 devices, and the search ends at 1,024."""
    _, report, _ = call("plan", "moe_175b_as_described", "--json")
    assert report["no_mesh_up_to"] == 1024 and "smallest_cluster" not in report
    _, out, _ = call("plan", "moe_175b_as_described")
    assert "no mesh of up to 1,024 devices fits" in out


def test_another_mesh_of_the_same_cluster_may_fit(call):
    _, report, _ = call("plan", "mixtral_8x7b", "mesh.fsdp=1", "mesh.data=8", "--topology", "h100:8x8", "--json")
    assert report["fits"] is False and report["smallest_cluster"]["topology"] == "h100:8x8"


REFUSED = [
    (["tiny_switch", "--topology", "v5q:2x2"], ("v5q", "v5p")),
    (["tiny_switch", "--topology", "h100:2x2x2"], ("hosts x GPUs",)),
    (["tiny_switch", "--devices", "8"], ("--topology",)),
    (["tiny_switch", "--devices", "0", "--topology", "h100"], ("more than 0",)),
    (["tiny_switch", "--devices", "16", "--topology", "v5e:2x4"], ("16 devices", "has 8")),
    (["tiny_switch", "--tokens", "-1"], ("--tokens",)),
    (["tiny_switch", "--topology", "v5e:4x4", "mesh.expert=4"], ("mesh of 8", "16 devices")),
    (["tiny_switch", "mesh.expert=3"], ("8 experts do not divide",)),
    (["tiny_mixtral", "mesh.data=1", "mesh.expert=1", "mesh.tensor=8"], ("does not divide over tensor=8",)),
    (["tiny_gshard", 'rules.mlp=["tensors"]'], ("rules.mlp", "unknown mesh axis 'tensors'")),
    (["tiny_gshard", 'rules.experts=["tensor"]', "mesh.tensor=2"], ("rules.experts", "not among the token axes")),
    (["tiny_gshard", 'rules.act_mlp=["data"]'], ("act_mlp", "mesh axis 'data' holds two dimensions")),
    (
        ["tiny_gshard", 'rules.act_exchange=["tensor"]', "rules.expert_mlp=[]", "mesh.tensor=2"],
        ("rules.act_exchange", "['tensor'] are not among the axes []"),
    ),
    (
        ["moe_175b_as_described", "--topology", "h100:32x8"],
        ("stops 84 of 495 meshes of h100:32x8, for example tensor=256", "rules.vocab=[]", "divisor of 512"),
    ),
    (["tiny_swich"], ("tiny_switch",)),
]


@pytest.mark.parametrize("argv,needles", REFUSED, ids=lambda x: " ".join(x) if isinstance(x, list) else "")
def test_refusals(call, argv, needles):
    check_refusal(*call("plan", *argv), "plan", *needles)


def test_the_plan_needs_no_jax():
    """Neither the formulas nor the search start JAX: the answer comes before it would be imported."""
    code = (
        "import sys; from moe_jax import cli; cli.keep_memory = lambda: None\n"
        "cli.main(['plan', 'mixtral_8x7b', '--devices', '64', '--topology', 'v5p', '--json'])\n"
        "assert not {'jax', 'flax', 'numpy'} & sys.modules.keys(), sorted(sys.modules)"
    )
    child = subprocess.run([sys.executable, "-c", code], capture_output=True, env=ENV, cwd=ROOT, text=True)
    assert child.returncode == 0, child.stderr
    assert json.loads(child.stdout)["params"]["total"] == 46_702_792_704


@pytest.mark.slow
def test_compile_on_fake_devices():
    """The compiler's all-to-alls are those of the plan."""
    small = [
        "tiny_gshard",
        "model.d_model=32",
        "model.d_ff=32",
        "model.moe.d_ff=32",
        "data.length=32",
        "model.layers=2",
    ]
    command = [sys.executable, "-m", "moe_jax", "plan", *small, "train.sample=unset", "--compile", "--json"]
    child = subprocess.run(command, capture_output=True, env=ENV, cwd=ROOT, text=True)
    assert child.returncode == 0, child.stderr
    report = json.loads(child.stdout.splitlines()[-1])
    found = [c for c in report["compiled"]["collectives"] if c["op"] == "all-to-all"]
    assert sum(c["count"] for c in found) == report["all_to_all"]["count"] == 4
    assert sum(c["bytes"] for c in found) == pytest.approx(report["all_to_all"]["bytes_per_step"], rel=0.01)
    assert report["compiled"]["peak_bytes"] > 0
