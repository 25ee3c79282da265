"""The figures of an estimate as one JSON object."""

from typing import Any

from moe_jax.cost import matrices
from moe_jax.kernels import choices
from moe_jax.plan import advice, claims, roofline
from moe_jax.plan.estimate import Estimate
from moe_jax.plan.search import Candidate, smallest
from moe_jax.plan.traffic import exchange_bytes
from moe_jax.refused import Problem


def said(problems: list[Problem]) -> list[dict[str, str]]:
    return [{"key": p.key, "reason": p.reason, "remedy": p.remedy} for p in problems]


def report(e: Estimate, *, tokens: int | None = None, price: float | None = None) -> dict[str, Any]:
    """Everything that the plan says about a config.

    Args:
        tokens: of the run whose time and money are asked for; None: those of `train.steps`.
        price: US dollars a device-hour; None: the hardware table's.
    """
    c, f, cfg = e.step.count, e.step.flops, e.cfg
    m = cfg.model
    out: dict[str, Any] = {
        "config": cfg.name,
        "mesh": cfg.mesh.sizes,
        "devices": cfg.mesh.size,
        "topology": None if e.cluster is None else str(e.cluster),
        "params": {
            "total": c.total,
            "active": c.active,
            "components": c.components,
            "active_components": c.active_components,
            "selection_bias": c.bias,
        },
        "flops_per_token": f.train,
        "flops": {"train": f.train, "inference": f.infer, "decode": f.decode, "weights": f.weights}
        | {"attention": f.attention, "executed_per_device_and_step": e.step.executed()},
        "memory_per_device": e.memory.kinds | {"peak": e.memory.peak},
        "peak_moment": e.memory.moment,
        "kv_cache_bytes": e.memory.cache,
        "kv_cache_bytes_per_token": m.layers * m.cached_width * e.step.width,
        "fits": e.fits,
        "attention": {name: choice._asdict() for name, choice in choices(cfg, e.step.platform).items()},
        **mixture(e),
        "traffic": [
            {"what": v.what, "op": v.op, "axes": list(v.axes), "count": v.count, "bytes": v.bytes, "sent": v.sent}
            for v in e.moves
        ],
        "warnings": said(advice.warnings(e)),
        "contradictions": said(claims.contradictions(e.step)),
    }
    if e.cluster is None:
        return out
    small = None if e.fits else smallest(e.cfg, e.cluster)
    if small is not None and small.found is None:
        out["no_mesh_up_to"] = small.without
    elif small is not None and small.found is not None:
        machine, best = small.found
        where: dict[str, Any] = {"topology": str(machine), "devices": machine.devices, "mesh": best.mesh.sizes}
        out["smallest_cluster"] = where | {"peak_bytes": best.peak, "step_seconds": best.seconds}
    return out | clocked(e, tokens, price)


def mixture(e: Estimate) -> dict[str, Any]:
    """Dispatch and exchange."""
    step, moe = e.step, e.cfg.model.moe
    if moe is None:
        return {"all_to_all_bytes": 0}
    n = step.expert_shards
    layers = sum(stack.moe_layers for stack in step.stacks)  # of an encoder too, whose tokens may be others: the mean
    each = sum(stack.moe_layers * exchange_bytes(stack) for stack in step.stacks) / layers * (n - 1) / n
    tokens = sum(stack.moe_layers * stack.tokens for stack in step.stacks) / layers
    least = tokens * moe.top_k * e.cfg.model.d_model * step.width * (n - 1) / n
    told = next(stack for stack in step.stacks if stack.moe_layers)  # the decoder, where it has experts
    of = "all" if step.encoder is None else "encoder" if told.both_ways else "decoder"
    exchanges = [v for v in e.moves if v.what == "exchange"]
    count, sent = sum(v.count for v in exchanges), sum(v.count * v.bytes for v in exchanges) * (n - 1) / n
    return {
        "all_to_all_bytes": round(each),
        "all_to_all": {"count": count, "bytes_each": round(each), "bytes_least": round(least), "devices": n}
        | {"bytes_per_step": round(sent)},
        "experts_per_device": moe.experts / n,
        "tokens_per_expert": roofline.expert_rows(told),
        "dispatch": {"kind": told.dispatch.dispatch, "reason": told.dispatch.reason, "group": told.group}
        | {"slots": told.slots, "overhead": roofline.exchange_overhead(told), "matrices": matrices(e.cfg.model.ffn)}
        | {"of": of},
    }


def clocked(e: Estimate, tokens: int | None, price: float | None) -> dict[str, Any]:
    """What depends on the cluster."""
    assert e.cluster is not None and e.times is not None
    t, chip, data = e.times, e.cluster.chip, e.cfg.data
    tokens = e.cfg.train.steps * data.batch * data.length if tokens is None else tokens
    price = chip.price if price is None else price
    least = roofline.money(e.step, e.cluster, t.step, tokens, price)
    return {
        "hbm_bytes": e.cluster.memory,
        "step_seconds": t.step,
        "mfu_ceiling": roofline.utilisation(e.step, e.cluster, t.step),
        "dominant": t.dominant,
        "bubble": t.bubble,
        "seconds": {"compute": t.compute, "hbm": t.memory, "exposed": t.exposed, "hidden": t.hidden}
        | {"collectives": [{"what": x.move.what, "op": x.move.op, "seconds": x.seconds} for x in t.moves]},
        "tokens_per_second": data.batch * data.length / t.step,
        "run": least._asdict() | {"price": price},
        "decode": roofline.decode(e.step, e.cluster)._asdict(),
    }


def listed(found: list[Candidate], most: int = 10) -> dict[str, Any]:
    """The meshes that fit, fastest first, and why others do not."""
    good = [c for c in found if not c.reason]
    bad = [c for c in found if c.reason]
    return {
        "fitting": len(good),
        "meshes": [
            {"mesh": c.mesh.sizes, "step_seconds": c.seconds, "peak_bytes": c.estimate.memory.peak}
            for c in good[:most]
            if c.estimate is not None
        ],
        "refused": [{"mesh": c.mesh.sizes, "reason": c.reason} for c in bad],
    }
