"""Options of `moe-jax bench`; only the standard library is imported before a benchmark runs."""

import argparse
import math
import os
import sys
from collections.abc import Callable
from typing import Any

from moe_jax.terminal import result, say

DISPATCHERS = ("einsum", "gather", "ragged")
DEFAULT_CONFIG = "bench_small"
MIXTRAL = {  # keys whose defaults are as in Mixtral, by what holds them
    "model": (
        "latent",
        "encoder",
        "biases",
        "qk_norm",
        "qkv_clip",
        "attention_scale",
        "window",
        "full_every",
        "sinks",
        "positions",
        "rope",
        "norm",
        "norm_order",
        "final_norm",
        "ffn",
        "head_bias",
        "embed_scale",
        "residual_scale",
        "logit_scale",
    ),
    "model.moe": ("shared_experts", "bias_rate"),
    "model.moe.router": ("scale", "groups", "gate", "bias", "force"),
}


def add_benchmarks(bench: argparse.ArgumentParser) -> None:
    """`bench layer`, `bench step` and `bench decode`."""
    kinds = bench.add_subparsers(dest="benchmark", required=True, metavar="layer|step|decode")

    def add(name: str, text: str, run: Callable, rounds: int) -> argparse.ArgumentParser:
        sub = kinds.add_parser(name, help=text, description=text)
        sub.add_argument("--json", action="store_true", help="print one JSON object last on standard output")
        sub.add_argument("--quiet", action="store_true", help="results only: no progress on standard error")
        sub.add_argument("--rounds", type=int, default=rounds, metavar="N", help=f"timed turns (default {rounds})")
        sub.set_defaults(run=run, overrides=[])
        return sub

    text = "one MoE layer with each dispatcher, against the products of its experts alone"
    layer = add("layer", text, run_layer, 9)
    for name, value in (("tokens", 4096), ("top-k", 2), ("d-model", 256), ("d-ff", 512)):
        layer.add_argument(f"--{name}", type=int, default=value, metavar="N", help=f"default {value}")
    help = "several are compared with the first, such as 8,64 (default 8)"
    layer.add_argument("--experts", type=numbers, default=(8,), metavar="N,...", help=help)
    layer.add_argument("--ffn", choices=("relu", "gelu", "swiglu", "geglu", "clamped_swiglu"), default="relu")
    layer.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    layer.add_argument("--capacity-factor", type=float, default=1.25, metavar="F", help="default 1.25")
    layer.add_argument(
        "--group-size", type=int, metavar="S", help="default: einsum by the cost model, others all tokens"
    )
    layer.add_argument(
        "--dispatch",
        default=",".join(DISPATCHERS),
        metavar="NAMES",
        help=f"some of {','.join(DISPATCHERS)} (default all); ragged is dropless",
    )
    layer.add_argument("--no-parts", action="store_true", help="leave out where the time goes")
    help = "time the products of the ragged dispatcher by jax.lax.ragged_dot too"
    layer.add_argument("--ragged-dot", action="store_true", help=help)

    step = add("step", "a train step against its matrix products alone and against a dense model", run_step, 9)
    step.add_argument("config", metavar="CONFIG", nargs="?", default=DEFAULT_CONFIG)
    step.add_argument("overrides", nargs="*", metavar="key.path=value")

    text = "prefill and decoding of a shape of Mixtral's, random weights, alone or against transformers on the same CPU"
    decode = add("decode", text, run_decode, 5)
    decode.add_argument("config", metavar="CONFIG", nargs="?", default=DEFAULT_CONFIG)
    decode.add_argument("overrides", nargs="*", metavar="key.path=value")
    decode.add_argument("--against", choices=("transformers",), help="its fastest implementation, by turns")
    help = "has torch and transformers (default: this interpreter)"
    decode.add_argument("--python", default=sys.executable, metavar="PATH", help=help)
    decode.add_argument("--batch", type=numbers, default=(1, 16), metavar="N,...", help="rows (default 1,16)")
    decode.add_argument("--prompt-tokens", type=int, default=64, metavar="N", help="of each row (default 64)")
    decode.add_argument("--tokens", type=int, default=128, metavar="N", help="new ones of each row (default 128)")
    decode.add_argument("--threads", type=int, default=2, metavar="N", help="processors of each program (default 2)")


def numbers(text: str) -> tuple[int, ...]:
    """Integers between commas, each once."""
    try:
        return tuple(dict.fromkeys(int(part) for part in text.split(",")))
    except ValueError:
        raise argparse.ArgumentTypeError(f"is {text!r}: give integers with commas between, such as 8,64") from None


def at_least_one(**values: float) -> None:
    """Refuse sizes below 1, and factors that are not finite and above 0."""
    from moe_jax.config import Problem, Refused

    factors = {n: v for n, v in values.items() if isinstance(v, float)}
    wrong = [(n, v, "1 or more") for n, v in values.items() if n not in factors and v < 1]
    wrong += [(n, v, "a finite number above 0") for n, v in factors.items() if not 0 < v < math.inf]
    if wrong:
        raise Refused(*(Problem(f"--{n.replace('_', '-')}", f"is {v}", f"give {want}") for n, v, want in wrong))


