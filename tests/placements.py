"""Cells of the placement battery: all factorisations of 8 devices; exchanges, dispatchers and attention in turn."""

import dataclasses
import functools
import itertools
import math
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from moe_jax import mesh as meshes
from moe_jax.axes import MESH_AXES, Axes, Rules
from moe_jax.collectives import Collective, read
from moe_jax.config import (
    Config,
    DataConfig,
    EncoderConfig,
    LatentConfig,
    MeshConfig,
    ModelConfig,
    MoEConfig,
    RouterConfig,
    TrainConfig,
    from_dict,
    to_dict,
)
from moe_jax.pattern import Schedule
from moe_jax.train.state import Model
from moe_jax.train.step import total_loss

B, L, D, VOCAB = 8, 32, 16, 40
INPUTS = 16  # of an encoder
COUNTS = 200  # bytes: what is counted by layer, or before ragged rows are sent
GROUP, SLOTS = 2, 1  # S and C, which is max(1, ceil(2*2*2/8))
AXES = MESH_AXES[1:]
SPLIT = [("attention",), ("ffn",), ("embed",), ("head",)]  # what needs whole rows that are split between them
KINDS = [
    *itertools.product(("einsum", "gather"), ("compiler", "shard_map", "hierarchical")),
    *(("ragged", exchange) for exchange in ("shard_map", "hierarchical", "ragged")),
]


class Cell(NamedTuple):
    """A way to lay a train step over devices."""

    mesh: tuple[int, ...]  # devices along each of AXES
    dispatch: str
    exchange: str
    attention: str  # gather or ring
    experts: Axes
    share: bool  # split tokens over `tensor` while they travel
    microbatches: int = 1
    stages: int = 1
    rounds: int = 1
    explicit: bool = False  # the mesh has Explicit axes, not Auto ones
    latent: bool = False  # latent attention, not norms of queries and keys and biases
    split: bool = False  # rows are split over `tensor` between attention and feed-forward layers
    encoder: bool = False  # there is an encoder of rows of half the length, and positions are relative

    @property
    def layers(self) -> int:
        return max(2, self.stages * self.rounds * (2 if self.stages == 2 else 1))

    @property
    def turns(self) -> int:
        """How often a device runs a layer in the forward pass of a step."""
        if self.stages == 1:
            return self.layers * self.microbatches
        schedule = Schedule(self.stages, self.microbatches, self.rounds)
        return schedule.ticks * self.layers // self.stages // self.rounds

    def __str__(self) -> str:
        sizes = ",".join(f"{a}={n}" for a, n in zip(MESH_AXES, (self.stages, *self.mesh), strict=True) if n > 1)
        extra = "-share" * self.share + f"-m{self.microbatches}" * (self.microbatches > 1)
        extra += (
            f"-r{self.rounds}" * (self.rounds > 1)
            + "-explicit" * self.explicit
            + "-latent" * self.latent
            + "-split" * self.split
            + "-encoder" * self.encoder
        )
        return f"{sizes}-{self.dispatch}-{self.exchange}-{self.attention}-{'+'.join(self.experts)}{extra}"


