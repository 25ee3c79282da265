"""Experts and routers as published families have them: against NumPy in float64, and the families' own modules.

The NumPy oracle loops over tokens and experts. Its gradients are central differences along one random direction of
signs for each parameter: a wrong element anywhere shows in that number.
"""

import dataclasses
import functools
import importlib
import re
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from flax import nnx
from jax.sharding import NamedSharding
from theirs import require

from moe_jax import config
from moe_jax import mesh as meshes
from moe_jax.axes import Rules
from moe_jax.capacity import capacity
from moe_jax.config import ConfigError, MeshConfig, MoEConfig, RouterConfig
from moe_jax.layers.ffn import FFN
from moe_jax.layers.moe import MoELayer
from moe_jax.model import Transformer
from moe_jax.plan.leaves import count, leaves
from moe_jax.plan.memory import memory
from moe_jax.plan.work import Step
from moe_jax.routing import draw, recorded, route
from moe_jax.rules import spec
from moe_jax.train.state import Model

B, L, D, F, E = 4, 8, 12, 10, 8
MASK = np.arange(L)[None] < np.array([L, 5, L, 7])[:, None]
MESHES = {"one": MeshConfig(), "expert=2,tensor=2": MeshConfig(expert=2, tensor=2)}
WAYS = ("einsum", "gather", "ragged")


class Variant(NamedTuple):
    """A layer: its MoE config, and the kind of its networks."""

    moe: MoEConfig
    ffn: str = "swiglu"
    biases: bool = False


def sized(top_k: int, router: RouterConfig, **more: Any) -> MoEConfig:
    return MoEConfig(E, top_k, d_ff=F, router=router, min_capacity=1, **more)


QWEN: dict[str, Any] = {"shared_experts": 1, "shared_d_ff": 14, "shared_gate": True}
VARIANTS = {
    "qwen2_moe": Variant(sized(2, RouterConfig("softmax_topk"), **QWEN)),
    "gpt_oss": Variant(sized(2, RouterConfig("topk_softmax", bias=True)), "clamped_swiglu", biases=True),
    "granitemoe": Variant(sized(3, RouterConfig("topk_softmax"))),
    "deepseek_v2": Variant(sized(3, RouterConfig("deepseek_v2", scale=16.0), shared_experts=2)),
    "phimoe": Variant(sized(2, RouterConfig("sparsemixer", margin=0.6))),
    "all": Variant(
        sized(2, RouterConfig("topk_softmax", bias=True), capacity_factor=1.0, **QWEN), "clamped_swiglu", biases=True
    ),
}
CASES = [  # variant, mesh, dispatch
    ("qwen2_moe", "one", "gather"),
    *(("gpt_oss", "one", d) for d in WAYS),
    ("granitemoe", "one", "einsum"),
    ("phimoe", "one", "ragged"),
    ("phimoe", "expert=2,tensor=2", "gather"),
    ("deepseek_v2", "one", "gather"),
    *(("all", "expert=2,tensor=2", d) for d in WAYS),
]


# The layer


def split_layer(name: str, dispatch: str, rules: Rules | None) -> tuple[Any, Any]:
    """The layer's graph and the shapes of its parameters, with their axes."""
    v = VARIANTS[name]
    moe = dataclasses.replace(v.moe, dispatch=dispatch)
    return nnx.split(
        nnx.eval_shape(lambda: MoELayer(moe, D, ffn=v.ffn, biases=v.biases, rules=rules, rngs=nnx.Rngs(params=0)))
    )


@functools.cache
def given(name: str) -> tuple[dict, np.ndarray, np.ndarray]:
    """Weights of a variant, tokens [B, L, D] and cotangents of the output, in float64 exactly float32 numbers."""
    rng = np.random.default_rng(0)

    def fill(path: Any, leaf: Any) -> np.ndarray:
        last = path[-1].key
        size = 1.0 if last.startswith("b_") or last == "router_bias" else 2.0 / np.sqrt(leaf.shape[-2])
        size *= 2 if VARIANTS[name].ffn == "clamped_swiglu" else 1  # some numbers are above its bounds
        return np.float64(np.float32(size * rng.normal(size=leaf.shape)))

    weights = jax.tree_util.tree_map_with_path(fill, nnx.to_pure_dict(split_layer(name, "einsum", None)[1]))
    x, probe = (np.float64(np.float32(rng.normal(size=(B, L, D)))) for _ in range(2))
    return weights, x, probe


