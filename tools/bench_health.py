"""What the health checks cost, and what redundant experts give: the figures of the README's section on both.

    python tools/bench_health.py [--rounds N] [--json] [key.path=value ...]

The train step of `bench_small`, with overrides, runs by turns with a second copy of itself, which shows how far two
equal programs come apart here, and without the numbers that only the checks read: XLA then leaves their work out. Each
ratio is the median over the rounds of that within a round. On the host `health.Watch` takes in records of a sound run.
Placement is of 58 layers of 256 experts, DeepSeek-V3's, with Zipf loads, in 288 slots on 32 devices.
"""

import argparse
import json
import math
import statistics
import time
from typing import Any

import jax
import numpy as np

from moe_jax import config, mesh
from moe_jax.bench.step import Trainer
from moe_jax.bench.timing import by_turns, cpu_ratio, machine, ratio
from moe_jax.config import Config, MoEConfig, Refused
from moe_jax.health import WINDOW, YOUNG, Watch
from moe_jax.placement import place
from moe_jax.train.step import Metrics, batch_targets, make_train_step

CHECKED = ("grad_norms", "least_prob", "router_entropy")  # what a step computes for the checks alone
SHAPES = ((4, 8), (58, 256))  # layers and experts of the records
STEPS = 100  # of them


class Unchecked(Trainer):
    """The train step without the numbers of the checks."""

    def __init__(self, cfg: Config):
        super().__init__(cfg)
        whole, seed = make_train_step(self.model), jax.eval_shape(lambda: jax.random.key(0))

        def step(*inputs: Any) -> tuple[Any, Metrics]:
            state, metrics = whole(*inputs)
            return state, {name: value for name, value in metrics.items() if name not in CHECKED}

        jitted = jax.jit(step, donate_argnums=0, out_shardings=(self.model.shardings(self.mesh), None))
        with jax.set_mesh(self.mesh):
            targets = self.model.targets(self.mesh), batch_targets(self.model, self.mesh)
            self.compiled = jitted.lower(*targets, seed).compile()


def watch_seconds(layers: int, experts: int) -> float:
    """Median of `Watch.step` on records as the train loop hands them over."""
    rng, watch, times = np.random.default_rng(0), Watch(MoEConfig(experts=experts, top_k=1)), []
    for step in range(YOUNG, YOUNG + WINDOW + STEPS):
        load = rng.integers(900, 1100, (layers, experts)).tolist()  # lists, as the loop has them for its log
        least, entropy = [0.9 / experts] * layers, [math.log(experts) - 0.1] * layers
        record = {"step": step, "loss": 3.0, "total_loss": 3.0, "grad_norm": 1.0, "grad_norms": {"experts": 1.0}}
        record |= {"load": load, "dropped_by_layer": [0] * layers}
        record |= {"least_prob": least, "router_entropy": entropy}
        begun = time.perf_counter()
        alarms = watch.step(record)
        times.append(time.perf_counter() - begun)
        assert not alarms, "a sound run"
    return statistics.median(times[WINDOW:])


def placement() -> dict[str, float]:
    """Mean over maximum load of the devices, mean over the layers, before and after, and the seconds it took."""
    rng = np.random.default_rng(0)
    load = np.stack([rng.permutation(1e6 / np.arange(1, 257)) for _ in range(58)])
    begun = time.perf_counter()
    made = place(load, slots=288, devices=32)
    seconds = time.perf_counter() - begun
    before, after = made.balance(load)
    return {"before": float(before.mean()), "after": float(after.mean()), "seconds": seconds}


def programs(cfg: Config) -> dict[str, Trainer]:
    """The step, its copy, and the step without."""
    return {"step": Trainer(cfg), "again": Trainer(cfg), "unchecked": Unchecked(cfg)}


def report(steps: dict[str, Trainer], rounds: int) -> dict[str, Any]:
    """All figures."""
    times = by_turns(steps, rounds)
    seconds = times["step"].seconds
    watches = []
    for layers, experts in SHAPES:
        took = watch_seconds(layers, experts)
        watches.append({"layers": layers, "experts": experts, "seconds": took, "part_of_step": took / seconds})
    out: dict[str, Any] = {"bench": "health", "rounds": rounds, "step_seconds": seconds}
    for name in ("again", "unchecked"):
        out[f"ratio_to_{name}"] = ratio(times["step"], times[name])
        out[f"ratio_to_{name}_cpu"] = cpu_ratio(times["step"], times[name])
    return out | {"watch": watches, "placement": placement(), "machine": machine()}


def lines(r: dict[str, Any]) -> list[str]:
    """The report for people."""
    out = [f"step {r['step_seconds'] * 1e3:.1f} ms, medians of {r['rounds']} rounds"]
    for name, words in (("again", "itself"), ("unchecked", "a step without the numbers of the checks")):
        wall, cpu = r[f"ratio_to_{name}"], r[f"ratio_to_{name}_cpu"]
        out.append(f"  {wall:.4f} times {words}, {cpu:.4f} times in CPU seconds")
    for w in r["watch"]:
        of = f"{w['layers']} layers of {w['experts']} experts"
        out.append(f"checks on the host, {of}: {w['seconds'] * 1e3:.3f} ms, {w['part_of_step']:.3%} of this step")
    p = r["placement"]
    out.append(f"placement: mean over maximum {p['before']:.3f} before, {p['after']:.4f} after, {p['seconds']:.3f} s")
    return out


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="*", metavar="key.path=value")
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--json", action="store_true", help="one line of JSON")
    args = parser.parse_args()
    try:
        cfg = config.load("bench_small", args.overrides)
    except Refused as e:
        parser.error(str(e))
    mesh.prepare_devices(cfg.mesh, None)
    out = report(programs(cfg), args.rounds)
    print(json.dumps(out) if args.json else "\n".join(lines(out)))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
