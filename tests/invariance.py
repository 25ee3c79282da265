"""The battery's cells and how one is run: a step of the library on a mesh, and the oracle's answer to it."""

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
import step_oracle
from jax.sharding import NamedSharding, PartitionSpec

from moe_jax import mesh as meshes
from moe_jax.config import Config, DataConfig, MeshConfig, ModelConfig, MoEConfig, RouterConfig, TrainConfig
from moe_jax.layers.common import fold
from moe_jax.layers.moe import group_keys
from moe_jax.routing import draw
from moe_jax.train.state import Model, Weights
from moe_jax.train.step import make_eval_step, moved, total_loss

B, L, D, E, LAYERS, VOCAB = 64, 12, 16, 8, 2, 40
BIAS_RATE = 0.125

MESHES = {
    str(m).replace(" x ", ","): m
    for m in (
        MeshConfig(data=8),
        MeshConfig(expert=8),
        MeshConfig(data=4, expert=2),
        MeshConfig(data=2, expert=4),
        MeshConfig(fsdp=8),
        MeshConfig(fsdp=2, expert=4),
        MeshConfig(data=2, fsdp=2, expert=2),
        MeshConfig(expert=4, tensor=2),
        MeshConfig(data=2, expert=2, tensor=2),
        MeshConfig(fsdp=2, expert=2, tensor=2),
    )
}
MICROBATCHES = (1, 2, 4)
REMAT = ("none", "full", "dots", "exchange")
DISPATCH = {  # the first three drop the same choices; the last runs dropless wherever they would drop
    "einsum": {"dispatch": "einsum"},
    "gather": {"dispatch": "gather"},
    "ragged": {"dispatch": "ragged"},
    "fallback": {"dispatch": "gather", "overflow": "fallback"},
}

# Coefficients that are 0 or not here only decide which statistics the layers make: each method brings its own.
STEERED = {"device_loss": 1.0, "communication_loss": 1.0, "balance_devices": 4, "importance_loss": 1.0}
ROUTERS = {
    "deepseek_v3": MoEConfig(
        top_k=3,
        router=RouterConfig("deepseek_v3", groups=4, topk_groups=2, scale=2.5),
        capacity_factor=0.9,
        bias_rate=0.0,  # there, and moved by the test: a moving bias beside losses is refused
        sequence_loss=1.0,
        **STEERED,
    ),
    "gshard": MoEConfig(
        top_k=2,
        router=RouterConfig("gshard", second="random", threshold=0.7),
        capacity_factor=0.8,
        group_size=L // 2,
        balance_over="sequence",
        **STEERED,
    ),
    "noisy_topk": MoEConfig(
        top_k=2,
        router=RouterConfig("noisy_topk"),
        capacity_factor=1.0,
        priority="token",
        load_loss=1.0,
        importance_loss=1.0,
    ),
    "softmax_topk": MoEConfig(
        top_k=2,
        router=RouterConfig("softmax_topk", normalize="after"),
        capacity_factor=0.9,
        group_size=2 * L,
        priority="probability",
        balance_over="microbatch",
    ),
}


class Method(NamedTuple):
    """A way to balance: coefficients, or a bias that moves."""

    coefficients: dict[str, float]
    bias: str | None = None  # bias_update


ALONE = {
    "balance": Method({"balance_loss": 0.5}),
    "device": Method({"device_loss": 0.5}),
    "communication": Method({"communication_loss": 0.5}),
    "importance": Method({"importance_loss": 0.3}),
    "z": Method({"z_loss": 0.1}),
    "sequence": Method({"sequence_loss": 0.5}),
    "load": Method({"load_loss": 0.3}),
    "sign": Method({}, "sign"),
    "centred": Method({"sequence_loss": 0.1}, "centred"),
}


def several(*names: str) -> Method:
    return Method({k: v for name in names for k, v in ALONE[name].coefficients.items()})


METHODS = {
    "deepseek_v3": {n: m for n, m in ALONE.items() if n != "load"}
    | {"several": several("balance", "sequence", "device", "communication", "importance", "z")},
    "gshard": {n: ALONE[n] for n in ("balance", "device", "communication", "importance", "z")}
    | {"several": several("balance", "device", "z")},
    "noisy_topk": {n: ALONE[n] for n in ("balance", "importance", "load", "z")}
    | {"several": several("balance", "importance", "load", "z")},
    "softmax_topk": {n: ALONE[n] for n in ("balance", "z")} | {"several": several("balance", "z")},
}


