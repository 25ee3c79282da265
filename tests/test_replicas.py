"""Redundant experts at load time: a placed model says what the model says, devices share the work, and refusals."""

import json
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from commands import TINY, check_refusal, write_text
from flax import nnx

from moe_jax import config
from moe_jax import mesh as meshes
from moe_jax.axes import Rules
from moe_jax.config import MoEConfig, Refused
from moe_jax.generate import Generator, Sampling
from moe_jax.layers.moe import Experts, MoELayer, Replicas
from moe_jax.model import moe_layers
from moe_jax.placement import place
from moe_jax.replicas import Applied, Loads, Placed, Wish, exchanged, lines, read_loads, report
from moe_jax.routing import Routing, in_slots
from moe_jax.train.optimizer import names_of
from moe_jax.train.state import Model, Weights

GREEDY = Sampling(temperature=0.0)
SIZES = [x for x in TINY[5:-4] if x != "model.layers=2"]
BASE = [*SIZES, "model.vocab=40", "model.remat=none", "mesh.data=1", "mesh.expert=1", "model.moe.d_ff=12"]
MODELS = {
    "gshard": ["tiny_gshard", "model.layers=4"],
    "shared": ["tiny_deepseek", "model.layers=3", "model.latent.query=8", "model.latent.key_value=8"],
    "biases": ["tiny_mixtral", "model.layers=2", "model.biases=true", "model.ffn=clamped_swiglu"],
    "encoder": ["tiny_t5", "model.encoder.layers=2", "model.layers=2", "model.moe.d_ff=unset"],
}
MODELS["shared"] += ["model.latent.rotary=4"]
MODELS["biases"] += ["model.moe.router.bias=true"]
PROMPTS = [np.array(p) for p in ([3, 1, 4], [1, 5, 9, 2, 6], [3, 1, 4], [7])]


def opened(name, *overrides):
    """A model with random weights, biases too, which are those of any mesh."""
    first, *more = MODELS[name]
    cfg = config.load(first, [*BASE, *more, *overrides])
    model, mesh = Model.of(cfg), meshes.build_mesh(cfg.mesh, jax.devices()[: cfg.mesh.size])
    weights = model.create(mesh).weights

    def drawn(path, x):
        if "b_" not in names_of(path)[-1] and "router_bias" not in names_of(path):
            return x
        with jax.set_mesh(mesh):
            return x + jax.device_put(np.random.default_rng(x.size).normal(size=x.shape).astype(x.dtype), x.sharding)

    return model, mesh, Weights(jax.tree_util.tree_map_with_path(drawn, weights.params), weights.bias)


def skewed(layers, E, seed=0):
    """Loads that give some experts several replicas."""
    return np.random.default_rng(seed).zipf(1.3, (layers, E)) % 1000 + 1.0


def forward(model, mesh, weights, shape=(16, 12)):
    """Logits, routes and statistics of a call."""
    tokens = np.random.default_rng(1).integers(0, 40, shape)
    with jax.set_mesh(mesh):
        run = jax.jit(lambda w, t: model.module(*w)(t, capacity_factor=None, record=True)._replace(cache=None))
        return run(weights, jnp.asarray(tokens, jnp.int32))


CELLS = [
    ("gshard", 11, ()),
    ("gshard", 12, ("mesh.expert=4", "mesh.tensor=2")),
    ("shared", 16, ("mesh.expert=4", "mesh.context=2")),
    ("biases", 20, ("mesh.expert=4", "mesh.tensor=2", "model.moe.dispatch=einsum")),
]


