"""`moe-jax convert`: options and flow."""

import argparse
from typing import Any

from moe_jax.terminal import add_processes, folder, mesh_words, result, size


def add_convert(convert: argparse.ArgumentParser) -> None:
    """`convert import` and `convert export`."""
    kinds = convert.add_subparsers(dest="direction", required=True, metavar="import|export")

    def add(name: str, text: str) -> argparse.ArgumentParser:
        sub = kinds.add_parser(name, help=text, description=text)
        sub.add_argument("--json", action="store_true", help="print one JSON object last on standard output")
        sub.add_argument("--quiet", action="store_true", help="results only: no progress on standard error")
        return sub

    load = add("import", "published weights into a workdir, for `eval`, `generate` and `train` to go on with")
    load.add_argument("source", type=folder, metavar="SRC", help="a folder of config.json and safetensors")
    load.add_argument("workdir", type=folder, metavar="WORKDIR", help="a new or an empty folder")
    help = "for example mesh.expert=4 mesh.tensor=2, data.path=FILE"
    load.add_argument("overrides", nargs="*", default=[], metavar="key.path=value", help=help)
    help = "run on N fake CPU devices (default: what the mesh needs)"
    load.add_argument("--fake-devices", type=int, metavar="N", help=help)
    add_processes(load)
    load.set_defaults(run=run_import)

    save = add("export", "the newest checkpoint of a workdir as a folder that transformers loads")
    save.add_argument("workdir", type=folder, metavar="WORKDIR", help="of an import or of a run")
    save.add_argument("target", type=folder, metavar="DST", help="a folder that is not there yet, or an empty one")
    help = "of the numbers (default: as imported; float32 for a model that was not)"
    save.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help=help)
    help = "largest file, in GB of 10^9 bytes (default 5)"
    save.add_argument("--shard-gb", type=float, default=5.0, metavar="GB", help=help)
    help = "model_type of a model that was not imported (default: the first one that it is)"
    save.add_argument("--family", metavar="NAME", help=help)
    save.set_defaults(run=run_export, overrides=[])


def run_import(args: argparse.Namespace) -> dict[str, Any]:
    """`moe-jax convert import`."""
    from moe_jax.convert.load import run
    from moe_jax.data.tokenizer import FILES

    several: dict[str, Any] = {}
    if (place := getattr(args, "place", None)) is not None:
        several = {"processes": place.count, "join": lambda: place.start(*args.joins)}
    report = run(args.source, args.workdir, args.overrides, args.fake_devices, quiet=args.quiet, **several)
    lines = [
        "{tensors:,} tensors of {family}, {params_total:,} parameters, {params_active:,} active".format(**report),
        f"{size(report['shard_bytes'])} in the shards of {mesh_words(report['mesh'])}",
    ]
    if report["ignored"]:
        lines.append(f"{len(report['ignored'])} tensors are of no use here, such as {report['ignored'][0]}")
    if report["tokenizer"] == "bytes":
        why = "text is read as bytes, which such a model has not learned"
        lines.append(f"{args.source} has no {', '.join(FILES[:-1])} or {FILES[-1]}: {why}")
    if not report["text"]:
        why = "the tokenizer has more ids than the model"
        lines.append(f"no text was prepared, because {why}: the workdir can be exported, not trained or evaluated")
    else:
        lines.append(f"go on with: moe-jax generate {args.workdir} --prompt TEXT")
        lines.append(f"or with: moe-jax train {args.workdir / 'config.toml'} --workdir {args.workdir}")
        trains = "    which trains on data.path={path}, data.batch={batch}, data.length={length}, at "
        trains += "train.optimizer.learning_rate={learning_rate:g}: set there what is to be another"
        lines.append(trains.format(**report["training"]))
    result(args, *lines)
    return report


def run_export(args: argparse.Namespace) -> dict[str, Any]:
    """`moe-jax convert export`."""
    from moe_jax.config import Problem, Refused
    from moe_jax.convert.save import run

    if args.overrides:
        raise Refused(Problem(args.overrides[0], "an export changes no key", "take it out"))
    options = {"dtype": args.dtype, "shard_gb": args.shard_gb, "family": args.family}
    report = run(args.workdir, args.target, **options, quiet=args.quiet)
    result(
        args,
        "{tensors:,} tensors of {family} at step {step} in {files} file{many} of {dtype}".format(
            **report, many="s"[: report["files"] != 1]
        ),
        f"{size(report['bytes'])} in {args.target}",
    )
    return report
