"""`moe-jax bench decode`: prefill and tokens one by one, here and by `generate` of transformers, by turns.

Both have random weights of one shape, Mixtral's: SwiGLU, rotary attention, the same type, dropless, the most probable
token each time. Each is a process of its own on the same processors. Of transformers the prefill is one bare call with
a cache and the logits of the last token alone, and each of its implementations of experts takes its turn; the fastest
is compared with. One that takes several times as long as another one takes a single turn.
"""

import os
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

from moe_jax.bench.turns import HOME, Missing, Program, ProgramFailed, Step, serve, take_turns

IMPLEMENTATIONS = ("eager", "grouped_mm", "batched_mm")  # the others that transformers has need a GPU
OURS = "moe_jax"
HOPELESS = 3  # times as long as another implementation in both phases: no round would make that the fastest


def ours(spec: dict[str, Any]) -> tuple[Step, dict[str, Any]]:
    """Generation of moe_jax, compiled."""
    from moe_jax import cli

    cli.keep_memory()  # before jax is imported
    from moe_jax import config, mesh

    cfg = config.load(spec["config"], spec["overrides"])
    mesh.prepare_devices(cfg.mesh, None)
    import numpy as np

    from moe_jax.bench.timing import machine
    from moe_jax.generate import Generator, Sampling
    from moe_jax.train.state import Model, unstack, unstacked

    model, built = Model.of(cfg), mesh.build_mesh(cfg.mesh)
    weights, V = unstack(model, model.create(built).weights, built), cfg.model.vocab
    generator = Generator(unstacked(model), built, V, V, Sampling(temperature=0.0))  # no token ends a text
    draw = np.random.default_rng(0)
    prompts = [draw.integers(V, size=spec["prompt"]) for _ in range(spec["batch"])]

    def step() -> list[float]:
        out = generator(weights, prompts, spec["tokens"])
        return [out.prefill_tokens_per_second, out.decode_tokens_per_second]

    step()
    return step, {"params_total": model.count()[0], "machine": machine()}


def theirs(spec: dict[str, Any]) -> tuple[Step, dict[str, Any]]:
    """Mixtral in transformers."""
    try:
        import torch
        from transformers import MixtralConfig, MixtralForCausalLM, __version__
    except (ImportError, OSError) as e:  # OSError: a library that torch loads
        raise Missing(str(e)) from None
    torch.set_num_threads(len(spec["processors"]))
    torch.manual_seed(0)
    cfg = MixtralConfig(**spec["mixtral"], eos_token_id=None, bos_token_id=None, pad_token_id=0)
    dtype = getattr(torch, spec["dtype"])
    model = MixtralForCausalLM._from_config(cfg, experts_implementation=spec["experts"], dtype=dtype).eval()
    tokens = torch.randint(cfg.vocab_size, (spec["batch"], spec["prompt"]))
    rows, new = spec["batch"], spec["tokens"]

    def seconds(work: Callable[[], Any]) -> float:
        begun = time.perf_counter()
        work()
        return time.perf_counter() - begun

    @torch.inference_mode()
    def step() -> list[float]:
        prefill = seconds(lambda: model(input_ids=tokens, use_cache=True, logits_to_keep=1))
        options = {"do_sample": False, "attention_mask": torch.ones_like(tokens)}
        first = seconds(lambda: model.generate(tokens, max_new_tokens=1, **options))
        whole = seconds(lambda: model.generate(tokens, max_new_tokens=new, **options))
        return [tokens.numel() / prefill, rows * (new - 1) / (whole - first)]

    total = sum(p.numel() for p in model.parameters())
    return step, {"params_total": total, "transformers": __version__, "torch": torch.__version__}


def mixtral(cfg: Any) -> dict[str, Any]:
    """The fields of a `MixtralConfig` of the same shape."""
    m, moe = cfg.model, cfg.model.moe
    return {
        "vocab_size": m.vocab,
        "hidden_size": m.d_model,
        "intermediate_size": moe.d_ff or m.d_ff,
        "num_hidden_layers": m.layers,
        "num_attention_heads": m.heads,
        "num_key_value_heads": m.resolved_kv_heads,
        "head_dim": m.resolved_head_dim,
        "max_position_embeddings": m.max_length,
        "num_local_experts": moe.experts,
        "num_experts_per_tok": moe.top_k,
        "tie_word_embeddings": m.tied_head,
    }


