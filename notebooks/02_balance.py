# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Balance: a collapse, its alarm and its cures
#
# A router that only follows the loss of the text sends ever more tokens to the experts that are already the best
# trained: it **collapses**. This notebook lets it, on real text (Python's own manual), and then balances it in two ways:
# by an auxiliary loss at three strengths, and by a bias on the scores that choose, without any loss. It shows what
# capacity costs in dropped tokens and what the z-loss does. Every claim ends in an `assert`. On a CPU it takes a few
# minutes: six runs of 400 steps of a small model and two of 60.
#
# The letters: `E` experts, `K` choices of a token, `C` slots of an expert, `T` tokens of a step.
#
# **To run it in Colab**, bring the folder of the project to the machine first: clone it with `git clone` from where
# you have it, or make a zip archive of it, upload it with the folder icon on the left, and unpack it with
# `!unzip NAME.zip`. The next cell finds the folder in `/content` and installs it.

# %%
import importlib
import importlib.util
import subprocess
import sys
from pathlib import Path


def checkout() -> Path:
    """The project's folder: the current one, one above it, or one directly below it (Colab)."""
    here = Path.cwd()
    for folder in [here, *here.parents, *sorted(here.glob("*/"))]:
        if (folder / "pyproject.toml").is_file() and (folder / "moe_jax" / "__init__.py").is_file():
            return folder
    raise ModuleNotFoundError(
        "moe_jax is not installed, and its folder is not near this notebook. Clone or unpack the project "
        "in the current folder (in Colab: /content), then run this cell again."
    )


if any(importlib.util.find_spec(name) is None for name in ("moe_jax", "flax")):
    subprocess.run([sys.executable, "-m", "pip", "install", "--quiet", str(checkout())], check=True)
    importlib.invalidate_caches()

# %%
import os
import tempfile
import time

os.environ["JAX_NUM_CPU_DEVICES"] = "1"  # on a CPU one device, whatever the surroundings ask for

import jax
import matplotlib.pyplot as plt
import numpy as np

from moe_jax import config
from moe_jax.capacity import capacity
from moe_jax.checkpoint import open_workdir
from moe_jax.data import open_prepared
from moe_jax.health import COLLAPSED, WINDOW
from moe_jax.mesh import build_mesh
from moe_jax.metrics import read_metrics
from moe_jax.train.evaluate import Evaluator
from moe_jax.train.loop import Run
from moe_jax.train.state import Model

# The palette of Okabe and Ito, which colour-blind readers can tell apart.
COLORS = ["#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#999999", "#222222"]
plt.rcParams.update(
    {
        "figure.dpi": 80,
        "figure.constrained_layout.use": True,
        "font.size": 10,
        "axes.titlesize": 11,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.prop_cycle": plt.cycler(color=COLORS),
        "legend.frameon": False,
    }
)
RUNS = Path(tempfile.mkdtemp())

# %% [markdown]
# ## The model
#
# Two layers, each with 8 experts of which a token uses two (`K = 2`), on bytes. Each expert has room for 1.25 times its
# fair share of the 1,024 tokens of a step; what finds no slot is **dropped**: it passes by the layer. `train` is the same
# program as `moe-jax train`; only the settings of the balance differ between the runs below.

# %%
SETTINGS = """
mesh.data=1 mesh.expert=1 model.layers=2 model.d_model=64 model.d_ff=128 model.heads=2
model.moe.every=1 model.moe.top_k=2 model.moe.d_ff=64 model.moe.dispatch=gather model.moe.z_loss=0
model.moe.router.kind=softmax_topk model.moe.router.normalize=before
model.moe.capacity_factor=1.25 model.moe.group_size=1024
data.length=64 data.batch=16 train.steps=400 train.eval_batches=8 train.tensorboard=false train.sample=
""".split()
STEPS = np.arange(1, 401)


def train(name, *more, **moe):
    """Train, 400 steps if `more` does not say another number: the run's report, its records, and its folder."""
    overrides = [f"model.moe.{key}={value}" for key, value in moe.items()] + list(more)
    workdir = RUNS / name
    report = Run(config.load("tiny_switch", SETTINGS + overrides), workdir, started=time.perf_counter(), quiet=True)()
    steps, evals = read_metrics(workdir / "metrics.jsonl")
    return {"name": name, "workdir": workdir, "report": report, "steps": steps, "evals": evals}


def dropped(run, last=100):
    """Part of the choices that found no slot, over the last steps."""
    return sum(r["dropped"] for r in run["steps"][-last:]) / sum(r["routed"] for r in run["steps"][-last:])


def shares(run, layer=0):
    """Part of the choices that each expert got, [steps, E]."""
    load = np.array([r["load"][layer] for r in run["steps"]], float)
    return load / load.sum(1, keepdims=True)


