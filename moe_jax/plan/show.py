"""The plan for people: the important line first, then tables with their units."""

import textwrap
from typing import Any

from moe_jax.inspect.show import attention, collectives
from moe_jax.plan.leaves import COMPONENTS
from moe_jax.terminal import mesh_words, size, table
from moe_jax.topology import GPUS

WIDTH = 100  # columns
MOST = 15  # rows of a table of collectives


def seconds(t: float) -> str:
    """A duration with three digits."""
    for unit, one in (("s", 1.0), ("ms", 1e-3)):
        if t >= one:
            return f"{t / one:,.3g} {unit}"
    return f"{t / 1e-6:,.3g} us"


def verdict(r: dict[str, Any]) -> list[str]:
    """Fits or not, by how much, how fast at the best, and what takes the time."""
    peak = r["memory_per_device"]["peak"]
    where = f"{r['config']}, mesh {mesh_words(r['mesh'])}"
    if r["topology"] is None:
        lines = [where, f"peak {size(peak)} a device; --topology adds times and a verdict"]
    else:
        hbm = r["hbm_bytes"]
        left = f"{size(abs(hbm - peak))} {'to spare' if r['fits'] else 'too much'}"
        fit = f"{'fits' if r['fits'] else 'DOES NOT FIT'}: peak {size(peak)} of {size(hbm)}, {left}"
        speed = f"step {seconds(r['step_seconds'])} at the least, MFU {r['mfu_ceiling']:.0%} at the most"
        speed += f", bubble {r['bubble']:.0%}" if r["bubble"] else ""
        if r["topology"].partition(":")[0] in GPUS:
            fit += " (the whole card, of which driver and libraries take some)"
        lines = [f"{where} on {r['topology']}", fit, f"{speed}; dominated by {r['dominant']}"]
    if "search" in r:
        lines[0] += f": the best of {len(r['search']['refused']) + r['search']['fitting']} meshes"
        lines += [f"the config's own mesh is {mesh_words(r['search']['mesh_of_config'])}"]
    if small := r.get("smallest_cluster"):
        lines += [
            f"smallest by doubling that fits: {small['topology']}, mesh {mesh_words(small['mesh'])}, "
            f"peak {size(small['peak_bytes'])}"
        ]
    if "no_mesh_up_to" in r:
        lines += [f"no mesh of up to {r['no_mesh_up_to']:,} devices fits, by doubling"]
    wrong = len(r["contradictions"])
    return lines + [f"{wrong} contradiction{'s' * (wrong > 1)} in its description"] * bool(wrong)


def parameters(r: dict[str, Any]) -> list[str]:
    """Parameters by component."""
    p = r["params"]
    active = p["active_components"]
    rows = [(COMPONENTS[c], f"{n:,}", f"{active[c]:,}") for c, n in p["components"].items()]
    rows.append(("all", f"{p['total']:,}", f"{p['active']:,}"))
    return table(("parameters", "total", "active"), rows, numbers=True)


def memory(r: dict[str, Any]) -> list[str]:
    """Memory by kind."""
    rows = [(k, size(n)) for k, n in r["memory_per_device"].items() if n]
    lines = table((f"memory a device at the peak, {r['peak_moment']}", "size"), rows, numbers=True)
    lines += [f"  keys and values of generation, same batch and length: {size(r['kv_cache_bytes'])}"]
    return lines + attention(r["attention"])


def exchange(r: dict[str, Any]) -> list[str]:
    """Dispatch, tokens of an expert, the all-to-all."""
    if "dispatch" not in r:
        return []
    d, a = r["dispatch"], r["all_to_all"]
    stack, mean = ("", "") if d["of"] == "all" else (f"of the {d['of']} ", " on average")
    lines = [f"  dispatch {stack}{d['kind']}: {d['reason']}"]
    lines += [
        f"  groups of {d['group']:,} tokens, {d['slots']:,} slots an expert",
        f"  experts of a layer on a device: {r['experts_per_device']:g}",
        f"  rows that each multiplies at a time: {r['tokens_per_expert']:,.0f}",
    ]
    if a["count"]:
        lines += [
            f"  all-to-all: {a['count']:,} a step over {a['devices']} devices; each time "
            f"{size(a['bytes_each'])}{mean} leave a device, {size(a['bytes_least'])} of it in use"
        ]
    return ["exchange", *lines]


def traffic(r: dict[str, Any]) -> list[str]:
    """Collectives of a step, with times on a named cluster."""
    timed = {(t["what"], i): t["seconds"] for i, t in enumerate(r.get("seconds", {}).get("collectives", []))}
    rows = []
    for i, t in enumerate(r["traffic"]):
        row = [f"{t['what']}: {t['op']}", " ".join(t["axes"]), f"{t['count']:,}", size(t["sent"])]
        rows.append([*row, seconds(timed[t["what"], i])] if timed else row)
    head = ["collectives of a step", "axes", "count", "sent each"]
    return table(head + ["time a step"] * bool(timed), rows, numbers=True) if rows else []


