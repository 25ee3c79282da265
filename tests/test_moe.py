"""The MoE layer: outputs and every gradient against the oracle on every mesh, and its collectives."""

import dataclasses
import functools
import itertools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from flax import nnx
from jax.sharding import NamedSharding
from programs import collectives

from moe_jax import mesh as meshes
from moe_jax.axes import Rules
from moe_jax.config import ConfigError, MeshConfig, MoEConfig, RouterConfig
from moe_jax.layers.common import fold
from moe_jax.layers.moe import MoELayer
from moe_jax.routing import draw
from moe_jax.rules import spec

B, L, D, F, E = 8, 16, 12, 20, 8
IDS = jnp.asarray(np.random.default_rng(0).integers(0, 50, (B, L)))

ROUTERS = {
    "switch": (RouterConfig("switch"), 1),
    "gshard": (RouterConfig("gshard"), 2),
    "gshard-random": (RouterConfig("gshard", second="random", threshold=0.6), 2),
    "gshard-sample": (RouterConfig("gshard", second="sample"), 2),
    "gshard-after": (RouterConfig("gshard", normalize="after"), 2),
    "topk_softmax": (RouterConfig("topk_softmax"), 3),
    "softmax_topk": (RouterConfig("softmax_topk"), 2),
    "softmax_topk-before": (RouterConfig("softmax_topk", normalize="before"), 2),
    "noisy_topk": (RouterConfig("noisy_topk"), 2),
    "deepseek_v2": (RouterConfig("deepseek_v2", groups=4, topk_groups=2, scale=4.0), 3),
    "deepseek_v3": (RouterConfig("deepseek_v3", groups=4, topk_groups=2, scale=2.5), 3),
    "expert_choice": (RouterConfig("expert_choice"), 2),
    "hash": (RouterConfig("hash"), 2),
}
MESHES = {
    "one": MeshConfig(),
    "expert=8": MeshConfig(expert=8),
    "data=2,expert=4": MeshConfig(data=2, expert=4),
    "data=4,expert=2": MeshConfig(data=4, expert=2),
    "expert=4,tensor=2": MeshConfig(expert=4, tensor=2),
    "data=2,expert=2,tensor=2": MeshConfig(data=2, expert=2, tensor=2),
    "fsdp=2,expert=4": MeshConfig(fsdp=2, expert=4),
}


def entered(config: MeshConfig):
    return jax.set_mesh(meshes.build_mesh(config, jax.devices()[: config.size]))


def close(got, want, name):
    """Within 1e-5 of the largest entry."""
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    assert np.abs(got - want).max() <= 1e-5 * np.abs(want).max(), name


def split_layer(moe: MoEConfig, ffn: str, rules: Rules | None):
    """The layer's graph and its weights as a dict of arrays; a large router, so that gates differ, noise and biases."""
    kind, _, bias = ffn.partition("+")
    layer = MoELayer(moe, D, ffn=kind, biases=bool(bias), rules=rules, rngs=nnx.Rngs(params=3))
    if layer.router is not None:
        layer.router[...] = 8.0 * layer.router[...]
    for i, extra in enumerate((layer.noise, layer.bias)):
        if extra is not None:
            extra[...] = 0.2 * jax.random.normal(jax.random.key(i), extra.shape)
    experts = layer.experts
    for i, extra in enumerate((experts.b_gate, experts.b_up, experts.b_down)):
        if extra is not None:
            extra[...] = 0.5 * jax.random.normal(jax.random.key(10 + i), extra.shape)
    graph, state = nnx.split(layer)
    return graph, nnx.to_pure_dict(state), state


def shard(mesh, state, weights):
    """Weights on the mesh by their logical axes."""
    axes = jax.tree.map(lambda v: v.get_metadata("axes"), state, is_leaf=lambda v: isinstance(v, nnx.Variable))
    return jax.tree.map(
        lambda w, a: jax.device_put(w, NamedSharding(mesh, spec(Rules().layout(*a)))),
        weights,
        nnx.to_pure_dict(axes),
    )


