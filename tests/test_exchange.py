"""Exchanges: every way to place them gives one answer, and sends what it should over the axes that it should."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import placements
import pytest
from jax.sharding import PartitionSpec
from programs import collectives

from moe_jax import exchange
from moe_jax import mesh as meshes
from moe_jax.axes import MESH_AXES, Rules
from moe_jax.collectives import Collective
from moe_jax.config import ConfigError, MeshConfig, MoEConfig, RouterConfig

# The battery

CELLS = {str(cell): cell for cell in placements.cells()}
QUICK = (
    "expert=2,context=2,tensor=2-einsum-shard_map-ring-context-share-m2",
    "data=2,context=2,tensor=2-einsum-hierarchical-gather-data+context-explicit",
    "data=2,expert=2,context=2-ragged-ragged-ring-expert-explicit-latent",
    "fsdp=2,expert=2,tensor=2-gather-shard_map-gather-expert-m2-explicit-split",
    "stage=2,expert=2,tensor=2-gather-compiler-ring-expert-m4-r2-explicit-split",
    "stage=2,data=2,tensor=2-einsum-shard_map-ring-data-share-m2",
    "fsdp=2,tensor=4-ragged-hierarchical-ring-data+expert-share-m2-explicit-split-encoder",
)


def test_the_battery_is_whole():
    """Every factorisation of 8 devices, every exchange with every dispatcher, all with split rows and shared tokens.

    All of that also with stages, and with both types of mesh axes.
    """
    cells = list(CELLS.values())
    assert len(cells) == 111 and len({(c.stages, *c.mesh) for c in cells}) == 56 and set(QUICK) <= set(CELLS)
    assert {c.mesh for c in cells if c.explicit and c.stages == 1} == {c.mesh for c in cells if c.stages == 1}
    staged = [c for c in cells if c.stages > 1]
    assert {(c.dispatch, c.exchange) for c in staged} == set(placements.KINDS)
    assert {c.rounds for c in staged} == {1, 2} and {c.explicit for c in staged} == {True, False}
    assert any(c.microbatches > c.stages for c in staged if c.rounds == 2)
    kinds = {(c.dispatch, c.exchange) for c in cells}
    assert kinds == set(placements.KINDS)
    split = [c for c in cells if c.mesh[placements.AXES.index("context")] > 1]
    assert {(c.dispatch, c.exchange) for c in split} == kinds
    assert {(c.dispatch, c.attention) for c in split} == set(
        itertools.product(("einsum", "gather", "ragged"), ("gather", "ring"))
    )
    for some in ("share", "split", "latent", "encoder"):
        assert {c.dispatch for c in cells if getattr(c, some)} == {"einsum", "gather", "ragged"}, some
    assert {c.stages > 1 for c in cells if c.split} == {c.stages > 1 for c in cells if c.latent} == {True, False}
    assert {c.microbatches for c in cells} == {1, 2, 4, 8}


def weighed(names):
    """A few at once, some more among the slow ones, all of them in a sweep."""
    for i, name in enumerate(names):
        marks = () if name in QUICK else (pytest.mark.slow, pytest.mark.sweep) if i % 5 else pytest.mark.slow
        yield pytest.param(name, marks=marks)


@pytest.mark.parametrize("name", list(weighed(CELLS)))
def test_a_step_is_that_of_one_device(name):
    """Loss, every gradient, drops and statistics: with noise, dropout, padding, segments and full experts.

    And what travels is what has to: tokens to their experts and home, each time at the least bytes, keys and values.
    """
    cell = CELLS[name]
    want = placements.expected(cell.layers, cell.latent, cell.encoder)
    assert (want.stats.kept < want.stats.routed).all(), "the test needs drops"
    got, found = placements.step(placements.config(cell), cell.explicit)
    placements.agree(got, want)
    sent = [c for c in found if c.op == "all-to-all" and c.bytes > placements.COUNTS and c.axes != ("stage",)]
    assert sorted((c.axes, c.bytes) for c in sent) == placements.exchanges(cell)
    assert not placements.stray(cell, found)


GATHERED = {
    "tokens over the parameters' axis": ("all-gather", ("fsdp",), 2**20, 2, ("ffn",)),
    "tokens over that of the length": ("all-gather", ("context",), 2**20, 2, ("attention",)),
    "tokens of that size, elsewhere": ("all-gather", ("context",), 8192, 2, ("ffn",)),
    "keys once too often": ("all-gather", ("context",), 8192, 4, ("attention",)),
    "a permutation that is no ring": ("collective-permute", ("context",), 8192, 2, ("attention",)),
    "tokens over the experts' axis": ("all-gather", ("expert",), 512, 2, ("dispatch",)),
}


@pytest.mark.parametrize("name", GATHERED)
def test_what_should_not_travel_is_seen(name):
    """Beside keys and values of 4 rows on two tensor shards: 2*4*32*16 numbers of 4 bytes, of which each has half."""
    cell = placements.Cell((1, 2, 1, 2, 2), "einsum", "compiler", "gather", ("expert",), False)

    def found(op, axes, size, times, modules):
        source = f"jit(f)/{modules[0]}/{op}"
        return Collective(op, axes, size, source, times=times, parts=((source, size),))

    keys, more = found("all-gather", ("context",), 16384 // 2, 2, ("attention",)), found(*GATHERED[name])
    assert placements.stray(cell, [keys]) == [] and placements.stray(cell, [keys, more]) == [more]


# What is sent


def programs(config: MeshConfig, rules: Rules, kind: str, dispatch: str = "einsum"):
    """Collectives of one layer: forward, and forward with backward; and the bytes of a shard's buffer."""
    router = RouterConfig("gshard")
    sizes = {"experts": 8, "top_k": 2, "d_ff": 64, "capacity_factor": 2.0, "group_size": 8}
    found = collectives(config, MoEConfig(**sizes, router=router, dispatch=dispatch, exchange=kind), 32, rules)
    slots = 4  # C = max(4, 2*8*2/8)
    buffer = 4 * 8 * (8 * 32 // 8 // config.over(rules.tokens)) * slots * 32  # float32 [E, G, C, D] of one device
    return found, buffer


PINNED = [
    (MeshConfig(expert=8), ("expert",)),
    (MeshConfig(data=2, expert=4), ("data", "expert")),
    (MeshConfig(data=2, expert=2, context=2), ("expert",)),
    (MeshConfig(data=2, expert=2, context=2), ("expert", "context")),
    (MeshConfig(expert=2, context=2, tensor=2), ("expert", "context")),
    (MeshConfig(data=2, expert=2, tensor=2), ("expert", "data")),
    (MeshConfig(fsdp=2, expert=2, context=2), ("context",)),
]


@pytest.mark.parametrize("dispatch", ["einsum", pytest.param("gather", marks=pytest.mark.slow)])
@pytest.mark.parametrize("config,experts", PINNED, ids=str)
@pytest.mark.parametrize("kind", ["compiler", "shard_map", "hierarchical"])
def test_exchanges_are_pinned(config, experts, kind, dispatch):
    """Flat: 2 all-to-alls forward, 2 more backward, over the experts' axes; in two stages: one of each over each axis.

    Each at the least bytes, and no other collective moves tokens.
    """
    if kind == "hierarchical" and len(experts) == 1:
        with pytest.raises(ConfigError, match="names no slow and fast axis"):
            programs(config, Rules(experts=experts), kind, dispatch)
        return
    found, buffer = programs(config, Rules(experts=experts), kind, dispatch)
    for program, ways in zip(found, (2, 4), strict=True):
        sent = [c for c in program if c.op == "all-to-all"]
        stages = [(a,) for a in experts] if kind == "hierarchical" else [tuple(a for a in MESH_AXES if a in experts)]
        assert sorted(c.axes for c in sent) == sorted(ways * stages)
        assert all(c.bytes == buffer for c in sent)
        moving = [c for c in program if c.op not in ("all-to-all", "all-reduce")]
        assert all(c.axes == ("fsdp",) for c in moving), moving  # weights, gathered over their own axis


@pytest.mark.parametrize("dispatch", ["einsum", "gather", "ragged"])
@pytest.mark.parametrize("kind", ["compiler", "shard_map"])
def test_tensor_shards_send_no_duplicates(kind, dispatch):
    """With `act_exchange` each tensor shard sends its share of D, half of the bytes; they are joined over tensor."""
    config = MeshConfig(data=2, expert=2, tensor=2)
    alike, _ = programs(config, Rules(), kind, dispatch)
    shared, _ = programs(config, Rules(act_exchange=("tensor",)), kind, dispatch)
    for before, after in zip(alike, shared, strict=True):
        rows = [[c.bytes for c in p if c.op == "all-to-all" and c.bytes > 100] for p in (before, after)]
        assert sorted(rows[1]) == sorted(b // 2 for b in rows[0])
        assert all(c.axes == ("tensor",) for c in after if c.op in ("all-gather", "reduce-scatter"))
    assert any(c.op == "all-gather" for c in shared[0]) and not any(c.op == "all-gather" for c in alike[0])


# Rows in ragged numbers

n, ROWS, MOST, WIDTH = 4, 12, 5, 3


@functools.cache
def sizes() -> np.ndarray:
    """Rows from each shard to each, [n, n], none of them and the most among them."""
    out = np.random.default_rng(0).integers(0, 4, (n, n)).astype(np.int32)
    out[0, 0], out[1, 2], out[3, 3] = 0, MOST, 1
    assert out.sum(1).max() <= ROWS and out.max() == MOST
    return out


def tables() -> tuple[np.ndarray, ...]:
    """starts, sizes, places and counts of all shards; places leave a gap of one row between senders."""
    size = sizes()
    starts = np.cumsum(size, 1) - size
    places = (np.cumsum(size, 0) - size + np.arange(n)[:, None]).astype(np.int32)  # [sender, receiver]
    return starts.astype(np.int32), size, places, size.T.copy()


def run_ragged(x):
    """[n, ROWS, WIDTH] -> [n, 3 * ROWS, WIDTH] over four shards of a mesh."""

    def local(x, starts, size, places, came):
        inner = (a.reshape(a.shape[1:]) for a in (starts, size, places, came))
        return exchange.ragged(x[0], 3 * ROWS, *inner, ("data", "expert"), MOST)[None]

    over = PartitionSpec(("data", "expert"))
    return jax.shard_map(local, in_specs=(over,) * 5, out_specs=over)(x, *map(jnp.asarray, tables()))


def test_ragged_rows():
    """Every row where a loop puts it, zeros elsewhere, and its gradient back where it came from."""
    starts, size, places, _ = tables()
    rng = np.random.default_rng(1)
    x, g = (
        rng.normal(size=(n, ROWS, WIDTH)).astype(np.float32),
        rng.normal(size=(n, 3 * ROWS, WIDTH)).astype(np.float32),
    )
    want, back = np.zeros_like(g), np.zeros_like(x)
    for i, j in itertools.product(range(n), range(n)):
        here, there = np.arange(size[i, j]) + starts[i, j], np.arange(size[i, j]) + places[i, j]
        want[j, there], back[i, here] = x[i, here], g[j, there]
    with jax.set_mesh(meshes.build_mesh(MeshConfig(data=2, expert=2), jax.devices()[:n])):
        out, pull = jax.vjp(jax.jit(run_ragged), x)
        np.testing.assert_array_equal(out, want)
        np.testing.assert_array_equal(pull(jnp.asarray(g))[0], back)


@pytest.mark.parametrize("target", ["tpu", "cuda"])
def test_accelerators_send_only_what_there_is(target, monkeypatch):
    """Their programs hold the ragged collective, forward and backward, and no padded blocks of tokens."""
    monkeypatch.setattr(exchange, "platform", lambda: target)
    with jax.set_mesh(meshes.build_mesh(MeshConfig(data=2, expert=2), jax.devices()[:n])):
        traced = jax.jit(jax.grad(lambda x: (run_ragged(x) ** 2).sum())).trace(jnp.ones((n, ROWS, WIDTH)))
        text = traced.lower(lowering_platforms=(target,)).as_text()
    assert text.count("@ragged_all_to_all") == 2
    assert not [line for line in text.splitlines() if "all_to_all" in line and "xf32" in line and "@ragged" not in line]
