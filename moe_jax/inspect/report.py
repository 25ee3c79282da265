"""What `moe-jax inspect` reports: one row for collectives that are alike, the exchange beside its least, and flags.

`inspect/show.py` puts it into words.
"""

from typing import Any

from jax.sharding import Mesh

from moe_jax import kernels
from moe_jax.collectives import Collective, read
from moe_jax.config import Config
from moe_jax.inspect.compile import compile_to_read
from moe_jax.inspect.flags import Seen, flags, is_exchange, of_state, total
from moe_jax.inspect.least import Least, least_exchange
from moe_jax.plan.work import Step
from moe_jax.topology import Topology
from moe_jax.train.state import Model
from moe_jax.train.step import lower_forward, lower_train_step


def rows(found: list[Collective]) -> list[dict[str, Any]]:
    """Collectives of one operation, axes, phase and module as one row; most bytes first."""
    groups: dict[tuple, list[Collective]] = {}
    for c in found:
        groups.setdefault((c.op, c.axes, c.phase, c.modules, c.conditional, weights_of(c)), []).append(c)
    out = []
    for (op, axes, phase, modules, conditional, weights), group in groups.items():
        row = {"op": op, "axes": list(axes), "phase": phase, "module": "+".join(modules)}
        row |= {"count": sum(c.times for c in group), "bytes": total(group), "of": weights, "conditional": conditional}
        out.append(row)
    return sorted(out, key=lambda r: -r["bytes"])


def weights_of(c: Collective) -> str:
    """`weights` for what gathers parameters alone, as fully sharded data parallelism does, and how; else empty."""
    if c.op != "all-gather" or not of_state(c):
        return ""
    return "weights, as a sum" if c.summed else "weights"


def exchange_found(found: list[Collective], cfg: Config, least: Least | None) -> dict[str, Any] | None:
    """The all-to-alls of a step as compiled, beside the least."""
    if least is None:
        return None
    mine = [c for c in found if is_exchange(c, cfg, least)]
    count = {phase: sum(c.times for c in mine if c.phase == phase) for phase in least.count}
    bound, moved = least.total_bytes, total(mine)
    at_most = any(c.conditional or c.op == "ragged-all-to-all" for c in mine)
    return {"count": count, "bytes": moved, "times_least": moved / bound if bound else None, "at_most": at_most}


def inspect(cfg: Config, mesh: Mesh, *, forward: bool = False, topology: Topology | None = None) -> dict[str, Any]:
    """Compile the train step of a config, or its forward pass, and report its collectives.

    Args:
        mesh: devices, fake devices or those of a topology; nothing runs on them.
        forward: the loss alone, without gradient and optimizer.
        topology: what the mesh was built of, for its memory.
    Returns:
        JSON: collectives[] with op, axes, count, bytes (sent by a device in a step), phase, module; least, exchange,
        encoder (whether there is one, so that `least` is a mean over its layers and the decoder's), attention (by kind
        of layer, the kernel and why), flags[], peak_bytes (memory of a device), compile_seconds.
    Raises:
        Refused: rules and mesh that do not fit, or attention that no kernel computes and that is to be fused.
        TooLarge: a program that does not fit the memory of the topology.
        Unreadable: the compiler wrote what this library cannot read.
    """
    model = Model.of(cfg)
    model.validate()
    platform = mesh.devices.flat[0].platform
    kernels.check(cfg, platform)
    compiled = compile_to_read((lower_forward if forward else lower_train_step)(model, mesh), mesh)
    found = read(compiled.text, mesh)
    least = least_exchange(cfg, platform, forward_only=forward)
    tokens = Step(cfg, platform).tokens
    leaves = {name: axes for name, _, axes in model.leaves()}
    flagged = flags(Seen(cfg, platform, least, tokens, leaves, found, compiled.replicated))
    return {
        "config": cfg.name,
        "program": "forward" if forward else "train step",
        "mesh": cfg.mesh.sizes,
        "devices": mesh.size,
        "platform": platform,
        "topology": None if topology is None else str(topology),
        "collectives": rows(found),
        "least": None if least is None else least.to_json(),
        "exchange": exchange_found(found, cfg, least),
        "encoder": cfg.inputs > 0,
        "attention": {name: choice._asdict() for name, choice in kernels.choices(cfg, platform).items()},
        "flags": [flag._asdict() for flag in flagged],
        "peak_bytes": compiled.peak_bytes,
        "memory_bytes": None if topology is None else topology.memory,
        "compile_seconds": compiled.seconds,
    }
