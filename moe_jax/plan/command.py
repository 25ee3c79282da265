"""`moe-jax plan`: options and flow."""

import argparse
import dataclasses
import math
import os
from collections.abc import Sequence
from typing import Any

from moe_jax.terminal import result, say


def add_plan(plan: argparse.ArgumentParser) -> None:
    """Options of `moe-jax plan`."""
    plan.add_argument("config", metavar="CONFIG")
    help = "for example model.remat=full mesh.expert=16"
    plan.add_argument("overrides", nargs="*", default=[], metavar="key.path=value", help=help)
    help = "the cluster: v5e:4x4, v5p:8x8x4, tpu7x:4x4x4, h100:32x8 (hosts x GPUs), or only the device: a100, v6e"
    plan.add_argument("--topology", metavar="T", help=help)
    plan.add_argument("--devices", type=int, metavar="N", help="rank all meshes of N devices by predicted step time")
    plan.add_argument("--tokens", type=float, metavar="N", help="price a run of so many tokens (default: train.steps)")
    plan.add_argument("--price", type=float, metavar="USD", help="of a device-hour (default: the hardware table)")
    plan.add_argument("--compile", action="store_true", help="ask the real compiler too, without an accelerator")
    plan.add_argument("--json", action="store_true", help="print one JSON object last on standard output")
    plan.add_argument("--quiet", action="store_true", help="results only: no progress on standard error")
    plan.set_defaults(run=run_plan)


def check_options(args: argparse.Namespace) -> None:
    """Refuse numbers out of range."""
    from moe_jax.refused import Problem, Refused

    limits = [("--devices", args.devices), ("--tokens", args.tokens), ("--price", args.price)]
    wrong = [
        Problem(name, f"is {n:g}", "give more than 0, and a finite number")
        for name, n in limits
        if n is not None and not 0 < n < math.inf
    ]
    if args.devices is not None and args.topology is None:
        wrong.append(Problem("--devices", "needs a kind of device", "add --topology v5p, h100, ..."))
    if wrong:
        raise Refused(*wrong)


def settle(cfg: Any, args: argparse.Namespace) -> tuple[Any, Any, list | None]:
    """The config to plan, its cluster, and the candidates where a mesh was searched for.

    A mesh is searched for when a number of devices is given, and when the cluster has another number of devices than
    the config's mesh and no override names one.
    """
    from moe_jax.plan.hardware import parse
    from moe_jax.plan.search import misfits, obstacles, search
    from moe_jax.refused import Problem, Refused

    named = args.topology or (cfg.claims.topology if cfg.claims is not None else None)
    cluster = None if named is None else parse(named, args.devices or cfg.mesh.size)
    if cluster is not None and args.devices not in (None, cluster.devices):
        why = f"{args.devices} devices, and {cluster} has {cluster.devices}"
        raise Refused(Problem("--devices", why, "leave one of them out, or name the device only"))
    if cluster is None or (args.devices is None and cluster.devices == cfg.mesh.size):
        if problems := misfits(cfg):
            raise Refused(*problems)
        return cfg, cluster, None
    if args.devices is None and any(text.startswith("mesh.") for text in args.overrides):
        why = f"a mesh of {cfg.mesh.size} ({cfg.mesh}), and {cluster} has {cluster.devices} devices"
        raise Refused(Problem("mesh", why, f"choose sizes whose product is {cluster.devices}, or leave them all out"))
    found = search(cfg, cluster)
    built = [c for c in found if c.estimate is not None]
    if not built:
        raise Refused(*obstacles(found, cluster))
    best = built[0] if not built[0].reason else min(built, key=lambda c: c.peak)
    return dataclasses.replace(cfg, mesh=best.mesh), cluster, found


def run_plan(args: argparse.Namespace) -> dict[str, Any]:
    """`moe-jax plan`."""
    check_options(args)
    from moe_jax import config, kernels
    from moe_jax.plan import report, show
    from moe_jax.plan.estimate import Estimate

    asked = config.load(args.config, args.overrides)
    cfg, cluster, found = settle(asked, args)
    kernels.check(cfg, "cpu" if cluster is None else cluster.platform)
    tokens = None if args.tokens is None else round(args.tokens)
    out = report.report(Estimate(cfg, cluster), tokens=tokens, price=args.price)
    if found is not None:
        out["search"] = report.listed(found) | {"mesh_of_config": asked.mesh.sizes}
    out["repaired"] = repaired(cfg)
    if args.compile:
        out["compiled"] = ask_compiler(cfg, cluster, args)
    result(args, *show.lines(out))
    return out


def ask_compiler(cfg: Any, cluster: Any, args: argparse.Namespace) -> dict[str, Any]:
    """The compiler's memory and collectives."""
    os.environ["TF_CPP_MIN_LOG_LEVEL"] = "1"  # the partitioner's warnings are a part of them
    from moe_jax.plan.compiled import compiled

    where = f"{cfg.mesh.size} fake CPU devices" if cluster is None else str(cluster)
    say(args, f"compiling the train step for {where}")
    return compiled(cfg, cluster)


def repaired(cfg: Any) -> list[dict[str, Any]]:
    """Configs that a contradictory description names in its place, in figures."""
    from moe_jax import config
    from moe_jax.plan.leaves import count

    names: Sequence[str] = (cfg.claims.repaired or "").split() if cfg.claims is not None else ()
    counts = {name: count(config.load(name).model) for name in names}
    return [{"config": name, "params_total": c.total, "params_active": c.active} for name, c in counts.items()]
