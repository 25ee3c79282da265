# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Watch the all-to-all
#
# In a sharded mixture of experts, tokens and experts live on different devices. A token must travel to the device of
# its expert, and its result must travel home. Both ways are one **all-to-all**: an operation in which every device
# sends a different piece to every other one. This notebook follows 16 tokens through 4 devices and 8 experts, first by
# hand and then in the program that the compiler makes. Every claim ends in an `assert`. It runs on a CPU in less than
# a minute.
#
# The letters: `T` tokens of a device, `G` groups of `S` tokens, `E` experts, `K` choices of a token, `C` slots of an
# expert in a group, `D` width of a token, `F` hidden width of an expert, `n` devices.
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
from functools import partial

import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
from flax import nnx
from matplotlib.patches import Rectangle

from moe_jax import MoEConfig, MoELayer, RouterConfig, Rules, place
from moe_jax.capacity import assign, capacity
from moe_jax.collectives import read
from moe_jax.dispatch import einsum_combine, einsum_dispatch, einsum_plan
from moe_jax.exchange import move, ragged
from moe_jax.routing import route
from moe_jax.rules import constrain, sharding, spec

# Devices 0 to 3 in colours of Okabe and Ito, which colour-blind readers can tell apart; pale below text.
COLORS = ["#0072B2", "#E69F00", "#009E73", "#CC79A7"]
PALE = ["#A9CFE5", "#F7DCA5", "#A5DBCC", "#EBCCDD"]
INK, GREY = "#222222", "#999999"
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
# ## 1. Who holds what
#
# 16 tokens have the names `a` to `p`. Four lie on each device, and they are its group: `n = G = 4`, `S = T = 4`. The 8
# experts are split too, two to a device: experts 0 and 1 on device 0, and so on.
#
# Which token wants which expert is fixed here, so that we can check everything by eye. A token has `D = 8` numbers, as
# many as there are experts, with a large one at the place of its expert. The router's matrix is the identity, so these
# numbers are the logits.

# %%
WANTS = np.array(  # expert of each token: one row for each device
    [
        [6, 2, 2, 1],  # a b c d
        [4, 3, 4, 7],  # e f g h
        [0, 1, 0, 7],  # i j k l
        [0, 3, 5, 6],  # m n o p
    ]
)
NAMES = np.array(list("abcdefghijklmnop")).reshape(4, 4)
n, S, E, D, F = 4, 4, 8, 8, 8

tokens = 3.0 * np.eye(E)[WANTS] + 0.1 * np.random.default_rng(0).normal(size=(n, S, D))  # [G, S, D]
tokens = tokens.astype(np.float32)

MOE = MoEConfig(experts=E, top_k=1, d_ff=F, capacity_factor=4.0, min_capacity=1, router=RouterConfig(kind="switch"))
C = capacity(MOE, S, MOE.capacity_factor)
assert C == np.ceil(MOE.top_k * S * MOE.capacity_factor / E) == 2
print(f"each of {E} experts has C = {C} slots for each of {n} groups of S = {S} tokens")

# %% [markdown]
# The mesh has one axis of 4 devices, `expert`. The library's table of rules says which dimension of an array is split
# over which axis. Between tokens and experts stands one array, the **dispatch buffers** `[E, G, C, D]`: row `e` of it
# is what expert `e` gets, and column `g` comes from group `g`. The rules derive two layouts for it:
#
# - **token-major**: a device holds the columns of its own tokens. It can fill them without asking anyone.
# - **expert-major**: a device holds the rows of its own experts. It can work on them without asking anyone.
#
# `owner` below does not trust the rules. It asks JAX's arrays for their shards, and the picture is drawn from that.

# %%
rules = Rules()
number = {device: i for i, device in enumerate(mesh.devices.flat)}


def owner(x: jax.Array) -> np.ndarray:
    """The number of the device that holds each element of `x`. Nothing may be held twice."""
    out = np.full(x.shape, -1)
    for shard in x.addressable_shards:
        assert (out[shard.index] == -1).all(), "held by several devices"
        out[shard.index] = number[shard.device]
    assert (out >= 0).all()
    return out


