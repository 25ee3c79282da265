"""Upcycling: the function of the dense model where it is promised and not elsewhere, layers, meshes, the command."""

import dataclasses
import functools
import json
import math
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from commands import NOISE, check_refusal, listing, write_text
from pydantic import TypeAdapter

from moe_jax import cli, config, mesh
from moe_jax.checkpoint import Checkpoints
from moe_jax.config import Config, LatentConfig, MeshConfig, ModelConfig, MoEConfig, Refused, RopeConfig, RouterConfig
from moe_jax.train.state import Model, State
from moe_jax.train.upcycling import check_model
from moe_jax.upcycle import cut, upcycle

pytestmark = pytest.mark.usefixtures("inside")

TOKENS = jnp.asarray(np.random.default_rng(3).integers(0, 17, (3, 11)), jnp.int32)


def sized(kind: str = "swiglu", layers: int = 2, **moe) -> ModelConfig:
    """A small model whose dense width is 24; `moe` are the keys of its experts, `router` among them a table."""
    router = RouterConfig(**moe.pop("router", {}))
    experts = MoEConfig(**{"experts": 8, "top_k": 2} | moe, router=router)
    return ModelConfig(
        vocab=17, layers=layers, d_model=8, d_ff=24, heads=2, max_length=16, ffn=kind, norm="layer", moe=experts
    )


def without(m: ModelConfig) -> ModelConfig:
    return dataclasses.replace(m, moe=None)


@functools.cache
def numbers(dense: ModelConfig):
    """Parameters of the dense model, every layer and every norm different, large enough that nothing is near zero."""
    rng = np.random.default_rng(0)
    return jax.tree.map(
        lambda s: rng.normal(0.0, 0.5, s.shape).astype(np.float32), Model.of(Config(model=dense)).shapes
    )


def upcycled(m: ModelConfig, method, **options):
    """`upcycle` as one program, of the numbers above."""
    return jax.jit(lambda params: upcycle(params, m, method, **options))(numbers(without(m)))


@functools.cache
def logits(m: ModelConfig, method=None, **options):
    """[3, 11, V] in evaluation on one device, no choice dropped; of the dense model, or upcycled by `method`."""
    model = Model.of(Config(model=m))

    def run(params):
        weights = (params,) if method is None else upcycle(params, m, method, **options)
        return model.module(*weights)(TOKENS, capacity_factor=None).logits

    with jax.set_mesh(mesh.build_mesh(MeshConfig())):
        return np.asarray(jax.jit(run)(numbers(without(m))))


def difference(m: ModelConfig, method, **options) -> float:
    """Of the upcycled model from the dense one, the largest over the largest logit."""
    want = logits(without(m))
    return float(np.abs(logits(m, method, **options) - want).max() / np.abs(want).max())


# The function


ALTERNATE = {"window": 3, "full_every": 2}  # two layers in a period, dense or not
SPLIT = {"d_ff": 6, "top_k": 4, "experts": 12}  # G=4 slices, R=3 groups
V3 = {"kind": "deepseek_v3", "scale": 2.5}
LIMITED = {"groups": 3, "topk_groups": 1}
NORMAL = {"normalize": "before"}
TOPK = {"kind": "topk_softmax"}

