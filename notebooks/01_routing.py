# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # A router and capacity in pictures
#
# A mixture-of-experts layer has a **router**. For each token, the router picks a few experts out of many.
# Each expert has room for a fixed number of tokens, its **capacity**. This notebook draws both, and it proves what it
# says: every claim ends in an `assert`. It runs on a CPU in about one minute.
#
# The letters: `S` tokens of a group, `E` experts, `K` choices of a token, `C` slots of an expert, `D` width of a token.
#
# **To run it in Colab**, bring the folder of the project to the machine first: clone it with `git clone` from where
# you have it, or make a zip archive of it, upload it with the folder icon on the left, and unpack it with
# `!unzip NAME.zip`. The next cell finds the folder in `/content` and installs it.

# %%
import importlib
import importlib.util
import os
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

os.environ["JAX_NUM_CPU_DEVICES"] = "8"  # JAX reads it when it starts; accelerators are left as they are

import jax

# Eight accelerators if they are here, else eight fake devices of the CPU.
devices = (jax.devices() if len(jax.devices()) >= 8 else jax.devices("cpu"))[:8]
assert len(devices) == 8, "JAX started before this cell: restart the kernel and run all cells from the top"
jax.config.update("jax_default_device", devices[0])
jax.config.update("jax_default_matmul_precision", "float32")  # GPUs and TPUs round products more by default
print(f"{len(devices)} devices of kind {devices[0].platform}")

# %%
import functools
import re

import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
from flax import nnx
from matplotlib.colors import ListedColormap
from matplotlib.lines import Line2D
from matplotlib.patches import Patch, Rectangle
from scipy.stats import binom

from moe_jax import balance, mesh, rules
from moe_jax.axes import Rules
from moe_jax.capacity import assign, capacity
from moe_jax.config import MeshConfig, MoEConfig, RouterConfig
from moe_jax.layers.moe import MoELayer
from moe_jax.routing import route

# The palette of Okabe and Ito (grey for its pale yellow), which colour-blind readers can tell apart.
COLORS = ["#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#999999", "#222222"]
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

# %% [markdown]
# ## 1. What a router does
#
# A token `x [D]` times the router's matrix `[D, E]` gives one **logit** for each expert. The router turns the logits
# into a choice of `K` experts and a **gate** for each of them. The layer's output is the sum of the chosen experts'
# outputs, each times its gate. Four routers of the literature are here; they read the same logits:
#
# | router | chooses | gate |
# |---|---|---|
# | `switch` | the best | its probability `p`, softmax over all experts |
# | `gshard` | the two best | `p` divided by the sum of the two |
# | `topk_softmax` | the `K` best | softmax over the `K` chosen logits |
# | `softmax_topk` | the `K` best | `p` as it is |
#
# Colour is the probability. A ring marks a chosen expert, and the number in it is the gate.

# %%
logits = 1.5 * np.random.default_rng(3).normal(size=(6, 8)).astype(np.float32)  # [S, E]
routings = {}
for kind in ("switch", "gshard", "topk_softmax", "softmax_topk"):
    moe = MoEConfig(experts=8, top_k=1 if kind == "switch" else 2, router=RouterConfig(kind=kind))
    routings[kind] = jax.tree.map(np.asarray, route(jnp.asarray(logits), moe))

fig, axes = plt.subplots(2, 2, figsize=(10, 6.4), sharex=True, sharey=True)
for ax, (kind, r) in zip(axes.flat, routings.items()):
    image = ax.imshow(r.prob, cmap="cividis", vmin=0, vmax=1, aspect="auto")
    for token, (experts, gates) in enumerate(zip(r.expert, r.gate)):
        for e, gate in zip(experts, gates):
            ink = "black" if r.prob[token, e] > 0.5 else "white"
            ax.plot(e, token, "o", markersize=27, markerfacecolor="none", markeredgecolor=ink, markeredgewidth=1.8)
            ax.text(e, token, f"{gate:.2f}", color=ink, ha="center", va="center", fontsize=9)
    ax.set_title(f"{kind}, K={r.expert.shape[1]}")
    ax.set_xticks(range(8))
    ax.spines[["left", "bottom"]].set_visible(False)
    ax.tick_params(length=0)
