"""Rules and meshes: what is refused, what is derived, and where every parameter ends up."""

import os
import subprocess
import sys
from dataclasses import fields, replace

import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from jax.sharding import AxisType, PartitionSpec

from moe_jax import mesh, rules
from moe_jax.axes import MESH_AXES, Rules
from moe_jax.config import MeshConfig, ModelConfig, MoEConfig, Refused
from moe_jax.model import Transformer

# constrain


def test_constrain_without_a_mesh_raises():
    with pytest.raises(RuntimeError, match=r"without a mesh.*jax\.set_mesh"):
        rules.constrain(jnp.zeros((4, 2)), (("data",), ()))


def test_constrain():
    with jax.set_mesh(mesh.build_mesh(MeshConfig(data=2, expert=2, tensor=2))):
        y = jax.jit(lambda x: rules.constrain(x, (("data", "expert"), (), ("tensor",))))(jnp.ones((8, 3, 4)))
        assert y.sharding.spec == PartitionSpec(("data", "expert"), None, "tensor")
        assert {s.data.shape for s in y.addressable_shards} == {(2, 3, 2)}
        with pytest.raises(ValueError, match=r"2 dimensions .* shape \(8, 3, 4\)"):
            rules.constrain(y, (("data",), ()))


def test_constrain_is_the_only_caller_of_sharding_constraints():
    package = os.path.dirname(mesh.__file__)
    calls = []
    for folder, _, names in os.walk(package):
        for name in (n for n in names if n.endswith(".py")):
            with open(os.path.join(folder, name), encoding="utf-8") as f:
                calls += [name] * f.read().count("with_sharding_constraint(")
    assert calls == ["rules.py"]


# Layouts


@pytest.mark.parametrize(
    "layout, want",
    [
        ((), PartitionSpec()),
        (((), ()), PartitionSpec(None, None)),
        ((("data",), (), ("fsdp", "expert")), PartitionSpec("data", None, ("fsdp", "expert"))),
    ],
)
def test_spec(layout, want):
    assert rules.spec(layout) == want


def test_layout_of_logical_names():
    assert Rules().layout("batch", None, "vocab") == (("data", "fsdp", "expert"), (), ("tensor",))
    with pytest.raises(AttributeError):
        Rules().layout("batches")


@pytest.mark.parametrize(
    "change, tokens, experts",
    [
        ({}, ((), ("data", "fsdp", "context", "expert"), (), ()), (("expert",), ("data", "fsdp", "context"), (), ())),
        ({"batch": ("expert",), "length": ()}, ((), ("expert",), (), ()), (("expert",), (), (), ())),
        (
            {"experts": (), "length": ()},
            ((), ("data", "fsdp", "expert"), (), ()),
            ((), ("data", "fsdp", "expert"), (), ()),
        ),
        (
            {"experts": ("expert", "fsdp"), "act_embed": ("tensor",)},
            ((), ("data", "context", "expert", "fsdp"), (), ("tensor",)),
            (("expert", "fsdp"), ("data", "context"), (), ("tensor",)),
        ),
        (
            {"experts": ("expert", "context"), "act_exchange": ("tensor",)},
            ((), ("data", "fsdp", "expert", "context"), (), ("tensor",)),
            (("expert", "context"), ("data", "fsdp"), (), ("tensor",)),
        ),
    ],
)
def test_both_layouts_of_a_dispatched_tensor_follow_the_rules(change, tokens, experts):
    """[E, G, C, D]: going to the experts moves the expert axes from G to E and touches nothing else."""
    r = replace(Rules(), **change)
    assert r.token_major == tokens
    assert r.expert_major == experts


def test_rows_instead_of_their_parts():
    """For decoding: the shards of a row take rows of their own, and the experts stay where they are."""
    r = Rules(experts=("expert", "context")).by_rows()
    assert (r.batch, r.length, r.experts) == (("data", "fsdp", "expert", "context"), (), ("expert", "context"))
    assert sorted(r.groups) == sorted(Rules().groups)


# Conflicts