@pytest.mark.parametrize("name,slots,where", CELLS, ids=str)
def test_a_placed_model_says_the_same(name, slots, where):
    """Routes are bit-equal, every slot holds its expert, texts are those without a placement."""
    model, mesh, weights = opened(name, *where)
    want = Generator(model, mesh, 40, 40, GREEDY)(weights, PROMPTS, 10)
    assert want.rows is None
    plain = forward(model, mesh, weights)
    before = jax.tree.map(np.asarray, weights.params)
    layers, E = plain.stats.load.shape
    p = place(skewed(layers, E), slots, model.cfg.mesh.over(("expert",)))
    assert p.count.max() > 1
    placed = Placed.of_model(model, p)
    moved = placed.take(weights, mesh)

    got = forward(placed, mesh, moved)
    np.testing.assert_array_equal(got.record.expert, plain.record.expert)
    np.testing.assert_allclose(got.logits, plain.logits, atol=2e-5)
    by_expert = np.stack([np.bincount(e, r, E) for e, r in zip(p.physical_to_logical, got.stats.rows, strict=True)])
    np.testing.assert_array_equal(by_expert, plain.stats.load)

    rows = dict(moe_layers(model.cfg.model))
    for path, x in jax.tree_util.tree_leaves_with_path(moved.params):
        names, old = names_of(path), before
        for key in names:
            old = old[key]
        if "experts" in names:
            sources = p.physical_to_logical[rows[".".join(names[:-2])]]
            old = np.stack([layer[s] for layer, s in zip(old, sources, strict=True)])
        np.testing.assert_array_equal(x, old, ".".join(names))
        assert x.sharding.is_fully_replicated == ("experts" not in names or not where) or model.cfg.mesh.tensor > 1

    text = Generator(placed, mesh, 40, 40, GREEDY)(moved, PROMPTS, 10)
    assert text.tokens == want.tokens
    times = max(1, placed.cfg.mesh.over(placed.cfg.rules.batch) // len(PROMPTS))  # to fill the shards
    assert (text.rows.sum(1) == 2 * times * (sum(map(len, PROMPTS)) + 9 * len(PROMPTS))).all(), "no text has ended"


def test_an_encoder_is_placed_too():
    """Its layers come first, run in the first call alone, and are counted once."""
    model, mesh, weights = opened("encoder", "mesh.expert=2")
    want = Generator(model, mesh, 40, 40, GREEDY)(weights, PROMPTS, 6)
    p = place(skewed(2, 8), 10, 2)
    placed = Placed.of_model(model, p)
    text = Generator(placed, mesh, 40, 40, GREEDY)(placed.take(weights, mesh), PROMPTS, 6)
    assert text.tokens == want.tokens
    # Top-1: all of a prompt but its last token; that one and, as no text ends, five of the six new ones
    assert text.rows.sum(1).tolist() == [sum(len(x) - 1 for x in PROMPTS), 6 * len(PROMPTS)]


@pytest.mark.parametrize(
    "shape,rules",
    [
        ({"expert": 4, "tensor": 2}, Rules()),
        ({"stage": 2, "expert": 4}, Rules()),
        ({"fsdp": 2, "expert": 2, "data": 2}, Rules(experts=("data", "expert"))),
        ({"expert": 8}, Rules()),
        ({"tensor": 2}, Rules()),
    ],
    ids=str,
)
def test_experts_are_exchanged(shape, rules):
    """Any slots on any mesh, against NumPy's own index; no expert need be anywhere."""
    cfg = config.MeshConfig(**shape)
    mesh, rng = meshes.build_mesh(cfg, jax.devices()[: cfg.size]), np.random.default_rng(0)
    w = rng.normal(size=(2, 16, 4, 6)).astype(np.float32)
    axes = ("layers", "experts", "expert_embed", "expert_mlp")
    layout = jax.NamedSharding(mesh, jax.sharding.PartitionSpec(*(rules.layout(*axes))))
    for sources in (rng.integers(0, 16, (2, 24)), np.zeros((2, 16), int), np.tile(np.arange(16)[::-1], (2, 2))):
        out = exchanged(jax.device_put(w, layout), sources, axes, rules, mesh)
        np.testing.assert_array_equal(out, np.take_along_axis(w, sources[:, :, None, None], 1))
        assert out.sharding.is_equivalent_to(layout, 4)


def test_a_config_for_prompts_of_any_length_keeps_the_placement():
    cfg = config.load("tiny_gshard", [*BASE, "mesh.expert=2", "model.attention_kernel=fused"])
    placed = Placed.of_model(Model.of(cfg), place(skewed(2, 8), 10, 2))
    model = Generator(placed, meshes.build_mesh(cfg.mesh, jax.devices()[:2]), 40, 40).model
    assert model.cfg.model.attention_kernel == "auto" and isinstance(model, Placed)
    assert model.placement is placed.placement and model.shapes == placed.shapes


def test_replicas_take_turns():
    """Tokens of a row, and rows of a decoding step, in turn; an expert with one slot keeps it; K slots differ."""
    E, S = 4, 12
    expert = np.stack([np.zeros(S, int), 1 + np.arange(S) % 3], -1)[None]  # [1,S,2], 0 is everyone's first choice
    blank = np.zeros((1, S, E), np.float32)
    routing = Routing(*map(jnp.asarray, (expert, np.ones((1, S, 2)), np.ones((1, S, 2), bool), blank, blank)))
    table = jnp.array([[5, 0, 3], [1, -1, -1], [2, 6, -1], [4, -1, -1]])
    out = in_slots(routing, table, jnp.arange(S)[None] + 7, 7)
    slot = np.asarray(out.expert)[0]
    assert np.bincount(slot[:, 0], minlength=7).tolist() == [4, 0, 0, 4, 0, 4, 0]
    assert [set(slot[expert[0, :, 1] == e, 1]) for e in (1, 2, 3)] == [{1}, {2, 6}, {4}]
    assert (slot[:, 0] != slot[:, 1]).all() and out.prob.shape == (1, S, 7)


@pytest.mark.parametrize("shared", [0, 1])
def test_a_layer_gives_each_place_its_turn(shared):
    """One token at a time, as one text is decoded, with shared experts beside the others or without."""
    layer = MoELayer(MoEConfig(experts=2, top_k=1, d_ff=4, shared_experts=shared), 4, rngs=nnx.Rngs(params=0))
    layer.experts = Experts(replace(layer.moe, experts=6), "swiglu", 4, 4, None, nnx.Rngs(params=0))
    layer.replicas = nnx.data(Replicas(jnp.array([[0, 2, 4], [1, 3, 5]])))
    x, used = jnp.ones((1, 1, 4)), []
    for at in range(6):
        stats = layer(x, places=jnp.array([[at]]), capacity_factor=None)[1]
        used.append(int(stats.rows.argmax()))
    assert len(set(used)) == 3 and used[:3] == used[3:], "three replicas, one after the other"


def test_devices_share_what_a_skewed_router_sends():
    """A planted bias sends first choices to experts 0 and 1, which lie on one device of four."""
    model, mesh, weights = opened("biases", "mesh.expert=4")

    def planted(path, x):
        with jax.set_mesh(mesh):
            return x.at[:, :2].set(jnp.array([30.0, 29.0], x.dtype)[None]) if "router_bias" in names_of(path) else x

    weights = Weights(jax.tree_util.tree_map_with_path(planted, weights.params), weights.bias)
    load = np.asarray(forward(model, mesh, weights).stats.load, float)
    assert (load[:, :2].sum(1) == load.sum(1)).all(), "the test needs all choices on one device"
    wish = Wish(16)
    p = wish.place(load, model.cfg)
    placed = Placed.of_model(model, p)
    prompts = [np.arange(8) + i for i in range(8)]
    want = Generator(model, mesh, 40, 40, GREEDY)(weights, prompts, 8)
    moved = placed.take(weights, mesh)
    text = Generator(placed, mesh, 40, 40, GREEDY)(moved, prompts, 8)
    assert text.tokens == want.tokens
    step = forward(placed, mesh, moved, (8, 1)).stats.rows
    assert step.sum() == 2 * 2 * 8 and step.max() == 2, "in one step 8 rows take turns at 5 replicas"
    told = report(Applied(wish, Loads(load, "a call"), p), text.rows)
    assert told["before"] == told["measured_before"] == pytest.approx(1 / 4)
    assert told["after"] == pytest.approx(5 / 6) and told["measured_after"] > 0.75  # ten such slots: 3, 3, 2 and 2
    assert told["rows"] == text.rows.sum() and len(told["layers"]) == 2 and "repeated" not in lines(told)[-1]
    for layer, row in zip(told["layers"], text.rows, strict=True):
        devices = row.reshape(4, 4).sum(1)
        assert layer["measured_after"] == pytest.approx(devices.mean() / devices.max())
        hot = row[np.flatnonzero(row)]
        assert len(hot) == sum(layer["replicas"][:2]) == 10, "every replica of the two experts is used"
        assert hot.max() - hot.min() <= 0.25 * hot.mean()
    assert "0.250 -> " in lines(told)[-1] and "8 experts in 16 slots on 4 devices, placed by a call" in lines(told)[0]


def test_the_policy_follows_nodes_and_groups():
    """On two nodes a group of the router's stays within one; on one node experts go anywhere."""
    cfg = config.load("tiny_deepseek", ["mesh.data=1", "mesh.expert=4"])
    load = skewed(3, 8)
    for row in Wish(16, 2).place(load, cfg).physical_to_logical:
        first, second = (set(part // 2) for part in np.split(row, 2))  # 4 groups of 2
        assert len(first) == len(second) == 2 and not first & second
    assert (Wish(16).place(load, cfg).physical_to_logical == place(load, 16, 4).physical_to_logical).all()


@pytest.mark.parametrize(
    "name,slots,nodes,words",
    [
        ("tiny_dense", 8, 1, "--slots: tiny_dense is a dense model"),
        ("tiny_gshard", 7, 1, "--slots: is 7, and 4 devices hold each of 8 experts once to 4 times.*from 8 to 32"),
        ("tiny_gshard", 33, 1, "--slots: is 33, and"),
        ("tiny_gshard", 10, 1, r"--slots: 10 slots do not divide over 4 devices \(mesh.expert\).*give 8 or 12"),
        ("tiny_gshard", 12, 3, r"--nodes: 4 devices \(mesh.expert\) do not divide over 3 nodes"),
        ("tiny_gshard", 12, 0, "--nodes: .*over 0 nodes"),
        ("tiny_gshard", 12, 2, r"--nodes: 1 groups of experts \(model.moe.router.groups\) do not divide over 2 nodes"),
    ],
)
def test_what_cannot_be_placed_is_refused(name, slots, nodes, words):
    with pytest.raises(Refused, match=f"(?s){words}"):
        Wish(slots, nodes).check(config.load(name))


def test_one_device_is_refused():
    with pytest.raises(Refused, match=r"all 8 experts lie on one device(?s:.*)with mesh\.expert"):
        Wish(8).check(config.load("tiny_gshard", ["mesh.data=2", "mesh.expert=1"]))


GOOD = [[1, 2, 3, 4, 5, 6, 7, 8]] * 2
BAD = {
    "no JSON": ("loss 1.2", "does not end with a JSON object"),
    "deep": ("[" * 100_000, "does not end with a JSON object"),
    "bytes": (b"\xff\xfe", "does not end with a JSON object"),
    "empty": ("", "does not end with a JSON object"),
    "no load": ('{"eval_loss": 1.0}', "has no `load`"),
    "one list": ('{"load": [1, 2]}', "has no `load`, a list of"),
    "layers": ({"load": GOOD[:1]}, "has 1 layers of 8 experts, and the model has 2 MoE layers of 8"),
    "experts": ({"load": [row[:4] for row in GOOD]}, "has 2 layers of 4 experts"),
    "ragged": ({"load": [GOOD[0], [1]]}, "has 2 layers of 1 or 8 experts"),
    "negative": ({"load": [GOOD[0], [-1, *GOOD[0][1:]]]}, "has -1 among the loads"),
    "nan": ({"load": [GOOD[0], [float("nan"), *GOOD[0][1:]]]}, "has nan among the loads"),
    "infinite": ({"load": [GOOD[0], [float("inf"), *GOOD[0][1:]]]}, "has inf among the loads"),
    "text": ({"load": [GOOD[0], ["1", *GOOD[0][1:]]]}, "has '1' among the loads"),
    "truth": ({"load": [GOOD[0], [True, *GOOD[0][1:]]]}, "has True among the loads"),
    "nothing": ({"load": [GOOD[0], [0] * 8]}, "has no choice in MoE layer 1"),
    "another model": ({"load": GOOD, "config": "tiny_mixtral"}, "has the loads of 'tiny_mixtral'"),
}


@pytest.mark.parametrize("name", BAD)
def test_loads_that_are_refused(name, tmp_path):
    content, words = BAD[name]
    content = json.dumps(content) if isinstance(content, dict) else content
    (tmp_path / "loads.json").write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(Refused) as e:
        read_loads(tmp_path / "loads.json", config.load("tiny_gshard"))
    assert words in str(e.value) and "moe-jax eval DIR --json > FILE" in str(e.value)


def test_a_file_of_loads(tmp_path):
    """Logs may stand before the object; where it was counted is told."""
    path = tmp_path / "loads.json"
    path.write_text(
        "a line\n" + json.dumps({"load": GOOD, "config": "tiny_gshard", "step": 7, "text": "a.txt"}) + "\n\n"
    )
    loads = read_loads(path, config.load("tiny_gshard"))
    assert loads.counts.tolist() == GOOD and loads.source == f"{path}, text a.txt, step 7"
    path.write_text(json.dumps({"load": GOOD, "text": "\x1b[2J"}, indent=1))  # as jq prints it
    loads = read_loads(path, config.load("tiny_gshard"))
    assert loads.counts.tolist() == GOOD and loads.source == f"{path}, text \\x1b[2J"
    for missing in (tmp_path, tmp_path / "none"):
        with pytest.raises(Refused, match=r"is not a file|does not exist"):
            read_loads(missing, config.load("tiny_gshard"))


@pytest.mark.usefixtures("inside")
def test_from_the_command_line(tmp_path, call):
    """Loads counted by generate and by eval, texts those of the model itself, and nothing is said without --slots."""
    more = ["model.layers=4", "model.moe.d_ff=16", "train.steps=2", "train.checkpoint_every=unset"]
    where = ["mesh.data=1", "mesh.expert=4", "train.eval_batches=1000"]  # all held-out text
    text, run = f"data.path={write_text(tmp_path)}", tmp_path / "run"
    code, _, err = call("train", "tiny_gshard", *TINY[1:], *more, *where, text, "--workdir", run, "--quiet")
    assert code == 0, err
    asked = ["generate", run, "--prompt", "abc de", "--tokens", 8, "--temperature", 0, "--json"]
    code, plain, err = call(*asked)
    assert code == 0 and "placement" not in plain and "mean over maximum" not in err
    code, counted, err = call("eval", run, "--json")
    file = tmp_path / "loads.json"
    file.write_text(json.dumps(counted))
    assert code == 0 and np.array(counted["load"]).shape == (2, 8)
    assert [sum(row) for row in counted["load"]] == [2 * counted["tokens"]] * 2 and counted["config"] == "tiny_gshard"
    code, placed, err = call(*asked, "--slots", 12)
    assert code == 0 and placed["text"] == plain["text"], err
    told = placed["placement"]
    assert told["slots"] == 12 and told["devices"] == 4 and told["nodes"] == 1
    assert 0 < told["before"] < told["after"] <= 1 and 0 < told["measured_after"] <= 1
    assert f"{counted['tokens']:,} tokens of held-out text" in told["loads"]
    assert f"mean over maximum load of the devices: {told['before']:.3f} -> {told['after']:.3f}" in err
    assert told["repeated_prompts"] == 3 and "with those of 3 repeated prompts that fill the devices" in err
    code, same, err = call(*asked, "--slots", 12, "--loads", file)
    names = ("before", "after", "measured_before", "measured_after", "rows", "layers")
    assert code == 0 and [same["placement"][x] for x in names] == [told[x] for x in names], err
    assert str(file) in same["placement"]["loads"]

    check_refusal(*call(*asked, "--loads", file, "--nodes", 1), "generate", "--loads: belongs to --slots", "--nodes: ")
    check_refusal(*call(*asked, "--slots", 12, "--loads", tmp_path / "no"), "generate", "--loads: ", "does not exist")
    check_refusal(*call(*asked, "--slots", 12, "mesh.expert=1"), "generate", "--slots: all 8 experts lie on one device")
