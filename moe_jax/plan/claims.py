"""A description held against its own figures: what contradicts what, with the numbers of both."""

from collections.abc import Iterator
from math import ceil

from moe_jax.plan.hardware import Cluster, parse
from moe_jax.plan.leaves import EXPERTS
from moe_jax.plan.work import Step
from moe_jax.refused import Problem
from moe_jax.schema import ClaimConfig

TOLERANCE = 0.05  # a claim is a rounded number
MIXED = 16  # bytes a parameter: bfloat16 weights and gradients, float32 weights and two moments
BF16 = 2  # bytes a parameter
YEAR = 24 * 365  # hours
TOKENS = 300e9  # of GPT-3, for comparison (Brown et al. 2020, section 2.2)


def billions(n: float) -> str:
    """A count of parameters in words."""
    return f"{n / 1e12:,.2f}T" if n >= 1e12 else f"{n / 1e9:,.1f}B"


def counts(c: ClaimConfig, step: Step, cluster: Cluster | None) -> Iterator[Problem]:
    """Parameters in total and active."""
    have, said = (step.count.total, step.count.active), (c.params, c.active)
    off = [s is not None and abs(h - s) > TOLERANCE * s for h, s in zip(have, said, strict=True)]
    if any(off):
        claimed = " and ".join(
            f"{billions(s)} {w}" for s, w in zip(said, ("in total", "active"), strict=True) if s is not None
        )
        why = f"{have[0]:,} parameters ({billions(have[0])}), {have[1]:,} active ({billions(have[1])}), not {claimed}"
        rest = have[0] - sum(step.count.components.get(c, 0) for c in EXPERTS)
        why += f"; what is not in experts, {billions(rest)}, is active for every token"
        remedy = "lower model.moe.d_ff, model.layers or model.d_model" if off[0] else f"say {billions(have[1])} active"
        yield Problem("parameters", why, remedy)


def weights(c: ClaimConfig, step: Step, cluster: Cluster | None) -> Iterator[Problem]:
    """The weights alone against the memory of the cluster."""
    if cluster is None:
        return
    size, room = BF16 * step.count.total, cluster.devices * cluster.memory
    if size > room:
        why = f"bfloat16 weights alone take {size / 1e12:,.2f} TB; {cluster} has {room / 1e12:,.2f} TB in all"
        yield Problem("weights", why, f"{ceil(size / cluster.memory):,} such devices would hold them, and nothing else")


def placement(c: ClaimConfig, step: Step, cluster: Cluster | None) -> Iterator[Problem]:
    """Pipeline stages against experts a device: a stage's devices hold all experts of its layers."""
    moe = step.cfg.model.moe
    if cluster is None or moe is None or c.stages is None or c.experts_per_device is None:
        return
    shards = ceil(moe.experts / c.experts_per_device)
    need, left = shards * c.stages, cluster.devices // c.stages
    if need <= cluster.devices:
        return
    split = "1 expert shard" if shards == 1 else f"{shards} expert shards"
    why = f"{c.experts_per_device} experts a device need {split}, {need} devices in {c.stages} stages; "
    why += f"{c.stages} stages leave {left} of the {cluster.devices} devices a stage"
    remedies = ["one stage"] if shards <= cluster.devices else []
    remedies.append(f"{need} devices")
    if left:
        each = ceil(moe.experts / left)
        why += f", so {each} experts a device"
        remedies.append(f"{each} experts a device")
    yield Problem("placement", why, ", or ".join(remedies))


def optimizer(c: ClaimConfig, step: Step, cluster: Cluster | None) -> Iterator[Problem]:
    """Weights, gradients and optimizer state against what the description leaves for them."""
    if cluster is None or c.state_bytes is None:
        return
    for said, n in (("counted", step.count.total), ("claimed", c.params)):
        if n is None or MIXED * n / cluster.devices <= c.state_bytes:
            continue
        each = MIXED * n / cluster.devices
        why = f"of the {said} {billions(n)} parameters, weights, gradients and Adam take {MIXED} bytes each: "
        why += f"{each / 1e9:,.1f} GB a device, where {c.state_bytes / 1e9:,.0f} GB are left "
        if said == "counted" and c.params is not None:
            claimed = MIXED * c.params / cluster.devices
            why += f"(even {billions(c.params)} would take {claimed / 1e9:,.1f} GB, and allow "
            why += f"{c.state_bytes * cluster.devices / c.params:.1f} bytes each)"
        need = ceil(MIXED * n / c.state_bytes)
        yield Problem("optimizer", why.strip(), f"{need:,} devices, or train.optimizer.kind=adafactor on fewer")
        return


def cost(c: ClaimConfig, step: Step, cluster: Cluster | None) -> Iterator[Problem]:
    """What the money buys in time and tokens."""
    if cluster is None or c.cost is None or c.price is None:
        return
    hours = c.cost / c.price
    years = hours / cluster.devices / YEAR
    if years <= 1:
        return
    why = f"${c.cost / 1e6:,.1f}M at ${c.price:g} a device-hour are {hours / 1e6:,.1f}M hours: {years:,.1f} years on "
    why += f"{cluster.devices} devices"
    remedy = "more devices for a shorter time"
    if c.mfu is not None:
        flops = hours * 3600 * cluster.chip.bf16 * c.mfu
        why += f"; at {c.mfu:.0%} MFU {flops / 6 / step.count.active / 1e9:,.0f}B tokens"
        if c.active is not None:
            spent = 6 * c.active * TOKENS / cluster.chip.bf16 / c.mfu / 3600 * c.price
            remedy = f"at the claimed {billions(c.active)} active, {TOKENS / 1e9:.0f}B tokens would cost ${spent:,.0f}"
    yield Problem("cost", why, remedy)


CHECKS = (counts, weights, placement, optimizer, cost)


def contradictions(step: Step) -> list[Problem]:
    """What a config's claims and its figures contradict each other in, on the cluster that they name."""
    claims = step.cfg.claims
    if claims is None:
        return []
    cluster = None if claims.topology is None else parse(claims.topology, step.cfg.mesh.size)
    return [p for check in CHECKS for p in check(claims, step, cluster)]