for ax in axes[1]:
    ax.set_xlabel("expert")
for ax in axes[:, 0]:
    ax.set_ylabel("token")
fig.colorbar(image, ax=axes, label="probability (softmax of the logits)", shrink=0.7)

p = np.exp(logits.astype(float)) / np.exp(logits.astype(float)).sum(1, keepdims=True)  # in float64, by hand
best = np.argsort(-p, axis=1)[:, :2]
chosen = np.take_along_axis(p, best, axis=1)
for kind, r in routings.items():
    np.testing.assert_array_equal(r.expert, best[:, : r.expert.shape[1]])
    hand = {"switch": chosen[:, :1], "softmax_topk": chosen}.get(kind, chosen / chosen.sum(1, keepdims=True))
    np.testing.assert_allclose(r.gate, hand, rtol=1e-5)
print("experts and gates of all four routers agree with float64 by hand")

# %% [markdown]
# `gshard` and `topk_softmax` give the same gates here: a softmax over two logits is the same as two probabilities
# divided by their sum. They differ in training, where `gshard` may keep the second expert only at random.
# The gates of `switch` and `softmax_topk` do not add up to 1. The missing part is how unsure the router is.

# %% [markdown]
# ## 2. The geometry of top-1 routing
#
# Expert `i` has a column `w_i` of the router's matrix, and a token goes to the expert with the largest `w_i . x`.
# Experts `i` and `j` tie where `(w_i - w_j) . x = 0`: a line through the origin for tokens with two numbers, a
# hyperplane in general. Only the part of the line where `i` and `j` are the two best is a border.
# So the regions of the experts are cones, and the length of a token does not matter to the choice. It does matter to
# the gate, which grows with the distance from the border.

# %%
W = np.array([[1.2, 0.5], [-0.9, 1.0], [0.1, -1.3]])  # [E, D], one row for each expert
TOP1 = MoEConfig(experts=3, top_k=1, router=RouterConfig(kind="switch"))
choose = jax.jit(lambda logits: route(logits, TOP1))


def experts_at(points):
    """Chosen expert of points [..., 2], by the library."""
    flat = np.asarray(points).reshape(-1, 2)
    return np.asarray(choose(jnp.asarray(flat @ W.T, jnp.float32)).expert).reshape(np.shape(points)[:-1])


n = 201
ticks = np.linspace(-2, 2, n)
grid = np.stack(np.meshgrid(ticks, ticks), -1)  # [n, n, 2]
colour = experts_at(grid)

# The border, without looking at W: bisection between grid neighbours of different colour.
pairs = [(grid[:, :-1], grid[:, 1:]), (grid[:-1], grid[1:])]
differ = [experts_at(a) != experts_at(b) for a, b in pairs]
lo = np.concatenate([a[d] for (a, _), d in zip(pairs, differ)])  # [points, 2]
hi = np.concatenate([b[d] for (_, b), d in zip(pairs, differ)])
start = experts_at(lo)
for _ in range(30):
    middle = (lo + hi) / 2
    same = (experts_at(middle) == start)[:, None]
    lo, hi = np.where(same, middle, lo), np.where(same, hi, middle)
found = (lo + hi) / 2
i, j = start, experts_at(hi)  # the experts on the two sides

# Each found point is on the line of its two experts, and these are its two best.
normal = W[i] - W[j]
distance = np.abs((normal * found).sum(1)) / np.linalg.norm(normal, axis=1)
third = (found @ W.T)[np.arange(len(found)), 3 - i - j]
assert distance.max() < 1e-4
assert (third < (found * W[i]).sum(1) + 1e-4).all()


