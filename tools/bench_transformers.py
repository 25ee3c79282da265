"""A train step of `bench_small` here and of a transformers Mixtral of the same shape, by turns on the same processors.

    python tools/bench_transformers.py --python ENV/bin/python [--json] [key.path=value ...]

Forward, loss with balance loss, backward, clipping and AdamW in both; SwiGLU, rotary attention and float32 in both, so
that both have the same parameters. Each program is a process of its own that waits on a pipe for its turn, so that no
two share a thread pool. Ours runs at the capacity of the config, dropless, as Mixtral is, and with the experts of the
config, of two matrices, which transformers does not have; and the matrix products of our step run alone, which bound
how fast it can be. transformers runs with each of its experts implementations, and each again with the allocator
settings that `moe-jax` gives itself, since they would help any program. Neither torch nor transformers is a dependency
of moe_jax: ENV/bin/python has both. Linux only.

On a busy machine torch's threads spin at their barriers, in wall and in CPU seconds: two threads then flatter us by a
factor of several. Compare with --threads 1 there, or on a quiet machine.
"""

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # an interpreter that serves need not have moe_jax

from moe_jax.bench.decode import IMPLEMENTATIONS, mixtral
from moe_jax.bench.turns import Missing, Program, Step, available_memory, serve, take_turns

ALLOCATOR = "glibc.malloc.arena_max=1:glibc.malloc.mmap_max=0:glibc.malloc.trim_threshold=2147483647"
KEPT = ", memory kept"
ALONE = "moe_jax, its products alone"
SERVE = "--serve"  # the first argument of a process that is a program
REMEDY = """they are no dependencies of moe_jax; make an environment that has both, and name its interpreter:
        python -m venv ENV
        ENV/bin/pip install torch transformers
        python tools/bench_transformers.py --python ENV/bin/python"""


# What a process of its own runs. Only the standard library is imported before the process knows its program.


def ours(spec: dict[str, Any]) -> tuple[Step, dict[str, Any]]:
    """The compiled train step of moe_jax, or its products alone, and what there is to say of it."""
    from moe_jax import cli

    cli.keep_memory()  # before jax is imported
    from moe_jax import config, mesh

    cfg = config.load("bench_small", spec["overrides"])
    mesh.prepare_devices(cfg.mesh, None)
    import jax

    from moe_jax.bench.step import Trainer, products_alone
    from moe_jax.bench.timing import machine

    if spec["alone"]:
        run = products_alone(cfg)
        return lambda: len(jax.block_until_ready(run())), {"machine": machine()}
    trainer = Trainer(cfg)
    total, active = trainer.model.count()
    return lambda: float(trainer()["loss"]), {"params_total": total, "params_active": active, "machine": machine()}


def theirs(spec: dict[str, Any]) -> tuple[Step, dict[str, Any]]:
    """The train step of transformers: Mixtral with random weights, torch's AdamW in its fused, fastest form."""
    try:
        import torch
        from transformers import MixtralConfig, MixtralForCausalLM, __version__
    except (ImportError, OSError) as e:  # OSError: a library that torch loads
        raise Missing(str(e)) from None
    torch.set_num_threads(spec["threads"])
    torch.manual_seed(0)
    cfg = MixtralConfig(**spec["mixtral"])
    model = MixtralForCausalLM._from_config(cfg, experts_implementation=spec["experts"], dtype=torch.float32).train()
    assert model.config._experts_implementation == spec["experts"]
    optimizer = torch.optim.AdamW(model.parameters(), fused=True, **spec["adamw"])
    tokens = torch.randint(cfg.vocab_size, spec["tokens"])

    def step() -> float:
        loss = model(input_ids=tokens, labels=tokens, use_cache=False, output_router_logits=True).loss
        loss.backward()
        if spec["clip"]:
            torch.nn.utils.clip_grad_norm_(model.parameters(), spec["clip"])
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    total = sum(p.numel() for p in model.parameters())
    routed = sum(p.numel() for name, p in model.named_parameters() if ".experts." in name)
    active = total - routed + routed * cfg.num_experts_per_tok // cfg.num_local_experts
    about = {"params_total": total, "params_active": active}
    return step, about | {"transformers": __version__, "torch": torch.__version__}