LEAVES = [("w_up", (2, 6, 5), ("experts", "expert_embed", "expert_mlp"))]
SIZES = {"data": 2, "fsdp": 1, "expert": 2, "tensor": 2}
CONFLICTS = {
    "unknown axis": (
        {"vocab": ("tensors",)},
        [],
        ["rules.vocab", "unknown mesh axis 'tensors'", "use stage, data, fsdp"],
    ),
    "one axis twice": (
        {"expert_embed": ("expert",)},
        [("w_up", (2, 6, 4), LEAVES[0][2])],
        ["w_up", "experts and expert_embed are both on mesh axis 'expert'", "change rules.expert_embed"],
    ),
    "indivisible": ({}, LEAVES, ["w_up [2, 6, 5]", "expert_mlp of size 5", "tensor=2", "rules.expert_mlp=[]"]),
    "experts outside": (
        {"batch": ("data",)},
        [],
        ["rules.experts", "['expert'] are not among the token axes ['data', 'context']", "use a subset of rules.batch"],
    ),
}


TRAVEL = {  # rules, mesh, words of the one row of the table
    "exchange over axes of the tokens": (
        {"act_exchange": ("data",), "expert_mlp": ("data",), "mlp": ()},
        {"data": 2},
        ["holds two dimensions"],
    ),
    "exchange outside the hidden width": (
        {"act_exchange": ("tensor",), "expert_mlp": ()},
        {"tensor": 2},
        ["rules.act_exchange", "['tensor'] are not among the axes []", "use a subset of rules.expert_mlp"],
    ),
    "exchange of an odd width": (
        {"act_exchange": ("tensor",)},
        {"tensor": 4},
        ["w_up", "tokens of width 6 do not divide over 4 shards", "rules.act_exchange=[]"],
    ),
    "latents over an axis of tokens": (
        {"latent": ("data",)},
        {"data": 2},
        ["activation (batch, length, latent)", "mesh axis 'data' holds two dimensions"],
    ),
    "rows split twice over one axis": (
        {"residual": ("context",)},
        {"context": 2},
        ["tokens between layers", "mesh axis 'context' holds two dimensions", "take it out of one"],
    ),
    "an axis that splits nothing": (
        {"length": ()},
        {"context": 2},
        ["mesh.context", "has 2 devices, and no rule splits anything over 'context'", "set it to 1"],
    ),
    "rows and heads on one axis": (
        {"act_heads": ("context",), "kv_heads": ()},
        {"context": 2},
        ["activation (batch, length, act_heads)", "mesh axis 'context' holds two dimensions"],
    ),
    "a cache of rows and heads on one axis": (
        {"kv_heads": ("context",)},
        {"context": 2},
        ["cache (batch, kv_heads)", "mesh axis 'context' holds two dimensions"],
    ),
}


@pytest.mark.parametrize("name", TRAVEL)
def test_conflict_of_split_rows_and_exchanges(name):
    change, sizes, words = TRAVEL[name]
    leaves = [("w_up", (2, 6, 4), ("experts", "expert_embed", "expert_mlp"))]
    with pytest.raises(rules.RulesError) as e:
        rules.validate(replace(Rules(), **change), sizes, leaves)
    assert any(all(word in line for word in words) for line in str(e.value).splitlines()), str(e.value)


@pytest.mark.parametrize("name", CONFLICTS)
def test_conflict(name):
    change, leaves, words = CONFLICTS[name]
    with pytest.raises(rules.RulesError) as e:
        rules.validate(replace(Rules(), **change), SIZES, leaves)
    row = str(e.value).splitlines()[3]
    assert len(e.value.problems) == 1
    for word in words:
        assert word in row


def test_all_conflicts_in_one_table():
    change = {k: v for c, _, _ in CONFLICTS.values() for k, v in c.items()}
    with pytest.raises(Refused) as e:
        rules.validate(replace(Rules(), **change), SIZES, LEAVES * 2)
    lines = str(e.value).splitlines()
    assert "data=2, fsdp=1, expert=2, tensor=2" in lines[0]
    assert lines[1].split() == ["where", "conflict", "remedy"] and set(lines[2]) == {" ", "-"}
    assert len(lines) == 3 + 4 == 3 + len(e.value.problems)  # the same parameter twice is one row
    for (_, _, words), line in zip(CONFLICTS.values(), (lines[3], lines[5], lines[6], lines[4]), strict=True):
        assert all(word in line for word in words)
    # columns are aligned
    assert len({line.index(word) for line, word in ((lines[1], "conflict"), (lines[3], "unknown mesh"))}) == 1