def single(tree: Any, dtype: Any = np.float32) -> Any:
    return jax.tree.map(lambda a: jnp.asarray(a, dtype), tree)


@functools.cache
def run(name: str, where: str, dispatch: str) -> tuple[Any, Any, Any]:
    """(output, statistics, record) of a layer, and the gradients of (output * cotangents).sum() in weights and x."""
    weights, x, probe = given(name)
    mesh = meshes.build_mesh(MESHES[where], jax.devices()[: MESHES[where].size])
    with jax.set_mesh(mesh):
        graph, state = split_layer(name, dispatch, Rules())
        axes = jax.tree.map(lambda v: v.get_metadata("axes"), state, is_leaf=lambda v: isinstance(v, nnx.Variable))
        layouts = nnx.to_pure_dict(axes)
        weights = jax.tree.map(
            lambda w, a: jax.device_put(w, NamedSharding(mesh, spec(Rules().layout(*a)))), single(weights), layouts
        )

        train = VARIANTS[name].moe.router.kind != "sparsemixer"  # which would draw its experts

        def loss(weights: Any, x: jax.Array) -> Any:
            y, stats, record = nnx.merge(graph, weights)(x, mask=jnp.asarray(MASK), train=train, record=True)
            return (y * single(probe)).sum(), (y, stats, record)

        (_, out), grads = jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))(weights, single(x))
    return *jax.tree.map(np.asarray, out[:1]), out[1:], jax.tree.map(np.float64, grads)


# The oracle


def sigmoid(h):
    return 1 / (1 + np.exp(-h))


ACTS = {
    "swiglu": lambda gate, up: gate * sigmoid(gate) * up,
    "geglu": lambda gate, up: 0.5 * gate * (1 + np.tanh(np.sqrt(2 / np.pi) * (gate + 0.044715 * gate**3))) * up,
    "clamped_swiglu": lambda gate, up: (
        np.minimum(gate, 7) * sigmoid(1.702 * np.minimum(gate, 7)) * (np.clip(up, -7, 7) + 1)
    ),
}


def network(x, w, ffn):
    """x [T, D] through one network; biases of none are 0."""
    gate, up = (x @ w[f"w_{name}"] + w.get(f"b_{name}", 0.0) for name in ("gate", "up"))
    return ACTS[ffn](gate, up) @ w["w_down"] + w.get("b_down", 0.0)


def one_by_one(logits, expert, margin):
    """Gates [T, 2]: of each expert by the softmax over the logits near the best that is left (GRIN, sparsemixer)."""
    out = np.zeros(expert.shape)
    for t, (row, pair) in enumerate(zip(logits, expert, strict=True)):
        left = dict(enumerate(row))
        for k, e in enumerate(pair):
            top = max(left.values())
            near = [s for s in left.values() if (top - s) / max(abs(s), top) <= margin]
            out[t, k] = np.exp(left[e] - top) / np.exp(np.array(near) - top).sum() if left[e] in near else 0.0
            del left[e]
    return out


def gates(logits, expert, moe):
    """Gates [T, K] of the experts that were chosen."""
    if moe.router.kind == "sparsemixer":
        return one_by_one(logits, expert, moe.router.margin)
    prob = np.exp(logits - logits.max(-1, keepdims=True))
    prob = prob / prob.sum(-1, keepdims=True)
    gate = np.take_along_axis(prob, expert, -1)
    if moe.router.kind == "topk_softmax":
        gate = gate / gate.sum(-1, keepdims=True)
    return gate * moe.router.scale


def logits_of(x, w):
    return x.reshape(-1, D) @ w["router"] + w.get("router_bias", 0.0)


def choices(name, x):
    """(expert, kept) [T, K] of the variant: the K largest logits, and a slot each as far as there are any."""
    moe = VARIANTS[name].moe
    logits, K = logits_of(x, given(name)[0]), moe.top_k
    expert = np.stack([oracle.best(row, K) for row in logits])
    asked = np.repeat(MASK.reshape(-1, 1), K, 1)
    slots = capacity(moe, L, moe.capacity_factor)
    rows = zip(np.split(expert, B), np.split(asked, B), strict=True)
    return expert, np.concatenate([oracle.queue(e, a, None, slots, "choice")[1] for e, a in rows])


