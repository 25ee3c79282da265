"""The MoE layer: outputs and every gradient against the oracle on every mesh, and its collectives."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from moe_jax import mesh as meshes
from moe_jax.axes import Rules
from moe_jax.capacity import capacity
from moe_jax.collectives import read
from moe_jax.config import ConfigError, MeshConfig, MoEConfig, RouterConfig
from moe_jax.layers.moe import MoELayer
from moe_jax.rules import spec

B, L, D, F, E = 8, 16, 12, 20, 8

ROUTERS = {
    "switch": (RouterConfig("switch"), 1),
    "gshard": (RouterConfig("gshard"), 2),
    "gshard-random": (RouterConfig("gshard", second="random", threshold=0.6), 2),
    "gshard-sample": (RouterConfig("gshard", second="sample"), 2),
    "gshard-after": (RouterConfig("gshard", normalize="after"), 2),
    "topk_softmax": (RouterConfig("topk_softmax"), 3),
    "softmax_topk": (RouterConfig("softmax_topk"), 2),
    "softmax_topk-before": (RouterConfig("softmax_topk", normalize="before"), 2),
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
    """The layer's graph and its weights as a dict of arrays; a large router, so that gates differ."""
    layer = MoELayer(moe, D, ffn=ffn, rules=rules, rngs=nnx.Rngs(params=3))
    layer.router[...] = 8.0 * layer.router[...]
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


@functools.cache
def expected(name: str, ffn: str, factor: float | None):
    """Output and gradients of the oracle for one router: choices by loops, the sums differentiated by JAX."""
    router, k = ROUTERS[name]
    moe = MoEConfig(experts=E, top_k=k, d_ff=F, router=router, capacity_factor=factor, min_capacity=1)
    graph, weights, _ = split_layer(moe, ffn, None)
    x = jax.random.normal(jax.random.key(0), (B, L, D))
    probe = jax.random.normal(jax.random.key(1), (B, L, D))
    mask = np.arange(L)[None] < np.array([L, L, 9, L, L, 1, L, 12])[:, None]
    key = jax.random.key(2)
    layer = nnx.merge(graph, weights)
    # The layer's own noise, so that the loop sees the same uniform numbers.
    from moe_jax.layers.moe import draw, fold

    noise = jax.vmap(lambda k: draw(k, moe, (L, E)))(fold(jax.random.split(key, B), 0))
    logits = np.asarray(jnp.matmul(x, layer.router[...], precision="highest"))
    C = capacity(moe, L, factor)
    expert, kept = np.zeros((B, L, k), int), np.zeros((B, L, k), bool)
    for g in range(B):
        uniform = None if noise.router is None else np.asarray(noise.router[g])
        options = {"normalize": router.normalize, "second": router.second, "threshold": router.threshold}
        expert[g], gate, asked = oracle.choose(logits[g], router.kind, k, uniform=uniform, **options)
        _, kept[g] = oracle.queue(expert[g], asked & mask[g][:, None], gate, C, "choice")

    def loss(weights, x):
        flat = {"router": weights["router"], **weights["experts"]}
        y, _, _ = oracle.layer(
            x.reshape(-1, D),
            flat,
            jnp.asarray(expert).reshape(-1, k),
            jnp.asarray(kept).reshape(-1, k),
            kind=router.kind,
            k=k,
            normalize=router.normalize,
            ffn=ffn,
        )
        return (y.reshape(B, L, D) * probe).sum(), y.reshape(B, L, D)

    (_, y), grads = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(weights, x)
    return moe, weights, x, probe, mask, key, y, grads, kept


CASES = [
    *((where, name, "swiglu", 1.0, "einsum") for where in MESHES for name in ROUTERS),
    *((where, "gshard", "relu", None, "einsum") for where in MESHES),
    *((where, "gshard-after", "swiglu", 1.0, "gather") for where in MESHES),
    *((where, "gshard", "relu", None, "ragged") for where in MESHES),
    ("data=2,expert=2,tensor=2", "gshard-after", "swiglu", 1.0, "ragged"),
]


@pytest.mark.parametrize("where,name,ffn,factor,dispatch", CASES)
def test_equals_the_oracle(where, name, ffn, factor, dispatch):
    """Outputs, all gradients and drops, with padding and full experts, to 1e-5 in float32 on every mesh."""
    moe, weights, x, probe, mask, key, want, want_grads, kept = expected(name, ffn, factor)
    moe = dataclasses.replace(moe, dispatch=dispatch)
    with entered(MESHES[where]) as _:
        mesh = meshes.build_mesh(MESHES[where], jax.devices()[: MESHES[where].size])
        graph, _, state = split_layer(moe, ffn, Rules())
        weights = shard(mesh, state, weights)

        def loss(weights, x, mask):
            y, stats = nnx.merge(graph, weights)(x, mask=mask, train=True, key=key)
            return (y * probe).sum(), (y, stats)

        run = jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))
        (_, (y, stats)), grads = run(weights, x, jnp.asarray(mask))
    close(y, want, "output")
    paths = jax.tree_util.tree_leaves_with_path(want_grads)
    for (path, w), g in zip(paths, jax.tree.leaves(grads), strict=True):
        assert float(jnp.abs(w).max()) > 0, f"{path}: the test needs a gradient"
        close(g, w, jax.tree_util.keystr(path))
    assert int(stats.kept) == kept.sum()
    assert int(stats.tokens) == mask.sum()
    if factor is not None:
        assert int(stats.kept) < int(stats.routed), "the test needs drops"
    assert int(stats.load.sum()) == int(stats.routed)


def programs(config: MeshConfig, dispatch: str = "einsum"):
    """Collectives of the compiled layer: forward, and forward with backward."""
    mesh = meshes.build_mesh(config, jax.devices()[: config.size])
    router = RouterConfig("gshard")
    moe = MoEConfig(experts=8, top_k=2, d_ff=64, capacity_factor=2.0, router=router, dispatch=dispatch)
    with jax.set_mesh(mesh):
        layer = MoELayer(moe, 32, rules=Rules(), rngs=nnx.Rngs(params=0))
        graph, state = nnx.split(layer)
        weights = shard(mesh, state, nnx.to_pure_dict(state))
        x = jax.device_put(jnp.ones((8, 16, 32)), NamedSharding(mesh, PartitionSpec(Rules().batch)))

        def forward(weights, x):
            return nnx.merge(graph, weights)(x, train=True)

        def loss(weights, x):
            y, stats = forward(weights, x)
            return (y**2).sum() + stats.prob.sum() + stats.z

        both = jax.value_and_grad(loss, argnums=(0, 1))
        texts = [jax.jit(f).lower(weights, x).compile().as_text() for f in (forward, both)]
    return [read(text, mesh) for text in texts]


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