class Program(NamedTuple):
    """What needs a compilation of its own."""

    mesh: str
    microbatches: int
    remat: str
    scan: bool
    router: str
    dispatch: str

    def __str__(self) -> str:
        loop = "scan" if self.scan else "unrolled"
        return f"{self.mesh}-m{self.microbatches}-{self.remat}-{loop}-{self.router}-{self.dispatch}"


class Evaluation(NamedTuple):
    """A program of the evaluation step."""

    mesh: str
    router: str
    dispatch: str

    def __str__(self) -> str:
        return f"{self.mesh}-{self.router}-{self.dispatch}"


class Cell(NamedTuple):
    program: Program | Evaluation
    padding: int  # percent
    method: str = "evaluation"

    def __str__(self) -> str:
        return f"{self.program}-pad{self.padding}-{self.method}"


def programs() -> list[Program]:
    """Every mesh with every remat, every router and every dispatcher, so that every two settings meet.

    One program a mesh is unrolled: these take the longest to compile.
    """
    kinds, ways = list(ROUTERS), list(DISPATCH)
    return [
        Program(
            mesh,
            microbatches=MICROBATCHES[(i + j) % 3],
            remat=remat,
            scan=j != (i + 3 + i // 4) % 4,
            router=kinds[(i + j) % 4],
            dispatch=ways[(i // 2 + j) % 4],
        )
        for i, mesh in enumerate(MESHES)
        for j, remat in enumerate(REMAT)
    ]


def cells() -> list[Cell]:
    return [Cell(p, padding, method) for p in programs() for padding in (0, 30) for method in METHODS[p.router]]


def evaluations() -> list[Cell]:
    """On every mesh, for the routers that draw noise in training, by each dispatcher in turn."""
    return [
        Cell(Evaluation(mesh, ("gshard", "noisy_topk")[i % 2], ("gather", "ragged", "einsum")[i % 3]), padding)
        for i, mesh in enumerate(MESHES)
        for padding in (0, 30)
    ]


def config(program: Program) -> Config:
    sizes = {"experts": E, "d_ff": 20, "min_capacity": 1}
    moe = dataclasses.replace(
        ROUTERS[program.router], **sizes, **DISPATCH[program.dispatch], balance_loss=1.0, z_loss=1.0
    )
    model = ModelConfig(
        vocab=VOCAB, layers=LAYERS, d_model=D, heads=2, max_length=L, scan=program.scan, remat=program.remat, moe=moe
    )
    train = TrainConfig(microbatches=program.microbatches)
    return Config(model=model, mesh=MESHES[program.mesh], data=DataConfig(length=L, batch=B), train=train)


def plain(router: str, mesh: str = "data=8", dispatch: str = "einsum") -> Program:
    """A program with nothing else special about it."""
    return Program(mesh, 1, "none", True, router, dispatch)


@functools.cache
def batch_of(padding: int) -> dict[str, np.ndarray]:
    """Random tokens in two segments a row, with padding at the end of rows, one row of it wholly."""
    rng = np.random.default_rng(0)
    # No token twice in two rows: at the start of a segment two equal ones have equal scores, and rounding alone would
    # say which of them is dropped.
    tokens = np.stack([rng.permutation(VOCAB)[: 2 * (L + 1)] for _ in range(B // 2)]).reshape(B, L + 1).astype(np.int32)
    place = np.arange(L)[None].repeat(B, 0)
    segments = np.where(place < 5, 1, 2).astype(np.int32)
    if padding:
        length = rng.permutation(np.resize(np.arange(5, L + 1), B))
        length[5] = 0
        segments[place >= length[:, None]] = 0
        assert abs((segments == 0).mean() - padding / 100) < 0.01
    weights = ((segments > 0) & (place != 4)).astype(np.float32)
    positions = np.where(place < 5, place, place - 5).astype(np.int32)
    rows = {"tokens": tokens[:, :-1], "targets": tokens[:, 1:], "segments": segments}
    return rows | {"positions": positions, "weights": weights}


@functools.cache
def weights_of(router: str) -> Weights:
    """Random numbers for every leaf, and a router strong enough that loads and gates differ."""
    model = Model.of(config(plain(router)))
    rng = np.random.default_rng(1)

    def numbers(path, shape):
        name = path[-1].key
        spread = {"scale": 0.8, "router": 2.0, "noise": 0.5}.get(name, 1.0) / np.sqrt(D)
        return (rng.normal(size=shape.shape) * spread + (name == "scale")).astype(np.float32)

    params = jax.tree_util.tree_map_with_path(numbers, model.shapes)
    # below 0 for many experts: a mask of 0 would then let the experts of other groups in
    bias = jax.tree.map(lambda s: rng.normal(-0.5, 0.4, s.shape).astype(np.float32), model.bias_shapes)
    return Weights(params, bias)


def row_keys() -> jax.Array:
    return jax.random.split(jax.random.key(7), B)


@functools.cache
def noise_of(moe: MoEConfig) -> np.ndarray:
    """The numbers that each layer draws for its tokens, [layers, T, ...]; zeros where it draws none."""
    S = moe.group_size or L

    @jax.jit
    def drawn(layer):
        keys = group_keys(fold(fold(fold(fold(row_keys(), 1), layer), 0), 2), L, S)  # run, layer, block, MoE
        return jax.vmap(lambda k: draw(k, moe, (S, E)))(fold(keys, 0)).router

    layers = [drawn(n) for n in range(LAYERS)]
    return np.stack([np.zeros(B * L) if x is None else np.asarray(x).reshape(B * L, *x.shape[2:]) for x in layers])


@functools.cache
def expected(router: str, microbatches: int, padding: int, mode: str = "drop") -> dict[str, step_oracle.Answer]:
    """The oracle's answers to all methods, or to evaluation; only one loss is defined by the microbatches.

    Of the library it has the random numbers alone.

    Args:
        mode: `drop`; `fallback`, where the same experts overflow and keep all; `evaluation`, which is dropless too.
    """
    moe, train = config(plain(router)).model.moe, mode != "evaluation"
    if moe.balance_over != "microbatch" and microbatches > 1:
        return expected(router, 1, padding, mode)
    S, r = moe.group_size or L, moe.router
    case = step_oracle.Case(
        kind=r.kind,
        top_k=moe.top_k,
        experts=E,
        group=S,
        priority=moe.priority,
        normalize=r.normalize,
        scale=r.scale,
        threshold=r.threshold,
        groups=r.groups,
        topk_groups=r.topk_groups or 1,
        devices=moe.balance_devices or 1,
        balance_over=moe.balance_over,
    )
    weights, methods = weights_of(router), METHODS[router]
    bias = np.concatenate(jax.tree.leaves(weights.bias)) if weights.bias else np.zeros((LAYERS, E))
    together = max(1, S // L)  # neighbouring rows of one group stay in one part
    batch = batch_of(padding) | {"part": np.arange(B) // together % microbatches}
    slots = math.ceil(moe.top_k * S * moe.capacity_factor / E - 1e-9)
    limit = {"drop": slots, "fallback": S, "evaluation": None}[mode]  # a token picks an expert once
    coefficients = [m.coefficients for m in methods.values()] if train else [{}]
    answers = step_oracle.step(case, weights.params, bias, batch, noise_of(moe), limit, coefficients)
    drops = answers[0].counts["routed"] - answers[0].counts["kept"]
    assert (drops > 0).all() if mode == "drop" else (drops == 0).all(), "the battery needs drops"
    if mode == "fallback":  # the first layer overflows, for the same tokens are dropped there where dropping is allowed
        expected(router, microbatches, padding, "drop")
    assert not train or all(g.any() for a in answers for g in jax.tree.leaves(a.gradient)), "and gradients everywhere"
    return dict(zip(methods, answers, strict=False))


class Step(NamedTuple):
    """What is compared: of the library, or of the oracle."""

    loss: Any
    gradient: Any
    counts: dict[str, np.ndarray]
    bias: Any = None  # [layers, E], where one moves


def tuned(model: Model, coefficients: dict[str, Any], bias_update: str = "sign") -> Model:
    """The model with other coefficients, which may be traced: one program serves all methods."""
    rate = None if model.cfg.model.moe.bias_rate is None else BIAS_RATE
    moe = dataclasses.replace(model.cfg.model.moe, **coefficients, bias_rate=rate, bias_update=bias_update)
    transformer = dataclasses.replace(model.cfg.model, moe=moe)
    return dataclasses.replace(model, cfg=dataclasses.replace(model.cfg, model=transformer))


def counts_of(stats: Any) -> dict[str, np.ndarray]:
    return {name: np.asarray(getattr(stats, name)) for name in ("tokens", "routed", "kept", "load")}


def build(program: Program | Evaluation) -> Callable[[int, str], Step]:
    """Compile a program; the result runs (padding, method)."""
    return trained(program) if isinstance(program, Program) else evaluated(program)


def trained(program: Program) -> Callable[[int, str], Step]:
    """The loss, its gradient and the moves of the biases."""
    cfg = config(program)
    model, mesh = Model.of(cfg), meshes.build_mesh(cfg.mesh)
    moe, where = cfg.model.moe, model.weight_shardings(mesh)
    updates = () if moe.bias_rate is None else ("sign", "centred")

    def step(weights: Weights, batch, keys, coefficients):
        loss = jax.value_and_grad(total_loss, argnums=1, has_aux=True)
        (value, sums), gradient = loss(tuned(model, coefficients), weights.params, batch, keys, weights.bias)
        return value, gradient, sums.stats, {u: moved(tuned(model, {}, u), weights.bias, sums.stats) for u in updates}

    given = inputs(model, program.router, mesh)
    compiled = jax.jit(step, out_shardings=(None, where.params, None, None))

    def run(padding: int, name: str) -> Step:
        method = METHODS[program.router][name]
        on = [loss for loss in step_oracle.LOSSES if getattr(moe, loss)]
        coefficients = {loss: np.float32(method.coefficients.get(loss, 0.0)) for loss in on}
        with jax.set_mesh(mesh):
            out = compiled(*given(padding), row_keys(), coefficients)
        value, gradient, stats, biases = jax.tree.map(np.asarray, out)
        bias = None if method.bias is None else np.concatenate(jax.tree.leaves(biases[method.bias]))
        return Step(value, gradient, counts_of(stats), bias)

    return run


def inputs(model: Model, router: str, mesh: jax.sharding.Mesh) -> Callable[[int], tuple[Any, Any]]:
    """Weights, and the batch for each padding, on the mesh."""
    rows = NamedSharding(mesh, PartitionSpec(model.cfg.rules.batch))
    weights = jax.device_put(weights_of(router), model.weight_shardings(mesh))
    return functools.cache(lambda padding: (weights, jax.device_put(batch_of(padding), rows)))


def evaluated(program: Evaluation) -> Callable[[int, str], Step]:
    """The dropless evaluation step: cross entropy and counts."""
    model = Model.of(config(plain(program.router, program.mesh, program.dispatch)))
    mesh = meshes.build_mesh(model.cfg.mesh)
    given = inputs(model, program.router, mesh)
    compiled = jax.jit(make_eval_step(model, None))

    def run(padding: int, name: str) -> Step:
        with jax.set_mesh(mesh):
            sums = compiled(*given(padding))
        return Step(np.asarray(sums.nats) / np.asarray(sums.targets), {}, counts_of(sums.stats))

    return run


def answer(cell: Cell) -> Step:
    """What the oracle says to a cell."""
    router = cell.program.router
    if isinstance(cell.program, Evaluation):
        [want] = expected(router, 1, cell.padding, "evaluation").values()
        return Step(want.loss, {}, want.counts)
    method = METHODS[router][cell.method]
    mode = "fallback" if cell.program.dispatch == "fallback" else "drop"
    want = expected(router, cell.program.microbatches, cell.padding, mode)[cell.method]
    bias = None
    if method.bias is not None:
        before = np.concatenate(jax.tree.leaves(weights_of(router).bias))
        bias = step_oracle.moved(before, want.counts["load"], BIAS_RATE, method.bias == "centred")
    return Step(*want, bias)


def agree(got: Step, want: Step) -> None:
    """Floats to 1e-5 of the largest entry of their array, counts exactly.

    Raises:
        AssertionError: which of loss, gradient, counts and bias differ, and where by how much.
    """
    found: dict[str, list[str]] = {}
    for kind, own, other in zip(Step._fields, got, want, strict=True):
        paths, others = jax.tree_util.tree_leaves_with_path(own), jax.tree.leaves(other)
        for (path, a), b in zip(paths, others, strict=True):
            off, size = np.abs(a - np.asarray(b, np.float64)).max(), np.abs(b).max()
            if not off <= (0 if kind == "counts" else 1e-5 * size):  # written so that NaN fails too
                found.setdefault(kind, []).append(f"{kind}{jax.tree_util.keystr(path)} by {off:.2g} of {size:.3g}")
    if found:
        raise AssertionError("\n".join([f"differ in {', '.join(found)}:", *itertools.chain(*found.values())]))
