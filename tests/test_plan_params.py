"""The plan's parameters, FLOPs and optimizer state against the real model, and against published counts."""

import json
from math import prod
from pathlib import Path

import jax
import pytest

from moe_jax import config
from moe_jax.axes import MESH_AXES
from moe_jax.plan.leaves import count, leaves
from moe_jax.plan.memory import optimizer_elements
from moe_jax.plan.search import misfits
from moe_jax.plan.work import Step
from moe_jax.rules import RulesError
from moe_jax.train.state import Model

GOLDEN = json.loads((Path(__file__).parent / "golden" / "models.json").read_text())
SMALL = [
    "model.layers=5",
    "model.d_model=24",
    "model.heads=3",
    "model.d_ff=40",
    "model.vocab=61",
    "model.max_length=32",
]
SMALL += ["train.sample=unset", "data.length=16", "model.head_dim=8", "model.kv_heads=1"]
SETTINGS = [
    ["tiny_dense", "model.tied_head=false", "model.norm=layer"],
    ["tiny_dense", "model.positions=learned", "model.ffn=gelu", "model.final_norm=false", "mesh.data=1"],
    ["tiny_dense", "model.positions=sinusoidal", "model.ffn=relu", "model.norm_order=post"],
    ["tiny_switch", "model.moe.every=2", "model.moe.experts=12"],
    ["tiny_switch", "model.moe.every=3", "model.moe.first_dense=1", "model.moe.router.gate=mlp"],
    ["tiny_switch", "model.moe.router.gate=mlp", "model.moe.router.gate_width=7", "model.moe.d_ff=12"],
    ["tiny_switch", "model.moe.router.kind=hash", "model.moe.z_loss=0", "model.moe.balance_loss=0"],
    ["tiny_mixtral", "model.moe.router.kind=noisy_topk", "model.ffn=gelu"],
    ["tiny_mixtral", "model.moe.shared_experts=3", "model.moe.first_dense=2", "model.moe.d_ff=unset"],
    ["tiny_deepseek", "model.kv_heads=unset", "model.moe.every=2", "model.ffn=relu"],
    ["tiny_gshard", "model.scan=false", "model.moe.every=1"],
    ["tiny_deepseek", "model.kv_heads=unset", "model.stack_above=12", "model.moe.every=2"],
    ["tiny_gshard", "model.biases=true", "model.ffn=swiglu", "model.moe.shared_experts=1"],
    ["tiny_mixtral", "model.biases=true", "model.qk_norm=true", "model.ffn=gelu"],
    ["tiny_deepseek", "model.kv_heads=unset", "model.latent.key_value=12", "model.latent.rotary=4"],
    ["tiny_t5", "model.encoder.layers=3", "model.encoder.vocab=7", "model.biases=true", "model.qk_norm=true"],
    ["tiny_t5", "model.moe.router.kind=softmax_topk", "model.stack_above=12"],
    ["tiny_dense", "model.positions=relative", "model.norm=layer", "model.distance_buckets=6"],
    ["tiny_t5", "model.moe.every=", "model.moe.layers=[1, 4]", "model.encoder.moe_layers=[0]"],
    ["tiny_dense", "model.biases=qkv"],
    ["tiny_dense", "model.qk_norm=all", "model.kv_heads=3"],
    ["tiny_gshard", "model.biases=attention", "model.moe.shared_experts=1"],
    ["tiny_dense", "model.sinks=true", "model.window=4", "model.full_every=2"],
    ["tiny_dense", "model.kv_heads=unset", "model.latent.query=6", "model.latent.value=10", "model.positions=rotary"],
]


def held_to_the_model(cfg):
    """Name by name, shape by shape, axis by axis."""
    model = Model.of(cfg)
    real = {name: (shape, axes) for name, shape, axes in model.leaves()}
    planned = leaves(cfg.model)
    assert {x.name: (x.shape, x.axes) for x in planned} == real and len(planned) == len(real)
    counted = count(cfg.model)
    assert counted[:2] == model.count()
    assert sum(counted.components.values()) == counted.total
    assert sum(counted.active_components.values()) == counted.active
    assert counted.bias == sum(x.size for x in jax.tree.leaves(model.bias_shapes))


@pytest.mark.parametrize("name", config.config_names())
def test_every_config_counts_like_its_model(name):
    held_to_the_model(config.load(name))


@pytest.mark.parametrize("settings", SETTINGS, ids=lambda s: " ".join(s))
def test_every_setting_counts_like_its_model(settings):
    name, *overrides = settings
    held_to_the_model(config.load(name, [*SMALL, *overrides]))


