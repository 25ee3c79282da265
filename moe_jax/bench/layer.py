"""`moe-jax bench layer`: one MoE layer with each dispatcher, against the products of its experts alone.

The ideal is the batched products `ecd,edf->ecf` and back on a ready buffer of K*T*f rows, in the same type and the same
process: no router, no dispatch. Every dispatcher is measured against this one reference, dropless ones included.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import ceil
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from moe_jax import balance, cost
from moe_jax.bench.timing import Times, by_turns, cpu_ratio, machine, ratio
from moe_jax.capacity import capacity
from moe_jax.config import MoEConfig, Problem, Refused, RouterConfig
from moe_jax.dispatch import ragged_plan
from moe_jax.grouped import grouped_ffn, ragged
from moe_jax.layers.common import ACTIVATIONS
from moe_jax.layers.moe import SILENT, MoELayer
from moe_jax.rows import gather_rows, sum_rows
from moe_jax.schema import GATED

PHASES = ("forward", "forward+backward")


@dataclass(frozen=True)
class Shape:
    """What is measured."""

    tokens: int = 4096
    experts: int = 8
    top_k: int = 2
    d_model: int = 256
    d_ff: int = 512
    ffn: str = "relu"
    dtype: str = "float32"
    capacity_factor: float = 1.25
    group_size: int | None = None  # unset: einsum by the cost model, others all tokens

    @property
    def matrices(self) -> int:
        return cost.matrices(self.ffn)

    def group(self, dispatch: str) -> int:
        """Tokens of a group."""
        if self.group_size or dispatch != "einsum":
            return self.group_size or self.tokens
        return cost.einsum_groups(self.tokens, self.d_ff, self.matrices).size


def both(f: Callable) -> Callable:
    """f(variables, constants) -> outputs, with gradients of its floating outputs for fixed cotangents of one."""

    def run(variables: Any, constants: Any) -> Any:
        def floats(variables: Any) -> tuple[list[jax.Array], Any]:
            leaves = jax.tree.leaves(f(variables, constants))
            inexact = [x for x in leaves if jnp.issubdtype(x.dtype, jnp.inexact)]
            return inexact, [x for x in leaves if not jnp.issubdtype(x.dtype, jnp.inexact)]

        out, back, rest = jax.vjp(floats, variables, has_aux=True)
        return out, rest, back([jnp.ones_like(x) for x in out])

    return run


class Piece:
    """A compiled function with its arguments."""

    def __init__(self, f: Callable, phase: str, variables: Any, constants: Any = ()):
        run = jax.jit(f if phase == "forward" else both(f))
        self.args = (variables, constants)
        self.compiled = run.lower(*self.args).compile()

    def __call__(self) -> Any:
        return self.compiled(*self.args)

    @property
    def temporaries(self) -> int | None:
        """Bytes that the program needs beside its arguments and results; None where the platform does not say."""
        memory = self.compiled.memory_analysis()
        return None if memory is None else int(memory.temp_size_in_bytes)


def ideal(shape: Shape, phase: str) -> Piece:
    """The products alone on a ready buffer [E, C, D]."""
    E, D, F, dtype = shape.experts, shape.d_model, shape.d_ff, jnp.dtype(shape.dtype)
    C = ceil(shape.top_k * shape.tokens * shape.capacity_factor / E)
    sizes = {"x": (E, C, D), "w_up": (E, D, F), "w_down": (E, F, D)}
    if shape.ffn in GATED:
        sizes["w_gate"] = (E, D, F)
    keys = jax.random.split(jax.random.key(0), len(sizes))
    arrays = {n: 0.05 * jax.random.normal(k, s) for k, (n, s) in zip(keys, sizes.items(), strict=True)}

    def products(a: dict[str, jax.Array], _: Any) -> jax.Array:
        w = {n: v.astype(dtype) for n, v in a.items()}  # parameters stay float32, as in the layer
        h = ACTIVATIONS[shape.ffn](*(w["x"] @ w[n] for n in ("w_gate", "w_up") if n in w))  # [E,C,F]
        return h @ w["w_down"]  # [E,C,D]

    return Piece(products, phase, arrays | {"x": arrays["x"].astype(dtype)})


def build(shape: Shape, dispatch: str) -> tuple[MoELayer, jax.Array]:
    """The layer and its tokens [1, T, D]. Ragged dispatch drops nothing, the others hold to the capacity."""
    group = shape.group(dispatch)
    if shape.tokens % group:
        why = f"{group} does not divide {shape.tokens} tokens"
        raise Refused(Problem("--group-size", why, f"use a divisor of {shape.tokens}"))
    options: dict[str, Any] = {"dispatch": dispatch, "d_ff": shape.d_ff, "group_size": group}
    moe = MoEConfig(
        experts=shape.experts,
        top_k=shape.top_k,
        router=RouterConfig("softmax_topk", normalize=None if shape.top_k == 1 else "before"),
        capacity_factor=None if dispatch == "ragged" else shape.capacity_factor,
        min_capacity=1,
        **options,
    )
    layer = MoELayer(moe, shape.d_model, ffn=shape.ffn, rngs=nnx.Rngs(params=0))
    x = jax.random.normal(jax.random.key(1), (1, shape.tokens, shape.d_model)).astype(shape.dtype)
    return layer, x


def pieces(layer: MoELayer, x: jax.Array, phase: str) -> dict[str, Piece]:
    """The whole layer, and its parts one by one, each on ready inputs."""
    graph, state = nnx.split(layer)
    moe, (_, T, D) = layer.moe, x.shape
    S = layer.group_size(1, T, moe.capacity_factor)
    C = capacity(moe, S, moe.capacity_factor)
    tokens, mask = x.reshape(-1, S, D), jnp.ones((T // S, S), bool)

    def whole(v: Any, _: Any) -> Any:
        return nnx.merge(graph, v[0])(v[1], train=True)  # with the statistics, which every train step uses

    def routing(v: Any, _: Any) -> Any:
        routed, slots = nnx.merge(graph, v[0]).route(moe, v[1], mask, SILENT, C, moe.dispatch)
        return slots, routed, balance.statistics(routed, slots, moe, mask)

    slots, routed, _ = jax.jit(routing)((state, tokens), ())
    out = {"layer": Piece(whole, phase, (state, x)), "routing": Piece(routing, phase, (state, tokens))}
    weights, kind = layer.experts.weights(x.dtype), layer.experts.kind
    if moe.dispatch == "ragged":
        plan = ragged_plan(routed, slots, C)

        def dispatch(v: Any, c: Any) -> Any:
            made = ragged_plan(c[0], c[1]._replace(gate=v[1]), C)
            return gather_rows(v[0].reshape(-1, D), made.rows), made.weight

        def combine(v: Any, plan: Any) -> jax.Array:
            return sum_rows((v[0].astype(jnp.float32) * v[1][:, None]).astype(x.dtype), plan.rows)

        def experts(v: Any, sizes: Any) -> jax.Array:
            return grouped_ffn(v[0], sizes, v[1], ACTIVATIONS[kind])

        rows = gather_rows(tokens.reshape(-1, D), plan.rows)
        out["experts"] = Piece(experts, phase, (rows, weights), plan.sizes)
        out["combine"] = Piece(combine, phase, (rows, plan.weight), plan)
    else:
        make_plan, move, back = layer.dispatcher(moe.dispatch, C, x.dtype)

        def dispatch(v: Any, c: Any) -> Any:
            made = make_plan(c[0], c[1]._replace(gate=v[1]))
            return move(v[0], made), made

        def combine(y: jax.Array, plan: Any) -> jax.Array:
            return back(y, plan)

        def experts(v: Any, _: Any) -> jax.Array:
            return nnx.merge(graph, v[1]).experts(v[0])

        plan = jax.jit(make_plan)(routed, slots)
        buffers = jax.jit(move)(tokens, plan)
        out["experts"] = Piece(experts, phase, (buffers, state))
        out["combine"] = Piece(combine, phase, buffers, plan)
    out["dispatch"] = Piece(dispatch, phase, (tokens, slots.gate), (routed, slots))
    return out


def programs(shape: Shape, dispatch: str, phase: str, parts: bool, ragged_dot: bool) -> dict[str, Piece]:
    """What is timed of one dispatcher: the layer, and on request its parts and the products by `jax.lax.ragged_dot`."""
    made = pieces(*build(shape, dispatch), phase)
    out = {name: piece for name, piece in made.items() if parts or name == "layer"}
    if ragged_dot and dispatch == "ragged":
        (rows, weights), sizes = made["experts"].args

        def experts(v: Any, sizes: Any) -> jax.Array:
            return ragged(v[0], sizes, v[1], ACTIVATIONS[shape.ffn])[0]

        out |= {"experts": made["experts"], "ragged_dot": Piece(experts, phase, (rows, weights), sizes)}
    return out


def measure(
    shapes: Sequence[Shape],
    dispatchers: Sequence[str],
    rounds: int = 9,
    parts: bool = True,
    ragged_dot: bool = False,
) -> dict[str, Any]:
    """Time every dispatcher at every shape in both phases, all by turns; `rows` holds one entry for each.

    Args:
        shapes: may differ in the number of experts.
        ragged_dot: time the products of the ragged dispatcher by `jax.lax.ragged_dot` too.
    Returns:
        `rows[]` with the shape, dispatcher, phase, ratio_to_ideal (median over rounds of wall time against the ideal
        in the same round), its twin in CPU seconds, ratio_to_first (against the layer of the first shape), seconds,
        temporaries in bytes and seconds of each part.
    """
    rows = []
    for phase in PHASES:
        run = {(shape.experts, "ideal"): ideal(shape, phase) for shape in shapes}
        for shape in shapes:
            for name in dispatchers:
                made = programs(shape, name, phase, parts, ragged_dot)
                run |= {(shape.experts, f"{name}.{part}"): piece for part, piece in made.items()}
        times = by_turns(run, rounds)
        for shape in shapes:
            mine = {name: (run[E, name], t) for (E, name), t in times.items() if shape.experts == E}
            for name in dispatchers:
                first = times[shapes[0].experts, f"{name}.layer"]
                rows.append(
                    row(shape, name, phase, mine, parts) | {"ratio_to_first": ratio(mine[f"{name}.layer"][1], first)}
                )
    shape = shapes[0]
    rule = cost.formula(shape.group("einsum"), shape.d_ff, shape.matrices)
    return {"bench": "layer", **machine(), "rounds": rounds, "formula": rule, "rows": rows}


def row(shape: Shape, name: str, phase: str, run: Mapping[str, tuple[Piece, Times]], parts: bool) -> dict[str, Any]:
    """What there is to say of a dispatcher at a shape."""
    (layer, t), (floor, ideal_times) = run[f"{name}.layer"], run["ideal"]
    group = shape.group(name)
    overhead = cost.einsum_overhead(group, shape.d_ff, shape.matrices) if name == "einsum" else None
    where = ("routing", "dispatch", "experts", "combine") if parts else ()
    dense = run.get(f"{name}.ragged_dot")
    return {
        "dispatcher": name,
        "experts": shape.experts,
        "top_k": shape.top_k,
        "d_model": shape.d_model,
        "d_ff": shape.d_ff,
        "tokens": shape.tokens,
        "ffn": shape.ffn,
        "dtype": shape.dtype,
        "group_size": group,
        "capacity_factor": None if name == "ragged" else shape.capacity_factor,
        "phase": phase,
        "ratio_to_ideal": ratio(t, ideal_times),
        "predicted_ratio": None if overhead is None else 1 + overhead,
        "ratio_to_ideal_cpu": cpu_ratio(t, ideal_times),
        "seconds": t.seconds,
        "ideal_seconds": ideal_times.seconds,
        "temporaries_bytes": layer.temporaries,
        "ideal_temporaries_bytes": floor.temporaries,
        "parts_seconds": {part: run[f"{name}.{part}"][1].seconds for part in where},
        "ragged_dot_to_experts": None if dense is None else ratio(dense[1], run[f"{name}.experts"][1]),
    }


def lines(report: dict[str, Any]) -> list[str]:
    """The report as a table for people."""
    out = [
        report["formula"],
        f"{'dispatcher':10} {'E':>4} {'phase':17} {'x ideal':>7} {'x cpu':>6} {'ms':>8} {'temp MB':>8}  parts, ms",
    ]
    for r in report["rows"]:
        parts = " ".join(f"{name} {1e3 * s:.1f}" for name, s in r["parts_seconds"].items())
        memory = "-" if r["temporaries_bytes"] is None else f"{r['temporaries_bytes'] / 1e6:.0f}"
        ratios = f"{r['ratio_to_ideal']:7.2f} {r['ratio_to_ideal_cpu']:6.2f}"
        head = f"{r['dispatcher']:10} {r['experts']:4} {r['phase']:17}"
        out.append(f"{head} {ratios} {1e3 * r['seconds']:8.1f} {memory:>8}  {parts}")
    first = report["rows"][0]["experts"] if report["rows"] else 0
    for r in report["rows"]:
        if r["experts"] != first:
            more = f"{r['experts']} experts take {r['ratio_to_first']:.2f} times as long as {first}"
            out.append(f"{r['dispatcher']}, {r['phase']}: {more}")
        if r["ragged_dot_to_experts"] is not None:
            more = f"the products by jax.lax.ragged_dot take {r['ragged_dot_to_experts']:.1f} times as long"
            out.append(f"{r['dispatcher']}, {r['experts']} experts, {r['phase']}: {more}")
    return out