def clock(r: dict[str, Any]) -> list[str]:
    """Times and money."""
    if "seconds" not in r:
        return []
    s, run, d = r["seconds"], r["run"], r["decode"]
    rows = [("compute at the peak rate", seconds(s["compute"])), ("weights through HBM", seconds(s["hbm"]))]
    rows += [("collectives that are waited for", seconds(s["exposed"]))]
    rows += [("collectives beside computation", seconds(s["hidden"]))]
    money = "no price is known: --price" if run["dollars"] is None else f"${run['dollars']:,.0f} at ${run['price']:g}"
    lines = table(("a step, at the least", "time"), rows, numbers=True)
    lines += [
        f"  {run['tokens']:,} tokens: {run['steps']:,.0f} steps, {run['days']:,.2f} days, "
        f"{run['device_hours']:,.0f} device-hours, {money}"
    ]
    touched = f"{d['experts']:,.1f} experts a layer, " if d["experts"] else ""
    lines += [
        f"  decoding a token of each sequence: {touched}{size(d['weights'] + d['cache'])} read a device,"
        f" {seconds(d['seconds'])}, {d['tokens_per_second']:,.0f} tokens/s"
    ]
    return lines


def problems(title: str, found: list[dict[str, str]]) -> list[str]:
    """Each with its key, reason and remedy, in lines that fit the page."""
    lines = []
    for p in found:
        lines += textwrap.wrap(f"{p['key']}: {p['reason']}", WIDTH, initial_indent="  ", subsequent_indent="      ")
        lines += textwrap.wrap(f"remedy: {p['remedy']}", WIDTH, initial_indent="    ", subsequent_indent="      ")
    return [title, *lines] if found else []


def meshes(found: dict[str, Any]) -> list[str]:
    """The ranking of a search."""
    rows = [(mesh_words(c["mesh"]), seconds(c["step_seconds"]), size(c["peak_bytes"])) for c in found["meshes"]]
    head = (f"{found['fitting']} meshes fit; the fastest", "step", "memory")
    lines = table(head, rows, numbers=True) if rows else ["no mesh fits"]
    refused = found["refused"]
    return [*lines, *(f"  {mesh_words(c['mesh'])}: {c['reason']}" for c in refused[:5])] + [
        f"  and {len(refused) - 5} more do not fit (--json lists them)"
    ] * (len(refused) > 5)


def repaired(r: dict[str, Any]) -> list[str]:
    """What a contradictory description can be replaced by."""
    found = [(c["config"], f"{c['params_total']:,}", f"{c['params_active']:,}") for c in r.get("repaired", [])]
    return table(("repaired configs", "parameters", "active"), found, numbers=True) if found else []


def compiled(r: dict[str, Any]) -> list[str]:
    """The compiler's word beside the plan's."""
    c = r.get("compiled")
    if c is None:
        return []
    planned = r["memory_per_device"]["peak"]
    if c["refused"] is not None:
        return ["compiled", *textwrap.wrap(c["refused"], WIDTH, initial_indent="  ", subsequent_indent="    ")]
    ratio = planned / c["peak_bytes"]
    lines = [f"compiled: peak {size(c['peak_bytes'])} a device, the plan says {size(planned)} ({ratio:.2f})"]
    if shown := c["collectives"][:MOST]:
        lines += collectives([x | {"module": "+".join(x["module"].split("+")[:3])} for x in shown])  # fits the page
    rest = len(c["collectives"]) - MOST
    lines += [f"  and {rest} kinds more (--json lists them)"] * (rest > 0)
    return lines + problems(
        "flags", [{"key": f["kind"], "reason": f["what"], "remedy": f["remedy"]} for f in c["flags"]]
    )


def fitted(line: str) -> list[str]:
    """A line in as many as the page's width needs."""
    return textwrap.wrap(line, WIDTH, subsequent_indent="      ") if len(line) > WIDTH else [line]


def lines(r: dict[str, Any]) -> list[str]:
    """The whole plan."""
    parts = [
        verdict(r),
        problems("contradictions", r["contradictions"]),
        repaired(r),
        problems("warnings", r["warnings"]),
        meshes(r["search"]) if "search" in r else [],
        parameters(r),
        [f"  FLOPs a token: {r['flops_per_token']:,} training, {r['flops']['inference']:,} inference"],
        memory(r),
        exchange(r),
        traffic(r),
        clock(r),
        compiled(r),
    ]
    return [short for part in parts if part for line in [*part, ""] for short in fitted(line)][:-1]
