"""The command line: `moe-jax train | eval | generate | upcycle | convert | plan | inspect | trace | doctor | bench`.

Only the standard library is imported before the arguments are read, so that `--help` answers at once.
Exit codes: 0 done, 1 failure, 2 refused input (one message, nothing written), 75 a training stopped by a signal after
saving, which the same command goes on with, 130 interrupted before there was anything to save, or twice.
"""

import argparse
import ctypes
import errno
import json
import math
import os
import platform
import signal
import sys
import threading
import time
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from moe_jax.bench.options import add_benchmarks
from moe_jax.convert.command import add_convert
from moe_jax.doctor import add_doctor
from moe_jax.plan.command import add_plan
from moe_jax.terminal import STOPPED, add_processes, folder, result, say
from moe_jax.trace import add_trace

STARTED = time.perf_counter()


OVERRIDES = "sets a key, and key.path=unset takes an inherited value out; for example "


class Version(argparse.Action):
    """Prints the versions and ends; looked up only then."""

    def __call__(self, parser: argparse.ArgumentParser, *_: Any, **__: Any) -> None:
        from importlib.metadata import version

        print(f"moe-jax {version('moe-jax')}, jax {version('jax')}, Python {platform.python_version()}")
        parser.exit()


def parser() -> argparse.ArgumentParser:
    """Commands and options."""
    top = argparse.ArgumentParser(
        prog="moe-jax",
        description="Train, evaluate and run sharded mixture-of-experts transformers.",
        epilog="CONFIG is a name in configs/ or a .toml file; key.path=value overrides follow it. "
        "All keys: configs/README.md.",
    )
    top.add_argument("--version", action=Version, nargs=0, help="print the version and end")
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def add(name: str, text: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=text, description=text)
        sub.add_argument("--json", action="store_true", help="print one JSON object last on standard output")
        sub.add_argument("--quiet", action="store_true", help="results only: no progress on standard error")
        sub.add_argument(
            "--fake-devices", type=int, metavar="N", help="run on N fake CPU devices (default: what the mesh needs)"
        )
        return sub

    train = add("train", "train a model; the same command goes on where a run in its workdir stopped")
    train.add_argument("config", metavar="CONFIG")
    train.add_argument("overrides", nargs="*", default=[], metavar="key.path=value", help=f"{OVERRIDES}train.steps=500")
    train.add_argument("--workdir", type=folder, metavar="DIR", help="default: a new folder runs/CONFIG-DATE-TIME")
    add_processes(train)
    train.set_defaults(run=run_train)

    evaluate = add("eval", "loss of a trained model on held-out text, dropless and at capacity")
    evaluate.add_argument("workdir", type=folder, metavar="DIR")
    help = "for example mesh.expert=2; data.path=FILE: the whole of another text"
    evaluate.add_argument("overrides", nargs="*", default=[], metavar="key.path=value", help=help)
    evaluate.add_argument("--batches", type=int, metavar="N", help="batches to read (default: all held-out text)")
    add_processes(evaluate)
    evaluate.set_defaults(run=run_eval)

    generate = add("generate", "continue a prompt with a trained model")
    generate.add_argument("workdir", type=folder, metavar="DIR")
    generate.add_argument(
        "overrides", nargs="*", default=[], metavar="key.path=value", help="for example mesh.expert=2"
    )
    generate.add_argument("--prompt", action="append", required=True, metavar="TEXT", help="may be given several times")
    generate.add_argument("--tokens", type=int, default=100, metavar="N", help="new tokens (default 100)")
    generate.add_argument(
        "--temperature", type=float, default=0.8, metavar="T", help="0: the most probable token (default 0.8)"
    )
    generate.add_argument(
        "--top-k", type=int, default=0, metavar="K", help="choose among the K most probable (default: all)"
    )
    help = "choose among the most probable that together have the probability P (default 1: all)"
    generate.add_argument("--top-p", type=float, default=1.0, metavar="P", help=help)
    help = "a text ends before TEXT; may be given several times (the tokenizer's end of a document always ends one)"
    generate.add_argument("--stop", action="append", default=[], metavar="TEXT", help=help)
    help = "each prompt is what a user says, put into the chat template that lies beside the tokenizer"
    generate.add_argument("--chat", action="store_true", help=help)
    generate.add_argument("--system", metavar="TEXT", help="with --chat: what the system says first")
    generate.add_argument("--seed", type=int, default=0)
    help = (
        "hold the experts in N slots of all devices together, the busiest several times, placed by their loads (EPLB)"
    )
    generate.add_argument("--slots", type=int, metavar="N", help=help)
    help = (
        "with --slots: loads that `moe-jax eval DIR --json` wrote, of any text (default: counted now on as much of the "
    )
    help += "run's held-out text as train.eval_batches says)"
    generate.add_argument("--loads", type=folder, metavar="FILE", help=help)
    help = "with --slots: each group of experts that the router knows stays within one of N nodes (default 1)"
    generate.add_argument("--nodes", type=int, metavar="N", help=help)
    generate.set_defaults(run=run_generate)

    upcycle = add("upcycle", "make a mixture of experts out of a trained dense model; `train` goes on in its workdir")
    upcycle.add_argument("dense", type=folder, metavar="DENSE_DIR", help="workdir of the dense run")
    upcycle.add_argument("config", metavar="CONFIG", help="the new model: the dense one but for model.moe")
    upcycle.add_argument("overrides", nargs="*", default=[], metavar="key.path=value")
    upcycle.add_argument("--workdir", type=folder, metavar="OUT", required=True, help="a new or an empty folder")
    upcycle.add_argument(
        "--method",
        choices=("copy", "split"),
        default="copy",
        help="experts are copies of the dense layer (default), or slices of it, model.moe.d_ff wide",
    )
    upcycle.add_argument(
        "--noise", type=float, default=0.0, metavar="S", help="noise on the experts, 1: that of fresh ones (default 0)"
    )
    upcycle.add_argument("--seed", type=int, metavar="N", help="of router and noise (default: train.seed)")
    upcycle.set_defaults(run=run_upcycle)

    text = "published weights in and out: Hugging Face folders of config.json and safetensors"
    add_convert(commands.add_parser("convert", help=text, description=text))

    text = "what a config costs before it runs: parameters, FLOPs, memory, traffic, time and money"
    add_plan(commands.add_parser("plan", help=text, description=text))

    look = add("inspect", "the collectives of the compiled train step, beside the least there could be; nothing is run")
    look.add_argument("config", metavar="CONFIG")
    look.add_argument("overrides", nargs="*", default=[], metavar="key.path=value", help=f"{OVERRIDES}mesh.expert=4")
    help = "compile for a machine that is not here: v5e:4x4, v5p:8x8x4, v5e:16x16*2 (slices), h100:32x8 (hosts x GPUs)"
    look.add_argument("--topology", metavar="T", help=help)
    look.add_argument("--forward", action="store_true", help="the forward pass alone")
    look.set_defaults(run=run_inspect)

    text = "which token of a text goes to which experts in which layer, with what weight"
    add_trace(commands.add_parser("trace", help=text, description=text))

    text = "are the experts of a run healthy: what is wrong, in numbers, and what to change"
    add_doctor(commands.add_parser("doctor", help=text, description=text))

    text = "speed of one layer or of a train step, as a ratio to its matrix products, and of prefill and decoding"
    add_benchmarks(commands.add_parser("bench", help=text, description=text))
    return top


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The arguments; overrides may stand before, between and after the options."""
    top = parser()
    args, rest = top.parse_known_args(argv)
    for text in rest:
        if text.startswith("-") or "=" not in text:
            top.error(
                f"unrecognized argument {text!r}: options are listed by `moe-jax {args.command} --help`, "
                "overrides are written key.path=value"
            )
    args.overrides = [*args.overrides, *rest]
    return args


def keep_memory() -> None:
    """Let the allocator keep what it freed. XLA on CPU takes one large buffer a step, and glibc would return it to the
    kernel each time, at tens of thousands of page faults a step. Elsewhere this does nothing."""
    if not sys.platform.startswith("linux"):
        return
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):  # not glibc
        return
    trim_threshold, mmap_max, arena_max = -1, -4, -8
    mallopt(arena_max, 1)
    mallopt(mmap_max, 0)
    mallopt(trim_threshold, 2**31 - 1)


def quiet_libraries() -> None:
    """Libraries log to standard error what no user can act on."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    os.environ.setdefault("GRPC_VERBOSITY", "ERROR")
    if only_compilers(sys.path, Path("/dev")):
        os.environ.setdefault("JAX_PLATFORMS", "cpu")


