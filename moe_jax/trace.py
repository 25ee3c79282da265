"""`moe-jax trace`: which token of a text goes to which experts in which layer, with what weight.

Of a short text, `--text`, every token is told. A long one, `--file`, is told by what each expert gets: `likes`.
"""

import argparse
import dataclasses
import io
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from moe_jax.terminal import folder, result, say, shown

if TYPE_CHECKING:
    import numpy as np

COLOURS = ("blue", "red", "green", "magenta", "cyan", "yellow", "bright_blue", "bright_red")  # by expert, in turn
CONTEXT = 8  # ids before one that its text is told by: more than a character has bytes
PLAIN = 100  # columns of a table that is not for a terminal
MOST_BYTES = 2**20  # of a file: what 200 shuffles of its bytes take is seconds


def add_trace(trace: argparse.ArgumentParser) -> None:
    """Options of `moe-jax trace`."""
    trace.add_argument("workdir", type=folder, metavar="DIR")
    help = "for example mesh.expert=2"
    trace.add_argument("overrides", nargs="*", default=[], metavar="key.path=value", help=help)
    source = trace.add_mutually_exclusive_group(required=True)
    source.add_argument("--text", metavar="TEXT", help="a short text: where each of its tokens goes")
    help = "a long text of up to 1 MiB: the load of each expert, and the tokens and classes of tokens that it likes"
    source.add_argument("--file", type=folder, metavar="FILE", help=help)
    help = "draw into the file F: of --text token x layer coloured by expert; of --file loads and likes"
    trace.add_argument("--png", type=folder, metavar="F", help=help)
    help = "at the training capacity, with the text, or each data.length tokens of a file, for a group: what finds no "
    help += "slot has gate 0 (default: dropless)"
    trace.add_argument("--capacity", action="store_true", help=help)
    trace.add_argument("--json", action="store_true", help="print one JSON object last on standard output")
    trace.add_argument("--quiet", action="store_true", help="results only: no progress on standard error")
    help = "run on N fake CPU devices (default: what the mesh needs)"
    trace.add_argument("--fake-devices", type=int, metavar="N", help=help)
    trace.set_defaults(run=run_trace)


def run_trace(args: argparse.Namespace) -> dict[str, Any]:
    """`moe-jax trace`."""
    from moe_jax.refused import Problem, Refused

    if any("\ud800" <= c <= "\udfff" for c in args.text or ""):  # how Python passes on bytes that are no text
        raise Refused(Problem("--text", f"is not UTF-8: {args.text[:40]!a}", "convert it to UTF-8"))
    if args.png is not None and (args.png.is_dir() or not args.png.absolute().parent.is_dir()):
        raise Refused(Problem("--png", f"{args.png} is no file of a folder that exists", "name a file"))
    if args.png is not None and args.file is not None and args.png.exists() and args.png.samefile(args.file):
        raise Refused(
            Problem("--png", f"{args.png} is the text of --file, which it would replace", "name another file")
        )
    text = args.text if args.file is None else read(args.file)
    from moe_jax.trained import Trained

    trained = Trained(args.workdir, args.overrides, args.fake_devices)
    if trained.other is not None:
        raise Refused(Problem("data.path", "is another one than the run's, and no text is read here", "take it out"))
    head = {"workdir": str(args.workdir), "config": trained.cfg.name, "step": trained.step}
    title = f"{trained.cfg.name}, step {trained.step}"
    if args.file is None:
        from moe_jax.picture import draw_trace as draw

        report = head | trace(trained, text, capacity=args.capacity)
        result(args, *lines(report))
    else:
        from moe_jax import likes
        from moe_jax.picture_likes import draw_likes as draw

        ids = trained.corpus.prompt(text)
        report = head | {"file": str(args.file)} | likes.likes(trained, ids, capacity=args.capacity)
        result(args, *likes.lines(report))
    if args.png is not None:
        report["picture"] = str(draw(report, args.png, title=title))
        say(args, f"picture {args.png}")
    return report


def read(path: Path) -> str:
    """The text of a file.

    Raises:
        Refused: no such file, one that is too long or not UTF-8, or no text in it.
    """
    from moe_jax.refused import Problem, Refused

    def no(why: str, remedy: str) -> Refused:
        return Refused(Problem("--file", f"{path} {why}", remedy))

    if not path.is_file():
        raise no("is no file" if path.exists() else "does not exist", "name a file of text")
    try:
        with path.open("rb") as file:
            raw = file.read(MOST_BYTES + 1)
    except OSError as e:
        raise no(f"cannot be read: {e.strerror}", "make it readable") from None
    if len(raw) > MOST_BYTES:
        why = f"has {path.stat().st_size:,} bytes, and at most {MOST_BYTES:,} are read"
        raise no(why, f"give a part of it, for example with head -c {MOST_BYTES}")
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as e:
        why = f"is not UTF-8: byte 0x{raw[e.start]:02x} at offset {e.start}"
        raise no(why, "convert it to UTF-8 (iconv -t UTF-8)") from None
    if not text.strip():
        raise no(f"holds no text: {len(raw):,} bytes without a visible character", "give a file with text in it")
    return text


