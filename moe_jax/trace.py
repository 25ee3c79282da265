"""`moe-jax trace`: which token of a text goes to which experts in which layer, with what weight."""

import argparse
import dataclasses
import io
import sys
from typing import Any

from moe_jax.terminal import folder, result, say, shown

COLOURS = ("blue", "red", "green", "magenta", "cyan", "yellow", "bright_blue", "bright_red")  # by expert, in turn
CONTEXT = 8  # ids before one that its text is told by: more than a character has bytes
PLAIN = 100  # columns of a table that is not for a terminal


def add_trace(trace: argparse.ArgumentParser) -> None:
    """Options of `moe-jax trace`."""
    trace.add_argument("workdir", type=folder, metavar="DIR")
    help = "for example mesh.expert=2"
    trace.add_argument("overrides", nargs="*", default=[], metavar="key.path=value", help=help)
    trace.add_argument("--text", required=True, metavar="TEXT")
    trace.add_argument("--png", type=folder, metavar="F", help="draw token x layer coloured by expert into the file F")
    help = "at the training capacity, with the text for a group: what finds no slot has gate 0 (default: dropless)"
    trace.add_argument("--capacity", action="store_true", help=help)
    trace.add_argument("--json", action="store_true", help="print one JSON object last on standard output")
    trace.add_argument("--quiet", action="store_true", help="results only: no progress on standard error")
    help = "run on N fake CPU devices (default: what the mesh needs)"
    trace.add_argument("--fake-devices", type=int, metavar="N", help=help)
    trace.set_defaults(run=run_trace)


def run_trace(args: argparse.Namespace) -> dict[str, Any]:
    """`moe-jax trace`."""
    from moe_jax.schema import Problem, Refused

    if any("\ud800" <= c <= "\udfff" for c in args.text):  # how Python passes on bytes that are no text
        raise Refused(Problem("--text", f"is not UTF-8: {args.text[:40]!a}", "convert it to UTF-8"))
    if args.png is not None and (args.png.is_dir() or not args.png.absolute().parent.is_dir()):
        raise Refused(Problem("--png", f"{args.png} is no file of a folder that exists", "name a file"))
    from moe_jax.trained import Trained

    trained = Trained(args.workdir, args.overrides, args.fake_devices)
    if trained.other is not None:
        raise Refused(Problem("data.path", "is another one than the run's, and no text is read here", "take it out"))
    report = {"workdir": str(args.workdir), "step": trained.step} | trace(trained, args.text, capacity=args.capacity)
    result(args, *lines(report))
    if args.png is not None:
        from moe_jax.picture import draw_trace

        title = f"{trained.cfg.name}, step {trained.step}"
        report["picture"] = str(draw_trace(report, args.png, title=title))
        say(args, f"picture {args.png}")
    return report


def check(cfg: Any, tokens: int, capacity: bool) -> None:
    """Refuse what has no experts, no record of them, no place for the text, or no capacity to run at."""
    from moe_jax.schema import Problem, Refused

    m = cfg.model
    if m.moe is None:
        raise Refused(Problem("DIR", f"{cfg.name} is a dense model: no layer has experts", "name a run of an MoE"))
    if m.encoder is not None:
        why = f"{cfg.name} has an encoder, whose text is another one than the decoder's, and one text is traced here"
        raise Refused(Problem("DIR", why, "name a run without model.encoder"))
    if not 0 < tokens <= m.max_length:
        why = f"makes {tokens} tokens, and the model reads 1 to model.max_length={m.max_length}"
        raise Refused(Problem("--text", why, "give a text of that length"))
    if capacity and m.moe.capacity_factor is None:
        why = "has no capacity to run at: the model was trained dropless, model.moe.capacity_factor is unset"
        raise Refused(Problem("--capacity", why, "leave it out, or set model.moe.capacity_factor=1.25 to see what if"))


def pieces(tokenizer: Any, ids: list[int]) -> list[str]:
    """Each id as what it adds to the text before it; a special one, such as BOS, by its name."""
    from moe_jax.data import continued

    names, out = {i: name for name, i in tokenizer.special.items()}, []
    for n, i in enumerate(ids):
        more = continued(tokenizer, ids[max(0, n - CONTEXT) : n], [i])
        out.append(names.get(i) or more or tokenizer.decode([i]))
    return out