# id: method, feed-forward layer, keys of the experts
PRESERVED = {
    "copy, top-2": ("copy", "swiglu", {"router": TOPK}),
    "copy, gshard": ("copy", "relu", {"router": {"kind": "gshard", "second": "random"}}),
    "copy, normalised after dropping": ("copy", "gelu", {"router": {"normalize": "after"}, "capacity_factor": 1.0}),
    "copy, hash top-1": ("copy", "swiglu", {"top_k": 1, "router": {"kind": "hash"}}),
    "copy, scaled gates": ("copy", "swiglu", {"top_k": 3, "router": V3, "bias_rate": 1e-3}),
    "split, G=2 top-2": ("split", "swiglu", {"d_ff": 12, "router": TOPK}),
    "split, G=2 top-4": ("split", "relu", {"d_ff": 12, "top_k": 4, "router": TOPK}),
    "split, G=2 gshard": ("split", "gelu", {"d_ff": 12, "router": {"kind": "gshard"}}),
    "split, G=4 swiglu": ("split", "swiglu", SPLIT | {"router": TOPK}),
    "split, G=4 relu": ("split", "relu", SPLIT | {"router": NORMAL}),
    "split, G=4 gelu": ("split", "gelu", SPLIT | {"router": TOPK}),
    "split, G=4 clamped": ("split", "clamped_swiglu", SPLIT | {"router": TOPK}),
    "split, G=4 top-8 of 12": ("split", "swiglu", SPLIT | {"top_k": 8, "router": {"normalize": "after"}}),
    "split, G=4 of all": ("split", "swiglu", SPLIT | {"experts": 4, "router": TOPK}),
    "split, noisy": ("split", "swiglu", SPLIT | {"router": {"kind": "noisy_topk"}}),
    "split, hash": ("split", "swiglu", SPLIT | {"router": {"kind": "hash"}}),
    "split, MLP gate": ("split", "swiglu", SPLIT | {"router": TOPK | {"gate": "mlp"}}),
    "split, group-limited": ("split", "swiglu", SPLIT | {"router": V3 | LIMITED, "bias_rate": 1e-3}),
    "split, shared": ("split", "swiglu", SPLIT | {"shared_experts": 2, "router": V3}),
    "split, shared of three": ("split", "gelu", SPLIT | {"d_ff": 8, "shared_experts": 1, "router": NORMAL}),
    "split, scale G": ("split", "swiglu", SPLIT | {"router": TOPK | {"scale": 4.0}}),
}


@pytest.mark.parametrize("case", PRESERVED)
def test_the_function_is_preserved(case):
    method, kind, moe = PRESERVED[case]
    m = sized(kind, **moe)
    assert cut(m, method).preserved
    assert difference(m, method) < 1e-5


def test_windows_that_alternate_are_preserved():
    m = dataclasses.replace(sized(layers=4, router=TOPK), **ALTERNATE)
    assert without(m).runs == [(("dense", "dense"), 2)]
    assert difference(m, "copy") < 1e-5


BIASED = ("copy, top-2", "copy, scaled gates", "split, G=4 relu", "split, G=4 gelu", "split, shared", "split, scale G")


@pytest.mark.parametrize("case", BIASED)
def test_biases_are_preserved_too(case):
    """Each slice has its part of the hidden layer's, and an equal one of the output's."""
    method, kind, moe = PRESERVED[case]
    assert difference(dataclasses.replace(sized(kind, **moe), biases=True), method) < 1e-5


# id: method, keys of the experts, options: not promised, and rightly so
CHANGED = {
    "copy, switch": ("copy", {"top_k": 1, "router": {"kind": "switch"}}, {}),
    "copy, unnormalised": ("copy", {"router": {}}, {}),
    "copy, experts choose": (
        "copy",
        {"top_k": 1, "capacity_factor": 1.0, "router": {"kind": "expert_choice", "lookahead": True}},
        {},
    ),
    "split, unnormalised": ("split", SPLIT, {}),
    "split, sigmoids": ("split", SPLIT | {"router": {"kind": "deepseek_v3", "normalize": "none"}}, {}),
    "split, forced": ("split", SPLIT | {"router": TOPK | {"force": "biased"}}, {}),
    "copy, noise": ("copy", {"router": TOPK}, {"noise": 0.5}),
}


@pytest.mark.parametrize("case", CHANGED)
def test_the_function_is_promised_nowhere_else(case):
    method, moe, options = CHANGED[case]
    m = sized(**moe)
    assert not cut(m, method).preserved or options
    assert difference(m, method, **options) > 1e-3


def test_gates_of_no_fixed_sum_are_scaled_for_a_uniform_router():
    """He et al.: a = R G^2 / K for a softmax over all experts; copies stay copies, bit for bit."""
    assert cut(sized(**SPLIT), "split").factor == pytest.approx(3 * 4**2 / 4)
    assert cut(sized(**SPLIT, router={"kind": "deepseek_v3", "normalize": "none"}), "split").factor == 4 / (4 / 2)
    assert cut(sized(**SPLIT, router=TOPK), "split").factor == 4
    m = sized(router={})
    assert cut(m, "copy").factor == 1
    new = block(upcycled(m, "copy").params, m, 1)["ffn"]["experts"]
    for name, w in block(numbers(without(m)), without(m), 1)["ffn"].items():
        np.testing.assert_array_equal(new[name], np.broadcast_to(w, (8, *w.shape)))


