"""The report of `moe-jax inspect` for people. No JAX."""

from collections.abc import Sequence
from typing import Any

from moe_jax.terminal import mesh_words, size, table


def collectives(rows: Sequence[dict[str, Any]]) -> list[str]:
    """A table of collectives, one row for those that are alike."""
    cells = [
        (
            r["op"],
            "+".join(r["axes"]),
            f"{'at most ' if r['conditional'] else ''}{r['count']:,}",
            f"{'at most ' if r['op'] == 'ragged-all-to-all' else ''}{size(r['bytes'])}",
            r["phase"],
            f"{r['module']}{' (weights)' if r['of'] else ''}",
        )
        for r in rows
    ]
    head = ("op", "mesh axes", "count", "sent", "phase", "module")
    return table(head, cells) if cells else ["  no collectives: nothing leaves its device"]


def lines(report: dict[str, Any]) -> list[str]:
    """The whole report."""
    where = report["topology"] or f"{report['devices']} {report['platform']} device(s)"
    mesh = mesh_words(report["mesh"])
    out = [f"{report['config']}, {report['program']} on {where}, mesh {mesh}: what one device sends in a step"]
    out += collectives(report["collectives"])
    out += exchange_lines(report)
    out += attention(report["attention"])
    out += [f"flag: {f['kind']}: {f['what']}\n    remedy: {f['remedy']}" for f in report["flags"]] or ["no flags"]
    memory = f"memory {size(report['peak_bytes'])} a device at the peak"
    if (available := report["memory_bytes"]) is not None:
        fits = "fits" if report["peak_bytes"] <= available else "does not fit"
        whole = " (the whole card, of which driver and libraries take some)" if report["platform"] == "gpu" else ""
        memory += f" of {size(available)}{whole}: {fits}"
    return [*out, f"{memory}; compiled in {report['compile_seconds']:.1f} s"]


def attention(found: dict[str, dict[str, str]]) -> list[str]:
    """What computes the attention of each kind of layer, and why."""
    return [f"  attention, {name}: {choice['kernel']}: {choice['reason']}" for name, choice in found.items()]


def exchange_lines(report: dict[str, Any]) -> list[str]:
    """The exchange beside its least."""
    least, found = report["least"], report["exchange"]
    if least is None:
        return []
    phases = [p for p, n in least["count"].items() if n or found["count"][p]]
    counts = ", ".join(f"{found['count'][p]} {p} (least {least['count'][p]})" for p in phases)
    n = ", ".join(map(str, least["stages"]))
    stages = f"the mean of {len(least['stages'])} stages, " if len(least["stages"]) > 1 else ""
    mean = " on average over encoder and decoder" if report["encoder"] else ""
    why = f"{stages}f*K*T*D*b*(n-1)/n with T={least['tokens']:,} tokens a device{mean}, n={n}"
    most = "at most " if found["at_most"] else ""
    moved = f"{most}all-to-alls {counts}; {most}{found['times_least']:.3f} times the least bytes"
    if not any(found["count"].values()):
        moved = "no all-to-all was found: least " + ", ".join(f"{least['count'][p]} {p}" for p in phases)
    return [
        f"exchange: {moved}",
        f"  least: {least['bytes_each_way']:,} bytes each way, {why}",
    ]