def expected(name, w, x, expert, kept):
    """y [B, L, D]: every token through its experts one by one, and the shared ones."""
    v, flat = VARIANTS[name], x.reshape(-1, D)
    gate, y = gates(logits_of(x, w), expert, v.moe) * kept, np.zeros_like(flat)
    for e in range(E):
        out = network(flat, {n: p[e] for n, p in w["experts"].items()}, v.ffn)
        y += (gate * (expert == e)).sum(-1, keepdims=True) * out
    if v.moe.shared_experts:
        gate = sigmoid(flat @ w["shared_gate"]) if v.moe.shared_gate else 1.0
        y += MASK.reshape(-1, 1) * gate * network(flat, w["shared"], v.ffn)
    return y.reshape(x.shape)


def agree(got, want, name, limit=1e-5):
    assert np.abs(got - want).max() <= limit * np.abs(want).max(), name


@pytest.mark.parametrize("name,where,dispatch", CASES)
def test_equals_numpy(name, where, dispatch):
    """Output, the gradient of every parameter, who was dropped; padding comes out as 0."""
    (weights, x, probe), (y, (stats, record), grads) = given(name), run(name, where, dispatch)
    expert, kept = choices(name, x)
    agree(y, expected(name, weights, x, expert, kept), "output")
    assert not y[~MASK].any()
    rng, step = np.random.default_rng(1), 1e-6
    trees = (weights, x)
    for i, (path, leaf) in enumerate(jax.tree_util.tree_leaves_with_path(trees)):
        direction = rng.choice([-1.0, 1.0], leaf.shape)
        sides = []
        for sign in (1, -1):
            flat, treedef = jax.tree.flatten(trees)
            flat[i] = leaf + sign * step * direction
            sides.append((expected(name, *treedef.unflatten(flat), expert, kept) * probe).sum())
        want, got = (sides[0] - sides[1]) / (2 * step), jax.tree.leaves(grads)[i]
        size = np.linalg.norm(got)
        assert size > 0 and abs((got * direction).sum() - want) <= 3e-5 * size, jax.tree_util.keystr(path)
    assert not grads[1][~MASK].any()
    routed = VARIANTS[name].moe.top_k * MASK.sum()
    assert [int(stats.routed), int(stats.kept)] == [routed, kept.sum()]
    np.testing.assert_array_equal(np.asarray(record.gate).reshape(kept.shape) > 0, kept)
    assert (kept.sum() < routed) == (VARIANTS[name].moe.capacity_factor is not None), "the test needs drops"


# The families' own modules


def up_and_down(w):
    """Experts as most families keep them: gate and up in one, each matrix transposed."""
    up = np.concatenate([w["w_gate"], w["w_up"]], -1)
    return {"experts.gate_up_proj": up.swapaxes(1, 2), "experts.down_proj": w["w_down"].swapaxes(1, 2)}


def qwen2_moe(w):
    shared = {f"shared_expert.{n}_proj.weight": w["shared"][f"w_{n}"].T for n in ("gate", "up", "down")}
    rest = {"gate.weight": w["router"].T, "shared_expert_gate.weight": w["shared_gate"].T}
    return up_and_down(w["experts"]) | shared | rest


def gpt_oss(w):
    """Gate and up lie by turns, nothing is transposed."""
    e = w["experts"]
    mixed = {n: np.stack([e[f"{n}_gate"], e[f"{n}_up"]], -1) for n in ("w", "b")}
    mixed = {n: a.reshape(*a.shape[:-2], -1) for n, a in mixed.items()}
    experts = {"gate_up_proj": mixed["w"], "gate_up_proj_bias": mixed["b"]}
    experts |= {"down_proj": e["w_down"], "down_proj_bias": e["b_down"]}
    router = {"router.weight": w["router"].T, "router.bias": w["router_bias"]}
    return {f"experts.{n}": a for n, a in experts.items()} | router


def granitemoe(w):
    return up_and_down(w["experts"]) | {"router.weight": w["router"].T}


def deepseek_v2(w):
    shared = {f"shared_experts.{n}_proj.weight": w["shared"][f"w_{n}"].T for n in ("gate", "up", "down")}
    return up_and_down(w["experts"]) | shared | {"gate.weight": w["router"].T}


def phimoe(w):
    return up_and_down(w["experts"]) | {"router.weight": w["router"].T}