def test_noise_tells_copies_apart_and_router_columns_repeat():
    m = sized(**SPLIT, router=TOPK)
    quiet, noisy = (upcycled(m, "split", noise=s, seed=4).params for s in (0.0, 0.1))
    other = upcycled(m, "split", seed=5).params
    for layer in range(m.layers):
        a, b, c = (block(p, m, layer)["ffn"] for p in (quiet, noisy, other))
        groups = a["router"].reshape(8, 3, 4)
        assert (groups == groups[..., :1]).all() and len(np.unique(groups[0])) == 3
        assert (a["router"] == b["router"]).all() and (a["router"] != c["router"]).all()
        for name, w in a["experts"].items():
            same = w.reshape(3, 4, *w.shape[1:])
            assert (same == same[:1]).all() and (same[:, 0] != same[:, 1]).all()
            fan, scale = (24, 2) if name == "w_down" else (8, 2 if name == "w_up" else 1)
            drawn = (b["experts"][name] - w) / (0.1 / math.sqrt(fan) * scale)
            assert abs(drawn.std() - 1) < 0.1 and (drawn[0] != drawn[4]).all()
    first, second = (
        block(noisy, m, i)["ffn"]["experts"]["w_up"] - block(quiet, m, i)["ffn"]["experts"]["w_up"] for i in (0, 1)
    )
    assert (first != second).all(), "each layer draws its own noise"


# Layers


def block(params, m: ModelConfig, layer: int):
    """The parameters of one layer, found by walking through the runs."""
    places = [(i, j, r) for i, (kinds, repeats) in enumerate(m.runs) for r in range(repeats) for j in range(len(kinds))]
    i, j, r = places[layer]
    return jax.tree.map(lambda a: np.asarray(a[r]), params["stacks"][str(i)]["blocks"][str(j)])


@pytest.mark.parametrize(
    "layers, every, first, more",
    [
        (6, 2, 0, {}),
        (5, 2, 1, {}),
        (5, 1, 1, {}),
        (7, 3, 1, {}),
        (11, 2, 1, {"stack_above": 11}),
        (5, 1, 1, ALTERNATE),
        (7, 2, 0, {"window": 3, "full_every": 3}),
    ],
    ids=str,
)
def test_every_layer_keeps_its_place(layers, every, first, more):
    """Also where windows alternate and so a period of the dense model's layers is many."""
    m = dataclasses.replace(sized(layers=layers, every=every, first_dense=first, d_ff=12, router=TOPK), **more)
    dense = numbers(without(m))
    params, bias = jax.tree.map(np.asarray, upcycled(m, "split"))
    assert jax.tree.map(np.shape, params) == jax.tree.map(lambda s: s.shape, Model.of(Config(model=m)).shapes)
    assert bias == {}
    for name in ("embedding", "final_norm"):
        assert jax.tree.all(jax.tree.map(lambda a, b: (a == b).all(), params[name], dense[name]))
    for layer, kind in enumerate(m.layer_kinds):
        new, old = block(params, m, layer), block(dense, without(m), layer)
        ffn, was = new.pop("ffn"), old.pop("ffn")
        assert jax.tree.all(jax.tree.map(np.array_equal, new, old)), layer
        if kind == "dense":
            assert jax.tree.all(jax.tree.map(np.array_equal, ffn, was)), layer
        else:
            for e, g in ((0, 0), (3, 1), (6, 0)):
                rows = slice(12 * g, 12 * g + 12)
                np.testing.assert_array_equal(ffn["experts"]["w_gate"][e], was["w_gate"][:, rows])
                np.testing.assert_allclose(ffn["experts"]["w_down"][e], was["w_down"][rows] * math.sqrt(2), rtol=1e-6)
    assert difference(m, "split") < 1e-5