def report(programs: Sequence[Program], tokens: int, **more: Any) -> dict[str, Any]:
    """Medians; ratios are medians over the rounds of the ratio within a round. The first program is the reference."""
    from moe_jax.bench.timing import Times, cpu_ratio, ratio

    times = {p.name: Times(*([t[k] for t in p.times] for k in ("wall", "cpu", "faults"))) for p in programs}
    reference, rows = times[programs[0].name], []
    for p in programs:
        row = {"program": p.name, **{k: p.about[k] for k in ("params_total", "params_active") if k in p.about}}
        if p.failed is None:
            t = times[p.name]
            row |= {"seconds": t.seconds, "cpu_seconds": t.cpu_seconds, "tokens_per_second": tokens / t.seconds}
            row |= {"ratio_to_ours": ratio(t, reference), "ratio_to_ours_cpu": cpu_ratio(t, reference)}
            row |= {"page_faults": sorted(t.faults)[len(t.faults) // 2], "returned": p.times[-1]["returned"]}
        rows.append(row | ({"failed": p.failed} if p.failed else {}))
    out = {"bench": "transformers", **more, "rows": rows}
    others = [r for r in rows if r["program"].startswith("transformers") and "failed" not in r]
    plain = [r for r in others if not r["program"].endswith(KEPT)]
    for key, among in (("fastest", others), ("fastest_default_allocator", plain)):
        if among:
            name = min(among, key=lambda r: r["ratio_to_ours"])["program"]
            wall, cpu = ratio(reference, times[name]), cpu_ratio(reference, times[name])
            out |= {key: name, f"ratio_ours_to_{key}": wall, f"ratio_ours_to_{key}_cpu": cpu}
    if "fastest" in out:
        for row in rows:
            if row["program"].startswith("moe_jax"):
                mine, best = times[row["program"]], times[out["fastest"]]
                row |= {"ratio_to_fastest": ratio(mine, best), "ratio_to_fastest_cpu": cpu_ratio(mine, best)}
    return out


def lines(report: dict[str, Any]) -> list[str]:
    """The report as a table for people."""
    titles = f"{'s/step':>8} {'cpu s':>7} {'tokens/s':>9} {'x ours':>7} {'x cpu':>6}"
    out = [f"{'program':38} {'parameters':>10} {'active':>10} {titles}"]
    for r in report["rows"]:
        head = f"{r['program']:38} {r.get('params_total', 0):10,} {r.get('params_active', 0):10,}"
        if "failed" in r:
            out.append(f"{head} failed: {r['failed']}")
            continue
        speed = f"{r['seconds']:8.4f} {r['cpu_seconds']:7.3f} {r['tokens_per_second']:9,.0f}"
        out.append(f"{head} {speed} {r['ratio_to_ours']:7.2f} {r['ratio_to_ours_cpu']:6.2f}")
    for r in report["rows"]:
        if "ratio_to_fastest" in r:
            faster = f"{1 / r['ratio_to_fastest']:.2f} times as fast as the fastest of transformers"
            out.append(f"{r['program']}: {faster}, {1 / r['ratio_to_fastest_cpu']:.2f} times in CPU seconds")
    for key in ("fastest", "fastest_default_allocator"):
        if key in report:
            wall, cpu = (report[f"ratio_ours_to_{key}{unit}"] for unit in ("", "_cpu"))
            faster = f"{1 / wall:.2f} times as fast, {1 / cpu:.2f} times in CPU seconds"
            out.append(f"{key.replace('_', ' ')}: {report[key]}; ours is {faster}")
    return out


def specifications(args: argparse.Namespace, cfg: Any, given: list[str]) -> list[tuple[str, list[str], dict, dict]]:
    """Name, command, specification and environment of each program; ours is the first, and the reference."""
    own = args.overrides
    moe, adamw = cfg.model.moe, cfg.train.optimizer
    both = {"processors": sorted(os.sched_getaffinity(0))[: args.threads], "threads": args.threads}
    adam = {"lr": adamw.learning_rate, "betas": (adamw.b1, adamw.b2), "eps": adamw.eps}
    their = both | {
        "mixtral": mixtral(cfg) | {"router_aux_loss_coef": moe.balance_loss},
        "adamw": adam | {"weight_decay": adamw.weight_decay},
        "clip": adamw.clip,
        "tokens": (cfg.data.batch, cfg.data.length),
        "memory": int(args.memory * 1e9) if args.memory else available_memory() // 2,
    }
    here, out = {"JAX_PLATFORMS": "cpu"}, []
    ours = [("moe_jax", []), ("moe_jax, dropless", ["model.moe.capacity_factor=unset"])]
    ours += [("moe_jax, two matrices", ["model.ffn=relu"])] if not any(o.startswith("model.ffn=") for o in own) else []
    ours += [(ALONE, [])]
    for name, more in ours:
        spec = both | {"overrides": given + more, "alone": name == ALONE}
        out.append((name, [sys.executable, __file__, SERVE, "ours"], spec, here))
    there = {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": str(args.threads)}
    for experts in args.experts.split(","):
        for kept, tunables in (("", {}), (KEPT, {"GLIBC_TUNABLES": ALLOCATOR})):
            name = f"transformers {experts}{kept}"
            out.append((name, [args.python, __file__, SERVE, "theirs"], their | {"experts": experts}, there | tunables))
    return out


def parser() -> argparse.ArgumentParser:
    """The options."""
    top = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    top.add_argument("overrides", nargs="*", metavar="key.path=value", help="of bench_small, for both")
    help = "has torch and transformers (default: this interpreter)"
    top.add_argument("--python", default=sys.executable, metavar="PATH", help=help)
    help = f"some of the implementations in transformers (default {','.join(IMPLEMENTATIONS)})"
    top.add_argument("--experts", default=",".join(IMPLEMENTATIONS), metavar="NAMES", help=help)
    top.add_argument("--json", action="store_true", help="print one JSON object last on standard output")
    top.add_argument("--rounds", type=int, default=9, metavar="N", help="timed turns (default 9)")
    top.add_argument("--warm", type=int, default=3, metavar="N", help="turns before, not counted (default 3)")
    top.add_argument("--threads", type=int, default=2, metavar="N", help="processors of every program (default 2)")
    help = "the most that a transformers process may take (default: half of what is available)"
    top.add_argument("--memory", type=float, metavar="GB", help=help)
    return top


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Start the programs, time them and end them."""
    from moe_jax import config

    given = ["model.ffn=swiglu", *args.overrides]
    cfg = config.load("bench_small", given)
    programs: list[Program] = []
    try:
        for each in reversed(specifications(args, cfg, given)):  # theirs first: a missing package shows at once
            programs.insert(0, Program(*each))
            print(f"started {each[0]}", file=sys.stderr)
        load = [os.getloadavg()[0]]
        take_turns(programs, args.rounds, args.warm, lambda line: print(line, file=sys.stderr))
        load.append(os.getloadavg()[0])
    finally:
        for program in programs:
            program.end()
    for program in programs:
        if program.failed and program.name.startswith("moe_jax"):
            raise RuntimeError(f"{program.name} failed: {program.failed}")
    versions = {k: p.about[k] for p in programs for k in ("transformers", "torch") if k in p.about}
    about = programs[0].about["machine"] | versions | {"threads": args.threads, "rounds": args.rounds}
    return report(programs, cfg.data.batch * cfg.data.length, **about | {"load_average": load})


def main(argv: Sequence[str] | None = None) -> int:
    """The exit code: 0 done, 2 refused."""
    args = parser().parse_args(argv)
    if not hasattr(os, "sched_setaffinity"):
        return refused("this system cannot pin a process to processors", "run it on Linux")
    here = len(os.sched_getaffinity(0))
    if not 1 <= args.threads <= here:
        return refused(f"--threads: is {args.threads}, and there are {here} processors", f"give 1 to {here}")
    for name, least in (("rounds", 1), ("warm", 0), ("memory", 1)):
        value = getattr(args, name)
        if value is not None and not value >= least:
            return refused(f"--{name}: is {value}", f"give {least} or more")
    from moe_jax.config import Refused

    try:
        result = run(args)
    except Refused as e:
        return refused(str(e))
    except Missing as e:
        return refused(f"--python {args.python}: lacks torch or transformers: {e}", REMEDY)
    except (FileNotFoundError, PermissionError) as e:
        remedy = "name a Python interpreter that has torch and transformers"
        return refused(f"--python {args.python}: {e.strerror}", remedy)
    print(*lines(result), sep="\n", file=sys.stderr if args.json else sys.stdout)
    if args.json:
        print(json.dumps(result))
    return 0


def refused(why: str, remedy: str = "") -> int:
    """One message on standard error; the exit code."""
    more = [f"    remedy: {remedy}"] if remedy else []
    print(f"bench_transformers: refused\n{why}", *more, sep="\n", file=sys.stderr)
    return 2


if __name__ == "__main__":
    if sys.argv[1:2] == [SERVE]:
        serve({"ours": ours, "theirs": theirs}[sys.argv[2]])
    else:
        sys.exit(main())