def only_compilers(folders: Sequence[str], devices: Path) -> bool:
    """Whether the accelerators that JAX has packages for, TPUs or NVIDIA's, are none here: it would try and complain.

    Other hardware has other device files: where a package for it is installed, JAX looks for itself.
    """
    plugins = {p.name for f in folders for p in Path(f, "jax_plugins").glob("*") if not p.name.startswith("__")}
    known = {name for name in plugins if name.startswith("xla_cuda")}
    if plugins - known or not (known or any(Path(f, "libtpu").exists() for f in folders)):
        return False
    places = ("accel*", "vfio/[0-9]*", "nvidia[0-9]*", "nvidiactl", "dxg")
    return not any(any(devices.glob(name)) for name in places)


def keep_programs() -> None:
    """Let JAX keep compiled programs from one command to the next, unless the environment says where or not to.

    A folder for each kind of processor: a shared home must not hand a program to a machine that lacks its instructions.
    """
    set_already = {"JAX_COMPILATION_CACHE_DIR", "JAX_ENABLE_COMPILATION_CACHE"} & os.environ.keys()
    if set_already or "jax" in sys.modules:
        return
    try:
        cpu = [
            x
            for x in Path("/proc/cpuinfo").read_text().splitlines()
            if x.startswith(("flags", "Features", "model name"))
        ]
    except OSError:
        cpu = [platform.processor()]
    kind = f"{platform.machine()}-{zlib.crc32(''.join(sorted(set(cpu))).encode()):08x}"
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "moe_jax" / "jax" / kind
    try:
        cache.mkdir(parents=True, exist_ok=True)
    except OSError:
        return
    if os.access(cache, os.W_OK | os.X_OK):
        os.environ["JAX_COMPILATION_CACHE_DIR"] = str(cache)
        os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.3")