def test_parameters_of_another_model_are_refused():
    m = sized(router=TOPK)
    with pytest.raises(Refused, match=r"params: 3 leaves .*\(2, 24, 8\) instead of \(2, 48, 8\)"):
        upcycle(numbers(without(m)), dataclasses.replace(m, d_ff=48), "copy")
    with pytest.raises(Refused, match="method: is 'splt'"):
        cut(m, "splt")


# The command


TINY = [
    "tiny_dense",
    "train.steps=2",
    "train.eval_batches=1",
    "train.log_every=1",
    "train.sample=unset",
    "train.tensorboard=false",
    "train.optimizer.warmup=2",
    "model.layers=3",
    "model.d_model=16",
    "model.d_ff=32",
    "model.heads=2",
    "model.max_length=32",
    "data.length=16",
    "data.batch=8",
    "mesh.data=1",
]
MOE = ["model.moe.experts=8", "model.moe.top_k=2", "model.moe.d_ff=16", "model.moe.first_dense=1"]
MOE += ["model.moe.router.kind=topk_softmax", "model.moe.balance_loss=0.01"]


def run(*argv) -> None:
    assert cli.main([str(a) for a in (*argv, "--quiet")]) == 0


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    """A dense run of two steps, and the text it read."""
    folder = tmp_path_factory.mktemp("dense")
    text = f"data.path={write_text(folder)}"
    run("train", *TINY, text, "--workdir", folder / "run")
    return folder / "run", text


@pytest.fixture(scope="module")
def made(dense, tmp_path_factory):
    """What upcycling wrote."""
    folder = tmp_path_factory.mktemp("made") / "run"
    run("upcycle", dense[0], *TINY, *MOE, dense[1], "--workdir", folder, "--method", "split")
    return folder


NOISY = ["model.moe.router.kind=deepseek_v3", "model.moe.bias_rate=0.001", "model.moe.balance_loss="]
NOISY += ["--noise", 0.1, "--seed", 3, "--method", "split", "--json"]


@pytest.fixture(scope="module")
def alone(dense, tmp_path_factory):
    """What upcycling with noise and biases writes on one device."""
    folder = tmp_path_factory.mktemp("alone") / "run"
    run("upcycle", dense[0], *TINY, *MOE, dense[1], *NOISY, "--workdir", folder)
    return folder


def state(workdir) -> State:
    """The newest checkpoint on one device."""
    checkpoints = Checkpoints(workdir / "checkpoints")
    cfg = config.from_dict(checkpoints.info()["config"])
    cfg = dataclasses.replace(cfg, mesh=MeshConfig())
    return checkpoints.restore(Model.of(cfg).targets(mesh.build_mesh(cfg.mesh)))[0]


JSON = {
    "step": int,
    "dense_step": int,
    "method": str,
    "slices": int,
    "copies": int,
    "factor": float,
    "preserved": bool,
    "params_total_before": int,
    "params_total": int,
    "params_active": int,
    "eval_loss_before": float,
    "eval_loss": float,
    "workdir": str,
}


def test_upcycle_and_train_on(dense, tmp_path, call):
    """The same held-out loss before and after; training goes on from step 0, with an evaluation first."""
    folder, text = dense
    new = ["--workdir", tmp_path / "a", "--json"]
    code, report, err = call("upcycle", folder, *TINY, *MOE, text, *new, "--method", "split")
    assert code == 0 and not NOISE.search(err), err
    assert {k: type(report[k]) for k in JSON} == JSON
    assert report["preserved"] and "function is preserved" in err
    assert (report["step"], report["dense_step"], report["slices"], report["copies"]) == (0, 2, 2, 4)
    assert report["eval_loss"] == pytest.approx(report["eval_loss_before"], rel=1e-5)
    assert report["params_total"] - report["params_total_before"] == 2 * (3 * 16 * 16 * 8 - 3 * 16 * 32 + 16 * 8)
    assert all((np.asarray(x) == 0).all() for x in jax.tree.leaves(state(tmp_path / "a").opt_state))
    assert Checkpoints(tmp_path / "a" / "checkpoints").info()["upcycled"]["workdir"] == str(folder)

    code, trained, err = call("train", *TINY, *MOE, text, *new)
    assert code == 0 and "goes on from the checkpoint at step 0" in err, err
    assert trained["first_eval_loss"] == pytest.approx(report["eval_loss"], rel=1e-6)
    assert trained["step"] == 2 and trained["dropped"] == 0 and trained["routed"] == 2 * 2 * 8 * 16
    lines = [json.loads(line) for line in (tmp_path / "a" / "metrics.jsonl").read_text().splitlines()]
    assert [(r["step"], "loss" in r) for r in lines] == [(0, False), (1, True), (2, True), (2, False)]
    assert lines[1]["learning_rate"] == pytest.approx(lines[2]["learning_rate"] / 2), "the schedule begins anew"
    assert Checkpoints(tmp_path / "a" / "checkpoints").steps() == [0, 2]


