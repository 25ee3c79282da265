"""`moe-jax doctor`: are the experts of a run healthy? Its log is read by the rules of its alarms, without JAX."""

import argparse
import json
from pathlib import Path
from typing import Any

from moe_jax.terminal import folder, result, run_wanted, table


def add_doctor(doctor: argparse.ArgumentParser) -> None:
    """Options of `moe-jax doctor`."""
    doctor.add_argument("workdir", type=folder, metavar="DIR")
    doctor.add_argument("--json", action="store_true", help="print one JSON object last on standard output")
    doctor.add_argument("--quiet", action="store_true", help="results only: no progress on standard error")
    doctor.set_defaults(run=run_doctor, overrides=[])


def run_doctor(args: argparse.Namespace) -> dict[str, Any]:
    """`moe-jax doctor`."""
    report = diagnose(args.workdir)
    result(args, *lines(report))
    return report


def opened(workdir: Path) -> tuple[Any, list[dict[str, Any]]]:
    """The config of a run and its train records, of which those of an older version are left out.

    Raises:
        Refused: no run in the folder, or none that has made a step.
    """
    from moe_jax import config
    from moe_jax.metrics import CONFIG, read_metrics
    from moe_jax.refused import Problem, Refused
    from moe_jax.workdir import LOG, MARKER, PUBLISHED

    which = run_wanted(workdir)
    if not workdir.is_dir():
        why = f"{workdir} is not a folder" if workdir.exists() else f"{workdir} does not exist"
        raise Refused(Problem("DIR", why, which))
    path, log = workdir / CONFIG, workdir / LOG
    if missing := [p.name for p in (path, log) if not p.exists()]:
        ours = (workdir / MARKER).exists()
        if ours and (workdir / PUBLISHED).is_dir():
            why = f"{workdir} holds imported weights, and nothing was trained here yet"
            raise Refused(Problem("DIR", why, f"moe-jax trace {workdir} --file FILE tells the loads of their experts"))
        older = "; a run of an older version writes them when it goes on" if ours else ""
        raise Refused(Problem("DIR", f"{workdir} holds no {' and no '.join(missing)}", which + older))
    try:
        tree = json.loads(path.read_text("utf-8"))
    except ValueError as e:
        raise Refused(Problem(str(path), f"is damaged: {e}", "remove it, and let the run go on")) from None
    cfg, records = config.from_dict(tree), read_metrics(log)[0]
    if not records:
        raise Refused(Problem("DIR", f"{log} holds no step", "wait for the first one"))
    needed = {"load", "dropped_by_layer", "router_entropy", "least_prob"} if cfg.model.moe is not None else set()
    old = max((i for i, record in enumerate(records, 1) if not needed <= record.keys()), default=0)
    if old == len(records):
        why = f"has no step with {', '.join(sorted(needed))}: an older version wrote it"
        raise Refused(Problem(str(log), why, "let the run go on for 20 steps"))
    return cfg, records[old:]


def diagnose(workdir: Path) -> dict[str, Any]:
    """The JSON of `moe-jax doctor`: `findings` that hold in the last steps, `past` ones that are over, and `layers`.

    Raises:
        Refused: no run in the folder, or none that has made a step.
    """
    from moe_jax.health import WINDOW, YOUNG, Watch, settling

    cfg, records = opened(workdir)
    watch = Watch(cfg.model.moe, cfg.train.optimizer.warmup)
    told = {alarm[:2]: alarm for record in records for alarm in watch.step(record)}
    here = {alarm[:2] for alarm in watch.present}
    window = watch.look(records[-1]["step"])
    settles = cfg.model.moe is not None and settling(window, cfg.model.moe)
    return {
        "workdir": str(workdir),
        "config": cfg.name,
        "step": records[-1]["step"],
        "window": min(WINDOW, len(records)),
        "judged": len(records) >= WINDOW or bool(watch.present),
        "settles_until": cfg.train.optimizer.warmup + YOUNG if settles else None,
        "findings": [alarm._asdict() for alarm in watch.present],
        "past": [alarm._asdict() for key, alarm in told.items() if key not in here],
        "layers": layers(window, records[-1]),
    }


def layers(w: Any, last: dict[str, Any]) -> list[dict[str, Any]]:
    """What the window says of each MoE layer; null where it routed nothing, or numbers are not finite."""
    import numpy as np

    from moe_jax.health import idle

    out = []
    for layer, row in enumerate(w.load):
        total, entropy = int(row.sum()), last["router_entropy"][layer]
        out.append(
            {
                "layer": layer,
                "routed": total,
                "dropped": int(w.dropped[layer]),
                "load_max_over_mean": float(row.max() / row.mean()) if total else None,
                "load_min_over_mean": float(row.min() / row.mean()) if total else None,
                "dead": np.flatnonzero(idle(row)).tolist() if total else [],
                "entropy": entropy,  # of the last step, nats a token
                "entropy_over_most": None if entropy is None or row.size == 1 else entropy / float(np.log(row.size)),
                "least_prob_times_experts": None if np.isnan(w.least[layer]) else float(w.least[layer] * row.size),
            }
        )
    return out


def lines(report: dict[str, Any]) -> list[str]:
    """The report in words: what is wrong, where and since when, what to change, and a row a layer."""

    def told(a: dict[str, Any]) -> str:
        where = "" if a["layer"] is None else f"MoE layer {a['layer']}: "
        return f"{a['kind']} since step {a['step']}: {where}{a['text']}"

    def number(x: float | None, form: str) -> str:
        return "-" if x is None else format(x, form)

    out = [f"{report['workdir']}: {report['config']} at step {report['step']}, by its last {report['window']} steps"]
    for a in report["findings"]:
        out += [told(a), f"    remedy: {a['remedy']}"]
    if not report["judged"]:
        out.append("too few steps to judge loads and routers: train 20")
    elif not report["findings"]:
        out.append("nothing is wrong")
    out += [f"over: {told(a)}" for a in report["past"]]
    if report["settles_until"] is not None:
        out.append(
            f"a young run: what its balance loss or bias may still mend is told from step {report['settles_until']} on"
        )
    if report["layers"]:
        head = ("MoE layer", "max/mean", "min/mean", "dead", "dropped", "entropy/log E", "least prob x E")
        rows = [
            (
                str(x["layer"]),
                number(x["load_max_over_mean"], ".2f"),
                number(x["load_min_over_mean"], ".2f"),
                str(len(x["dead"])),
                number(x["dropped"] / x["routed"] if x["routed"] else None, ".1%"),
                number(x["entropy_over_most"], ".4f"),
                number(x["least_prob_times_experts"], ".2f"),
            )
            for x in report["layers"]
        ]
        out += table(head, rows, numbers=True)
    return out