def run_train(args: argparse.Namespace) -> dict[str, Any]:
    """`moe-jax train`."""
    from moe_jax import config, mesh

    cfg = config.load(args.config, args.overrides)
    workdir = args.workdir or Path("runs") / f"{cfg.name}-{time.strftime('%Y%m%d-%H%M%S')}"
    place = getattr(args, "place", None)
    if place is not None:
        place.start(*args.joins)
    mesh.prepare_devices(cfg.mesh, args.fake_devices, 1 if place is None else place.count)
    from moe_jax.train.loop import Run

    run = Run(cfg, workdir, started=STARTED, quiet=args.quiet)
    run.say_left_behind(args.config)
    report = run()
    if report.get("eval_loss") is not None:
        loss = f"{report['eval_loss']:.4f} nats a token, {report['eval_bits_per_byte']:.4f} bits a byte"
        later = f"; moe-jax eval has that of step {report['step']}" if report["eval_step"] < report["step"] else ""
        result(args, f"held-out loss {loss}, after step {report['eval_step']}{later}", f"workdir {workdir}")
    if "sample" in report:
        result(args, f"sample:\n{report['sample']}")
    return report


def run_eval(args: argparse.Namespace) -> dict[str, Any]:
    """`moe-jax eval`."""
    from moe_jax.config import Problem, Refused

    if args.batches is not None and args.batches < 1:
        raise Refused(Problem("--batches", f"is {args.batches}", "give 1 or more"))
    from moe_jax.trained import Trained

    place, keep = getattr(args, "place", None), args.batches is not None
    if place is not None:
        place.start(*args.joins)
    processes = 1 if place is None else place.count
    trained = Trained(args.workdir, args.overrides, args.fake_devices, keep_batch=keep, processes=processes)
    from moe_jax.train.evaluate import Evaluator

    evaluator = Evaluator(trained.model, trained.mesh, trained.text())
    report = evaluator.report(trained.weights, args.batches or sys.maxsize, at_capacity=True)
    text = f"held-out part of {trained.cfg.data.path}" if trained.other is None else trained.other
    lines = [f"{text}: loss {report['eval_loss']:.4f} nats a token, {report['bits_per_byte']:.4f} bits a byte"]
    if report.get("capacity_factor") is not None:
        lines.append(
            f"at capacity factor {report['capacity_factor']}: {report['eval_loss_at_capacity']:.4f} nats, "
            f"{report['dropped']:,} of {report['routed']:,} choices dropped"
        )
    result(args, *lines, f"{report['tokens']:,} tokens, step {trained.step}")
    about = {"workdir": str(args.workdir), "config": trained.cfg.name, "step": trained.step}
    return about | {"text": trained.cfg.data.path, **report}