def test_a_run_that_was_cut_begins_again_at_step_0(dense, made, tmp_path):
    """And so does its log, if there was no checkpoint yet."""
    shutil.copytree(made, tmp_path / "a")
    log = tmp_path / "a" / "metrics.jsonl"
    log.write_text('{"step": 0, "eval_loss": 1.0}\n{"step": 1, "loss": 1.0}\n')
    run("train", *TINY, *MOE, dense[1], "--workdir", tmp_path / "a")
    assert [json.loads(line)["step"] for line in log.read_text().splitlines()] == [0, 1, 2, 2]


@pytest.mark.parametrize("axes", [["mesh.data=2", "mesh.expert=4"], ["mesh.fsdp=2", "mesh.expert=2", "mesh.tensor=2"]])
def test_the_same_on_every_mesh(dense, alone, tmp_path, call, axes):
    """Every bit of the train state, router and noise among it."""
    code, report, err = call("upcycle", dense[0], *TINY, *MOE, dense[1], *NOISY, *axes, "--workdir", tmp_path / "a")
    assert code == 0, err
    assert not report["preserved"] and "not preserved: noise was added" in err
    assert report["eval_loss"] != pytest.approx(report["eval_loss_before"], rel=1e-5)
    a, b = state(alone), state(tmp_path / "a")
    assert jax.tree.leaves(a.bias) and jax.tree.all(jax.tree.map(np.array_equal, a, b))


# id: arguments after the config, and what the message must say
REFUSED = {
    "dense config": (["model.moe=unset"], "model.moe", "dense"),
    "another model": (["model.d_ff=64", "model.norm=layer"], "model.d_ff", "is 64", "has 32", "model.norm"),
    "more heads": (["model.kv_heads=1"], "model.kv_heads", "has 2"),
    "another tokenizer": (["data.tokenizer=tokenizer.json"], "data.tokenizer", "'bytes'"),
    "misspelt key": (["model.moe.exprts=2"], "model.moe.exprts", "'experts'"),
    "wide copies": (["--method", "copy"], "model.moe.d_ff", "16", "32", "split"),
    "copies and shared": (
        ["--method", "copy", "model.moe.d_ff=32", "model.moe.shared_experts=1"],
        "model.moe.shared_experts",
        "split",
    ),
    "indivisible width": (["model.moe.d_ff=12"], "model.moe.d_ff", "12", "model.d_ff=32"),
    "wider experts": (["model.moe.d_ff=64"], "model.moe.d_ff", "64", "model.d_ff=32"),
    "indivisible experts": (["model.moe.experts=5"], "model.moe.experts", "5 experts", "2 slices"),
    "indivisible choices": (["model.moe.top_k=3"], "model.moe.top_k", "3 choices", "2 slices"),
    "all shared": (["model.moe.shared_experts=2"], "model.moe.shared_experts", "2 slices"),
    "gated slices": (["model.moe.shared_experts=1", "model.moe.shared_gate=true"], "model.moe.shared_gate", "in full"),
    "wide slices": (["model.moe.shared_experts=1", "model.moe.shared_d_ff=20"], "model.moe.shared_d_ff", "20", "16"),
    "unequal gates": (["model.moe.router.kind=sparsemixer"], "model.moe.router.kind", "gates differ"),
    "parted groups": (
        [
            "model.moe.d_ff=8",
            "model.moe.top_k=4",
            "model.moe.router.kind=deepseek_v2",
            "model.moe.router.groups=4",
            "model.moe.router.topk_groups=2",
        ],
        "model.moe.router.groups",
        "2 experts",
        "4 slices",
    ),
    "experts choose slices": (
        ["model.moe.router.kind=expert_choice", "model.moe.router.lookahead=true"]
        + ["model.moe.capacity_factor=1", "model.moe.balance_loss=0"],
        "model.moe.router.kind",
        "copy",
    ),
    "negative noise": (["--noise", "-1"], "--noise", "0 or more"),
    "infinite noise": (["--noise", "inf"], "--noise", "finite"),
    "negative seed": (["--seed", "-1"], "--seed", "4294967295"),
    "foreign workdir": (["--workdir", "foreign"], "--workdir", "foreign", "model.bin"),
    "used workdir": (["--workdir", "run"], "--workdir", "holds a run already"),
    "mesh": (["mesh.expert=3"], "mesh.expert", "8 experts"),
    "no such text": (["data.path=missing.txt"], "data.path", "missing.txt"),
    "no run": (["DENSE", "missing"], "DENSE_DIR", "missing does not exist"),
    "foreign run": (["DENSE", "foreign"], "DENSE_DIR", "moe_jax.json"),
    "damaged run": (["DENSE", "damaged"], "damaged", "checkpoints"),
    "run of experts": (["DENSE", "moe"], "DENSE_DIR", "8 experts"),
}