def held(run, layer):
    """Part of the choices that the two busiest experts hold over the last 20 steps, from step 20 on."""
    load = np.array([r["load"][layer] for r in run["steps"]], float)
    together = np.array([load[i : i + WINDOW].sum(0) for i in range(len(load) - WINDOW + 1)])  # [steps, E]
    return np.sort(together, 1)[:, -2:].sum(1) / together.sum(1)


def told(run, words):
    """The alarms of a run with these words."""
    return [alarm for alarm in run["report"]["alarms"] if words in alarm]


# %% [markdown]
# ## 1. Imbalance, collapse, and their alarms
#
# No balancing at all. The run watches its own routing over the last 20 steps: when an expert gets less than 1 percent of
# its fair share (it is *dead*), when `K` experts hold more than 90 percent of the choices (the router has *collapsed*),
# or when a fifth of the choices is *dropped*, it says so, with what to change. At the usual learning rate, 3e-3, experts
# die and choices are dropped.

# %%
runs = {"none": train("none", balance_loss=0)}
alarms = runs["none"]["report"]["alarms"]
print("\n".join(alarms[:3]))
print(f"... {len(alarms)} alarms in all")
assert told(runs["none"], "they are dead") and told(runs["none"], "found no slot"), "an imbalance without an alarm"

fig, ax = plt.subplots(figsize=(9, 3.2))
ax.stackplot(STEPS, shares(runs["none"]).T, colors=COLORS, linewidth=0)
ax.set(xlabel="step", ylabel="part of the choices", ylim=(0, 1), xlim=(1, 400), title="without balance: first layer")
drop = dropped(runs["none"])
print(f"dropped in the last 100 steps: {drop:.1%}")

# %% [markdown]
# At three times that learning rate the router falls for its favourites before the experts have learned anything: it
# collapses within 60 steps. Over the same 60 steps with a balance loss two experts never hold half of the choices.

# %%
fast = ["train.optimizer.learning_rate=1e-2", "train.steps=60"]
collapsed = train("collapsed", *fast, balance_loss=0)
cured = train("cured", *fast, balance_loss="1e-1")
print("\n".join(told(collapsed, "the router has collapsed")))
assert told(collapsed, "the router has collapsed"), "a collapse without its alarm"
for layer in range(2):
    says = bool(told(collapsed, f"MoE layer {layer}: 2 of 8 experts"))
    assert says == (held(collapsed, layer).max() > COLLAPSED), "the alarm says what the loads say"
    assert held(cured, layer).max() < 0.5, "the loss keeps two experts below half"

fig, ax = plt.subplots(figsize=(9, 3.2))
for run, label, color in ((collapsed, "no balance", COLORS[5]), (cured, "loss 1e-1", COLORS[0])):
    for layer, style in enumerate(("-", "--")):
        ax.plot(STEPS[WINDOW - 1 : 60], held(run, layer), style, color=color, label=f"{label}, layer {layer}")
ax.axhline(COLLAPSED, color=COLORS[6], linestyle=":", label="the alarm's limit")
ax.set(xlabel="step", ylabel="held by two of eight", ylim=(0, 1), title="the two busiest experts, over 20 steps")
ax.legend()

# %% [markdown]
# ## 2. The cure by a loss
#
# `L = a E sum_i f_i P_i`: the part `f_i` of the choices that expert `i` got times its mean probability `P_i`, 1 at perfect
# balance (Fedus et al. 2021, eq. 4-6). The gradient flows through `P` alone: it lowers the probabilities of busy experts.

# %%
for coefficient in ("1e-3", "1e-2", "1e-1"):
    runs[coefficient] = train(coefficient, balance_loss=coefficient)
    print(f"a = {coefficient}: dropped {dropped(runs[coefficient]):.2%}")

# %% [markdown]
# ## 3. The cure without a loss
#
# Each expert has a **bias** that is added to its score when experts are chosen, and nowhere else: the gates do not know it.
# After each step it goes up by a fixed rate where the expert had less than the mean load, and down where it had more
# (Wang et al. 2024; DeepSeek-V3). No gradient of the text is disturbed. The biases are not parameters: they have no
# optimizer, and they are kept in the checkpoint.

# %%
runs["bias"] = train("bias", balance_loss=0, bias_rate=0.001)
print(f"bias: dropped {dropped(runs['bias']):.2%}")

# %%
names = {"none": "no balance", "1e-3": "loss 1e-3", "1e-2": "loss 1e-2", "1e-1": "loss 1e-1", "bias": "bias"}
fig, (left, right) = plt.subplots(1, 2, figsize=(10, 3.6))
for name, label in names.items():
    part = np.array([r["dropped"] / r["routed"] for r in runs[name]["steps"]])
    smooth = np.convolve(part, np.ones(20) / 20, mode="valid")
    left.semilogy(STEPS[19:], np.maximum(smooth, 1e-5), label=label)