layer = MoELayer(MOE, d_model=D, ffn="relu", rules=rules, rngs=nnx.Rngs(params=0))
layer.router[...] = jnp.eye(E)
place(layer, mesh, rules)  # each expert onto its device

x = jax.device_put(tokens, sharding(mesh, rules.layout("batch", "length", "act_embed")))  # [G, S, D]
empty = jnp.zeros((E, n, C, D))
holders = {
    "tokens": ("group g", "token s", x),
    "expert weights": ("expert e", "row d of its matrix", layer.experts.w_up[...]),
    "buffers, token-major": ("expert e", "group g", jax.device_put(empty, sharding(mesh, rules.token_major))),
    "buffers, expert-major": ("expert e", "group g", jax.device_put(empty, sharding(mesh, rules.expert_major))),
}


def cell(ax, column, row, device, text, **kw):
    """A box of the colour of its device."""
    ax.add_patch(Rectangle((column - 0.5, row - 0.5), 1, 1, facecolor=PALE[device], edgecolor="white", lw=1.5))
    ax.text(column, row, text, ha="center", va="center", color=INK, **kw)


def grid(ax, columns, rows):
    """Axes of rows and columns of boxes."""
    ax.set(xlim=(-0.6, columns - 0.4), ylim=(rows - 0.4, -0.6), xticks=range(columns), yticks=range(rows))
    ax.set_aspect("equal")
    ax.spines[["left", "bottom"]].set_visible(False)
    ax.tick_params(length=0)


fig, axes = plt.subplots(1, 4, figsize=(12, 4), width_ratios=(4, 8, 4, 4))
held_by = {}
for ax, (title, (down, across, array)) in zip(axes, holders.items()):
    held = held_by[title] = owner(array).reshape(*array.shape[:2], -1)[..., 0]  # of the first two dimensions
    for (row, column), device in np.ndenumerate(held):
        cell(ax, column, row, device, str(device), fontsize=9)
    grid(ax, held.shape[1], held.shape[0])
    ax.set(title=title, ylabel=down, xlabel=across)
fig.suptitle("the number in a box is the device that holds it", fontsize=10)