LOCAL = {"num_local_experts": E, "intermediate_size": F}
# It does not heed norm_topk_prob.
GREEDY = {"topk_method": "greedy", "norm_topk_prob": True, "routed_scaling_factor": 16.0}
SIZES = {"hidden_size": D, "num_experts_per_tok": 2, "num_attention_heads": 3}
FAMILIES = {  # variant -> config and class of its module there, its sizes, and the names of its parameters
    "qwen2_moe": (
        "Qwen2MoeConfig",
        "Qwen2MoeSparseMoeBlock",
        {"num_experts": E, "moe_intermediate_size": F, "shared_expert_intermediate_size": 14},
        qwen2_moe,
    ),
    "gpt_oss": ("GptOssConfig", "GptOssMLP", LOCAL, gpt_oss),
    "granitemoe": ("GraniteMoeConfig", "GraniteMoeMoE", LOCAL | {"num_experts_per_tok": 3}, granitemoe),
    "phimoe": ("PhimoeConfig", "PhimoeSparseMoeBlock", LOCAL | {"router_jitter_noise": 0.3}, phimoe),
    "deepseek_v2": (
        "DeepseekV2Config",
        "DeepseekV2Moe",
        GREEDY | {"num_experts_per_tok": 3, "n_routed_experts": E, "n_shared_experts": 2, "moe_intermediate_size": F},
        deepseek_v2,
    ),
}


def theirs(name):
    """Output and gradients of the family's own module in float64, by its own names; padding is left out."""
    wanted, kind, sizes, names = FAMILIES[name]
    require("torch", "transformers")
    import torch
    import transformers

    family = name.partition("-")[0]
    settings = getattr(transformers, wanted)(**SIZES | sizes)
    settings._experts_implementation = "eager"
    code = importlib.import_module(f"transformers.models.{family}.modeling_{family}")
    module = getattr(code, kind)(settings).double().eval()
    weights, x, probe = given(name)
    module.load_state_dict({n: torch.tensor(w) for n, w in names(weights).items()})
    tokens = torch.tensor(x[MASK], requires_grad=True)  # [T, D]
    y = module(tokens[None])
    y = (y[0] if isinstance(y, tuple) else y)[0]
    (y * torch.tensor(probe[MASK])).sum().backward()
    grads = {n: np.asarray(p.grad) for n, p in module.named_parameters()}
    return y.detach().numpy(), grads, np.asarray(tokens.grad)


@pytest.mark.filterwarnings("ignore")  # of what torch and transformers import
@pytest.mark.parametrize("name,where,dispatch", [c for c in CASES if c[0] in FAMILIES and c[1] == "one"])
def test_equals_the_family(name, where, dispatch):
    """Output and every gradient of the module that transformers has, strictly every parameter of it."""
    want, want_grads, want_dx = theirs(name)
    y, _, (grads, dx) = run(name, where, dispatch)
    agree(y[MASK], want, "output")
    agree(dx[MASK], want_dx, "gradient at the tokens")
    got = FAMILIES[name][-1](grads)
    assert got.keys() == want_grads.keys()
    for n, g in got.items():
        agree(g, want_grads[n], n, 2e-5)


@pytest.mark.parametrize("ffn", ["geglu", "clamped_swiglu"])
def test_dense_networks(ffn):
    """A dense layer of each kind: its output, and bounds that are reached."""
    layer = nnx.eval_shape(lambda: FFN(ffn, D, F, None, nnx.Rngs(params=0), biases=True))
    graph, state = nnx.split(layer)
    rng = np.random.default_rng(0)
    weights = jax.tree.map(lambda p: 2.0 * rng.normal(size=p.shape), nnx.to_pure_dict(state))
    x = rng.normal(size=(B, L, D))
    assert (np.abs(x @ weights["w_up"]) > 7).any() and (x @ weights["w_gate"] > 7).any()
    y = jax.jit(lambda x: nnx.merge(graph, single(weights))(x))(single(x))
    agree(np.float64(y), network(x, weights, ffn), "output")


