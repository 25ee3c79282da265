# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # A wrong rule, and how it is found
#
# `03_watch_the_all_to_all.ipynb` shows how tokens get to the devices of their experts and home again. This notebook
# breaks the layouts behind it, in two ways: one is refused before anything compiles, the other gives the right result
# by a slow program, and is found in that. Every claim ends in an `assert`. It runs on a CPU in less than a minute.
#
# The letters: `T` tokens of a device, `E` experts, `K` choices of a token, `D` width of a token, `f` capacity factor,
# `b` bytes of a number, `n` devices.
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

import jax

from moe_jax.config import MeshConfig
from moe_jax.mesh import build_mesh, prepare_devices

prepare_devices(MeshConfig(expert=4), fake_devices=4)  # on every machine, so that all show the same programs
mesh = build_mesh(MeshConfig(expert=4))
devices = jax.devices()
print(f"{len(devices)} fake devices of the CPU")

# %%
import dataclasses

import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
from flax import nnx

from moe_jax import MoEConfig, MoELayer, RouterConfig, Rules, config, place
from moe_jax.inspect.report import inspect
from moe_jax.inspect.show import lines
from moe_jax.rules import RulesError

n, E, D = 4, 8, 8
MOE = MoEConfig(experts=E, top_k=1, d_ff=8, capacity_factor=4.0, min_capacity=1, router=RouterConfig(kind="switch"))
x = jnp.asarray(np.random.default_rng(0).normal(size=(n, 4, D)), jnp.float32)


def output(rules):
    """What a layer with these rules makes of `x`."""
    layer = MoELayer(MOE, d_model=D, ffn="relu", rules=rules, rngs=nnx.Rngs(params=0))
    place(layer, mesh, rules)
    with jax.set_mesh(mesh):
        return nnx.jit(lambda layer, x: layer(x, train=True)[0])(layer, x)


# %% [markdown]
# ## 1. What is refused
#
# The exchange depends on the layouts, and a wrong one gives no wrong result: the program is only slower. So the
# library looks. First, what can be known without a compiler is refused. Here tokens are split over `data` and not over
# `expert`, so that the devices of the `expert` axis all have the same tokens, and there is nothing to exchange:

# %%
try:
    output(Rules(batch=("data", "fsdp")))
    raise AssertionError("this must be refused")
except RulesError as error:
    (problem,) = error.problems
    print(f"{problem.key}: {problem.reason}\n    remedy: {problem.remedy}")
    assert problem.key == "rules.experts" and "no all-to-all is possible" in problem.reason

# %% [markdown]
# ## 2. What is flagged
#
# The second mistake cannot be written in a config, because both layouts are derived from one table. So we break the
# table itself: at home, the buffers are said to lie on *every* device. It sounds harmless. But a device then needs the
# columns of all others before any exchange, and the compiler gathers them: an **all-gather**, in which each device
# sends all that it has to all others. The result is the same:

# %%
class Everywhere(Rules):
    """Rules whose dispatch buffers are whole on every device while tokens are at home."""

    @property
    def token_major(self):
        return ((), (), (), ())


y, same = output(Rules()), output(Everywhere())
np.testing.assert_allclose(same, y, atol=1e-5 * np.abs(y).max())
print("the outputs are equal")

# %% [markdown]
# In a model with many layers nobody reads lists of collectives. `moe_jax.inspect`, the command `moe-jax inspect`, compiles the
# whole train step, holds the exchange against its least, and flags what should not be there. Here is a small
# transformer with one MoE layer, top-2 of 8 experts, with the right rules and with the broken ones:

# %%
SETTINGS = """
mesh.data=1 mesh.expert=4 model.layers=1 model.d_model=64 model.d_ff=64 model.heads=2 model.ffn=relu
model.moe.every=1 model.moe.top_k=2 model.moe.router.kind=softmax_topk model.moe.balance_loss=0 model.moe.z_loss=0
data.length=64 data.batch=16
""".split()
right = config.load("tiny_switch", SETTINGS)
reports = {
    "right rules": inspect(right, mesh),
    "broken rules": inspect(dataclasses.replace(right, rules=Everywhere()), mesh),
}
for name, report in reports.items():
    print(f"{name}:", *lines(report)[1:-1], "", sep="\n")  # without the title and the seconds

# %%
m, moe = right.model, right.model.moe
T = right.data.batch * right.data.length // n  # tokens of a device
least = moe.capacity_factor * moe.top_k * T * m.d_model * 4 * (n - 1) / n
good, bad = reports.values()
assert good["flags"] == [] and good["exchange"]["count"] == {"forward": 2, "recompute": 0, "backward": 2}
assert good["least"]["bytes_each_way"] == least and good["exchange"]["bytes"] == 4 * least
assert {flag["kind"] for flag in bad["flags"]} == {"tokens are gathered", "experts are not exchanged"}
assert sum(flag["bytes"] for flag in bad["flags"]) == 4 * n * least
assert all("rules.experts and rules.batch" in flag["remedy"] for flag in bad["flags"])
print(f"{least:,.0f} bytes each way; the flags of the broken rules tell of {4 * n * least:,.0f}")

# %% [markdown]
# ## 3. Bytes by kind
#
# What one device sends in a step, by operation. The all-reduce adds up gradients of what all devices have a copy of;
# it is the same in both.

# %%
KINDS = {"all-to-all": "#009E73", "all-gather": "#D55E00", "all-reduce": "#6B6B6B"}
sent = {name: {kind: 0 for kind in KINDS} for name in reports}
for name, report in reports.items():
    for line in report["collectives"]:
        sent[name][line["op"]] += line["bytes"]  # an operation that KINDS lacks would raise

fig, ax = plt.subplots(figsize=(9, 2.6))
for at, (name, of) in enumerate(sent.items()):
    begin = 0
    for kind, size in of.items():
        ax.barh(at, size / 1e6, left=begin / 1e6, color=KINDS[kind], height=0.6, label=kind if at == 0 else None)
        if size:
            label = dict(ha="center", va="center", color="white", fontsize=9)
            ax.text((begin + size / 2) / 1e6, at, f"{size / 1e6:.2f} MB", **label)
        begin += size
ax.set_yticks(range(len(sent)), list(sent))
ax.invert_yaxis()
ax.set(xlabel="sent by one device in a train step (MB)", title="bytes by kind of collective")
ax.legend(loc="upper right")

assert sent["right rules"]["all-gather"] == sent["broken rules"]["all-to-all"] == 0
assert sent["broken rules"]["all-gather"] == n * sent["right rules"]["all-to-all"] == n * 4 * least
assert sent["broken rules"]["all-reduce"] == sent["right rules"]["all-reduce"]
print({name: {kind: f"{size:,}" for kind, size in of.items()} for name, of in sent.items()})

# %% [markdown]
# Next: `moe-jax inspect CONFIG` does this for any config, and with `--topology` for machines that you have not rented
# yet.
