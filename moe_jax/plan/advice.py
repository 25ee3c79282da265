"""Warnings: what will be slow, wasteful or impossible, with the key to change."""

from collections.abc import Callable, Iterator, Mapping
from math import prod

from moe_jax.axes import MESH_AXES, Axes
from moe_jax.cost import EINSUM_LIMIT, einsum_groups, matrices
from moe_jax.plan import roofline
from moe_jax.plan.estimate import Estimate
from moe_jax.plan.leaves import expert_width
from moe_jax.plan.memory import devices_at_least
from moe_jax.refused import Problem

WASTE = 2.0  # slots, or rows of a buffer, a choice in use
FAR = 0.05  # share of a step, of traffic between hosts or slices
BUBBLE = 0.1  # share of the ticks of a pipeline in which a stage has no work
MEGA = 1e6


def memory(e: Estimate) -> Iterator[Problem]:
    """Too much for the device."""
    if e.cluster is None or e.memory.peak <= e.cluster.memory:
        return
    m, train, room = e.cfg.model, e.cfg.train, e.cluster.memory
    over = (e.memory.peak - room) / 1e9
    why = (
        f"{e.memory.peak / 1e9:,.1f} GB a device exceed the {room / 1e9:,.1f} GB of {e.cluster.name} by {over:,.1f} GB"
    )
    held = e.memory.kinds["parameters"] + e.memory.kinds["optimizer"] + e.memory.kinds["gradients"]
    if held > room:
        need = devices_at_least(e.step, room, with_gradients=True)
        text = f"state and gradients alone take {held / 1e9:,.1f} GB: raise mesh.fsdp or mesh.expert"
        yield Problem("mesh.fsdp", why, f"{text} (all split, at least {need:,.0f} devices), or use adafactor")
    elif m.remat == "none":
        yield Problem("model.remat", why, "set model.remat=exchange or full")
    elif e.step.rows > 1:
        yield Problem("train.microbatches", why, f"set it to {2 * train.microbatches} or more")
    else:
        yield Problem("mesh.fsdp", why, "raise mesh.fsdp or mesh.tensor, on more devices")


def dispatch(e: Estimate) -> Iterator[Problem]:
    """One-hot products that cost more than they should, empty slots, worst-case buffers."""
    moe, step = e.cfg.model.moe, e.step
    if moe is None:
        return
    overhead, kind = roofline.exchange_overhead(step), step.dispatch.dispatch
    if overhead > EINSUM_LIMIT:
        why = f"one-hot dispatch costs {overhead:.2f} of the expert products: {step.dispatch.reason}"
        groups = einsum_groups(e.cfg.data.length, expert_width(e.cfg.model), matrices(e.cfg.model.ffn))
        yield Problem("model.moe.dispatch", why, f"set dispatch=gather, or model.moe.group_size={groups.size}")
    used = step.groups * step.group * moe.top_k
    if kind == "ragged" and step.sent_rows > WASTE * used:
        why = f"sorted rows are exchanged in buffers for the worst case, {step.sent_rows / used:.1f} times those in use"
        yield Problem("model.moe.capacity_factor", why, "set it, for example to 1.25, with dispatch=gather")
    elif kind != "ragged" and step.sent_rows > WASTE * used * max(1.0, (moe.capacity_factor or 1.0) / WASTE):
        why = (
            f"{moe.experts} experts x {step.slots} slots hold {step.sent_rows / used:.1f} times the choices of a group"
        )
        name = "group_size" if moe.capacity_factor is not None else "capacity_factor"
        remedy = "raise it, or lower model.moe.min_capacity" if name == "group_size" else "set it, or dispatch=ragged"
        yield Problem(f"model.moe.{name}", f"{why} of {step.group} tokens", remedy)
    if moe.capacity_factor is not None and moe.capacity_factor < 1:
        why = f"is {moe.capacity_factor}: {1 - moe.capacity_factor:.0%} of the choices are dropped at perfect balance"
        yield Problem("model.moe.capacity_factor", why, "set it to 1 or more")