left.set(xlabel="step", ylabel="dropped (mean of 20 steps)", title="dropped choices")
left.legend()
drops = [dropped(runs[name]) for name in names]
losses = [runs[name]["report"]["eval_loss"] for name in names]
bars = right.bar(list(names.values()), losses, color=COLORS[: len(names)])
right.bar_label(bars, [f"{d:.1%} dropped" for d in drops], fontsize=8)
right.set(ylabel="nats/token", title="held-out loss, dropless", ylim=(0.97 * min(losses), 1.02 * max(losses)))
right.tick_params(axis="x", rotation=20)

order = dict(zip(names, drops))
assert order["none"] > order["1e-3"] > order["1e-2"] > order["1e-1"], "a stronger loss drops less"
assert order["bias"] < 0.01, "the bias balances without a loss"
print("no balance > 1e-3 > 1e-2 > 1e-1, and the bias under 1 percent:", {n: f"{d:.2%}" for n, d in order.items()})

# %% [markdown]
# ## 4. Capacity against drops
#
# The model balanced by the loss `1e-2`, on held-out text, at growing capacity factors `f`: an expert has
# `C = ceil(K*T*f/E)` slots for the `T` tokens of a step. More room drops less and costs memory and time in proportion.
# Beside it a router that throws fair dice for each choice: the least that independent choices drop.

# %%
run = runs["1e-2"]
checkpoints = open_workdir(run["workdir"])
cfg = config.from_dict(checkpoints.info()["config"])
model, mesh = Model.of(cfg), build_mesh(cfg.mesh)
weights = checkpoints.restore_weights(model.weight_targets(mesh))
evaluator = Evaluator(model, mesh, open_prepared(run["workdir"] / "tokens", cfg.data))

factors, moe, T = [0.5, 0.75, 1.0, 1.25, 1.5, 2.0, 3.0], cfg.model.moe, 1024
found = {f: evaluator.sums(weights, 8, f) for f in factors}
measured = [1 - int(s.stats.kept.sum()) / int(s.stats.routed.sum()) for s in found.values()]
nats = [float(s.nats / s.targets) for s in found.values()]
dropless = evaluator.sums(weights, 8, None)

dice = np.random.default_rng(0).multinomial(2 * T, np.ones(8) / 8, size=2000)  # [2000, E], loads of fair dice
fair = [np.maximum(dice - capacity(moe, T, f), 0).sum() / dice.sum() for f in factors]

fig, (left, right) = plt.subplots(1, 2, figsize=(10, 3.4))
left.plot(factors, measured, "o-", label="trained router")
left.plot(factors, fair, "s--", color=COLORS[6], label="fair dice")
left.set(xlabel="capacity factor f", ylabel="dropped choices", title="held-out text")
left.legend()
right.plot(factors, nats, "o-", color=COLORS[2])
right.axhline(float(dropless.nats / dropless.targets), color=COLORS[6], linestyle="--", label="dropless")
right.set(xlabel="capacity factor f", ylabel="nats/token", title="held-out loss at capacity")
right.legend()
assert all(a >= b for a, b in zip(measured, measured[1:])), "more room never drops more"
assert measured[0] >= 0.5 - 1e-9, "at f = 0.5 half of the choices cannot have a slot"
assert int(dropless.stats.kept.sum()) == int(dropless.stats.routed.sum())
print({f"f={f}": f"{m:.1%}" for f, m in zip(factors, measured)})

# %% [markdown]
# ## 5. The z-loss
#
# `z = mean of logsumexp(logits)^2` (Zoph et al. 2022, ST-MoE) keeps the logits of the router small. The choice of experts
# does not need large ones, and in short number formats large logits lose their differences: bfloat16 has 8 bits, so
# that above 256 neighbouring values are 2 apart.

# %%
runs["z"] = train("z", balance_loss="1e-2", z_loss="1e-2")
with_z = np.array([r["z_loss"] for r in runs["z"]["steps"]])
without = np.array([r["z_loss"] for r in runs["1e-2"]["steps"]])
fig, ax = plt.subplots(figsize=(6, 3.2))
ax.semilogy(STEPS, np.sqrt(without), label="no z-loss")
ax.semilogy(STEPS, np.sqrt(with_z), label="z-loss 1e-2")
ax.set(xlabel="step", ylabel="root mean square of logsumexp", title="size of the router's logits")
ax.legend()
assert with_z[-100:].mean() < 0.5 * without[-100:].mean(), "the z-loss keeps the logits smaller"
change = runs["z"]["report"]["eval_loss"] - runs["1e-2"]["report"]["eval_loss"]
print(f"mean z of the last 100 steps: {without[-100:].mean():.2f} without, {with_z[-100:].mean():.2f} with;")
print(f"held-out loss {runs['1e-2']['report']['eval_loss']:.3f} without, {change:+.3f} with")
