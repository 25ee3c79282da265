"""`moe-jax bench step`: a whole train step, its matrix products alone, and a dense model of equal active FLOPs."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from moe_jax import cost
from moe_jax import mesh as meshes
from moe_jax.bench.timing import by_turns, cpu_ratio, machine, ratio
from moe_jax.capacity import capacity
from moe_jax.config import Config, ModelConfig, Problem, Refused
from moe_jax.pattern import seen_blocks
from moe_jax.rules import sharding
from moe_jax.train.state import Model
from moe_jax.train.step import lower_train_step


class Product(NamedTuple):
    """A batch of b products [m, k] x [k, n]."""

    b: int
    m: int
    k: int
    n: int

    @property
    def flops(self) -> int:
        """Of the product and of its two gradients."""
        return 3 * 2 * self.b * self.m * self.k * self.n


def ffn_products(rows: int, batch: int, D: int, F: int, kind: str) -> list[Product]:
    """Two matrices, or three."""
    return [Product(batch, rows, D, F)] * (cost.matrices(kind) - 1) + [Product(batch, rows, F, D)]


def layer_products(
    m: ModelConfig,
    kind: str,
    B: int,
    L: int,
    *,
    window: int | None = None,
    both_ways: bool = False,
    inputs: int = 0,
) -> list[Product]:
    """The products of one layer, without those that move tokens to experts and back.

    Args:
        window: tokens that a query sees; unset: all so far. both_ways: of an encoder.
        inputs: tokens M that an encoder read, to which a decoder's layer attends too.
    """
    D, H, J, N, V, T = m.d_model, m.heads, m.resolved_kv_heads, m.key_dim, m.value_dim, B * L
    if m.latent is None:
        out = [Product(1, T, D, H * N), *[Product(1, T, D, J * N)] * 2]
    else:
        Q, C = m.latent.query, m.latent.key_value
        out = [Product(1, T, D, Q), Product(1, T, Q, H * N)] if Q else [Product(1, T, D, H * N)]
        out += [
            Product(1, T, D, C + m.latent.rotary),
            Product(1, T, C, H * m.resolved_head_dim),
            Product(1, T, C, H * V),
        ]
    out.append(Product(1, T, H * V, D))
    for queries, keys in [(L, L)] if both_ways else seen_blocks(L, window):  # all, or causal blocks of them
        out += [Product(B * H, queries, N, keys), Product(B * H, queries, keys, V)]
    if inputs:
        out += [Product(1, T, D, H * N), *[Product(1, B * inputs, D, J * N)] * 2, Product(1, T, H * V, D)]
        out += [Product(B * H, L, N, inputs), Product(B * H, L, inputs, V)]
    if kind == "dense" or m.moe is None:
        return out + ffn_products(T, 1, D, m.d_ff, m.ffn)
    moe = m.moe
    F = moe.d_ff or m.d_ff
    S = cost.group_size(moe, moe.capacity_factor, L, F, cost.matrices(m.ffn))
    # Without a limit, the rows in use: what sorted rows multiply, and buffers that drop nothing exceed.
    dropless = moe.capacity_factor is None
    rows = -(-moe.top_k * T // moe.experts) if dropless else capacity(moe, S, moe.capacity_factor) * (T // S)
    out += [Product(1, T, D, moe.experts), *ffn_products(rows, moe.experts, D, F, m.ffn)]
    out += ffn_products(T, 1, D, moe.shared_width(F), m.ffn) if moe.shared_experts else []
    return out + ([Product(1, T, D, 1)] if moe.shared_gate else [])


def step_products(cfg: Config) -> list[list[Product]]:
    """Products of every layer, then of the head."""
    m, B, L, M = cfg.model, cfg.data.batch, cfg.data.length, cfg.inputs
    encoder = [layer_products(m, kind, B, M, both_ways=True) for kind in m.encoder_kinds]
    both = zip(m.layer_kinds, m.windows, strict=True)
    layers = [layer_products(m, kind, B, L, window=window, inputs=M) for kind, window in both]
    return [*encoder, *layers, [Product(1, B * L, m.d_model, m.vocab)]]


def products_alone(cfg: Config) -> Callable[[], list[Any]]:
    """A function that runs every product of a step with its two gradients, on ready operands."""
    dtype = jnp.dtype(cfg.model.dtype)

    @jax.jit
    def run(operands: list[tuple[jax.Array, jax.Array, jax.Array]]) -> list[Any]:
        return [(x @ w, g @ w.swapaxes(1, 2), x.swapaxes(1, 2) @ g) for x, w, g in operands]

    made: dict[tuple[Product, ...], Any] = {}
    for part in step_products(cfg):
        if tuple(part) not in made:
            keys = iter(jax.random.split(jax.random.key(0), 3 * len(part)))
            shapes = [((p.b, p.m, p.k), (p.b, p.k, p.n), (p.b, p.m, p.n)) for p in part]
            made[tuple(part)] = [tuple(jax.random.normal(next(keys), s).astype(dtype) for s in t) for t in shapes]
    order = [made[tuple(part)] for part in step_products(cfg)]
    return lambda: [run(operands) for operands in order]


class Trainer:
    """A compiled train step on made-up tokens; each call runs one more step."""

    def __init__(self, cfg: Config):
        self.model = Model.of(cfg)
        self.model.validate()
        self.mesh = meshes.build_mesh(cfg.mesh)
        self.state = self.model.create(self.mesh)
        self.seed = jax.random.key(cfg.train.seed)
        shape = (cfg.data.batch, cfg.data.length)
        tokens = jax.random.randint(jax.random.key(1), shape, 0, cfg.model.vocab, jnp.int32)
        batch = {
            "tokens": tokens,
            "targets": jnp.roll(tokens, -1, 1),
            "segments": jnp.ones(shape, jnp.int32),
            "positions": jnp.broadcast_to(jnp.arange(shape[1], dtype=jnp.int32), shape),
            "weights": jnp.ones(shape, jnp.float32),
        }
        if M := cfg.inputs:
            inputs = jnp.roll(tokens, 1, 1)[:, jnp.arange(M) % shape[1]]
            whole = jnp.broadcast_to(jnp.arange(M, dtype=jnp.int32), inputs.shape)
            batch |= {"inputs": inputs, "input_segments": jnp.ones_like(inputs), "input_positions": whole}
        self.batch = jax.device_put(batch, sharding(self.mesh, (cfg.rules.batch, ())))
        self.compiled = lower_train_step(self.model, self.mesh).compile()

    def __call__(self) -> Any:
        self.state, metrics = self.compiled(self.state, self.batch, self.seed)
        return metrics


def dense_twin(cfg: Config) -> Config:
    """The config with dense layers as wide as what a token passes in an MoE layer: equal active FLOPs."""
    m, moe = cfg.model, cfg.model.moe
    assert moe is not None
    expert = moe.d_ff or m.d_ff
    width = expert * moe.top_k + moe.shared_width(expert)
    if "dense" in m.layer_kinds + m.encoder_kinds and width != m.d_ff:
        why = f"some layers are dense, {m.d_ff} wide, and the twin's layers all have one width, {width}"
        raise Refused(Problem("model.d_ff", why, f"set model.d_ff={width}"))
    return replace(cfg, model=replace(m.dense, d_ff=width))


def measure(cfg: Config, rounds: int = 9) -> dict[str, Any]:
    """Time the step, its products and, for an MoE, its dense twin, by turns.

    Returns:
        `rows[]` with program (moe or dense, and products), seconds, tokens_per_second, ratio_to_products (median over
        the rounds), its twin in CPU seconds and page_faults, each a step.
    """
    steps: dict[str, Callable] = {"products": products_alone(cfg)}
    if cfg.model.moe is None:
        steps["dense"] = Trainer(cfg)
    else:
        steps |= {"moe": Trainer(cfg), "dense": Trainer(dense_twin(cfg))}
    times = by_turns(steps, rounds, warm=2)
    tokens, rows = cfg.data.batch * cfg.data.length, []
    for name, t in times.items():
        program = steps[name]
        memory = program.compiled.memory_analysis() if isinstance(program, Trainer) else None
        rows.append(
            {
                "program": name,
                "seconds": t.seconds,
                "cpu_seconds": t.cpu_seconds,
                "tokens_per_second": tokens / t.seconds,
                "ratio_to_products": ratio(t, times["products"]),
                "ratio_to_products_cpu": cpu_ratio(t, times["products"]),
                "page_faults": sorted(t.faults)[len(t.faults) // 2],
                "temporaries_bytes": None if memory is None else int(memory.temp_size_in_bytes),
            }
        )
    flops = sum(p.flops for part in step_products(cfg) for p in part)
    report = {"bench": "step", "config": cfg.name, **machine(), "rounds": rounds, "flops": flops, "rows": rows}
    if cfg.model.moe is not None:
        report |= cost.for_training(jax.devices()[0].platform, cfg.model, cfg.data.length)._asdict()
    if "moe" in times:
        moe, dense = times["moe"], times["dense"]
        report |= {"moe_to_dense": ratio(moe, dense), "moe_to_dense_cpu": cpu_ratio(moe, dense)}
    return report


def lines(report: dict[str, Any]) -> list[str]:
    """The report as a table for people."""
    out = [f"{report['config']}: {report['flops'] / 1e9:.1f} GFLOP of products a step"]
    if "dispatch" in report:
        out.append("dispatch {dispatch} ({reason})".format(**report))
    out.append(
        f"{'program':9} {'s/step':>8} {'cpu s':>8} {'tokens/s':>9} {'x products':>10} {'x cpu':>6} {'faults':>8}"
    )
    for r in report["rows"]:
        speed = f"{r['seconds']:8.4f} {r['cpu_seconds']:8.4f} {r['tokens_per_second']:9,.0f}"
        ratios = f"{r['ratio_to_products']:10.2f} {r['ratio_to_products_cpu']:6.2f}"
        out.append(f"{r['program']:9} {speed} {ratios} {r['page_faults']:8,}")
    if "moe_to_dense" in report:
        wall, cpu = report["moe_to_dense"], report["moe_to_dense_cpu"]
        out.append(f"the step takes {wall:.2f} times as long as its dense twin, {cpu:.2f} times in CPU seconds")
    return out