class Expected(NamedTuple):
    """A call of a layer, and what the oracle says to it."""

    moe: MoEConfig
    weights: dict
    x: jax.Array  # [B, L, D]
    probe: jax.Array  # [B, L, D], cotangents of the output
    mask: np.ndarray  # [B, L] bool
    key: jax.Array
    y: jax.Array  # [B, L, D]
    grads: tuple  # in the weights and x
    expert: np.ndarray  # [B, L, K]
    asked: np.ndarray  # [B, L, K] bool
    kept: np.ndarray  # [B, L, K] bool


@functools.cache
def expected(name: str, ffn: str, factor: float | None, priority: str = "choice") -> Expected:
    """Output and gradients of the oracle for one router: choices by loops, the sums differentiated by JAX."""
    router, k = ROUTERS[name]
    more: dict = {"bias_rate": 0.0 if router.kind == "deepseek_v3" else None, "priority": priority}
    moe = MoEConfig(E, k, d_ff=F, router=router, capacity_factor=factor, min_capacity=1, **more)
    graph, weights, _ = split_layer(moe, ffn, None)
    x = jax.random.normal(jax.random.key(0), (B, L, D))
    probe = jax.random.normal(jax.random.key(1), (B, L, D))
    mask = np.arange(L)[None] < np.array([L, L, 9, L, L, 1, L, 12])[:, None]
    key = jax.random.key(2)
    layer = nnx.merge(graph, weights)
    # The layer's own noise, so that the loop sees the same numbers.
    noise, uniform = jax.vmap(lambda k: draw(k, moe, (L, E)))(fold(jax.random.split(key, B), 0))
    logits = np.zeros((B, L, E))
    if layer.router is not None:
        logits = np.asarray(jnp.matmul(x, layer.router[...], precision="highest"))
    slots = L if factor is None else math.ceil(k * L * factor / E)
    common = {"slots": slots, "bias": None if layer.bias is None else layer.bias[...]}
    spread = None if layer.noise is None else np.asarray(jax.nn.softplus(x @ layer.noise[...]))
    K = E if router.kind == "expert_choice" else k
    expert, asked, kept = np.zeros((B, L, K), int), np.zeros((B, L, K), bool), np.zeros((B, L, K), bool)
    for g in range(B):
        own = {"mask": mask, "noise": noise, "spread": spread, "ids": IDS}
        own = common | {name: None if a is None else np.asarray(a[g]) for name, a in own.items()}
        expert[g], _, asked[g] = oracle.choose(logits[g], router, K, **own)
        score = np.take_along_axis(oracle.probabilities(logits[g].astype(np.float64), router), expert[g], -1)
        dice = None if uniform is None else np.asarray(uniform[g])
        _, kept[g] = oracle.queue(expert[g], asked[g], score, slots, priority, dice)
    drawn = noise.reshape(-1, E) if router.kind == "noisy_topk" else None

    def loss(weights, x):
        choices = (jnp.asarray(a).reshape(-1, K) for a in (expert, kept))
        y = oracle.layer(x.reshape(-1, D), weights | weights["experts"], *choices, router, noise=drawn, ffn=ffn)
        return (y.reshape(B, L, D) * probe).sum(), y.reshape(B, L, D)

    (_, y), grads = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(weights, x)
    return Expected(moe, weights, x, probe, mask, key, y, grads, expert, asked, kept)


WAYS = ("einsum", "gather", "ragged")
PRIORITIES = ("token", "probability", "batch", "random")
MANY = [where for where in MESHES if where != "one"]
FEW = ("noisy_topk", "deepseek_v2", "deepseek_v3", "expert_choice", "hash")  # differ in their routing, which is local
MIXED = "data=2,expert=2,tensor=2"
CASES = [  # mesh, router, network, capacity factor, dispatch, priority
    *(("one", n, "swiglu", 1.0, d, "choice") for n in ROUTERS for d in WAYS),
    *(("one", n, "swiglu", None, d, "choice") for n in ROUTERS for d in WAYS if n != "expert_choice"),
    *(("one", "topk_softmax", "swiglu", 1.0, d, p) for p in PRIORITIES for d in WAYS),
    *((w, n, "swiglu", 1.0, "einsum", "choice") for n in ROUTERS for w in MANY if n not in FEW or w == MIXED),
    *((where, "gshard", "relu", None, "einsum", "choice") for where in MESHES),
    *((where, "gshard-after", "swiglu", 1.0, "gather", "choice") for where in MANY),
    *((where, "gshard", "relu", None, "ragged", "choice") for where in MESHES),
    *((MIXED, n, "swiglu", 1.0, d, "choice") for n in FEW for d in ("gather", "ragged")),
    (MIXED, "gshard-after", "swiglu", 1.0, "ragged", "choice"),
    *(("one", "gshard", f"{n}+biases", 1.0, d, "choice") for n in ("relu", "swiglu") for d in WAYS),
    *((MIXED, "gshard", "swiglu+biases", 1.0, d, "choice") for d in WAYS),
]