def border(i, j):
    """Points of the line (w_i - w_j) x = 0 inside the picture where i and j are the two best."""
    along = np.array([-(W[i] - W[j])[1], (W[i] - W[j])[0]])
    points = np.linspace(-2.0, 2.0, 801)[:, None] * along / np.abs(along).max()
    return points[(points @ W.T)[:, 3 - i - j] <= points @ W[i]]


# The other way round: no piece of a border was missed.
borders = {(i, j): border(i, j) for i, j in [(0, 1), (0, 2), (1, 2)]}
step = ticks[1] - ticks[0]
missed = max(np.linalg.norm(p[:, None] - found, axis=-1).min(1).max() for p in borders.values())
assert missed < 2 * step
print(f"{len(found)} points of the border found; farthest from its line {distance.max():.1e}; grid step {step:.2f}")

# %%
fig, (left, right) = plt.subplots(1, 2, figsize=(10, 4.6), sharey=True)
span = dict(extent=(-2, 2, -2, 2), origin="lower")
left.imshow(colour, cmap=ListedColormap(COLORS[:3]), vmin=-0.5, vmax=2.5, alpha=0.45, **span)
left.set_title("chosen expert, and where two experts tie")
for e, w in enumerate(W):
    left.annotate("", w, (0, 0), arrowprops=dict(arrowstyle="-|>", color=COLORS[e], lw=2, shrinkA=0, shrinkB=0))
    left.text(*(1.2 * w), f"$w_{e}$", ha="center", va="center", fontsize=13)
gate = np.asarray(choose(jnp.asarray(grid @ W.T, jnp.float32)).gate)[..., 0]
image = right.contourf(*grid.transpose(2, 0, 1), gate, levels=np.linspace(0.3, 1, 15), cmap="cividis")
right.set_aspect("equal")
right.set_title("gate of the chosen expert")
fig.colorbar(image, ax=right, label="gate (probability)")
for style, ((i, j), points) in zip(("-", "--", ":"), borders.items()):
    left.plot(*points.T, style, color="black", lw=2.2, label=f"$(w_{i}-w_{j})\\,x=0$")
    right.plot(*points.T, style, color="white", lw=2.2)
left.legend(loc="lower left", frameon=True, framealpha=0.9)
left.set_ylabel("second number of the token")
for ax in (left, right):
    ax.set_xlabel("first number of the token")

# %% [markdown]
# ## 3. Capacity
#
# On an accelerator, arrays have fixed sizes. So each expert gets a buffer of `C` slots in each group of `S` tokens:
# `C = ceil(K S f / E)` with the **capacity factor** `f` (and never less than a set minimum). With `f = 1` there are as
# many slots as choices; all of them fit only when the load is even. A choice that finds its expert full is **dropped**:
# the token then passes that expert by, on the residual connection.
#
# Who is dropped? That is the **priority**. Here 32 tokens take 2 of 4 experts each, so `C = 16`. Each column is an
# expert, each box a choice, the number in it is the token. Boxes above the line are dropped.