np.testing.assert_array_equal(held_by["tokens"], np.arange(n)[:, None].repeat(S, 1))
np.testing.assert_array_equal(held_by["expert weights"], np.arange(E)[:, None].repeat(D, 1) // (E // n))
np.testing.assert_array_equal(held_by["buffers, token-major"], np.arange(n)[None].repeat(E, 0))
np.testing.assert_array_equal(held_by["buffers, expert-major"], np.arange(E)[:, None].repeat(n, 1) // (E // n))
print("tokens and token-major buffers are split by group, experts and expert-major buffers by expert")

# %% [markdown]
# ## 2. By hand
#
# ### Who sends how many tokens to whom
#
# Device 0 has tokens for experts 6, 2, 2 and 1, which live on devices 3, 1, 1 and 0. So it sends `[1, 2, 0, 1]` tokens
# to devices 0 to 3 (the one for device 0 stays where it is). The table below is written by hand. The library's router
# makes the same one.

# %%
SEND = np.array(  # row i: how many tokens device i sends to devices 0, 1, 2, 3
    [
        [1, 2, 0, 1],
        [0, 1, 2, 1],
        [3, 0, 0, 1],
        [1, 1, 1, 1],
    ]
)
routing = route(x @ jnp.eye(E), MOE)
np.testing.assert_array_equal(routing.expert[..., 0], WANTS)
goes = np.asarray(routing.expert)[..., 0] // (E // n)  # [G, S], the device of each token's expert
for i in range(n):
    np.testing.assert_array_equal(np.bincount(goes[i], minlength=n), SEND[i])
gate = np.asarray(routing.gate)[..., 0]  # [G, S]
np.testing.assert_allclose(gate, np.exp(tokens).max(-1) / np.exp(tokens).sum(-1), rtol=1e-5)
print(f"the router's choices make the table; gates lie between {gate.min():.2f} and {gate.max():.2f}")

# %% [markdown]
# We shall follow one token, `c`: it lives on device 0 and wants expert 2, which lives on device 1.

# %%
MARKED = (0, 2)  # device and place of the token that we follow
assert NAMES[MARKED] == "c" and WANTS[MARKED] == 2 and goes[MARKED] == 1

# The order on arrival, by hand: by sender, and the tokens of a sender by expert.
by_expert = [(i, int(s)) for i in range(n) for s in np.argsort(WANTS[i], kind="stable")]
lands = {j: [home for home in by_expert if goes[home] == j] for j in range(n)}

fig, (left, right) = plt.subplots(1, 2, figsize=(10, 4.6), width_ratios=(1, 1.5))
for (i, j), count in np.ndenumerate(SEND):
    cell(left, j, i, i, str(count), fontsize=13)
for k in range(n):
    left.text(n - 0.3, k, f"{SEND[k].sum()} sent", va="center", fontsize=9)
    left.text(k, n - 0.3, f"{SEND[:, k].sum()}\nreceived", ha="center", va="center", fontsize=9)
grid(left, n, n)
left.set(title="tokens that device i sends to device j", ylabel="from device i", xlabel="to device j")
left.set(xlim=(-0.6, n + 0.4), ylim=(n, -0.6))

height = 6  # boxes between two devices
for i in range(n):
    for s in range(S):
        y = height * i + s
        right.add_patch(Rectangle((0, y - 0.45), 0.5, 0.9, facecolor=PALE[i], edgecolor="white"))
        right.text(0.25, y, f"{NAMES[i, s]} → {WANTS[i, s]}", ha="center", va="center", fontsize=9)
    for slot, (home, s) in enumerate(lands[i]):
        y, marked = height * i + slot, (home, s) == MARKED
        right.add_patch(Rectangle((2.5, y - 0.45), 0.5, 0.9, facecolor=PALE[home], edgecolor="white"))
        right.text(2.75, y, f"{NAMES[home, s]} → {WANTS[home, s]}", ha="center", va="center", fontsize=9)
        line = dict(color=INK, lw=2.5, zorder=3) if marked else dict(color=COLORS[home], lw=1.2)
        right.plot([0.52, 2.48], [height * home + s, y], **line)
    right.text(-0.1, height * i + 1.5, f"device {i}", ha="right", va="center")
    right.text(3.1, height * i + 1.5, f"device {i}\nexperts {2 * i}, {2 * i + 1}", ha="left", va="center")
right.set(xlim=(-0.8, 4.1), ylim=(height * n - 1, -1), title="token → expert; the black line is token c")
right.set_axis_off()
assert [[SEND[i, j] for i in range(n)] for j in range(n)] == [
    [sum(home == i for home, _ in lands[j]) for i in range(n)] for j in range(n)
]

# %% [markdown]
# ### The smallest all-to-all
#
# Before devices exchange tokens of a number that varies, they tell one another how many will come. Each device has a
# row of the table, one number for each device. `lax.all_to_all` sends number `j` of a row to device `j`. Afterwards
# device `j` has a column of the table: the exchange is a transpose. This is all that an all-to-all does; with tokens
# in place of numbers, the same holds.

# %%
by_device = spec((("expert",),))


def on_each(function):
    """`function` run by every device on its own part [1, ...] of the arguments."""
    return jax.jit(jax.shard_map(function, mesh=mesh, in_specs=by_device, out_specs=by_device))


tell = on_each(lambda row: jax.lax.all_to_all(row, "expert", split_axis=1, concat_axis=1, tiled=True))
told = tell(jnp.asarray(SEND))
assert (owner(told) == np.arange(n)[:, None]).all()  # a row lies on its device, before and after
np.testing.assert_array_equal(told, SEND.T)
for i in range(n):
    print(f"device {i} sends {SEND[i]} and learns that {np.asarray(told)[i]} will come")

# %% [markdown]
# ### Into the slots
#
# The compiler wants arrays of fixed sizes, so the usual exchange sends buffers with `C` slots for each pair of expert
# and group, full or not. The library gives each token a slot (`assign`) and puts it there (`einsum_dispatch`).
# Everything stays on the token's own device. Then comes the all-to-all (`move`): inside, the same `lax.all_to_all` as
# above.

# %%
with jax.set_mesh(mesh):

    @jax.jit
    def dispatch(x):
        """Tokens [G, S, D] -> buffers [E, G, C, D], on the devices of the tokens."""
        routing = route(x @ jnp.eye(E), MOE)
        slots = assign(routing, MOE, C)
        plan = einsum_plan(routing, slots, C, x.dtype)
        return constrain(einsum_dispatch(x, plan), rules.token_major), plan, slots

    at_home, plan, slots = dispatch(x)
    at_experts = jax.jit(partial(move, rules=rules, kind="shard_map", home=False))(at_home)

assert slots.kept.all(), "no token is dropped"


def token_in(row):
    """The name of the token with these numbers; empty for an empty slot."""
    if not row.any():
        return ""
    (found,) = np.argwhere((tokens == row).all(-1))
    return NAMES[tuple(found)]


def names_in(buffers):
    """Buffers [E, G, C, D] -> the names in their slots [E, G, C]."""
    return np.apply_along_axis(token_in, -1, np.asarray(buffers))


fig, axes = plt.subplots(1, 2, figsize=(10, 4.8))
for ax, buffers, title in zip(axes, (at_home, at_experts), ("before: token-major", "after: expert-major")):
    held, names = owner(buffers)[..., 0], names_in(buffers)  # [E, G, C]
    for (e, g, c), name in np.ndenumerate(names):
        cell(ax, C * g + c, e, held[e, g, c], name, fontsize=12)
        if name == NAMES[MARKED]:
            ax.plot(C * g + c, e, "o", markersize=20, markerfacecolor="none", markeredgecolor=INK, markeredgewidth=2)
    grid(ax, C * n, E)
    ax.set_xticks(range(C * n), [f"{g}.{c}" for g in range(n) for c in range(C)])
    ax.set(title=f"buffers {title}", xlabel="group.slot", ylabel="expert")
handles = [Rectangle((0, 0), 1, 1, facecolor=PALE[i], label=f"on device {i}") for i in range(n)]
fig.legend(handles=handles, loc="outside lower center", ncols=4)

np.testing.assert_array_equal(at_home, at_experts)  # the same array ...
moved = owner(at_home) != owner(at_experts)  # ... in other hands
assert moved.mean() == (n - 1) / n
print(f"the array is the same; {moved.mean():.0%} of its slots changed hands")

# %% [markdown]
# This is the whole secret: **the all-to-all does not change the array, it changes who holds it.** The columns had a
# colour before, the rows have one after. One slot in `n` stays where it is.
#
# Now every slot is checked against the table: a token of group `g` that wants expert `e` must lie in row `e`, column
# `g`, on device `e // 2`, in the first free slot; and no other slot may hold anything.

# %%
names, held = names_in(at_experts), owner(at_experts)[..., 0]
for e in range(E):
    for g in range(n):
        queue = [NAMES[g, s] for s in range(S) if WANTS[g, s] == e]
        assert list(names[e, g]) == queue + [""] * (C - len(queue))
        assert (held[e, g] == e // (E // n)).all()
for j in range(n):  # the tokens on device j are those that the table sends to it
    mine = names[held == j]
    assert sorted(mine[mine != ""]) == sorted(NAMES[home] for home in lands[j])
    assert (mine != "").sum() == SEND[:, j].sum()
print(f"all {names.size} slots are right: {(names != '').sum()} tokens, {(names == '').sum()} empty")

# %% [markdown]
# ### Through the expert and home again
#
# So that every result can be recognised, expert `e` multiplies its tokens by `e + 1`. The second all-to-all brings the
# slots home, and `einsum_combine` takes each token's result out of its slot and multiplies it by the gate. If any
# token had been swapped, the result would be wrong.

# %%
with jax.set_mesh(mesh):
    factor = jax.device_put(jnp.arange(1.0, E + 1), sharding(mesh, (rules.experts,)))  # [E], each at its expert
    worked = jax.jit(lambda b: constrain(b * factor[:, None, None, None], rules.expert_major))(at_experts)
    back = jax.jit(partial(move, rules=rules, kind="shard_map", home=True))(worked)
    result = jax.jit(lambda b: constrain(einsum_combine(b, plan), (rules.groups, (), ())))(back)  # [G, S, D]

np.testing.assert_array_equal(owner(worked), owner(at_experts))
np.testing.assert_array_equal(owner(back), owner(at_home))
np.testing.assert_array_equal(owner(result), owner(x))
np.testing.assert_allclose(result, gate[..., None] * (WANTS[..., None] + 1) * tokens, rtol=1e-5)
print("every token is back on its device, in its place, with the result of its own expert")

# %% [markdown]
# And token `c`, step by step. `find` looks for its numbers in the parts that the devices really hold.

# %%
def find(x: jax.Array, row: np.ndarray) -> tuple[int, tuple[int, ...]]:
    """The device that holds `row`, and where in the whole array; it must be in one place only."""
    found = []
    for shard in x.addressable_shards:
        start = [part.start or 0 for part in shard.index[:-1]]
        for place in np.argwhere(np.isclose(np.asarray(shard.data), row, rtol=1e-5, atol=0).all(-1)):
            found.append((number[shard.device], tuple(int(a + b) for a, b in zip(start, place))))
    (only,) = found
    return only


def journey(home):
    """Where a token is at each step: (what happened, device, place in the array)."""
    row, scale = tokens[home], WANTS[home] + 1
    steps = {
        "at home": (x, row),
        "in its slot": (at_home, row),
        "sent": (at_experts, row),
        "worked on": (worked, scale * row),
        "sent back": (back, scale * row),
        "combined": (result, gate[home] * scale * row),
    }
    return [(name, *find(*where)) for name, where in steps.items()]


steps = journey(MARKED)
for name, device, at in steps:
    kind = "group {}, token {}" if len(at) == 2 else "expert {}, group {}, slot {}"
    print(f"{name:12} on device {device}: {kind.format(*at)}")
assert [device for _, device, _ in steps] == [0, 0, 1, 1, 0, 0]
assert steps[1][2] == steps[2][2] == steps[3][2] == steps[4][2] == (2, 0, 1), "the slot never changes"
assert steps[0][2] == steps[-1][2] == MARKED

fig, ax = plt.subplots(figsize=(9, 4))
for home in np.ndindex(n, S):
    path = [device for _, device, _ in journey(home)]
    assert path == [home[0], home[0], goes[home], goes[home], home[0], home[0]]
    at_home_y = home[0] + 0.17 * (home[1] - 1.5)  # beside the other tokens of the device, at home and away
    away_y = goes[home] + 0.17 * (lands[goes[home]].index(home) - (len(lands[goes[home]]) - 1) / 2)
    style = dict(color=INK, lw=3, marker="o", zorder=3) if home == MARKED else dict(color=COLORS[home[0]], lw=1.3)
    ax.plot([at_home_y, at_home_y, away_y, away_y, at_home_y, at_home_y], **style)
    for edge, side in ((-0.06, "right"), (5.06, "left")):
        weight = "bold" if home == MARKED else "normal"
        ax.text(edge, at_home_y, NAMES[home], ha=side, va="center", fontsize=9, weight=weight)
for i in range(n - 1):
    ax.axhline(i + 0.5, color=GREY, lw=0.6, ls=":", zorder=0)
for begin in (1, 3):
    ax.axvspan(begin, begin + 1, color="#F0F0F0", zorder=-1)
    ax.text(begin + 0.5, -0.58, "all-to-all", ha="center", va="center", fontsize=9)
ax.set_xticks(range(6), [name for name, _, _ in steps])
ax.set(yticks=range(n), ylim=(n - 0.5, -0.72), xlim=(-0.3, 5.3), ylabel="device", title="the way of the 16 tokens")
print("all 16 tokens go to the device of their expert and come home")

# %% [markdown]
# ### Only what is needed: the ragged all-to-all
#
# Three quarters of the slots above were empty, and they travelled like the full ones. `lax.ragged_all_to_all` sends as
# many rows as there are: device 0 sends exactly `[1, 2, 0, 1]`. A device says where its rows for each other one begin,
# how many they are, and where they go there. GPUs and TPUs have this operation. A CPU does not, and
# `moe_jax.exchange.ragged` gives the same result there, with padding.

# %%
sizes = jnp.asarray(SEND, jnp.int32)  # [n, n]; row i belongs to device i, as in all of these
came = sizes.T  # what devices have told one another
starts = jnp.cumsum(sizes, 1) - sizes  # where the rows for j begin on i
targets = jnp.cumsum(sizes, 0) - sizes  # where the rows of i begin on j
busiest = int(SEND.sum(0).max())  # rows that the busiest device receives


def send(room):
    """Sends rows of tokens to the others. Each device has room for so many, and zeros after the last that came."""

    def one(x, starts, sizes, targets, came):  # of this device: [1, rows, D], and four times [1, n]
        table = (a[0] for a in (starts, sizes, targets, came))
        return ragged(x[0], room, *table, axes=("expert",), most=S)[None]

    return on_each(one)


order = np.argsort(WANTS, axis=1, kind="stable")  # [n, S], tokens by expert
sorted_tokens = jax.device_put(np.take_along_axis(tokens, order[..., None], 1), x.sharding)
there = send(busiest)(sorted_tokens, starts, sizes, targets, came)  # [n, 5, D]
again = send(S)(there, jnp.cumsum(came, 1) - came, came, starts.T, sizes)  # [n, S, D]

for j in range(n):
    want = [NAMES[home] for home in lands[j]]
    got = [token_in(row) for row in np.asarray(there)[j]]
    assert got == want + [""] * (busiest - len(want)), (got, want)
    print(f"device {j} received {' '.join(want)}")
np.testing.assert_array_equal(again, sorted_tokens)
np.testing.assert_array_equal(owner(again), owner(sorted_tokens))
np.testing.assert_array_equal(np.take_along_axis(np.asarray(again), np.argsort(order, 1)[..., None], 1), tokens)

row = D * tokens.itemsize  # bytes of a token
travelled = SEND.sum() - np.trace(SEND)
assert (names == "").mean() == 3 / 4 and SEND[0].tolist() == [1, 2, 0, 1]
slots_sent = (n - 1) * (E // n) * C  # of a device, to the others
print(f"home in order. {travelled} tokens crossed between devices, {travelled * row} bytes in all;")
print(f"the buffers take {n * slots_sent} slots across, {n * slots_sent * row} bytes, whatever the routing is")

# %% [markdown]
# ## 3. The compiler does it alone
#
# In the layer nobody calls an all-to-all. `MoELayer` states the two layouts of the buffers, token-major and then
# expert-major, and the compiler finds out that one all-to-all leads from the first to the second. The same 16 tokens
# go through the real layer:

# %%
with jax.set_mesh(mesh):
    y, stats, record = nnx.jit(lambda layer, x: layer(x, train=True, record=True))(layer, x)

np.testing.assert_array_equal(record.expert[..., 0], WANTS)
np.testing.assert_allclose(record.gate[..., 0], gate, rtol=1e-6)
up, down = (np.asarray(w[...], np.float64)[WANTS] for w in (layer.experts.w_up, layer.experts.w_down))  # [G, S, ...]
hidden = np.maximum(np.einsum("gsd,gsdf->gsf", tokens, up), 0)
want = gate[..., None] * np.einsum("gsf,gsfd->gsd", hidden, down)
np.testing.assert_allclose(y, want, atol=1e-5 * np.abs(want).max())
print(f"experts, gates and outputs are those by hand; kept {int(stats.kept)} of {int(stats.routed)} choices")

# %% [markdown]
# `moe_jax.collectives.read` reads the operations between devices, the **collectives**, out of the text of a compiled
# program: what they are, in which phase and module they stand, and how many bytes a device sends for each.
#
# We know what to expect. By hand a device sent slots of `2 experts x 2 slots` to each of 3 others. In letters this is
# `f*K*T*D*b*(n-1)/n` bytes each way, with capacity factor `f` and `b` bytes a number. One way to the experts, one way
# home, and both again in the backward pass, for gradients travel the same ways in the opposite direction.

# %%
def collectives(layer, mesh, x, wrt=None):
    """What the compiled layer sends: forward, or also backward, with gradients of the weights (0) and tokens (1)."""
    graph, weights = nnx.split(layer)

    def forward(weights, x):
        return nnx.merge(graph, weights)(x, train=True)[0]

    def loss(weights, x):
        return (forward(weights, x) ** 2).sum()

    program = jax.jit(forward if wrt is None else jax.value_and_grad(loss, argnums=wrt))
    with jax.set_mesh(mesh):
        return read(program.lower(weights, x).compile().as_text(), mesh)


def show(found):
    for c in found:
        print(f"{c.op:11} {c.phase:17} {'+'.join(c.modules):14} {c.moved:5} bytes sent")


forward, both = collectives(layer, mesh, x), collectives(layer, mesh, x, wrt=(0, 1))
show(both)

f, K, T, b = MOE.capacity_factor, MOE.top_k, S, 4
least = f * K * T * D * b * (n - 1) / n
assert least == slots_sent * row, "the formula is the count by hand"
trips = [[c for c in found if c.op == "all-to-all"] for found in (forward, both)]
assert [len(found) for found in trips] == [2, 4]
assert all(c.moved == least and c.axes == ("expert",) for found in trips for c in found)
(rest,) = [c for c in both if c.op != "all-to-all"]
assert len(forward) == 2 and rest.op == "all-reduce" and rest.bytes == b * (D * E + 1)  # the router, and the loss
print(f"all-to-alls: {len(trips[0])} forward, {len(trips[1])} forward and backward, each {least:.0f} bytes: the least")

# %% [markdown]
# The all-reduce is not part of the exchange: all devices have a copy of the router, and its gradients are added up,
# and with them the loss.
#
# ## 4. Exercises
#
# Find the answer on paper first. The next cell computes it.
#
# 1. **A full expert.** All four tokens of device 2 want expert 0. What is row 2 of `SEND` then? How many of the four
#    tokens find no slot, and how many bytes does the all-to-all send?
# 2. **Fewer devices for the experts.** The mesh is `data=2, expert=2`: two copies of the 8 experts, each spread over
#    two devices. A device still has 4 tokens. How many bytes does it send each way?
# 3. **A missing trip.** Take gradients of the weights alone, not of the tokens. How many all-to-alls are left of the
#    four, and which one is gone?

# %%
# 1. Two tokens find no slot. The buffers have a fixed size, so the bytes do not change.
crowded = jnp.asarray(np.where(np.arange(n)[:, None] == 2, 0, WANTS))
crowd = route(3.0 * jax.nn.one_hot(crowded, E), MOE)
kept = np.asarray(assign(crowd, MOE, C).kept)[..., 0]  # [G, S]
sends = np.bincount(np.asarray(crowd.expert)[2, :, 0] // (E // n), minlength=n)
print(f"1. device 2 sends {sends}, {(~kept[2]).sum()} of {S} tokens find no slot; {slots_sent * row} bytes as before")
assert sends.tolist() == [4, 0, 0, 0] and kept[2].tolist() == [True, True, False, False] and kept[[0, 1, 3]].all()

# 2. The same buffers, of which one half and not three quarters leave the device.
halves = build_mesh(MeshConfig(data=2, expert=2), devices)
other = MoELayer(MOE, d_model=D, ffn="relu", rules=rules, rngs=nnx.Rngs(params=0))
place(other, halves, rules)
split = jax.device_put(tokens, sharding(halves, rules.layout("batch", "length", "act_embed")))
there, home = [c for c in collectives(other, halves, split) if c.op == "all-to-all"]
print(f"2. {there.moved} bytes each way, over the axis {there.axes}")
assert there.moved == home.moved == f * K * S * D * b * (2 - 1) / 2 and there.axes == home.axes == ("expert",)

# 3. The way of gradients to the tokens: nobody asked for them.
alone = [(c.phase, *c.modules) for c in collectives(layer, mesh, x, wrt=0) if c.op == "all-to-all"]
(gone,) = {(c.phase, *c.modules) for c in trips[1]} - set(alone)
print(f"3. {len(alone)} all-to-alls; the one of {gone} is gone")
assert len(alone) == 3 and gone == ("backward", "dispatch")

# %% [markdown]
# Inside a model the fourth trip is always there, for the layers below need the gradient of their outputs. Next:
# `03b_a_wrong_rule.ipynb` breaks the layouts, and lets the library find out.