def test_sparsemixer_in_training():
    """Drawn by Gumbel noise; what is not the best counts a third three times in four; gradients as if it were whole."""
    moe, rng = VARIANTS["phimoe"].moe, np.random.default_rng(0)
    logits, c = (rng.normal(size=(2, 200, n)) for n in (E, 2))
    noise = jax.vmap(lambda k: draw(k, moe, (200, E)))(jax.random.split(jax.random.key(0), 2))

    @jax.jit
    @functools.partial(jax.value_and_grad, has_aux=True)
    def run(logits):
        routing = route(logits, moe, None, noise)
        return (routing.gate * single(c)).sum(), routing

    (_, routing), grad = run(single(logits))
    expert, gate, u = (np.float64(a) for a in (routing.expert, routing.gate, noise.router))
    whole, want, thirds = np.zeros_like(gate), np.zeros_like(logits), 0
    for g, t in np.ndindex(2, 200):
        left = set(range(E))
        for k in range(2):
            s = logits[g, t]
            top = max(s[e] for e in left)
            near = [e for e in left if (top - s[e]) / max(abs(s[e]), top) <= 0.6]
            share = np.exp(s[near]) / np.exp(s[near]).sum()
            drawn = max(near, key=lambda e: s[e] - np.log(-np.log(u[g, t, k, e])))
            assert expert[g, t, k] == drawn
            m = share[near.index(drawn)]
            third = s[drawn] < top and u[g, t, k, E] <= 0.75
            whole[g, t, k], thirds = m / 3 if third else m, thirds + third
            want[g, t, near] -= c[g, t, k] * m * share
            want[g, t, drawn] += c[g, t, k] * m
            left.remove(drawn)
    assert 50 < thirds < 350
    np.testing.assert_allclose(gate, whole, atol=1e-6)
    np.testing.assert_allclose(grad, want, atol=1e-5)
    again = jax.jit(lambda x: route(x, moe, None, noise, chosen=recorded(routing)))(single(logits))
    np.testing.assert_allclose(again.gate, routing.gate, atol=1e-7)
    with pytest.raises(ValueError, match="draws noise in training"):
        MoELayer(moe, D, rngs=nnx.Rngs(params=0))(jnp.ones((1, L, D)), train=True)


def test_sparsemixer_draws_alike_on_every_mesh():
    """Each token's noise is its own, wherever it lies."""
    weights, x, _ = given("phimoe")
    out = {}
    for where in (MeshConfig(), MeshConfig(expert=2, tensor=2), MeshConfig(expert=2, context=2)):
        with jax.set_mesh(meshes.build_mesh(where, jax.devices()[: where.size])):
            graph, _ = split_layer("phimoe", "gather", Rules())
            layer = nnx.merge(graph, single(weights))
            call = jax.jit(lambda x: layer(x, train=True, key=jax.random.key(3), record=True))  # noqa: B023
            y, _, record = call(single(x))
            out[str(where)] = np.float64(y), np.asarray(record.expert)
    (want, expert), *others = out.values()
    best = np.argsort(-logits_of(x, weights).reshape(B, L, E))[..., :2]
    assert 0.1 < (expert == best).mean() < 0.95, "the test needs draws"
    for y, drawn in others:
        np.testing.assert_array_equal(drawn, expert)
        agree(y, want, "output")


# In bfloat16, on the whole, and what is refused


@pytest.mark.parametrize("dispatch", ["gather", "ragged"])
def test_in_bfloat16(dispatch):
    """To the precision of the type, which the output has; the router and the gate of shared experts have float32."""
    (weights, x, _), (graph, _) = given("all"), split_layer("all", dispatch, None)
    x = np.float64(x.astype(jnp.bfloat16))
    layer = nnx.merge(graph, single(weights))
    y, stats = jax.jit(lambda x: layer(x, mask=jnp.asarray(MASK), train=True))(single(x, jnp.bfloat16))
    expert, kept = choices("all", x)
    assert y.dtype == jnp.bfloat16 and not np.asarray(y)[~MASK].any()
    agree(np.float64(y), expected("all", weights, x, expert, kept), "output", 2e-2)
    assert int(stats.kept) == kept.sum()


COUNTED = [
    ["tiny_mixtral", "model.moe.shared_experts=2", "model.moe.shared_d_ff=28", "model.moe.shared_gate=true"],
    ["tiny_gshard", "model.moe.router.bias=true", "model.moe.router.gate=mlp"],
    ["tiny_mixtral", "model.ffn=clamped_swiglu", "model.biases=true", "model.moe.first_dense=1"],
    ["tiny_dense", "model.head_bias=true"],
    ["tiny_mixtral", "model.layers=6", "model.moe.layers=[0,3,4]"],
    ["tiny_t5", "model.moe.shared_experts=1", "model.moe.shared_gate=true", "model.biases=true"],
]


@pytest.mark.parametrize("settings", COUNTED, ids=lambda s: " ".join(s))
def test_the_plan_counts_like_the_model(settings):
    """Name by name, shape by shape, axis by axis; total and active to the unit."""
    cfg = config.load(settings[0], [*settings[1:], "train.sample=unset"])
    model = Model.of(cfg)
    assert {x.name: (x.shape, x.axes) for x in leaves(cfg.model)} == {n: (s, a) for n, s, a in model.leaves()}
    assert count(cfg.model)[:2] == model.count()