def run_generate(args: argparse.Namespace) -> dict[str, Any]:
    """`moe-jax generate`."""
    from moe_jax.config import Problem, Refused

    limits = [
        ("--tokens", args.tokens, args.tokens >= 1, "1 or more"),
        ("--temperature", args.temperature, 0 <= args.temperature < float("inf"), "0 or more, and finite"),
        ("--top-k", args.top_k, args.top_k >= 0, "0 or more"),
        ("--top-p", args.top_p, 0 < args.top_p <= 1, "more than 0, and 1 at the most"),
        ("--seed", args.seed, 0 <= args.seed < 2**32, "0 to 4294967295"),
    ]
    problems = [Problem(name, f"is {value}", f"give {allowed}") for name, value, good, allowed in limits if not good]
    if args.system is not None and not args.chat:
        problems.append(Problem("--system", "belongs to a chat", "add --chat, or put the text into --prompt"))
    problems += [Problem("--stop", "is empty", "give at least one character") for text in args.stop if not text]
    options = [("--loads", args.loads), ("--nodes", args.nodes)] if args.slots is None else []
    problems += [
        Problem(name, "belongs to --slots", "add --slots N, or leave it out") for name, v in options if v is not None
    ]
    texts = [("--prompt", text) for text in args.prompt] + [("--stop", text) for text in args.stop]
    for flag, text in [*texts, ("--system", args.system or "")]:
        if any("\ud800" <= c <= "\udfff" for c in text):  # how Python passes on bytes that are no text
            problems.append(Problem(flag, f"is not UTF-8: {text[:40]!a}", "convert it to UTF-8"))
    if problems:
        raise Refused(*problems)
    from moe_jax.trained import Trained

    wish = None
    if args.slots is not None:
        from moe_jax.replicas import Wish

        wish = Wish(args.slots, 1 if args.nodes is None else args.nodes, args.loads)
    check = None if wish is None else wish.check
    trained = Trained(args.workdir, args.overrides, args.fake_devices, decodes=True, check=check)
    import numpy as np

    from moe_jax.data import continued
    from moe_jax.data.chat import Chat, before, exactly
    from moe_jax.generate import Generator, Sampling

    if trained.other is not None:
        raise Refused(Problem("data.path", "is another one than the run's, and no text is read here", "take it out"))
    tokenizer, stops = trained.corpus.tokenizer, {trained.corpus.tokenizer.eos}
    whole = trained.cfg.model.answers
    prompts = [trained.corpus.prompt(text, whole) if text else np.zeros(0, np.int32) for text in args.prompt]
    if args.chat:
        chat = Chat(trained.cfg.data.tokenizer, tokenizer)
        prompts = [chat.prompt(text, args.system) for text in args.prompt]
        stops |= chat.stops
    alone = args.chat or whole  # an answer begins a text
    contexts = [*(p.tolist() for p in prompts), *([[]] if alone else [])]
    stops |= {i for text in args.stop for i in exactly(tokenizer, text, contexts)}
    sampling = Sampling(args.temperature, args.top_k, args.seed, args.top_p)
    placed = None if wish is None else wish.apply(trained)
    trained.take_apart()
    generator = Generator(trained.model, trained.mesh, tokenizer.size, sorted(stops), sampling)
    out = generator(trained.weights, prompts, args.tokens)
    texts = []
    for text, prompt, new in zip(args.prompt, prompts, out.tokens, strict=True):
        answer = tokenizer.decode(new) if alone else continued(tokenizer, prompt.tolist(), new)
        texts.append(("" if alone else text) + before(answer, args.stop))
    if not args.json:
        print("\n\n".join(texts))
    speeds = out._asdict()
    del speeds["tokens"], speeds["rows"]
    say(args, ", ".join(f"{name.split('_')[0]} {value:,.0f} tokens/s" for name, value in speeds.items()))
    report = {"workdir": str(args.workdir), "step": trained.step, "text": texts[0], "texts": texts, **speeds}
    if placed is not None:
        from moe_jax.replicas import lines
        from moe_jax.replicas import report as balance

        assert out.rows is not None
        report["placement"] = balance(placed, out.rows, generator.repeated(len(prompts)))
        say(args, *lines(report["placement"]))
    return report


