# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Inside a model
#
# A mixture of experts is trained here for some seconds, and then opened: where does each letter of a sentence go, what
# does each expert like, is that more than chance, and what does it take to spread the experts evenly over devices?
# Every claim ends in an `assert`. It runs on a CPU in about one minute.
#
# The letters: `T` tokens, `E` experts, `K` choices of a token.
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

import matplotlib.pyplot as plt
import numpy as np
from IPython.display import Image

from moe_jax import Trained, config
from moe_jax.likes import likes, lines
from moe_jax.picture import draw_trace, expert_colours
from moe_jax.picture_likes import draw_likes
from moe_jax.placement import place
from moe_jax.specialise import classes, crossed, entropy, information, loads, shuffled
from moe_jax.trace import pieces, routes, trace
from moe_jax.train.loop import Run

plt.rcParams.update(
    {
        "figure.dpi": 80,
        "figure.constrained_layout.use": True,
        "font.size": 10,
        "axes.titlesize": 11,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "legend.frameon": False,
    }
)
FOLDER = Path(tempfile.mkdtemp())
E, K, LENGTH = 8, 2, 64

# %% [markdown]
# ## 1. A small model
#
# Two layers of 8 experts, of which each token uses two, as in Mixtral. A token is a byte, and the text is the manual
# that comes with Python. The balance loss is weak, so that experts may differ in load. `Run` is what `moe-jax train`
# runs, and `Trained` opens what it leaves; a folder that `moe-jax convert import` made of published weights opens alike.

# %%
SETTINGS = f"""
mesh.data=1 mesh.expert=1 model.layers=2 model.d_model=64 model.d_ff=128 model.moe.d_ff=64
model.moe.dispatch=gather model.moe.capacity_factor=4 model.moe.group_size=1024 model.moe.balance_loss=1e-3
data.length={LENGTH} data.batch=16 train.steps=250 train.eval_batches=8 train.tensorboard=false train.sample=unset
""".split()
report = Run(config.load("tiny_mixtral", SETTINGS), FOLDER / "run", started=time.perf_counter(), quiet=True)()
run = Trained(FOLDER / "run")
print(f"held-out loss after {run.step} steps: {report['eval_loss']:.2f} nats a byte; blind guessing: {np.log(256):.2f}")
assert report["eval_loss"] < 0.5 * np.log(256), "it has learned something of the text"

# %% [markdown]
# ## 2. A sentence through its experts
#
# `trace`, the command `moe-jax trace --text`, says where each token goes in each layer and with what weight. In the
# picture a column is a token and a band is a layer, with a strip for each of its two experts. A colour is an expert, and
# the paler one has less weight. Look for columns of equal letters: in layer 0 they are mostly alike, in layer 1 less,
# where the letters before count for more. Part 3 measures it.

# %%
SENTENCE = "The list has 12 items, and the set has 7."
found = trace(run, SENTENCE)
gate, expert = (np.array([layer[name] for layer in found["layers"]]) for name in ("gate", "expert"))  # [layers, T, K]
assert "".join(found["tokens"]) == SENTENCE and expert.shape == (2, len(SENTENCE), K)
np.testing.assert_allclose(gate.sum(2), 1, atol=1e-5)
assert found["dropped"] == 0 and found["routed"] == 2 * len(SENTENCE) * K
assert (expert[..., 0] != expert[..., 1]).all()
print("two different experts for each token, whose weights add up to 1; nothing is dropped")
Image(draw_trace(found, FOLDER / "trace.png", title="A sentence through its experts").read_bytes(), width=1000)

# %% [markdown]
# ## 3. What each expert likes
#
# One sentence tells little. `likes`, the command `moe-jax trace --file`, reads a long text, here 20,000 bytes that the
# model was not trained on. Each token has a **class**: a blank, a digit, a small letter that begins a word or stands
# inside one, and so on. The tokens told of an expert are those of which it gets most beyond its share.

# %%
text = np.array(run.corpus.heldout.tokens[:20_000], np.int32)
liked = likes(run, text)
print("\n".join(lines(liked)))

# %% [markdown]
# The **mutual information** `I(class; expert)` is what the class of a token tells of its expert, in bits. It is 0 if
# each class is spread over the experts as all tokens are. It is `H(class)`, the entropy of the classes, if the expert
# tells the class. Finite counts never give exactly 0, even if the router is blind to the classes. So it is measured
# again with the classes **shuffled** among the tokens: as many tokens of each class, as many choices of each expert, and
# no connection. Only what is beyond the shuffled ones is specialisation. In the picture that is a blue bar longer than
# the black mark, and below it rows of p(expert | class) that differ from one another.