def test_the_plan_counts_work():
    """A gate of shared experts multiplies D numbers a token and layer; biases and factors multiply nothing."""
    extra = ["model.moe.shared_experts=1", "model.moe.shared_d_ff=30"]
    base, gate, rest = (
        Step(config.load("tiny_mixtral", [*extra, *own, "mesh.data=1"]), "tpu")
        for own in (
            [],
            ["model.moe.shared_gate=true"],
            ["model.moe.router.bias=true", "model.head_bias=true", "model.embed_scale=12", "model.ffn=clamped_swiglu"],
        )
    )
    m = base.cfg.model
    assert gate.flops.infer - base.flops.infer == 2 * m.d_model * m.layer_kinds.count("moe")
    assert rest.flops == base.flops and rest.count.total == base.count.total + m.vocab + m.layers * m.moe.experts
    assert gate.executed()["router"] > base.executed()["router"] > 0
    assert all(memory(step).peak > memory(base).peak for step in (gate, rest))


def test_factors_of_a_model():
    """Those of Granite are factors on parameters: of the embedding, of the last matrix of each sub-layer, the head."""
    base = config.load("tiny_t5", ["model.biases=true", "model.tied_head=false", "model.encoder.vocab=512"]).model
    base = dataclasses.replace(base, d_model=16, d_ff=24, heads=2, layers=2, vocab=32, head_bias=True)
    factors = {"table": 12.0, "last": 0.22, "head": 1 / 6}
    names = ("w_out", "b_out", "w_down", "b_down")

    def scaled(path, leaf):
        last = path[-1].key
        of = "last" if last in names else "head" if last.startswith("head") else last
        return leaf * factors.get(of, 1.0)

    def model(m):
        return nnx.split(nnx.eval_shape(lambda: Transformer(m, rngs=nnx.Rngs(params=0))))

    graph, state = model(base)
    rng = np.random.default_rng(0)
    weights = jax.tree.map(lambda p: rng.normal(size=p.shape) / 4, nnx.to_pure_dict(state))
    m = dataclasses.replace(base, embed_scale=12.0, residual_scale=0.22, logit_scale=1 / 6)
    tokens, inputs = (jnp.asarray(rng.integers(0, 32, (2, 6))) for _ in range(2))

    def logits(graph, weights):
        return jax.jit(lambda w: nnx.merge(graph, w)(tokens, inputs=inputs).logits)(single(weights))

    plain, want = (logits(graph, w) for w in (weights, jax.tree_util.tree_map_with_path(scaled, weights)))
    agree(np.float64(logits(model(m)[0], weights)), np.float64(want), "logits")
    assert np.abs(np.asarray(want - plain)).max() > 0.1


LISTED = {
    "is [1, 4], and the layers are numbered from 0 to 3": ["model.moe.layers=[1,4]"],
    "is [1, 1], and": ["model.moe.layers=[1,1]"],
    "is [], and": ["model.moe.layers=[]"],
    "is 2, and moe.layers lists the layers": ["model.moe.layers=[1]", "model.moe.every=2"],
    "not a whole number": ['model.moe.layers=["1"]'],
}


@pytest.mark.parametrize("reason", LISTED)
def test_lists_of_layers_are_checked(reason):
    with pytest.raises(ConfigError, match=re.escape(reason)):
        config.load("tiny_mixtral", ["model.layers=4", *LISTED[reason]])


def test_layers_by_number():
    """As Qwen's mlp_only_layers leaves them: which are MoE, in runs as any others."""
    m = config.load("tiny_mixtral", ["model.layers=6", "model.moe.layers=[4,0,3]"]).model
    kinds = ("moe", "dense", "dense", "moe", "moe", "dense")
    assert m.layer_kinds == kinds and sum((period * n for period, n in m.runs), ()) == kinds


REFUSED = {
    "there are no shared experts": {"shared_d_ff": 8},
    "is true, and there are no shared experts": {"shared_gate": True},
    "sparsemixer router picks 2": {"top_k": 3, "router": RouterConfig("sparsemixer")},
    "the softmax_topk router has none": {"router": RouterConfig(margin=0.1)},
    "does not normalise its gates": {"router": RouterConfig("sparsemixer", normalize="before")},
    "no effect on the hash router": {"router": RouterConfig("hash", bias=True)},
}


@pytest.mark.parametrize("reason", REFUSED)
def test_contradictions_are_refused(reason):
    with pytest.raises(ConfigError, match=re.escape(reason)):
        MoELayer(MoEConfig(E, **{"top_k": 2, "d_ff": F} | REFUSED[reason]), D, rngs=nnx.Rngs(params=0))