def test_equal_conflicts_of_many_arrays_are_one_row():
    """Rows differ in axis, size or reason; rules and activations are always named one by one."""
    shape, axes = LEAVES[0][1:]
    leaves = [(f"blocks.{i}.{w}", shape, axes) for i in range(4) for w in ("w_gate", "w_up")]
    leaves += [("w_down", (2, 9, 6), ("experts", "expert_mlp", "expert_embed"))]
    with pytest.raises(rules.RulesError) as e:
        rules.validate(replace(Rules(), vocab=("tensors",), mlp=("tensors",)), SIZES, leaves)
    assert [p.key for p in e.value.problems] == [
        "rules.vocab",
        "rules.mlp",
        "blocks.0.w_gate [2, 6, 5] and 7 more",
        "w_down [2, 9, 6]",
    ]
    assert len(str(e.value).splitlines()) == 3 + 4


def test_an_axis_of_size_one_holds_one_dimension_too():
    """JAX refuses a repeated axis whatever its size, so the table does."""
    change = {"expert_embed": ("expert",)}
    with pytest.raises(rules.RulesError, match="both on mesh axis 'expert'"):
        rules.validate(replace(Rules(), **change), {"data": 2, "fsdp": 1, "expert": 1, "tensor": 1}, LEAVES)
    rules.validate(Rules(), {}, LEAVES)


@pytest.mark.parametrize(
    "change",
    [
        {"act_embed": ("data",)},
        {"expert_mlp": ("fsdp",), "expert_embed": ()},
        {"kv_heads": ("expert",)},
        {"act_embed": ("tensor",)},
    ],
    ids=str,
)
def test_activations_are_checked_too(change):
    with pytest.raises(rules.RulesError, match="holds two dimensions"):
        rules.validate(replace(Rules(), **change), {"data": 2, "fsdp": 1, "expert": 2, "tensor": 1}, LEAVES)


# Meshes


@pytest.mark.parametrize("axes", [dict(data=8), dict(data=2, fsdp=2, expert=2), dict(expert=4, tensor=2)], ids=str)
def test_build(axes):
    built = mesh.build_mesh(MeshConfig(**axes))
    assert dict(built.shape) == {a: axes.get(a, 1) for a in MESH_AXES}
    assert set(built.axis_types) == {AxisType.Auto}
    assert list(built.devices.flat) == jax.devices()  # slowest axis first


@pytest.mark.parametrize("axes, devices", [(dict(data=2), 8), (dict(data=3, expert=3), 8), ({}, 2)], ids=str)
def test_build_refuses(axes, devices):
    config = MeshConfig(**axes)
    with pytest.raises(Refused) as e:
        mesh.build_mesh(config, jax.devices()[:devices])
    text = str(e.value)
    assert f"a mesh of {config} needs {config.size} devices, and {devices} (cpu) are here" in text
    assert f"--fake-devices {config.size}" in text and "remedy" in text


def test_fake_devices_refused():
    with pytest.raises(Refused, match=r"4 fake devices for a mesh of 6 \(data=2 x expert=3\)[\s\S]*--fake-devices 6"):
        mesh.prepare_devices(MeshConfig(data=2, expert=3), 4)


@pytest.mark.parametrize("count", [0, -4])
def test_no_fake_devices_at_all_refused(count):
    with pytest.raises(Refused, match=rf"^--fake-devices: is {count}\n    remedy: give 1 or more$"):
        mesh.prepare_devices(MeshConfig(data=2), count)


def test_fake_devices_beside_an_accelerator_that_has_started_refused(monkeypatch):
    """Two accelerators and a mesh of two places: without a check the run would be on them."""
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    with pytest.raises(Refused, match=r"^--fake-devices: JAX has started on gpu in this process\n    remedy: "):
        mesh.prepare_devices(MeshConfig(data=2), 2)
    mesh.prepare_devices(MeshConfig(data=2), None)


@pytest.mark.parametrize("fake", ["3", "None"])
def test_fake_devices(fake):
    """In a process of its own: the number of devices is fixed once JAX has started."""
    code = f"""
import jax
from moe_jax.config import MeshConfig
from moe_jax.mesh import build_mesh, prepare_devices
prepare_devices(MeshConfig(expert=3), {fake})
print(build_mesh(MeshConfig(expert=3)).devices.size)
"""
    env = {k: v for k, v in os.environ.items() if k != "JAX_NUM_CPU_DEVICES"}
    out = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=120)
    assert out.stdout.strip() == "3", out.stderr


# Where the parameters of a transformer end up