def filling(e: Estimate) -> Iterator[Problem]:
    """Experts with so few tokens that reading their weights takes longer than multiplying them."""
    if e.cfg.model.moe is None or e.cluster is None:
        return
    rows, need = roofline.expert_rows(e.step), roofline.rows_to_fill(e.step, e.cluster)
    if rows < need:
        why = f"an expert gets {rows:,.0f} rows at a time, and {e.cluster.name} needs {need:,.0f} to be busy"
        yield Problem("data.batch", why, "raise it, lower train.microbatches, or split experts over more token shards")
    shards, groups = e.step.expert_shards, e.cfg.model.moe.router.groups
    if groups > 1 and shards > 1 and groups % shards and shards % groups:
        why = f"{groups} groups of experts do not lie on {shards} shards evenly: group-limited routing saves no traffic"
        yield Problem("model.moe.router.groups", why, f"use a multiple or a divisor of {shards}")
    F, split = expert_width(e.cfg.model), e.step.over("expert_mlp")
    if split > 1 and F // split < 128:
        why = f"experts of width {F} are cut into slices of {F // split} columns"
        yield Problem("rules.expert_mlp", why, "set it to [], so that the tensor axis splits attention only")


def network(e: Estimate) -> Iterator[Problem]:
    """Traffic that belongs on the fast network and crosses the slow one."""
    if e.times is None or e.cluster is None:
        return
    where, moe = "hosts" if e.cluster.platform == "gpu" else "slices", e.cfg.model.moe
    meant = e.cfg.rules.experts[:1] if moe is not None and moe.exchange == "hierarchical" else None
    for move, seconds, far in e.times.moves:
        share = seconds / e.times.step
        if move.hidden or not far or share < FAR or (move.what == "exchange" and move.axes == meant):
            continue
        if move.op == "collective-permute":  # stages are the slowest axis, and pass on less than any other
            continue
        sent = f"{move.count} x {move.sent / MEGA:,.1f} MB a device"
        why = f"{share:.0%} of a step goes to the {move.what} between {where}, {sent} ({move.op})"
        yield nearer(e.cfg.mesh.sizes, move.axes, e.cluster.topology.fast, why)


def nearer(sizes: Mapping[str, int], axes: Axes, fast: int, why: str) -> Problem:
    """The mesh axis to lower so that groups along `axes` lie inside the `fast` neighbours of the fast network.

    The fastest axes are neighbours: the slowest one of the group spans all the faster ones.
    """
    axis = min(axes, key=MESH_AXES.index)
    inner = [a for a in MESH_AXES[MESH_AXES.index(axis) + 1 :] if sizes.get(a, 1) > 1]
    most = min(fast // prod(sizes[a] for a in inner), sizes[axis] - 1)
    if not inner or most > 1 or (most == 1 and len(axes) > 1):
        return Problem(f"mesh.{axis}", why, f"lower mesh.{axis} to {at_most(most)}")
    together = " x ".join(f"mesh.{a}" for a in inner)
    first = f"lower mesh.{axis} to {at_most(fast)} and " if sizes[axis] > fast else "lower "
    return Problem(f"mesh.{inner[-1]}", why, f"{first}{together} to {at_most(fast // min(fast, sizes[axis]))}")


def at_most(n: int) -> str:
    """A limit in words."""
    return f"{n} or less" if n > 1 else "1"


def schedule(e: Estimate) -> Iterator[Problem]:
    """Idle devices, slow types."""
    mesh, cfg = e.cfg.mesh, e.cfg
    if cfg.model.dtype == "float32" and e.cluster is not None and e.cluster.chip.f32 < e.cluster.chip.bf16:
        times = e.cluster.chip.bf16 / e.cluster.chip.f32
        why = f"is float32, and {e.cluster.name} multiplies bfloat16 {times:.0f} times as fast"
        yield Problem("model.dtype", why, "set it to bfloat16")
    s = e.step.schedule
    if s is not None and s.bubble > BUBBLE:
        rows = e.cfg.data.batch // e.cfg.mesh.over(e.cfg.rules.batch)
        enough = (m for m in range(1, rows + 1) if rows % m == 0 and s._replace(microbatches=m).bubble <= BUBBLE)
        need = next(enough, None)
        remedy = "raise data.batch, then this" if need is None else f"raise it to {need}"
        why = f"{s.bubble:.0%} of the {s.ticks} ticks of a step leave a stage without work"
        yield Problem("train.microbatches", why, f"{remedy}, or raise train.rounds where the layers allow")
    if e.times is not None and e.times.hidden > max(e.times.compute, e.times.memory):
        busy = max(e.times.compute, e.times.memory)
        why = f"weights and gradients move for {e.times.hidden:.3g} s a step, behind {busy:.3g} s of work"
        more = " or mesh.fsdp" if mesh.fsdp > 1 else ""
        yield Problem("data.batch", why, f"raise it, or lower train.microbatches{more}")


CHECKS: tuple[Callable[[Estimate], Iterator[Problem]], ...] = (memory, dispatch, filling, network, schedule)


def warnings(e: Estimate) -> list[Problem]:
    """Every warning about a config on its cluster."""
    return [problem for check in CHECKS for problem in check(e)]