@pytest.mark.parametrize("where,name,ffn,factor,dispatch,priority", CASES)
def test_equals_the_oracle(where, name, ffn, factor, dispatch, priority):
    """Outputs, all gradients and who is dropped, with padding and full experts, to 1e-5 in float32 on every mesh."""
    want = expected(name, ffn, factor, priority)
    moe = dataclasses.replace(want.moe, dispatch=dispatch)
    with entered(MESHES[where]):
        mesh = meshes.build_mesh(MESHES[where], jax.devices()[: MESHES[where].size])
        graph, _, state = split_layer(moe, ffn, Rules())
        weights = shard(mesh, state, want.weights)

        def loss(weights, x, mask):
            layer = nnx.merge(graph, weights)
            y, stats, record = layer(x, mask=mask, train=True, key=want.key, tokens=IDS, record=True)
            return (y * want.probe).sum(), (y, stats, record)

        run = jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))
        (_, (y, stats, record)), grads = run(weights, want.x, jnp.asarray(want.mask))
    close(y, want.y, "output")
    paths = jax.tree_util.tree_leaves_with_path(want.grads)
    for (path, w), g in zip(paths, jax.tree.leaves(grads), strict=True):
        if "bias" in jax.tree_util.keystr(path):
            assert not w.any() and not g.any()
            continue
        assert float(jnp.abs(w).max()) > 0, f"{path}: the test needs a gradient"
        close(g, w, jax.tree_util.keystr(path))
    tokens = np.asarray(want.mask)[..., None]  # which expert padding was not sent to says nothing
    recorded = np.where(want.asked, want.expert, ~want.expert)
    np.testing.assert_array_equal(np.where(tokens, record.expert, -1), np.where(tokens, recorded, -1))
    assert (np.asarray(record.expert)[~np.asarray(want.mask)] < 0).all()
    np.testing.assert_array_equal(np.asarray(record.gate) > 0, want.kept)
    load = np.bincount(want.expert[want.asked], minlength=E)
    np.testing.assert_array_equal(stats.load, load)
    counts = [int(n) for n in (stats.tokens, stats.routed, stats.kept)]
    assert counts == [want.mask.sum(), load.sum(), want.kept.sum()]
    if factor is not None and name != "expert_choice":
        assert want.kept.sum() < load.sum(), "the test needs drops"


def test_padding_is_zero_beside_biases():
    """Shared experts make something of zeros, too."""
    moe = MoEConfig(E, 2, d_ff=F, shared_experts=1, capacity_factor=1.0)
    layer = MoELayer(moe, D, biases=True, rngs=nnx.Rngs(params=0))
    assert layer.shared is not None
    for b in (layer.shared.b_gate, layer.shared.b_up, layer.shared.b_down):
        b[...] = jnp.ones_like(b[...])
    mask = jnp.arange(L)[None] < jnp.asarray([L, 9])[:, None]
    y, _ = layer(jax.random.normal(jax.random.key(0), (2, L, D)), mask=mask, train=True)
    assert not y[1, 9:].any() and bool(y[1, :9].any(-1).all())


def test_priorities_differ():
    """Each queue keeps other choices of the same routing: none can stand in for another."""
    kept = [expected("topk_softmax", "swiglu", 1.0, p).kept for p in ("choice", *PRIORITIES)]
    assert all((a != b).any() for a, b in itertools.combinations(kept, 2))


def programs(config: MeshConfig, dispatch: str = "einsum", factor: float | None = 2.0):
    """Collectives of the compiled layer: forward, and forward with backward."""
    router = RouterConfig("gshard")
    moe = MoEConfig(experts=8, top_k=2, d_ff=64, capacity_factor=factor, router=router, dispatch=dispatch)
    return collectives(config, moe, 16)