# %%
Image(draw_likes(liked, FOLDER / "likes.png", title="What the experts get of held-out text").read_bytes(), width=1000)

# %%
# The same once more, by hand
found = routes(run, text, LENGTH)
label = classes(pieces(run.corpus.tokenizer, text.tolist()), text == run.corpus.tokenizer.eos)
rng = np.random.default_rng(0)
for layer, said in enumerate(liked["layers"]):
    table, blind = np.zeros((2, 12, E), int)
    mixed = shuffled(label, found.kept[layer].sum(1), rng)
    for k in range(K):
        np.add.at(table, (label, found.expert[layer, :, k]), 1)
        np.add.at(blind, (mixed, found.expert[layer, :, k]), 1)
    bits = entropy(table.sum(1)) + entropy(table.sum(0)) - entropy(table.ravel())  # H(class) + H(expert) - H(both)
    assert abs(bits - said["bits"]) < 1e-9
    assert (blind.sum(0) == table.sum(0)).all() and (blind.sum(1) == table.sum(1)).all(), "the margins stay"
    seen = len(liked["classes"])
    bias = (seen - 1) * (E - K) / (2 * K * len(text) * np.log(2))
    assert said["bits"] > 20 * said["chance_95"], "far more than chance"
    assert abs(said["chance_mean"] / bias - 1) < 0.2, "chance is what so many counts make of no connection"
    assert information(blind) < 2 * bias
    print(f"layer {layer}: {bits:.3f} bits, shuffled {information(blind):.4f}, by the formula of the bias {bias:.4f}")

# %% [markdown]
# The letter itself tells more than its class does. In layer 0 it tells more than in layer 1: there, what a token is for the
# model depends more on the text before it.

# %%
told = []
for layer in range(2):
    table = crossed(np.repeat(text, K), found.expert[layer].ravel(), 257, E)  # [letters, E]
    told.append(information(table) / entropy(table.sum(0)))
    print(f"layer {layer}: the letter tells {told[layer]:.0%} of what there is to tell of an expert")
    assert information(table) > liked["layers"][layer]["bits"]
assert told[0] > told[1]

# %% [markdown]
# More than chance is not yet learned. A router that was never trained sees equal letters alike too, so that it sends
# them alike. So here is the same model with its weights before the first step. The letters alone already tell something
# of its experts; training makes it more, in both layers.

# %%
trained_weights, run.weights = run.weights, run.model.create(run.mesh).weights
fresh = likes(run, text)
run.weights = trained_weights

for before, after in zip(fresh["layers"], liked["layers"]):
    print(f"layer {after['layer']}: {before['bits']:.3f} bits before training, {after['bits']:.3f} after")
    assert before["bits"] > before["chance_95"], "more than chance, without any learning"
    assert after["bits"] > 1.5 * before["bits"], "and more by learning"

# %% [markdown]
# ## 4. Balance by placement
#
# Experts that differ in load make devices wait for one another: a layer takes as long as its busiest device. EPLB, which
# DeepSeek-V3 uses, leaves the model as it is, and moves the experts. The busiest ones get **replicas**, which share
# their tokens, and all of them are laid on devices so that every device has about the same to do. It needs nothing but
# **loads**: how many choices each expert got.
#
# The loads are recorded on text that the model was trained on. Four devices have 12 slots for 8 experts.

# %%
DEVICES, SLOTS = 4, 12
past = np.array(run.corpus.train.tokens[:32_768], np.int32)
load = loads(routes(run, past, LENGTH).expert, E)  # [layers, E]
assert load.sum(1).tolist() == [K * len(past)] * 2
placement = place(load, SLOTS, DEVICES)

for layer, (slots, count) in enumerate(zip(placement.physical_to_logical, placement.count)):
    print(f"layer {layer}: " + "  ".join(f"device {d}: {part}" for d, part in enumerate(slots.reshape(DEVICES, -1))))
    busiest = load[layer].argmax()
    assert set(slots) == set(range(E)) and count.sum() == SLOTS, "no expert is lost, and each slot holds one"
    assert count[busiest] == count.max() > 1, "the busiest expert has as many replicas as any"