PLACES = {
    # logical axes and sizes of each parameter, and its shard on data=2, expert=2, tensor=2
    "embedding/table": (("vocab", "embed"), (14, 16), (7, 16)),
    "embedding/positions": (("position", "embed"), (32, 16), (32, 16)),
    "embedding/head": (("embed", "vocab"), (16, 14), (16, 7)),
    "attention_norm/scale": (("layers", "norm"), (2, 16), (2, 16)),
    "attention_norm/bias": (("layers", "norm"), (2, 16), (2, 16)),
    "attention/w_query": (("layers", "embed", "heads", "head"), (2, 16, 4, 6), (2, 16, 2, 6)),
    "attention/w_key": (("layers", "embed", "kv_heads", "head"), (2, 16, 2, 6), (2, 16, 1, 6)),
    "attention/w_value": (("layers", "embed", "kv_heads", "head"), (2, 16, 2, 6), (2, 16, 1, 6)),
    "attention/w_out": (("layers", "heads", "head", "embed"), (2, 4, 6, 16), (2, 2, 6, 16)),
    "ffn_norm/scale": (("layers", "norm"), (2, 16), (2, 16)),
    "ffn_norm/bias": (("layers", "norm"), (2, 16), (2, 16)),
    "ffn/w_gate": (("layers", "embed", "mlp"), (2, 16, 24), (2, 16, 12)),
    "ffn/w_up": (("layers", "embed", "mlp"), (2, 16, 24), (2, 16, 12)),
    "ffn/w_down": (("layers", "mlp", "embed"), (2, 24, 16), (2, 12, 16)),
    "ffn/router": (("layers", "router_embed", "router_experts"), (2, 16, 4), (2, 16, 4)),
    "experts/w_gate": (("layers", "experts", "expert_embed", "expert_mlp"), (2, 4, 16, 10), (2, 2, 16, 5)),
    "experts/w_up": (("layers", "experts", "expert_embed", "expert_mlp"), (2, 4, 16, 10), (2, 2, 16, 5)),
    "experts/w_down": (("layers", "experts", "expert_mlp", "expert_embed"), (2, 4, 10, 16), (2, 2, 5, 16)),
    "shared/w_gate": (("layers", "embed", "mlp"), (2, 16, 10), (2, 16, 5)),
    "shared/w_up": (("layers", "embed", "mlp"), (2, 16, 10), (2, 16, 5)),
    "shared/w_down": (("layers", "mlp", "embed"), (2, 10, 16), (2, 5, 16)),
    "final_norm/scale": (("norm",), (16,), (16,)),
    "final_norm/bias": (("norm",), (16,), (16,)),
}


def test_every_parameter_of_a_transformer():
    m = ModelConfig(
        vocab=14,
        layers=4,
        d_model=16,
        d_ff=24,
        heads=4,
        kv_heads=2,
        head_dim=6,
        max_length=32,
        positions="learned",
        norm="layer",
        tied_head=False,
        moe=MoEConfig(experts=4, top_k=2, d_ff=10, every=2, shared_experts=1),
    )
    model = nnx.eval_shape(lambda: Transformer(m, rules=Rules(), rngs=nnx.Rngs(params=0)))
    leaves = []
    for path, variable in nnx.to_flat_state(nnx.state(model, nnx.Param)):
        leaves.append(("/".join(map(str, path)), variable.shape, variable.get_metadata("axes")))
    built = mesh.build_mesh(MeshConfig(data=2, expert=2, tensor=2))
    rules.validate(Rules(), built.shape, leaves)
    seen = set()
    for path, shape, axes in leaves:
        name = "/".join(path.split("/")[-2:])
        seen.add(name)
        placed = rules.sharding(built, Rules().layout(*axes))
        assert (axes, shape, placed.shard_shape(shape)) == PLACES[name], path
    assert seen == set(PLACES)
    unused = {f.name for f in fields(Rules)} - {a for axes, _, _ in PLACES.values() for a in axes}
    # those of activations, and of an MLP gate, biases and latent attention, which are tested with their layers
    activations = {"batch", "length", "residual", "act_embed", "act_exchange", "act_heads", "act_mlp", "act_vocab"}
    assert unused == activations | {"router_mlp", "bias", "latent", "latent_embed"}


def test_fsdp_splits_the_embedding_dimension():
    built = mesh.build_mesh(MeshConfig(fsdp=2, expert=4))
    for axes, shape, shard in (
        (("embed", "mlp"), (16, 24), (8, 24)),
        (("experts", "expert_embed", "expert_mlp"), (4, 16, 10), (1, 8, 10)),
        (("router_embed", "router_experts"), (16, 4), (16, 4)),
    ):
        assert rules.sharding(built, Rules().layout(*axes)).shard_shape(shape) == shard