@pytest.mark.parametrize("dispatch", ["einsum", "gather"])
@pytest.mark.parametrize(
    "config",
    [
        MeshConfig(expert=8),
        MeshConfig(data=2, expert=4),
        MeshConfig(expert=4, tensor=2),
        MeshConfig(data=2, expert=2, tensor=2),
        MeshConfig(fsdp=2, expert=4),
    ],
    ids=str,
)
def test_collectives_are_pinned(config, dispatch):
    """Two all-to-alls forward, four with the backward pass, over the expert axis and at the least bytes."""
    forward, both = programs(config, dispatch)
    buffer = 4 * 8 * (8 // config.over(Rules().batch)) * 8 * 32  # float32 [E, G, C, D] of one device, C = 2*16*2/8
    for program, count in ((forward, 2), (both, 4)):
        exchanges = [c for c in program if c.op == "all-to-all"]
        assert [c.axes for c in exchanges] == [("expert",)] * count
        assert all(c.bytes == buffer for c in exchanges)
        others = {c.op for c in program} - {"all-to-all"}
        if config.fsdp == 1:
            assert others <= {"all-reduce"}, program
        else:  # fully sharded weights are gathered over their own axis, and over no other
            assert all(c.axes == ("fsdp",) for c in program if c.op == "all-gather")
    sums = [c for c in forward if c.op == "all-reduce" and c.axes == ("tensor",)]
    assert len(sums) == (1 if config.tensor > 1 else 0), "one sum over tensor, of the second expert product"


@pytest.mark.parametrize(
    "where,factor,overflows", [("data=2,expert=2,tensor=2", 1.0, True), ("one", 1.0, True), ("one", 4.0, False)]
)
def test_fallback_drops_nothing(where, factor, overflows):
    """Full experts or not, outputs and gradients are those of the dropless oracle, and every choice counts as kept."""
    _, weights, x, probe, mask, key, want, want_grads, *_, kept = expected("gshard", "relu", None)
    moe = MoEConfig(
        experts=E,
        top_k=2,
        d_ff=F,
        router=RouterConfig("gshard"),
        capacity_factor=factor,
        min_capacity=1,
        dispatch="gather",
        overflow="fallback",
    )
    with entered(MESHES[where]):
        mesh = meshes.build_mesh(MESHES[where], jax.devices()[: MESHES[where].size])
        graph, _, state = split_layer(moe, "relu", Rules())
        weights = shard(mesh, state, weights)

        def loss(weights, x, mask):
            y, stats = nnx.merge(graph, weights)(x, mask=mask, train=True, key=key)
            return (y * probe).sum(), (y, stats)

        run = jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))
        (_, (y, stats)), grads = run(weights, x, jnp.asarray(mask))
        dropping = nnx.merge(split_layer(dataclasses.replace(moe, overflow="drop"), "relu", Rules())[0], weights)
        _, limited = jax.jit(lambda x, mask: dropping(x, mask=mask, train=True, key=key))(x, jnp.asarray(mask))
    assert (int(limited.kept) < int(limited.routed)) == overflows, "the test needs the branch"
    close(y, want, "output")
    for g, w in zip(jax.tree.leaves(grads), jax.tree.leaves(want_grads), strict=True):
        close(g, w, "gradient")
    assert int(stats.kept) == int(stats.routed) == kept.sum()