@pytest.mark.parametrize("name", GOLDEN["models"])
def test_published_counts_to_the_unit(name):
    want = GOLDEN["models"][name]
    cfg = config.load(want["config"], want["overrides"])
    counted = count(cfg.model)
    assert counted.total == want["total"] and counted.active == want["active"]
    assert counted.components == want["components"]
    if "seq_len" in want:
        assert cfg.data.length == want["seq_len"]
        assert Step(cfg, "tpu").flops.train == want["train_flops_per_token"]


def test_switch_c():
    """ "1571B" (Fedus et al. 2022, table 9): 30 layers of 2048 experts, and attention, routers, embedding and norms."""
    counted = count(config.load("switch_c").model)
    D, F, layers, E = 2080, 6144, 30, 2048
    experts, rest = layers * E * 2 * D * F, 32128 * D + 45 * 4 * D * 2048 + layers * D * E + (2 * 15 + 3 * 15 + 2) * D
    assert counted.total == experts + rest + 2 * 32 * 32 and round(counted.total / 1e9) == 1571
    assert counted.active == counted.total - layers * (E - 1) * 2 * D * F


def test_flops_of_an_encoder_with_its_decoder():
    """A token of each, layer by layer; the encoder and the reading of it see every pair, the decoder half."""
    step = Step(config.load("switch_base_8"), "tpu")
    D, F, N, V, L, E = 768, 3072, 12 * 64, 32128, 512, 8
    feed_forward = 12 * 2 * (2 * D * F) * 2 + 12 * 2 * D * E  # 24 layers, 12 of them with routers and one expert of E
    own, reading = 24 * 4 * 2 * D * N, 12 * 4 * 2 * D * N
    scores = 12 * (2 * 2 * L * N) + 12 * (2 * 2 * L * N) // 2 + 12 * (2 * 2 * L * N)  # encoder, decoder, between
    head = 2 * D * V
    assert step.flops.infer == feed_forward + own + reading + scores + head
    assert step.flops.train == 3 * step.flops.infer
    assert [stack.moe_layers for stack in step.stacks] == [6, 6]
    decoder = feed_forward // 2 + own // 2 + reading // 2 + head  # it makes no keys of the input again
    assert step.flops.decode == decoder + 2 * 12 * (2 * 2 * L * N)


def test_mixtral_8x22b():
    """281,241,268,224 bytes of bfloat16 in the 59 published safetensors files; active by the two of eight experts."""
    counted = count(config.load("mixtral_8x22b").model)
    experts = 56 * 3 * 6144 * 16384
    assert counted.total == 281_241_268_224 // 2 == 140_620_634_112
    assert counted.active == counted.total - 6 * experts


@pytest.mark.parametrize("kind", ["adamw", "adafactor", "muon"])
@pytest.mark.parametrize("name", ["tiny_gshard", "moe_175b_wide"])
def test_optimizer_state_is_that_of_the_real_one(name, kind):
    """Elements of each device, from the shapes and shardings that training uses."""
    sizes = ["mesh.data=1", "mesh.fsdp=2", "mesh.expert=2", "mesh.tensor=2", "rules.vocab=[]"]
    cfg = config.load(name, [f"train.optimizer.kind={kind}", *sizes])
    step = Step(cfg, "cpu")
    mesh = jax.make_mesh(cfg.mesh.shape, MESH_AXES, axis_types=(jax.sharding.AxisType.Auto,) * len(MESH_AXES))
    state = jax.tree_util.tree_leaves_with_path(Model.of(cfg).targets(mesh).opt_state)
    arrays = [x for path, x in state if x.ndim and "ns_coeffs" not in jax.tree_util.keystr(path)]
    real = sum(prod(x.sharding.shard_shape(x.shape)) for x in arrays)
    assert sum(optimizer_elements(kind, leaf, step) for leaf in step.leaves) == real


UNFIT = {
    "of size 257 does not divide": ["model.vocab=257", "rules.vocab=[]"],
    "act_heads of size 3 does not divide": [
        "model.heads=3",
        "model.kv_heads=3",
        "model.head_dim=4",
        "rules.heads=[]",
        "rules.kv_heads=[]",
    ],
    "act_embed of size 15 does not divide": ['rules.act_embed=["tensor"]', "model.d_model=15", "model.head_dim=4"],
    "unknown mesh axis 'tensors'": ['rules.mlp=["tensors"]'],
    "holds two dimensions": ['rules.act_mlp=["data"]'],
    "are not among the token axes": ['rules.experts=["tensor"]'],
}


@pytest.mark.parametrize("reason", UNFIT)
def test_the_plan_refuses_what_a_run_refuses(reason):
    """The same conflicts of rules and mesh, before any model is made."""
    cfg = config.load("tiny_gshard", ["mesh.data=1", "mesh.tensor=2", "train.sample=unset", *UNFIT[reason]])
    with pytest.raises(RulesError) as e:
        Model.of(cfg).validate()
    planned = {p.reason for p in misfits(cfg)}
    assert planned == {p.reason for p in e.value.problems} and any(reason in r for r in planned)