def run_upcycle(args: argparse.Namespace) -> dict[str, Any]:
    """`moe-jax upcycle`."""
    from moe_jax import config, mesh

    cfg = config.load(args.config, args.overrides)
    mesh.prepare_devices(cfg.mesh, args.fake_devices)
    from moe_jax.train.upcycling import run

    report = run(args.dense, cfg, args.workdir, method=args.method, noise=args.noise, seed=args.seed)
    before, total, active = (report[f"params_{name}"] for name in ("total_before", "total", "active"))
    result(
        args,
        f"{args.dense} at step {report['dense_step']}: {before:,} parameters -> {total:,}, {active:,} active",
        "{method}: {slices} slices x {copies} copies, outputs times {factor:g}".format(**report),
        f"the function is {'' if report['preserved'] else 'not '}preserved: {report['why']}",
        "held-out loss {eval_loss_before:.6f} -> {eval_loss:.6f}, dropless".format(**report),
        f"go on with: moe-jax train CONFIG --workdir {args.workdir}",
    )
    return report


def run_inspect(args: argparse.Namespace) -> dict[str, Any]:
    """`moe-jax inspect`."""
    os.environ["TF_CPP_MIN_LOG_LEVEL"] = "1"  # the partitioner's warnings are a part of the report
    from moe_jax import config, mesh, topology

    cfg = config.load(args.config, args.overrides)
    if args.topology is None:
        mesh.prepare_devices(cfg.mesh, args.fake_devices)
        machine, devices = None, mesh.build_mesh(cfg.mesh)
    elif args.fake_devices is not None:
        why = "are fake CPU devices, and --topology names others"
        raise config.Refused(config.Problem("--fake-devices", why, "take one of the two out"))
    else:
        machine = topology.parse(args.topology)
        devices = topology.topology_mesh(cfg.mesh, machine)
    from moe_jax.inspect.report import inspect
    from moe_jax.inspect.show import lines

    report = inspect(cfg, devices, forward=args.forward, topology=machine)
    result(args, *lines(report))
    return report