# Rows that a device may send to one shard: both choices of its 16 tokens, or the slots of the 2 experts there.
@pytest.mark.parametrize("factor,pair", [(None, 16 * 2), (2.0, 2 * (2 * 16 * 2 // 8)), (1.0, 2 * (2 * 16 // 8))])
def test_ragged_collectives(factor, pair):
    """Counts, rows and their way back forward; the rows' gradients both ways backward. Nothing gathers tokens."""
    forward, both = programs(MeshConfig(data=2, expert=4), "ragged", factor)
    for program, rows in ((forward, 2), (both, 4)):
        exchanges = [c for c in program if c.op == "all-to-all"]
        assert [c.axes for c in exchanges] == [("expert",)] * (rows + 1)
        assert {c.op for c in program} <= {"all-to-all", "all-reduce"}
        worst = 4 * 4 * pair * 32  # float32 [n, M, D] of one device
        assert sorted(c.bytes for c in exchanges) == [4 * 8, *[worst] * rows]


def test_without_the_exchange_layouts_the_compiler_gathers(monkeypatch):
    """The pinned counts come from the two layouts: with one of them taken out they change."""
    monkeypatch.setattr(MoELayer, "exchange", lambda self, buffers, to_experts: buffers)
    forward, _ = programs(MeshConfig(data=2, expert=4))
    assert [c.op for c in forward].count("all-to-all") != 2


def test_ten_lines_in_a_flax_model():
    """The layer inside a model that knows nothing else of the library, on one device and without a mesh."""

    class Net(nnx.Module):
        def __init__(self, rngs):
            self.inp = nnx.Linear(6, D, rngs=rngs)
            self.moe = MoELayer(MoEConfig(experts=4, top_k=2, d_ff=16), D, rngs=rngs)

        def __call__(self, x):
            y, stats = self.moe(self.inp(x))
            return y, stats

    net = Net(nnx.Rngs(0))
    y, stats = nnx.jit(lambda net, x: net(x))(net, jnp.ones((2, 5, 6)))
    assert y.shape == (2, 5, D) and int(stats.kept) == int(stats.routed) == 20
    grads = nnx.grad(lambda net: net(jnp.ones((2, 5, 6)))[0].sum())(net)
    assert len(jax.tree.leaves(grads)) == 6


def test_rules_without_a_mesh_raise():
    layer = MoELayer(MoEConfig(experts=4, top_k=2, d_ff=16), D, rules=Rules(), rngs=nnx.Rngs(0))
    with pytest.raises(RuntimeError, match="without a mesh"):
        layer(jnp.ones((2, 4, D)))


def test_settings_that_fight_are_refused():
    with pytest.raises(ConfigError, match=r"moe.top_k: 5 choices among 4 experts"):
        MoELayer(MoEConfig(experts=4, top_k=5, d_ff=16), D, rngs=nnx.Rngs(0))
    with pytest.raises(ConfigError, match="gives the router no gradient"):
        MoELayer(MoEConfig(top_k=1, d_ff=16, router=RouterConfig("topk_softmax")), D, rngs=nnx.Rngs(0))
    for wrong in (
        dict(dispatch="ragged", expert_dropout=0.1),
        dict(capacity_factor=1.0, overflow="fallback", expert_dropout=0.1),
        dict(capacity_factor=1.0, overflow="fallback", dispatch="ragged"),
        dict(overflow="fallback"),
    ):
        with pytest.raises(ConfigError, match=r"moe\.(expert_dropout|overflow): is"):
            MoELayer(MoEConfig(d_ff=16, **wrong), D, rngs=nnx.Rngs(0))
    layer = MoELayer(MoEConfig(d_ff=16, capacity_factor=1.0, group_size=7), D, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="group_size=7 fits no"):
        layer(jnp.ones((2, 4, D)), train=True)


@pytest.mark.parametrize(
    "moe, words",
    [
        (
            MoEConfig(router={"kind": "switch"}, d_ff=16),
            r"moe.router: is \{'kind': 'switch'\}, a dict, and not a RouterConfig\n.* RouterConfig\(kind='switch'\)",
        ),
        (MoEConfig(router=None, d_ff=16), "moe.router: is None, a NoneType, and not a RouterConfig"),
        ({"experts": 4}, r"moe: is \{'experts': 4\}, a dict.*\n.* MoEConfig\(experts=4\)"),
    ],
)
def test_settings_of_another_class_are_refused(moe, words):
    with pytest.raises(ConfigError, match=words):
        MoELayer(moe, D, rngs=nnx.Rngs(0))


@pytest.mark.parametrize(
    "shape, where, keys, words",
    [
        ((2, 4, D + 1), "one", {}, rf"width {D + 1}, and this .* d_model={D}: project x .* d_model={D + 1}"),
        ((4, D), "one", {}, rf"x has the shape \[4, {D}\], .* \[B, L, D={D}\]: .* x\[None\]"),
        (
            (6, 4, D),
            "data=2,expert=4",
            {},
            r"batch of 6 .* over 8 token shards \(data=2 x expert=4\): .* multiple of 8",
        ),
        ((8, 4, D), "data=2,expert=4", {"group_size": 8}, r"\[B=8, L=4\] makes 4 groups of 8 tokens, which .* lower"),
    ],
)
def test_inputs_that_do_not_fit_are_refused(shape, where, keys, words):
    moe = MoEConfig(experts=4, top_k=2, d_ff=16, capacity_factor=1.0, **keys)
    with entered(MESHES[where]):
        layer = MoELayer(moe, D, rules=Rules(), rngs=nnx.Rngs(0))
        with pytest.raises(ValueError, match=words):
            layer(jnp.ones(shape), train=True)


@pytest.mark.parametrize("where", ["one", "data=2,expert=4"])
def test_noise_does_not_depend_on_rows_or_mesh(where):
    """A row keeps its noise whatever rows share the call: microbatches and meshes draw the same numbers."""
    moe = MoEConfig(
        experts=E,
        top_k=2,
        d_ff=F,
        router=RouterConfig("gshard", second="sample"),
        capacity_factor=1.0,
        priority="random",
        expert_dropout=0.4,
    )
    x = jax.random.normal(jax.random.key(0), (16, L, D))
    keys = jax.random.split(jax.random.key(5), 16)
    plain = MoELayer(moe, D, rngs=nnx.Rngs(params=0))
    whole, _ = nnx.jit(lambda m, x, k: m(x, train=True, key=k))(plain, x, keys)
    with entered(MESHES[where]):
        layer = MoELayer(moe, D, rules=Rules(), rngs=nnx.Rngs(params=0))
        call = nnx.jit(lambda m, x, k: m(x, train=True, key=k)[0])
        parts = [call(layer, x[i::2], keys[i::2]) for i in range(2)]
    close(jnp.stack(parts, 1).reshape(x.shape), whole, "rows")


def test_auto_asks_the_cost_model():
    """Dropless calls sort rows, bounded ones use tables; with dropout inside the experts slots are needed."""

    def chosen(S, C, **options):
        moe = MoEConfig(experts=E, top_k=2, d_ff=F, dispatch="auto", **options)
        return MoELayer(moe, D, rngs=nnx.Rngs(params=0)).dispatch_for(moe, S, C)

    assert [chosen(16, 16), chosen(16, 4), chosen(16, 16, expert_dropout=0.1)] == ["ragged", "gather", "gather"]


def test_bfloat16_keeps_the_router_in_float32():
    """In bf16 the choices are those of the float32 router on the same tokens, and outputs agree to bf16 precision."""
    moe = MoEConfig(experts=E, top_k=2, d_ff=F)
    layer = MoELayer(moe, D, rngs=nnx.Rngs(params=0))
    x = jax.random.normal(jax.random.key(0), (2, L, D)).astype(jnp.bfloat16)
    y, stats = layer(x)
    exact, exact_stats = layer(x.astype(jnp.float32))
    assert y.dtype == jnp.bfloat16 and stats.prob.dtype == jnp.float32
    np.testing.assert_array_equal(stats.load, exact_stats.load)
    np.testing.assert_allclose(stats.prob, exact_stats.prob, rtol=1e-6)
    np.testing.assert_allclose(y.astype(jnp.float32), exact, atol=0.03 * float(jnp.abs(exact).max()))


def test_mlp_gate_is_its_formula():
    """Logits are gelu(x w1) w2 in float32, of the width asked for; a linear gate has no first matrix."""
    gated = RouterConfig("noisy_topk", gate="mlp", gate_width=7)
    graph, _, state = split_layer(MoEConfig(E, 2, d_ff=F, router=gated), "swiglu", None)
    layer = nnx.merge(graph, state)
    assert layer.gate_in.shape == (D, 7) and layer.router.shape == (7, E)
    x = jax.random.normal(jax.random.key(0), (2, L, D))
    logits, spread = layer.scores(x, None)
    w1, w2, noise, x = (np.asarray(a, np.float64) for a in (layer.gate_in[...], layer.router[...], layer.noise[...], x))
    h = x @ w1
    h = 0.5 * h * (1.0 + np.tanh(np.sqrt(2.0 / np.pi) * (h + 0.044715 * h**3)))
    np.testing.assert_allclose(logits, h @ w2, atol=1e-5)
    np.testing.assert_allclose(spread, np.log1p(np.exp(x @ noise)), atol=1e-5)  # the noise's scale stays linear
    assert MoELayer(MoEConfig(E, 2, d_ff=F), D, rngs=nnx.Rngs(0)).gate_in is None


NOISY = [  # a router and the one that it is without its noise
    (RouterConfig("softmax_topk", jitter=0.3), RouterConfig("softmax_topk")),
    (RouterConfig("noisy_topk"), RouterConfig("topk_softmax")),
    (RouterConfig("gshard", second="random", threshold=2.0), RouterConfig("gshard")),
]


@pytest.mark.parametrize("router,calm", NOISY, ids=lambda r: r.kind)
def test_noise_is_drawn_in_training_only(router, calm):
    """Evaluation is that of the router without noise; training needs a key, and another key routes otherwise."""
    graph, _, state = split_layer(MoEConfig(E, 2, d_ff=F, router=router), "swiglu", None)
    x = jax.random.normal(jax.random.key(0), (2, L, D))
    call = jax.jit(lambda train, key: nnx.merge(graph, state)(x, train=train, key=key)[0], static_argnums=0)
    keys = jax.random.split(jax.random.key(1))
    plain, quiet = call(False, None), call(False, keys[0])
    np.testing.assert_array_equal(quiet, plain)
    calm_graph, _, calm_state = split_layer(MoEConfig(E, 2, d_ff=F, router=calm), "swiglu", None)  # the same weights
    np.testing.assert_allclose(nnx.merge(calm_graph, calm_state)(x)[0], plain, atol=1e-6)
    noisy, again, other = (call(True, key) for key in (keys[0], keys[0], keys[1]))
    np.testing.assert_array_equal(again, noisy)
    assert not jnp.allclose(noisy, plain) and not jnp.allclose(noisy, other)
    with pytest.raises(ValueError, match="pass key="):
        nnx.merge(graph, state)(x, train=True)


def test_jitter_reaches_the_router_alone():
    """With one expert the gate is 1 whatever the logits: jitter moves the z statistics and not the output."""
    moe = MoEConfig(1, 1, d_ff=F, router=RouterConfig("switch", jitter=0.5))
    layer = MoELayer(moe, D, rngs=nnx.Rngs(0))
    x = jax.random.normal(jax.random.key(0), (2, L, D))
    (y, plain), (noisy, stats) = layer(x), layer(x, train=True, key=jax.random.key(1))
    np.testing.assert_allclose(noisy, y, rtol=1e-6)
    assert abs(float(stats.z) - float(plain.z)) > 1e-3 * float(plain.z)


@pytest.mark.parametrize("name", ["gshard-random", "deepseek_v3", "expert_choice"])
def test_replay_of_a_layer(name):
    """The record of a noisy, padded, overfull call gives its output again; without the noise, the same experts."""
    router, k = ROUTERS[name]
    moe = MoEConfig(E, k, d_ff=F, router=router, capacity_factor=0.7, min_capacity=1)
    graph, _, state = split_layer(moe, "swiglu", None)
    x, key = jax.random.normal(jax.random.key(0), (B, L, D)), jax.random.key(5)
    mask = jnp.arange(L)[None] < 3 + jnp.arange(B)[:, None]

    @jax.jit
    def call(x, replay):
        return nnx.merge(graph, state)(x, mask=mask, train=True, key=key, replay=replay, record=True)

    y, stats, record = call(x, None)
    again = call(x, record.expert)
    jax.tree.map(np.testing.assert_array_equal, again, (y, stats, record))
    other, _, moved = call(x[::-1], record.expert)
    np.testing.assert_array_equal(moved.expert, record.expert)
    np.testing.assert_array_equal(moved.gate > 0, record.gate > 0)
    assert not jnp.allclose(other, y)
    quiet = nnx.merge(graph, state)(x, mask=mask, replay=record.expert, capacity_factor=0.7)[0]
    np.testing.assert_allclose(quiet, y, atol=1e-6)
    with pytest.raises(ValueError, match=r"replay is int32\[8, 16, 1\], this call's integers \[B=8, L=16, K="):
        call(x, record.expert[..., :1])


def test_the_hash_router_needs_token_ids():
    layer = MoELayer(MoEConfig(E, 2, d_ff=F, router=RouterConfig("hash")), D, rngs=nnx.Rngs(0))
    assert layer.router is None
    with pytest.raises(ValueError, match=r"MoELayer\(x, tokens=ids\)"):
        layer(jnp.ones((2, 4, D)))