# %%
S, E, K = 32, 4, 2
rng = np.random.default_rng(0)
logits = rng.normal(size=(S, E)) + np.array([0.9, 0.35, -0.2, -0.9])  # the first expert is popular
PRIORITIES = {
    "choice": "all first choices, then\nall second ones",
    "token": "tokens in order, both\nchoices of a token together",
    "probability": "most probable\nchoices first",
    "batch": "first choices by probability,\nthen second ones",
}
fig, axes = plt.subplots(1, 4, figsize=(12, 5.4), sharey=True)
for ax, (priority, meaning) in zip(axes, PRIORITIES.items()):
    moe = MoEConfig(experts=E, top_k=K, capacity_factor=1.0, priority=priority)
    C = capacity(moe, S, moe.capacity_factor)
    routing = route(jnp.asarray(logits, jnp.float32), moe)
    slots = assign(routing, moe, C)
    expert, prob, kept, position = map(np.array, (routing.expert, routing.prob, slots.kept, slots.position))

    # The same in plain Python: queue up by priority, the first C of each expert stay.
    order = {
        "choice": lambda t, k: (k, t),
        "token": lambda t, k: (t, k),
        "probability": lambda t, k: (-prob[t, expert[t, k]], k, t),
        "batch": lambda t, k: (k, -prob[t].max(), t),
    }[priority]
    queue = sorted(((t, k) for t in range(S) for k in range(K)), key=lambda choice: order(*choice))
    for e in range(E):
        mine = [c for c in queue if expert[c] == e]
        assert {c for c in mine if kept[c]} == set(mine[:C])
        assert sorted(position[c] for c in mine[:C]) == list(range(len(mine[:C])))  # no slot twice, none skipped
        for height, c in enumerate(mine[C:]):
            position[c] = C + height
    assert kept.sum() + (~kept).sum() == S * K and (~kept).sum() == np.clip(np.bincount(expert.flat) - C, 0, None).sum()

    for (t, k), e in np.ndenumerate(expert):
        y, stays = position[t, k], kept[t, k]
        face = (COLORS[0], COLORS[1])[k]
        box = dict(facecolor=face, edgecolor="white") if stays else dict(facecolor="white", edgecolor=face, hatch="////")
        ax.add_patch(Rectangle((e - 0.46, y + 0.04), 0.92, 0.92, lw=0.8, **box))
        ink = "white" if stays and k == 0 else "black"
        around = None if stays else dict(facecolor="white", edgecolor="none", pad=0.6)
        ax.text(e, y + 0.47, str(t), ha="center", va="center", fontsize=7.5, color=ink, bbox=around)
    for e in range(E):
        ax.add_patch(Rectangle((e - 0.5, 0), 1, C, fill=False, edgecolor="#888888", lw=0.8))
    ax.axhline(C, color="black", lw=2)
    first, second = (~kept).sum(0)
    ax.set_title(priority, fontweight="bold", pad=32)
    ax.text(0.5, 1.01, meaning, transform=ax.transAxes, ha="center", va="bottom", fontsize=9)
    ax.set(xlim=(-0.6, E - 0.4), ylim=(0, 27), xticks=range(E))
    ax.set_xlabel(f"expert\ndropped: {first} first, {second} second")
axes[0].set_ylabel("slot of the expert's buffer")
axes[0].set_yticks([0, 4, 8, 12, 16])
axes[0].text(E - 0.45, C + 0.3, "capacity C = 16", ha="right", fontsize=9)
fig.legend(
    handles=[
        Patch(color=COLORS[0], label="first choice of a token"),
        Patch(color=COLORS[1], label="second choice"),
        Patch(facecolor="white", edgecolor="black", hatch="////", label="dropped"),
    ],
    loc="outside lower center",
    ncols=3,
)
print(f"kept and dropped agree with plain Python for all four priorities; {(~kept).sum()} of {S * K} dropped in each")

# %% [markdown]
# The *number* of drops is the same in all four: it depends on the load alone. Priority decides *which* choices go.
# `choice` saves first choices at the cost of second ones. `probability` and `batch` keep what the router is sure about.
# `token` favours the start of the text, and it is the only one that is causal: with the others, the choice of a later
# token can push out a choice of an earlier one, so a language model that drops in this way looks ahead a little.
#
# ## 4. How many are dropped?
#
# Let a router choose without looking at the token: logits are the logarithms of fixed shares `q_e` plus Gumbel noise,
# so the first choice is expert `e` with probability `q_e`, and the second is drawn in the same way from the rest.
# The number of choices that reach expert `e` is then binomial, `X_e ~ Bin(S, r_e)`, where `r_e` is the probability that
# `e` is among a token's `K`: `K/E` for even shares, and for `K = 2` in general `q_e + sum_{j != e} q_j q_e / (1 - q_j)`.
# Experts depend on each other, but an expectation does not care, and the expected share of dropped choices is exact:
#
# `sum_e E[max(X_e - C, 0)] / (K S)`
#
# The dots and bands are measured with the library's router and slots: the mean of 200 groups and the middle 90 percent
# of them.