def factorisations(n: int, axes: int) -> list[tuple[int, ...]]:
    """All tuples of `axes` numbers whose product is n."""
    if axes == 1:
        return [(n,)]
    return [(k, *rest) for k in range(1, n + 1) if n % k == 0 for rest in factorisations(n // k, axes - 1)]


def expert_axes(mesh: tuple[int, ...], turn: int) -> tuple[Axes, Axes]:
    """One axis for the experts, and two, of those that split tokens here if there are any."""
    wide = [a for a, n in zip(AXES, mesh, strict=True) if n > 1 and a not in ("tensor", "fsdp")]
    one = wide[turn % len(wide)] if wide else "expert"
    rest = [a for a in (*wide, "data", "expert", "context") if a != one]
    pair = (rest[0], one) if turn % 2 else (one, rest[0])
    return (one,), pair


def cells() -> list[Cell]:
    """Every mesh without stages twice, with Auto and with Explicit axes; with stages once; everything else in turn."""
    out = []
    staged = [(mesh, s) for s in (2, 4, 8) for mesh in factorisations(8 // s, len(AXES))]
    for i, (mesh, stages) in enumerate(staged):
        dispatch, exchange = KINDS[i % len(KINDS)]
        one, pair = expert_axes(mesh, i)
        experts = pair if exchange == "hierarchical" or i % 4 == 0 else one
        share, attention = mesh[-1] > 1 and i % 2 == 0, ("gather", "ring")[i // 2 % 2]
        parts, rounds = (max(2, stages // 2), 1) if i % 3 or stages == 8 else (stages, 2)
        rows = B // math.prod(mesh[: AXES.index("context")])  # of a shard
        parts *= 2 if rounds == 2 and 2 * parts <= rows else 1  # with more than there are stages, rounds wait
        out.append(Cell(mesh, dispatch, exchange, attention, experts, share, parts, stages, rounds, i % 2 == 1))
    for i, mesh in enumerate(factorisations(8, len(AXES))):
        for j in range(2):
            dispatch, exchange = KINDS[(2 * i + 5 * j) % len(KINDS)]
            one, pair = expert_axes(mesh, i + j)
            experts = pair if exchange == "hierarchical" or (i + j) % 4 == 0 else one
            share = mesh[-1] > 1 and (i // 2 + j) % 2 == 0
            attention = ("gather", "ring")[(i + j) % 2]
            parts = 1 if math.prod(mesh[: AXES.index("context")]) == B else 1 + (i + j) % 3 // 2  # a row for each shard
            out.append(Cell(mesh, dispatch, exchange, attention, experts, share, parts, explicit=j == 1))
    out = [c._replace(latent=i % 8 in (1, 6), split=c.mesh[-1] > 1 and i % 3 == 0) for i, c in enumerate(out)]
    whole = [c for c in out if c.stages == 1 and c.mesh[AXES.index("context")] == 1]
    return out + [c._replace(latent=False, encoder=True) for i, c in enumerate(whole) if i % 4 in (1, 2)]


def config(cell: Cell | None, layers: int = 2, latent: bool = False, encoder: bool = False) -> Config:
    """A model with all that could depend on the mesh; without a cell on one device, its microbatches one by one."""
    if cell is not None:
        layers, latent, encoder = cell.layers, cell.latent, cell.encoder
    moe = MoEConfig(
        experts=8,
        top_k=2,
        d_ff=16,
        capacity_factor=2.0,
        min_capacity=SLOTS,
        group_size=GROUP,
        balance_loss=0.1,
        sequence_loss=0.1,
        z_loss=0.1,
        shared_experts=1,
        router=RouterConfig("noisy_topk", jitter=0.1),
    )
    model = ModelConfig(vocab=VOCAB, layers=layers, d_model=D, d_ff=24, heads=8, max_length=L, dropout=0.1, moe=moe)
    attention = {"latent": LatentConfig(16, 8, 2)} if latent else {"qk_norm": True, "biases": True}
    if encoder:
        attention |= {"encoder": EncoderConfig(layers=layers, length=INPUTS), "positions": "relative"}
    model = dataclasses.replace(model, **attention)
    cfg = Config(model=model, data=DataConfig(length=L, batch=B))
    if cell is None:
        return cfg
    moe = dataclasses.replace(moe, dispatch=cell.dispatch, exchange=cell.exchange)
    # expert weights are gathered over fsdp, whichever axes their experts are on
    over = {"act_exchange": cell.share, "residual": cell.split}
    rules = Rules(experts=cell.experts, **{name: ("tensor",) if used else () for name, used in over.items()})
    return dataclasses.replace(
        cfg,
        model=dataclasses.replace(model, moe=moe, attention_exchange=cell.attention),
        mesh=MeshConfig(stage=cell.stages, **dict(zip(AXES, cell.mesh, strict=True))),
        rules=rules,
        train=TrainConfig(microbatches=cell.microbatches, rounds=cell.rounds),
    )


@functools.cache
def batch(encoder: bool) -> dict[str, np.ndarray]:
    """Random tokens, in two segments and padding, which begin inside of pieces; and what stands before them."""
    rng = np.random.default_rng(0)
    segments = np.repeat(np.where(np.arange(L) < 11, 1, 2)[None], B, 0).astype(np.int32)
    segments[::2, -5:] = 0
    positions = np.where(np.arange(L) < 11, np.arange(L), np.arange(L) - 11)[None].repeat(B, 0).astype(np.int32)
    tokens = rng.integers(0, VOCAB, (B, L + 1)).astype(np.int32)
    rows = {"tokens": tokens[:, :-1], "targets": tokens[:, 1:], "segments": segments, "positions": positions}
    rows |= {"weights": (segments > 0).astype(np.float32)}
    if not encoder:
        return rows
    before = np.where(np.arange(INPUTS) < 5, 0, 1)[None].repeat(B, 0).astype(np.int32)
    before[::2] = np.where(np.arange(INPUTS) < 9, 1, 2)
    inputs = rng.integers(0, VOCAB, (B, INPUTS)).astype(np.int32)
    return rows | {"inputs": inputs, "input_segments": before, "input_positions": np.zeros_like(inputs)}


class Step(NamedTuple):
    loss: Any
    gradient: Any
    stats: Any


def random_parameters(shapes: Any) -> Any:
    """Numbers of one size, but for the scale of the encoder's last norm, which lies around 1 as it does in training.

    With a smaller one a decoder's tokens read from all inputs alike, and what the gradients at its queries then are is
    what cancelling leaves over: the rounding of one device against that of another came to 1.2e-5 of it.
    """
    named = jax.tree_util.tree_leaves_with_path(shapes)
    last = ["encoder", "final_norm", "scale"]
    out = [
        0.3 * np.random.default_rng(i).normal(size=s.shape) + ([k.key for k in path] == last)
        for i, (path, s) in enumerate(named)
    ]
    return jax.tree.unflatten(jax.tree.structure(shapes), [x.astype(np.float32) for x in out])


def step(cfg: Config, explicit: bool = False) -> tuple[Step, list[Collective]]:
    """Loss, gradient and statistics of a train step, and the collectives of its program."""
    assert from_dict(to_dict(cfg)) == cfg, "a config that a file could hold"
    model = Model.of(cfg)
    model.validate()
    mesh = meshes.build_mesh(cfg.mesh, jax.devices()[: cfg.mesh.size])
    if explicit:
        mesh = Mesh(mesh.devices, mesh.axis_names, axis_types=(AxisType.Explicit,) * len(MESH_AXES))
    where = model.weight_shardings(mesh).params
    params = random_parameters(model.shapes)
    keys = jax.random.split(jax.random.key(1), B)

    def loss(params, batch):
        return total_loss(model, params, batch, keys)

    with jax.set_mesh(mesh):
        rows = jax.device_put(batch(cfg.inputs > 0), NamedSharding(mesh, PartitionSpec(cfg.rules.batch)))
        params = jax.device_put(params, where)
        run = jax.jit(jax.value_and_grad(loss, has_aux=True), out_shardings=(None, where)).lower(params, rows).compile()
        (value, sums), gradient = run(params, rows)
    return jax.tree.map(np.asarray, Step(value, gradient, sums.stats)), read(run.as_text(), mesh)


def exchanges(cell: Cell) -> list[tuple[Axes, int]]:
    """Axes and bytes of the all-to-alls that a layer of a cell needs, in any order.

    Out and home, forward and backward; one forward more where microbatches are recomputed.
    """
    cfg = config(cell)
    sizes, ways = cfg.mesh.sizes, 4 if cell.microbatches == 1 or cell.stages > 1 else 6
    wide = tuple(a for a in AXES if a in cell.experts and a in sizes)
    stages = [(a,) for a in wide] if cell.exchange == "hierarchical" else [wide] * bool(wide)
    out = []
    for length in (L, cfg.inputs) if cell.encoder else (L,):
        groups = B * length // GROUP // cfg.mesh.over(cfg.rules.tokens) // cell.microbatches  # of a shard
        number = 8 * groups * SLOTS  # [E, G, C] of one shard
        if cell.dispatch == "ragged":
            n, tokens = cfg.mesh.over(cell.experts), groups * GROUP
            number = n * min(tokens * min(2, 8 // n), groups * 8 // n * SLOTS)  # [n, M], the worst case
        out += ways * [(s, 4 * number * D // (cfg.mesh.tensor if cell.share else 1)) for s in stages]
    return sorted(out)


def stray(cell: Cell, found: list[Collective]) -> list[Collective]:
    """Collectives of a cell that neither sum something up nor are meant to move anything.

    Meant are: what stages pass on, once a tick; weights that are gathered over `fsdp`; the keys and values of whole
    rows, or pieces of them that go round, once a layer and pass; and the shares of what tensor shards sent.
    """
    cfg = config(cell)
    n, runs = cfg.mesh.context, cell.turns
    heads = cfg.model.heads * cfg.model.key_dim  # values are made as wide as keys
    rows = 2 * 4 * heads * L * B // cfg.mesh.over(cfg.rules.batch) // cell.microbatches // cfg.mesh.tensor  # k and v
    groups = B * L // GROUP // cfg.mesh.over(cfg.rules.tokens) // cell.microbatches

    tokens = 4 * D * B * L // cfg.mesh.over(cfg.rules.tokens) // cell.microbatches  # bytes

    def meant(c: Collective) -> bool:
        if c.axes == ("tensor",) and cell.split and c.op == "all-gather" and c.modules in SPLIT:
            shares = (1, cell.microbatches, cell.microbatches / cell.stages)  # a pipeline has its rows there at once
            shares = shares[: 3 if c.modules in SPLIT[2:] and cell.stages > 1 else 1]
            if c.bytes in [tokens * n for n in (*shares, cfg.inputs / L)]:
                return True
        if cell.stages > 1 and c.axes == ("stage",):
            if c.bytes <= 4 * 8 * cell.layers:  # what is counted by layer and expert
                return True
            if c.times == 1 and cell.rounds > 1:  # layers are dealt out to the rounds
                return c.op == "collective-permute" and c.bytes <= cell.rounds * max(weights(cfg))
            passed = tokens // cfg.mesh.over(cfg.rules.residual)
            ticks = Schedule(cell.stages, cell.microbatches, cell.rounds).ticks
            return (c.op, c.bytes, c.times) == ("collective-permute", passed, ticks)
        if c.axes == ("fsdp",):  # weights of a round are no arguments any more
            return c.op == "all-gather" and (only_weights(c) or (cell.rounds > 1 and c.bytes in weights(cfg)))
        if c.axes == ("context",) and c.modules == ("attention",):
            if cell.attention == "ring":
                return c.op == "collective-permute" and c.bytes == rows // n and c.times in (runs, runs * (n - 1))
            return (c.op, c.bytes, c.times) in (("all-gather", rows, runs), ("reduce-scatter", rows // n, runs))
        if c.axes == ("tensor",) and cell.share and c.op in ("all-gather", "reduce-scatter"):
            return {"attention", "embed", "head"}.isdisjoint(c.modules) and c.bytes <= 4 * 8 * groups * SLOTS * D
        return False

    return [c for c in found if c.op not in ("all-reduce", "all-to-all") and not meant(c)]


def weights(cfg: Config) -> set[int]:
    """Bytes of the arrays of one layer on a device, where they are gathered over `fsdp`."""
    leaves = [
        (shape[1:], cfg.rules.layout(*axes)[1:]) for _, shape, axes in Model.of(cfg).leaves() if axes[0] == "layers"
    ]
    split = [[cfg.mesh.over(tuple(a for a in dim if a != "fsdp")) for dim in layout] for _, layout in leaves]
    return {4 * math.prod(shape) // math.prod(n) for (shape, _), n in zip(leaves, split, strict=True)}


def only_weights(c: Collective) -> bool:
    return bool(c.arguments) and all(argument.startswith("params[") for argument in c.arguments)


@functools.cache
def expected(layers: int, latent: bool, encoder: bool) -> Step:
    """What one device says; no number of it depends on the dispatcher."""
    return step(config(None, layers, latent, encoder))[0]


def agree(got: Step, want: Step) -> None:
    """Floats to 1e-5 of the largest entry of their array, counts exactly."""
    off = []
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(got), jax.tree.leaves(want), strict=True):
        error = np.abs(a.astype(np.float64) - b.astype(np.float64)).max()
        if not error <= (1e-5 * np.abs(b).max() if a.dtype.kind == "f" else 0):  # written so that NaN fails too
            off.append(f"{jax.tree_util.keystr(path)} by {error:.2g} of {np.abs(b).max():.3g}")
    assert not off, "\n".join(off)