def check(cfg: Any, tokens: int, capacity: bool) -> None:
    """Refuse what has no experts, no record of them, no place for the text, or no capacity to run at."""
    from moe_jax.refused import Problem, Refused

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


class Routes(NamedTuple):
    """Where each token went in each MoE layer, bottom first."""

    expert: "np.ndarray"  # [layers, T, K] int32, best first; negative where there was no choice (`routing.recorded`)
    gate: "np.ndarray"  # [layers, T, K] float32, 0 where there was no slot
    kept: "np.ndarray"  # [layers, T, K] bool, the choices that were made and found a slot
    factor: float | None  # capacity factor, None: dropless
    slots: int | None  # of an expert in each group

    def counts(self, cfg: Any) -> dict[str, Any]:
        """What the report of a text and that of a file share. `load` [layers][E] counts the dropped choices too."""
        from moe_jax.specialise import loads

        made, kept = int((self.expert >= 0).sum()), int(self.kept.sum())
        counts = {"routed": made, "dropped": made - kept, "load": loads(self.expert, cfg.model.moe.experts).tolist()}
        return {"experts": cfg.model.moe.experts, "capacity_factor": self.factor, "slots": self.slots} | counts


def routes(trained: Any, ids: "np.ndarray", length: int, *, capacity: bool = False) -> Routes:
    """Runs the model on T tokens, in sequences of `length` that do not see one another, the last one shorter.

    Args:
        trained: a `Trained` run, on any mesh.
        ids: [T] integers.
        capacity: at the training capacity of groups of `length` tokens, of which overflow is dropped.
    Raises:
        Refused: a dense model, one with an encoder, or tokens that do not fit.
    """
    import jax
    import numpy as np

    from moe_jax.cost import capacity as slots
    from moe_jax.kernels import of_any_length
    from moe_jax.mesh import fetch
    from moe_jax.rules import sharding
    from moe_jax.train.state import Model

    cfg, T = trained.cfg, len(ids)
    check(cfg, min(T, length), capacity)
    # Each sequence is a group by itself, in a row by itself on one shard; rows of padding fill the other shards
    moe = dataclasses.replace(cfg.model.moe, group_size=None)
    m = dataclasses.replace(of_any_length(cfg.model), moe=moe)
    cfg = dataclasses.replace(cfg, model=m, rules=cfg.rules.by_rows())
    model, factor = Model.of(cfg), moe.capacity_factor if capacity else None
    shards, wanted = cfg.mesh.over(cfg.rules.batch), -(-T // length)
    B = -(-min(wanted, cfg.data.batch) // shards) * shards
    N = -(-wanted // B) * B * length
    tokens, segments = (np.pad(a.astype(np.int32), (0, N - T)).reshape(-1, B, length) for a in (ids, np.ones(T)))

    @jax.jit
    def run(weights: Any, tokens: jax.Array, segments: jax.Array) -> Any:
        return model.module(*weights)(tokens, segments=segments, capacity_factor=factor, record=True).record

    parts = []
    with jax.set_mesh(trained.mesh):
        wide = sharding(trained.mesh, (cfg.rules.batch,))
        for batch in zip(tokens, segments, strict=True):
            parts.append([fetch(x) for x in run(trained.weights, *(jax.device_put(a, wide) for a in batch))])
    whole = (np.concatenate(p, 1) for p in zip(*parts, strict=True))  # [layers, rows, length, K]
    expert, gate = (x.reshape(len(x), N, -1)[:, :T] for x in whole)
    kept = (expert >= 0) & (True if factor is None else gate != 0)
    return Routes(expert, gate, kept, factor, None if factor is None else slots(moe, length, factor))


def trace(trained: Any, text: str, *, capacity: bool = False) -> dict[str, Any]:
    """Where each of T tokens goes: the JSON of `moe-jax trace --text`.

    Args:
        trained: a `Trained` run, on any mesh.
        capacity: at the training capacity of a group of these T tokens, of which overflow is dropped.
    Returns:
        `tokens` [T] texts (`pieces`), `ids` [T], what `data.bos` puts in front first, `load` [layers][E], and `layers`,
        bottom first, each with `expert` and `gate` [T][K], best first. A negative expert was not chosen after all
        (`routing.recorded`); one with gate 0 was dropped.
    Raises:
        Refused: a dense model, one with an encoder, or a text that does not fit.
    """
    ids = trained.corpus.prompt(text)
    found = routes(trained, ids, len(ids), capacity=capacity)
    told = {"text": text, "ids": ids.tolist(), "tokens": pieces(trained.corpus.tokenizer, ids.tolist())}
    layers = [
        {"layer": i, "block": block, "expert": e.tolist(), "gate": g.tolist()}
        for i, (block, e, g) in enumerate(zip(blocks(trained.cfg), found.expert, found.gate, strict=True))
    ]
    return told | found.counts(trained.cfg) | {"layers": layers}


def blocks(cfg: Any) -> list[int]:
    """The MoE layers by their place among all layers of the model."""
    return [i for i, kind in enumerate(cfg.model.layer_kinds) if kind == "moe"]


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