# %%
E, GROUPS = 8, 200
FACTORS = [round(0.25 * n, 2) for n in range(1, 17)]
SHARES = {"uniform": np.full(E, 1 / E), "skewed": 1 / np.arange(1, E + 1) / (1 / np.arange(1, E + 1)).sum()}


def expected(q, K, S, C):
    """Expected share of dropped choices, exact, and a bound on its standard deviation over groups."""
    among = q if K == 1 else q + q * ((q / (1 - q)).sum() - q / (1 - q))  # r_e; adds up to K
    over = np.maximum(np.arange(S + 1) - C, 0) / (K * S)  # share dropped by one expert for each load
    chance = binom.pmf(np.arange(S + 1)[:, None], S, among)  # [S+1, E]
    mean = over @ chance  # [E]
    # A token that goes to one expert does not go to another: covariances are negative, the sum of variances a bound.
    return mean.sum(), np.sqrt((over**2 @ chance - mean**2).clip(0).sum())


def measured(q, moe, S, slots, key):
    """Shares of dropped choices [factors, groups]."""
    logits = jnp.log(q) + jax.random.gumbel(key, (GROUPS, S, E))  # [G, S, E]
    routing = route(logits, moe)
    dropped = jax.vmap(lambda C: (~assign(routing, moe, C).kept).sum((-2, -1)))(slots)  # [factors, G]
    return dropped / (moe.top_k * S)


fig, axes = plt.subplots(2, 2, figsize=(10, 6.4), sharex=True, sharey=True)
worst = {}
for row, K in enumerate((1, 2)):
    for column, S in enumerate((64, 1024)):
        ax, moe = axes[row, column], MoEConfig(experts=E, top_k=K, min_capacity=1)
        C = [capacity(moe, S, f) for f in FACTORS]
        for n, (name, q) in enumerate(SHARES.items()):
            run = jax.jit(measured, static_argnames=("moe", "S"))
            share = np.asarray(run(jnp.asarray(q, jnp.float32), moe, S, jnp.asarray(C), jax.random.key(10 * K + n)))
            exact, spread = np.array([expected(q, K, S, c) for c in C]).T
            error = spread / np.sqrt(GROUPS) + 1e-6  # 1e-6: measured in float32
            worst[name, K, S] = np.abs((share.mean(1) - exact) / error).max()
            ax.fill_between(FACTORS, *np.quantile(share, [0.05, 0.95], axis=1), color=COLORS[(0, 5)[n]], alpha=0.25, lw=0)
            ax.plot(FACTORS, share.mean(1), "os"[n], color=COLORS[(0, 5)[n]], markersize=5)
            ax.plot(FACTORS, exact, ("-", "--")[n], color="black", lw=1.2)
        ax.set_title(f"K={K}, groups of S={S} tokens")
        ax.grid(axis="y", color="#E4E4E4")
axes[0, 0].legend(
    handles=[
        Line2D([], [], marker="o", ls="", color=COLORS[0], label="uniform router, measured"),
        Line2D([], [], color="black", label="uniform router, exact"),
        Line2D([], [], marker="s", ls="", color=COLORS[5], label="skewed router, measured"),
        Line2D([], [], ls="--", color="black", label="skewed router, exact"),
    ]
)
axes[0, 0].yaxis.set_major_formatter("{x:.0%}")
axes[0, 0].set(ylim=(0, None), xlim=(0, 4.1))
for ax in axes[1]:
    ax.set_xlabel("capacity factor f")
for ax in axes[:, 0]:
    ax.set_ylabel("choices dropped")

assert max(worst.values()) < 4, worst  # the largest of 128 comparisons
for (name, K, S), z in worst.items():
    print(f"{name:8} K={K} S={S:<5} largest difference: {z:.1f} standard errors")