# %% [markdown]
# Does it hold for text that it has not seen? Below is what each device has to do for the held-out text, as a multiple of
# the mean. Each piece is an expert in its colour, with its number. On the left the experts lie in order, two on a
# device; on the right they lie where the placement put them. The closer all bars come to the line, the less any device
# waits.

# %%
new = np.array(liked["load"])  # of the held-out text
share = np.take_along_axis(new / placement.count, placement.physical_to_logical, 1)  # [layers, slots]
layouts = {
    "in order": (np.tile(np.arange(E), (2, 1)), new),
    "placed by the loads": (placement.physical_to_logical, share),
}
fig, axes = plt.subplots(2, 2, figsize=(10, 5.2), sharey=True)
colours = expert_colours(E)
worst = {}
for row, layer in zip(axes, range(2)):
    for ax, (name, (who, tokens)) in zip(row, layouts.items()):
        parts = tokens[layer].reshape(DEVICES, -1) / (new[layer].sum() / DEVICES)  # [devices, slots of each]
        experts = who[layer].reshape(DEVICES, -1)
        for d in range(DEVICES):
            for e, part, begin in zip(experts[d], parts[d], np.cumsum(parts[d]) - parts[d]):
                ax.bar(d, part, bottom=begin, color=colours[e], edgecolor="white", width=0.7)
                if part > 0.06:
                    ax.text(d, begin + part / 2, str(e), ha="center", va="center", fontsize=9)
        worst[name, layer] = parts.sum(1).max()
        ax.axhline(1, color="#222222", linestyle="--", linewidth=1, zorder=0)
        ax.set(title=f"layer {layer}, {name}", xlabel="device", xticks=range(DEVICES))
    row[0].set_ylabel("load over the mean")

recorded, unseen = placement.balance(load), placement.balance(new)
for layer in range(2):
    np.testing.assert_allclose(1 / unseen.before[layer], worst["in order", layer])
    np.testing.assert_allclose(1 / unseen.after[layer], worst["placed by the loads", layer])
    assert recorded.after[layer] > recorded.before[layer] and unseen.after[layer] > unseen.before[layer]
    print(
        f"layer {layer}, mean over maximum: {recorded.before[layer]:.2f} -> {recorded.after[layer]:.2f} on the text of "
        f"the loads, {unseen.before[layer]:.2f} -> {unseen.after[layer]:.2f} on held-out text"
    )

# %% [markdown]
# ## 5. As large as the real ones
#
# 58 layers of 256 experts, as in DeepSeek-V3, on 32 devices with 9 slots each. The loads follow Zipf's law, as words
# do: the busiest expert gets twice what the second one gets, three times what the third gets, and so on. In order, the
# device with the busiest expert does several times the mean. The picture has the loads of the 32 devices of one layer,
# busiest first.

# %%
rng = np.random.default_rng(0)
zipf = np.stack([rng.permutation(1 / np.arange(1, 257)) for _ in range(58)])  # [layers, E]
large = place(zipf, slots=288, devices=32)
balance = large.balance(zipf)
print(f"mean over maximum, of 58 layers: {balance.before.mean():.3f} -> {balance.after.mean():.4f}")
print(f"the busiest expert of a layer has {large.count.max(1).min()} to {large.count.max(1).max()} replicas")
assert balance.before.mean() < 0.3 and balance.after.mean() >= 0.99
assert (large.count.sum(1) == 288).all() and (large.count >= 1).all()

alone = zipf[0].reshape(32, -1).sum(1)
shared = np.take_along_axis(zipf / large.count, large.physical_to_logical, 1)[0].reshape(32, -1).sum(1)
np.testing.assert_allclose(alone.sum(), shared.sum())
fig, ax = plt.subplots(figsize=(9, 3))
for values, name, colour in ((alone, "in order", "#D55E00"), (shared, "placed by the loads", "#0072B2")):
    ax.step(range(32), np.sort(values)[::-1] / values.mean(), where="mid", color=colour, label=name)
ax.axhline(1, color="#222222", linestyle="--", linewidth=1)
ax.legend()
ax.set_ylim(bottom=0)
ax.set(xlabel="devices, busiest first", ylabel="load over the mean", title="Zipf loads, 256 experts on 32 devices")
plt.show()

# %% [markdown]
# Next: `moe-jax trace DIR --file TEXT --png F` draws the picture of part 3 for any run and any text, and with `--json`
# writes its `load` for `place`.