def specifications(cfg: Any, args: Any, batch: int) -> list[tuple[str, list[str], dict, dict]]:
    """Name, command, specification and environment of each program, ours first."""
    both = {"processors": sorted(os.sched_getaffinity(0))[: args.threads], "batch": batch}
    both |= {"prompt": args.prompt_tokens, "tokens": args.tokens}
    path = {"PYTHONPATH": os.pathsep.join([HOME, *filter(None, [os.environ.get("PYTHONPATH")])])}
    here = both | {"config": args.config, "overrides": args.overrides}
    out = [(OURS, [sys.executable, "-m", "moe_jax.bench.decode", "ours"], here, {"JAX_PLATFORMS": "cpu"} | path)]
    if args.against is None:
        return out
    there = {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": str(args.threads)} | path
    for experts in IMPLEMENTATIONS:
        spec = both | {"mixtral": mixtral(cfg), "experts": experts, "dtype": cfg.model.dtype}
        command = [args.python, "-m", "moe_jax.bench.decode", "theirs"]
        out.append((f"transformers {experts}", command, spec, there))
    return out


def measure(cfg: Any, args: Any, tell: Callable[[str], None]) -> dict[str, Any]:
    """Every batch size in turn, its programs by turns.

    Raises:
        Missing: no transformers there. ProgramFailed: our own program, or all of transformers' at every batch size.
    """
    rows, about = [], {}
    for batch in args.batch:
        programs: list[Program] = []
        try:
            for each in reversed(specifications(cfg, args, batch)):  # theirs first: a missing package shows at once
                programs.insert(0, Program(*each))
                tell(f"batch {batch}: started {each[0]}")
            take_turns(programs, 1, 0, tell)  # to warm up
            slow = hopeless(programs[1:])
            for program in slow:
                tell(f"batch {batch}: {program.name} takes {HOPELESS} times as long as another one, and no more turns")
                program.end()
            rest = [p for p in programs if p not in slow]
            for program in rest:
                program.times.clear()
            take_turns(rest, args.rounds, 0, tell)
        finally:
            for program in programs:
                program.end()
        mine, *others = programs
        if mine.failed:
            raise ProgramFailed(f"{mine.name}: {mine.failed}")
        about |= {k: p.about[k] for p in programs for k in ("machine", "transformers", "torch") if k in p.about}
        rows.append({"batch": batch, **compared(mine, others, slow)})
    if args.against is not None and not any("decode_fastest" in row for row in rows):
        failed = {(name, p["failed"]) for row in rows for name, p in row["programs"].items() if "failed" in p}
        why = "".join(f"\n    {name}: {reason}" for name, reason in sorted(failed))
        remedy = f"mend what {args.python} has, or leave --against out"
        raise ProgramFailed(f"there is nothing to compare with{why}\n    remedy: {remedy}")
    return {
        "bench": "decode",
        "config": cfg.name,
        "overrides": args.overrides,
        **about,
        "threads": args.threads,
        "rounds": args.rounds,
        "rows": rows,
    }


def hopeless(programs: Sequence[Program]) -> list[Program]:
    """Those that another one is several times as fast as in both phases, by one turn of each."""
    able = [(p, p.times[0]["returned"]) for p in programs if p.failed is None]
    return [
        p for p, mine in able if any(all(a > HOPELESS * b for a, b in zip(its, mine, strict=True)) for _, its in able)
    ]


def compared(mine: Program, others: Sequence[Program], slow: Sequence[Program] = ()) -> dict[str, Any]:
    """Medians of both phases, and the median over the rounds of the ratio to the fastest other in the same round."""
    programs = {p.name: {"params_total": p.about.get("params_total"), **speeds(p)} for p in (mine, *others)}
    out: dict[str, Any] = {"programs": programs}
    able = [p for p in others if p.failed is None and p not in slow]
    for i, phase in enumerate(("prefill", "decode")):
        if able:
            best = max(able, key=lambda p: statistics.median(t["returned"][i] for t in p.times))
            pairs = zip(mine.times, best.times, strict=True)
            ratio = statistics.median(a["returned"][i] / b["returned"][i] for a, b in pairs)
            out |= {f"{phase}_fastest": best.name, f"{phase}_ratio": ratio}
    return out


def speeds(program: Program) -> dict[str, Any]:
    """Tokens a second of both phases, or why there are none."""
    if program.failed is not None:
        return {"failed": program.failed}
    prefill, decode = (statistics.median(t["returned"][i] for t in program.times) for i in (0, 1))
    return {"prefill_tokens_per_second": prefill, "decode_tokens_per_second": decode, "turns": len(program.times)}


def lines(report: dict[str, Any]) -> list[str]:
    """The report for people."""
    out = [f"{report['config']} with {' '.join(report['overrides'])}"]
    for row in report["rows"]:
        out.append(f"batch {row['batch']:<20} {'prefill tokens/s':>18} {'decode tokens/s':>17}")
        for name, p in row["programs"].items():
            if "failed" in p:
                out.append(f"  {name:24} failed: {p['failed']}")
                continue
            prefill, decode = p["prefill_tokens_per_second"], p["decode_tokens_per_second"]
            once = "  one turn: far slower" if p["turns"] < report["rounds"] else ""
            out.append(f"  {name:24} {prefill:18,.0f} {decode:17,.0f}{once}")
        for phase in ("prefill", "decode"):
            if f"{phase}_ratio" in row:
                fastest = row[f"{phase}_fastest"]
                out.append(f"  {phase}: {row[f'{phase}_ratio']:.2f} times the tokens a second of {fastest}")
    return out


if __name__ == "__main__":
    serve({"ours": ours, "theirs": theirs}[sys.argv[1]])