# %% [markdown]
# The error is a bound on the standard error, so the agreement is a little better than it looks.
#
# Two lessons. Below `f = 1` choices must be lost: about `1 - f` of them have no slot. Above it, a *uniform*
# router loses less the larger the group is, as chance evens out; small groups need a larger `f` because of chance alone.
# A *skewed* router loses a large share at any useful `f`, and larger groups hardly help. The next part helps.

# %% [markdown]
# ## 5. The balance loss
#
# `L = E sum_i f_i P_i`, where `f_i` is the share of choices that expert `i` got and `P_i` is its mean probability.
# It is 1 when both are even, for every `K`. When all tokens choose the same `K` experts and no others, it is `E / K`.
# (1 is not a strict minimum: `f` and `P` are not the same average, and the loss can dip below 1 by a little.)

# %%
@functools.partial(jax.jit, static_argnames="moe")
def statistics(logits, moe):
    """Balance statistics of one dropless group."""
    routing = route(logits, moe)
    return balance.statistics(routing, assign(routing, moe, slots=logits.shape[-2]), moe)


T, E = 64, 8
even = np.stack([np.roll(np.arange(E, 0, -1) / E, t) for t in range(T)])  # token t likes experts t, t+1, ... (mod E)
print(" K   even load   collapse   E/K")
for K in (1, 2, 3, 4, 8):
    moe = MoEConfig(experts=E, top_k=K)
    collapse = np.where(np.arange(E) < K, 30.0, 0.0)[None].repeat(T, 0)  # everyone wants the first K
    at_even, at_collapse = (float(balance.balance_loss(statistics(jnp.asarray(l), moe), moe)) for l in (even, collapse))
    print(f"{K:2} {at_even:11.6f} {at_collapse:10.6f} {E / K:5.2f}")
    np.testing.assert_allclose([at_even, at_collapse], [1, E / K], rtol=1e-5)

# %% [markdown]
# `f` is a count and has no gradient; the gradient flows through `P`. It lowers the logits of experts with more than
# their share and raises those of the others. Below, a router that starts skewed follows this gradient alone,
# without any other loss.

# %%
D, T, E, STEPS = 16, 1024, 8, 160
rng = np.random.default_rng(1)
common = 1.5 * rng.normal(size=D) / np.sqrt(D)  # what all tokens have in common
x = jnp.asarray(rng.normal(size=(T, D)) + common, jnp.float32)  # [T, D]
router = rng.normal(size=(D, E)) * 0.3 + np.outer(common, np.linspace(2.0, -1.5, E))
router = jnp.asarray(router, jnp.float32)  # [D, E]; the first expert is popular, the last is not
moe = MoEConfig(experts=E, top_k=2)


def loss(router):
    stats = statistics(x @ router, moe)
    return balance.balance_loss(stats, moe), stats.load


@jax.jit
def descend(router):
    (value, load), slope = jax.value_and_grad(loss, has_aux=True)(router)
    return router - slope, value, load


# The push on one logit: up to a small second-order term, overloaded experts go down.
slope = np.asarray(jax.grad(lambda l: balance.balance_loss(statistics(l, moe), moe))(x @ router)).sum(0)  # [E]
load = np.asarray(loss(router)[1])
assert slope[load.argmax()] > 0 > slope[load.argmin()]

loads, losses = [], []
for _ in range(STEPS + 1):
    router, value, load = descend(router)
    loads.append(np.asarray(load) / (T * moe.top_k / E))  # 1 = the fair share
    losses.append(float(value))
loads = np.array(loads)

fig, (left, right) = plt.subplots(1, 2, figsize=(10, 3.8), width_ratios=(1.5, 1))
for e in range(E):
    style = dict(color=COLORS[e], marker="os^Dv<>P"[e], markevery=(2 * e, 20), markersize=5)
    left.plot(loads[:, e], **style, label=f"expert {e}")