def run_layer(args: argparse.Namespace) -> dict[str, Any]:
    """`moe-jax bench layer`."""
    from moe_jax.config import Problem, Refused

    names = tuple(args.dispatch.split(","))
    unknown = [n for n in names if n not in DISPATCHERS]
    if unknown:
        raise Refused(Problem("--dispatch", f"has no {unknown[0]!r}", f"use some of {','.join(DISPATCHERS)}"))
    if args.overrides:
        raise Refused(Problem(args.overrides[0], "a layer has no config", "use the options of `bench layer`"))
    sizes = {n: getattr(args, n) for n in ("tokens", "top_k", "d_model", "d_ff", "capacity_factor")}
    group = {} if args.group_size is None else {"group_size": args.group_size}
    at_least_one(rounds=args.rounds, experts=min(args.experts), **sizes, **group)
    if args.ragged_dot and "ragged" not in names:
        raise Refused(Problem("--ragged-dot", "compares the ragged dispatcher, and --dispatch leaves it out", "add it"))
    from moe_jax.bench import layer

    more = {"ffn": args.ffn, "dtype": args.dtype, **sizes, **group}
    shapes = [layer.Shape(experts=E, **more) for E in args.experts]
    report = layer.measure(shapes, names, args.rounds, parts=not args.no_parts, ragged_dot=args.ragged_dot)
    result(args, *layer.lines(report))
    return report


def run_step(args: argparse.Namespace) -> dict[str, Any]:
    """`moe-jax bench step`."""
    from moe_jax import config, mesh

    at_least_one(rounds=args.rounds)
    if "=" in args.config:  # no config was named
        args.config, args.overrides = DEFAULT_CONFIG, [args.config, *args.overrides]
    cfg = config.load(args.config, args.overrides)
    mesh.prepare_devices(cfg.mesh, None)
    from moe_jax.bench import step

    report = step.measure(cfg, args.rounds)
    result(args, *step.lines(report))
    return report


def run_decode(args: argparse.Namespace) -> dict[str, Any]:
    """`moe-jax bench decode`."""
    from moe_jax import config
    from moe_jax.config import Problem, Refused

    sizes = {n: getattr(args, n) for n in ("rounds", "prompt_tokens", "threads")}
    at_least_one(batch=min(args.batch), **sizes)
    if not hasattr(os, "sched_setaffinity"):
        raise Refused(Problem("bench decode", "this system cannot pin a process to processors", "run it on Linux"))
    here = len(os.sched_getaffinity(0))
    if args.threads > here:
        raise Refused(Problem("--threads", f"is {args.threads}, and there are {here}", f"give 1 to {here}"))
    if args.tokens < 2:
        raise Refused(Problem("--tokens", f"is {args.tokens}, and the first comes with prefill", "give 2 or more"))
    if "=" in args.config:  # no config was named
        args.config, args.overrides = DEFAULT_CONFIG, [args.config, *args.overrides]
    args.overrides = ["model.ffn=swiglu", *args.overrides]  # as Mixtral has it; the report says so
    cfg = config.load(args.config, args.overrides)
    check_mixtral(cfg)
    config.require_decoding(cfg.model)
    if args.prompt_tokens + args.tokens > cfg.model.max_length:
        why = f"{args.prompt_tokens} tokens and {args.tokens} new ones exceed model.max_length={cfg.model.max_length}"
        raise Refused(Problem("--tokens", why, "ask for fewer, or raise model.max_length"))
    from moe_jax.bench import decode

    try:
        report = decode.measure(cfg, args, lambda line: say(args, line))
    except decode.Missing as e:
        why, remedy = f"lacks torch or transformers: {e}", "python -m pip install torch transformers there"
        raise Refused(Problem(f"--python {args.python}", why, remedy)) from None
    result(args, *decode.lines(report))
    return report


def check_mixtral(cfg: Any) -> None:
    """Refuse a config that transformers' Mixtral is not the shape of."""
    from moe_jax.config import Problem, Refused

    m, moe = cfg.model, cfg.model.moe
    fits = {
        "model.moe": moe is not None and m.layer_kinds == ("moe",) * m.layers,
        "model.moe.router.kind": moe is None or moe.router.kind in ("softmax_topk", "topk_softmax"),
        "mesh": cfg.mesh.size == 1,
    }
    for key, part in zip(MIXTRAL, (m, moe, moe and moe.router), strict=True):
        if part is not None:
            usual = type(part)()
            fits |= {f"{key}.{name}": getattr(part, name) == getattr(usual, name) for name in MIXTRAL[key]}
    if wrong := [key for key, fit in fits.items() if not fit]:
        why = "is not as in Mixtral, the shape that is timed"
        raise Refused(*(Problem(key, why, "take bench_small, or set it as there") for key in wrong))