def trace(trained: Any, text: str, *, capacity: bool = False) -> dict[str, Any]:
    """Where each of T tokens goes: the JSON of `moe-jax trace`.

    Args:
        trained: a `Trained` run, on any mesh.
        capacity: at the training capacity of a group of these T tokens, of which overflow is dropped.
    Returns:
        `tokens` [T] texts (`pieces`), `ids` [T], what `data.bos` puts in front first, and `layers`, bottom first, each
        with `expert` and `gate` [T][K], best first. A negative expert was not chosen after all (`routing.recorded`);
        one with gate 0 was dropped.
    Raises:
        Refused: a dense model, one with an encoder, or a text that does not fit.
    """
    import jax
    import numpy as np

    from moe_jax.cost import capacity as slots
    from moe_jax.mesh import fetch
    from moe_jax.rules import sharding
    from moe_jax.train.state import Model

    tokenizer, cfg = trained.corpus.tokenizer, trained.cfg
    ids = trained.corpus.prompt(text)
    check(cfg, len(ids), capacity)
    # The text is a group by itself, in a row by itself on one shard; rows of padding fill the other shards
    moe = dataclasses.replace(cfg.model.moe, group_size=None)
    cfg = dataclasses.replace(cfg, model=dataclasses.replace(cfg.model, moe=moe), rules=cfg.rules.by_rows())
    model, factor = Model.of(cfg), moe.capacity_factor if capacity else None
    tokens, segments = (np.zeros((cfg.mesh.over(cfg.rules.batch), len(ids)), np.int32) for _ in range(2))
    tokens[0], segments[0] = ids, 1

    def run(weights: Any, tokens: jax.Array, segments: jax.Array) -> Any:
        return model.module(*weights)(tokens, segments=segments, capacity_factor=factor, record=True).record

    with jax.set_mesh(trained.mesh):
        wide = sharding(trained.mesh, (cfg.rules.batch,))
        record = jax.jit(run)(trained.weights, *(jax.device_put(a, wide) for a in (tokens, segments)))
    expert, gate = (fetch(x)[:, 0] for x in record)  # [layers, T, K]
    blocks = [i for i, kind in enumerate(cfg.model.layer_kinds) if kind == "moe"]
    return {
        "text": text,
        "ids": ids.tolist(),
        "tokens": pieces(tokenizer, ids.tolist()),
        "experts": moe.experts,
        "capacity_factor": factor,
        "slots": None if factor is None else slots(moe, len(ids), factor),
        "routed": int((expert >= 0).sum()),
        "dropped": 0 if factor is None else int(((expert >= 0) & (gate == 0)).sum()),
        "layers": [
            {"layer": i, "block": block, "expert": e.tolist(), "gate": g.tolist()}
            for i, (block, e, g) in enumerate(zip(blocks, expert, gate, strict=True))
        ],
    }


def lines(report: dict[str, Any]) -> list[str]:
    """A table of a row a token and a column an MoE layer, each choice as `expert:gate`; `-` for a dropped one."""
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    def cell(experts: list[int], gates: list[float]) -> Text:
        text = Text()
        for e, g in zip(experts, gates, strict=True):
            if e >= 0:
                text.append(f"{e}:{f'{g:.2f}' if g else '-'} ", COLOURS[e % len(COLOURS)] if g else "dim")
        return text

    cells = [[cell(*pair) for pair in zip(x["expert"], x["gate"], strict=True)] for x in report["layers"]]
    terminal = sys.stdout.isatty()
    out = io.StringIO()
    console = Console(file=out, force_terminal=terminal, width=None if terminal else PLAIN, highlight=False)
    names = [shown(t) for t in report["tokens"]]
    widths = [max(len(c) for c in column) + 2 for column in cells]
    room, first = console.width - max(map(len, (*names, "token"))) - 3, 0
    while first < len(cells):  # as many layers beside one another as fit, and at least one
        last = first + 1
        while last < len(cells) and sum(widths[first : last + 1]) <= room:
            last += 1
        table = Table("token", *(f"layer {x['layer']}" for x in report["layers"][first:last]), box=box.SIMPLE_HEAD)
        for name, *row in zip(names, *cells[first:last], strict=True):
            table.add_row(Text(name), *row)
        console.print(table)
        first = last
    how = "dropless"
    if report["capacity_factor"] is not None:
        how = f"capacity factor {report['capacity_factor']:g}: {report['slots']} slots an expert"
    told = f"{report['routed']} choices of {len(names)} tokens in {len(cells)} MoE layers, {how}"
    return [*out.getvalue().splitlines(), f"{told}, {report['dropped']} dropped"]