left.axhline(1, color="black", lw=1, ls="--")
left.text(STEPS, 1.07, "fair share", ha="right", va="bottom", fontsize=9)
left.set(xlabel="step of gradient descent", ylabel="load / fair share", ylim=(0, None), title="load of each expert")
left.legend(ncols=2, fontsize=8.5)
right.plot(losses, color=COLORS[0], lw=2)
right.axhline(1, color="black", lw=1, ls="--")
right.set(xlabel="step of gradient descent", ylabel="balance loss", title="balance loss (1 = even)")

before, after = loads[0].max(), loads[-1].max()
assert before > 2 and after < 1.1 and loads[-1].min() > 0.9, (before, after, loads[-1])
print(f"largest load / fair share: {before:.2f} -> {after:.2f}; balance loss {losses[0]:.3f} -> {losses[-1]:.3f}")

# %% [markdown]
# The least popular experts come back last: the gradient on a logit is proportional to its probability, which is small
# for them. A collapsed router is slow to mend, so the loss should be there from the first step.
#
# ## 6. One MoE layer in your own model
#
# `MoELayer` is a Flax NNX module. It takes `[B, L, D]` and returns `[B, L, D]` and the statistics from above. Nothing
# else of the library is needed:

# %%
MOE = MoEConfig(experts=8, top_k=2, d_ff=64, capacity_factor=1.25)


class Model(nnx.Module):
    def __init__(self, sharding: Rules | None, rngs: nnx.Rngs):
        self.before = nnx.Linear(16, 32, rngs=rngs)
        self.moe = MoELayer(MOE, d_model=32, rules=sharding, rngs=rngs)
        self.after = nnx.Linear(32, 16, rngs=rngs)

    def __call__(self, x):  # [B, L, 16]
        h = self.before(x)
        y, stats = self.moe(h, train=True)  # train: at the training capacity; evaluation is dropless
        return self.after(h + y), stats


x = jax.random.normal(jax.random.key(1), (16, 32, 16))  # [B, L, 16]
one, one_stats = nnx.jit(lambda model, x: model(x))(Model(None, nnx.Rngs(params=0)), x)
print(f"{one.shape}, kept {int(one_stats.kept)} of {int(one_stats.routed)} choices on one device")

# %% [markdown]
# With `Rules` instead of `None` the same layer runs on a mesh. Here the 8 devices are two copies (`data=2`) of four
# that share the 8 experts (`expert=4`), two experts each. The batch is split over all eight. Tokens must then travel
# to the device of their expert and back: two all-to-alls, and the text of the compiled program shows that there are
# no more.

# %%
places, table = mesh.build_mesh(MeshConfig(data=2, expert=4), devices), Rules()
graph, state = nnx.split(Model(table, nnx.Rngs(params=0)))


def shard(path, leaf):
    """The library's parameters name their axes; those of `nnx.Linear` do not, and are copied to all devices."""
    return rules.sharding(places, table.layout(*leaf.get_metadata().get("axes", ())))


with jax.set_mesh(places):
    state = jax.device_put(state, nnx.map_state(shard, state))
    batch = jax.device_put(x, rules.sharding(places, table.layout("batch")))
    program = jax.jit(lambda state, x: nnx.merge(graph, state)(x)).lower(state, batch).compile()
    many, many_stats = program(state, batch)

difference = float(np.abs(np.asarray(many) - np.asarray(one)).max())
exchanges = len(re.findall(r" all-to-all(?:-start)?\(", program.as_text()))
print(f"all-to-alls: {exchanges}; largest difference from one device: {difference:.1e}")
print(f"an expert matrix {state['moe']['experts']['w_up'].shape} lies as {state['moe']['experts']['w_up'].sharding.spec}")
assert exchanges == 2
assert difference < 1e-5
for a, b in ((one_stats.load, many_stats.load), (one_stats.kept, many_stats.kept)):
    np.testing.assert_array_equal(a, b)

# %% [markdown]
# The numbers agree, the counts are the same integers, and the experts stay where they are: only tokens move.