YARN = RopeConfig("yarn", factor=4.0, original_length=32, truncate=False)


@pytest.mark.parametrize(
    "was, now",
    [
        ({"rope": YARN}, {"rope": dataclasses.replace(YARN, factor=8.0, truncate=True, mscale=1.0)}),
        ({"rope": YARN}, {}),
        ({}, {"rope": YARN}),
        ({"rope": RopeConfig()}, {}),
        ({"latent": LatentConfig()}, {}),
        ({"latent": LatentConfig(query=8)}, {"latent": LatentConfig(rotary=2)}),
        ({"tied_head": False, "attention_scale": 0.3, "qk_norm": "all"}, {}),
    ],
    ids=str,
)
def test_what_differs_from_the_dense_model_can_be_typed(was, now):
    """The remedies, taken for overrides, give the dense model."""
    dense, m = ModelConfig(**was), ModelConfig(**now)
    with pytest.raises(Refused) as e:
        check_model(dense, m)
    tree = config.to_dict(Config(model=m))
    for problem in e.value.problems:
        remedy = problem.remedy.removeprefix("set ").replace("it to ", f"{problem.key}=")
        for text in remedy.split():
            tree = config.override(tree, text)
    assert TypeAdapter(Config).validate_json(json.dumps(tree)).model == dense
    check_model(dense, dense)


@pytest.fixture(scope="module")
def place(dense, made, tmp_path_factory):
    """Folders of every wrong kind beside a good dense run."""
    root = tmp_path_factory.mktemp("place")
    (root / "foreign").mkdir()
    (root / "foreign" / "model.bin").write_text("someone's weights")
    words = {"type": "WordLevel", "vocab": {"</s>": 0, "a": 1}, "unk_token": "a"}
    (root / "tokenizer.json").write_text(json.dumps({"version": "1.0", "model": words}))
    for name, source in {"run": dense[0], "damaged": dense[0], "moe": made}.items():
        shutil.copytree(source, root / name)
    arrays = max(
        (p for p in (root / "damaged" / "checkpoints").rglob("*") if p.is_file()), key=lambda p: p.stat().st_size
    )
    arrays.write_bytes(bytes(len(arrays.read_bytes())))
    return root


@pytest.mark.parametrize("case", REFUSED)
def test_upcycle_refuses(dense, place, monkeypatch, call, case):
    monkeypatch.chdir(place)
    more, *needles = REFUSED[case]
    source, more = (more[1], []) if more[0] == "DENSE" else ("run", more)
    argv = ["upcycle", source, *TINY, *MOE, dense[1], "--method", "split", "--workdir", "new", *more]
    before = listing(place)
    check_refusal(*call(*argv), "upcycle", *needles)
    assert listing(place) == before, "something was written or lost"