def finite(value: Any) -> Any:
    """JSON knows no NaN: such numbers become null."""
    if isinstance(value, dict):
        return {k: finite(v) for k, v in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


def told(error: OSError) -> str:
    """What the system would not do, and the remedy."""
    what = f"{error.filename}: {error.strerror}" if error.filename else error.strerror or str(error)
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        remedy = "free space, and run the same command again; with a --workdir, training goes on from the last "
        remedy += "complete checkpoint there"
    elif error.filename:
        remedy = f"check {error.filename}, and run the same command again"
    else:
        remedy = "mend that, and run the same command again"
    return f"{what}\n    remedy: {remedy}"


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit code."""
    args = parse(argv)
    keep_memory()
    quiet_libraries()
    keep_programs()
    for text in args.overrides:
        if text.endswith("="):  # also what `train.steps=$STEPS` is without the variable
            why = "no value given, so at the default of the key, whatever the config says"
            say(args, f"{text[:-1]}: {why}\n    remedy: write {text}VALUE, or leave it out")
    return checked(args, together)


def together(args: argparse.Namespace) -> int:
    """Run the command, in this process or as one of several; returns the exit code."""
    if all(getattr(args, flag, None) is None for flag in ("processes", "process", "coordinator", "service_port")):
        return alone(args)
    from moe_jax import processes, rendezvous, supervise, workdir

    place = processes.find_place(args)
    if place is None:
        return alone(args)
    before = workdir.Before(args.workdir) if args.command == "convert" else None
    place, links = rendezvous.meet(place, processes.asks(args, place), args.join_seconds)
    args.place = place

    def work(here: Callable[[], None]) -> int:
        args.joins = seconds, here
        if place.index != 0:
            args.quiet, args.json = True, True  # process 0 tells the results
        return checked(args, alone)

    saves, seconds = args.command == "train", max(args.join_seconds, processes.JAX_SECONDS)
    supervisor = supervise.Supervisor(place, links, lambda line: say(args, line), saves, seconds)
    try:
        return supervisor(work)
    finally:
        if before is not None:  # a process that is killed takes nothing away itself
            before.restore()


def alone(args: argparse.Namespace) -> int:
    """Run the command in this process."""
    report = args.run(args)
    place = getattr(args, "place", None)
    if args.json and (place is None or place.index == 0):
        print(json.dumps(finite(report), allow_nan=False), flush=True)
    return 0 if report.get("finished", True) else STOPPED


def checked(args: argparse.Namespace, work: Callable[[argparse.Namespace], int]) -> int:
    """The exit code of `work`; refusals and failures are one message on standard error."""
    from moe_jax.config import Refused

    try:
        return work(args)
    except Refused as e:
        print(f"moe-jax {args.command}: refused\n{e}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # whoever read the output has gone, such as `head`: nothing is left to say
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except PermissionError as e:
        print(f"moe-jax {args.command}: refused\n{e}\n    remedy: give this user the right to use it", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"moe-jax {args.command}: interrupted", file=sys.stderr)
        return 130
    except OSError as e:
        print(f"moe-jax {args.command}: failed\n{told(e)}", file=sys.stderr)
        return 1
    except Exception as e:
        if type(e).__name__ not in (
            "CheckpointFailed",
            "Overflow",
            "ProcessDied",
            "ProgramFailed",
            "TooLarge",
            "Unreadable",
        ):
            raise
        print(f"moe-jax {args.command}: failed\n{e}", file=sys.stderr)
        return 1


def interrupt(number: int, frame: Any) -> None:
    """Ctrl-C, as Python takes it. In JAX's callback of the garbage collector it would be lost: once more.

    While a command loads what it needs it ends the process here: nothing is begun yet, and libraries in C that cannot
    load a part of themselves abort, or tell of something else. In an import of the work itself, which may have a draft
    to take away, it is raised as anywhere.
    """
    if frame is not None and frame.f_code.co_name == "_xla_gc_callback":
        threading.Timer(0.01, os.kill, (os.getpid(), number)).start()
        return
    if loads(frame):
        os.write(2, f"moe-jax{''.join(f' {word}' for word in sys.argv[1:2])}: interrupted\n".encode())
        os._exit(130)
    raise KeyboardInterrupt


def loads(frame: Any) -> bool:
    """Whether the outermost import of a stack is one of a command's own, `run_NAME`, or of what leads there."""
    importer = None
    while frame is not None:
        if frame.f_code.co_filename.startswith("<frozen importlib"):
            importer = frame.f_back
        frame = frame.f_back
    return importer is not None and (
        importer.f_code.co_name.startswith("run_") or importer.f_globals.get("__name__") == __name__
    )


def entry() -> None:
    """`moe-jax`. What was interrupted ends at once: Python's own way out waits for threads, or crashes in them."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # not ignored, as in a background job
        signal.signal(signal.SIGINT, interrupt)
    try:
        code = main()
    except KeyboardInterrupt:  # in the imports
        code = 130
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # all is done and said
    if code == 130:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


if __name__ == "__main__":
    entry()
