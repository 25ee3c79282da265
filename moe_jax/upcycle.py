"""Upcycling: the weights of a dense model become those of a mixture of experts. Pure functions on parameter trees.

The dense feed-forward layer y(x) is cut along its hidden width into slices that add up to it: y = f_0 + f_1 + ...
exactly. `copy` makes one slice of it, so that every expert is the dense layer (Komatsuzaki et al. 2022, Sparse
Upcycling). `split` makes d_ff / moe.d_ff of them: the first ones become the shared experts, if there are any (always-
active slices as in CMoE, Pei et al. 2025), the other G are spread over R = E/G virtual groups (He et al. 2024,
Upcycling Large Language Models into Mixture of Experts). Expert r*G + g holds slice g in group r.

The experts of a group share one column of the router, and so one logit: the K best are K/G whole groups, each of
which adds up to y. Their gates are equal within a group, so the layer returns y times (sum of the K gates) / G. That is
y itself for every token where the sum does not depend on the token and the experts are scaled by a = G / sum.
Neighbours make a group, so that ties fall whole groups at a time and group-limited routers never part one. In training
drops and the noise of noisy_topk, which is drawn for each expert, can part them.

He et al. scale every matrix by a^(1/3) or a^(1/2), which SwiGLU's and GELU's gates do not pass on exactly. Here the
factor goes onto the matrices in which the layer is homogeneous: `w_up` and `w_down` by a^(1/2) each; for GELU, and for
SwiGLU between bounds, `w_down` by a.
"""

import math
import operator
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
from flax import nnx

from moe_jax.config import ModelConfig, MoEConfig, Problem, Refused
from moe_jax.layers.common import fan_in
from moe_jax.layers.moe import SelectionBias
from moe_jax.model import Transformer
from moe_jax.train.state import Weights, plain

Method = Literal["copy", "split"]


class Cut(NamedTuple):
    """How the dense feed-forward layer is spread over the experts of an MoE layer."""

    slices: int  # G, among the routed experts
    copies: int  # R, of each of them
    shared: int  # slices that the shared experts hold
    factor: float  # a, on the output of every routed expert
    preserved: bool  # the model computes what the dense one did, as long as no choice is dropped
    why: str  # in words


def gate_sum(moe: MoEConfig) -> tuple[float, bool]:
    """Sum of a token's K gates without noise and drops, and whether it is that for every token.

    Where it is not, the sum under a router without preferences: K/E of a softmax, K/2 of sigmoids; of sparsemixer the
    sum where no other logit is near the best ones.
    """
    kind, norm, scale = moe.router.kind, moe.router.normalize, moe.router.scale
    always = kind in ("topk_softmax", "noisy_topk", "hash")
    if always or norm in ("before", "after") or (norm is None and kind in ("gshard", "deepseek_v3")):
        return scale, True
    return scale * moe.top_k * {"deepseek_v3": 0.5, "sparsemixer": 1.0}.get(kind, 1 / moe.experts), False


def cut(m: ModelConfig, method: Method) -> Cut:
    """How `method` makes the experts of model `m`, and what it promises.

    Raises:
        Refused: no such method, a dense model, or experts that the dense layer cannot fill.
    """
    moe = m.moe
    if method not in get_args(Method):
        raise Refused(Problem("method", f"is {method!r}", f"use one of {', '.join(get_args(Method))}"))
    if moe is None:
        raise Refused(Problem("model.moe", "is unset: this is a dense model", "give a config with experts"))
    width = moe.d_ff or m.d_ff
    slices = _copy_slices(m, moe, width) if method == "copy" else _split_slices(m, moe, width)
    total, exact = gate_sum(moe)
    if exact:
        factor = slices / total
        held = slices == 1 or moe.router.force is None
        why = f"the gates of a token sum to {total:g}" if held else "router.force parts the groups"
        return Cut(slices, moe.experts // slices, moe.shared_experts, factor, held, why)
    # Copies stay copies (Komatsuzaki et al.); slices are scaled for a uniform router (He et al.: a = R G^2 / K).
    factor = 1.0 if method == "copy" else slices / total
    why = f"router.kind={moe.router.kind} with normalize={moe.router.normalize or 'unset'} has gates of no fixed sum"
    return Cut(slices, moe.experts // slices, moe.shared_experts, factor, False, why)


def _copy_slices(m: ModelConfig, moe: MoEConfig, width: int) -> int:
    out = []
    if width != m.d_ff:
        why = f"is {width}, and copies of the dense feed-forward layer have the width model.d_ff={m.d_ff}"
        out.append(Problem("model.moe.d_ff", why, "leave it unset, or use --method split"))
    if moe.shared_experts:
        why = f"is {moe.shared_experts}, and a copy of the whole layer beside routed copies would count it twice"
        out.append(Problem("model.moe.shared_experts", why, "set it to 0, or use --method split and narrower experts"))
    if out:
        raise Refused(*out)
    return 1


def _split_slices(m: ModelConfig, moe: MoEConfig, width: int) -> int:
    """Slices G among the routed experts."""
    if m.d_ff % width:
        why = f"is {width}, which does not divide the dense width model.d_ff={m.d_ff}"
        raise Refused(Problem("model.moe.d_ff", why, f"use a divisor of {m.d_ff}"))
    slices = m.d_ff // width - moe.shared_experts
    if slices < 1:
        why = f"is {moe.shared_experts}, and of the {m.d_ff // width} slices of the dense layer none is left for others"
        raise Refused(Problem("model.moe.shared_experts", why, "lower it, or model.moe.d_ff"))
    out = []
    if moe.shared_d_ff not in (None, width):
        why = f"is {moe.shared_d_ff}, and all slices of the dense layer are {width} wide"
        out.append(Problem("model.moe.shared_d_ff", why, "leave it unset"))
    if moe.shared_gate:
        why = "is true, and slices of the dense layer in shared experts count in full"
        out.append(Problem("model.moe.shared_gate", why, "leave it out"))
    if moe.experts % slices:
        why = f"{moe.experts} experts are no whole number of groups of {slices} slices"
        out.append(Problem("model.moe.experts", why, f"use a multiple of {slices}, or another model.moe.d_ff"))
    if moe.router.kind == "expert_choice":
        why = "is expert_choice, under which a token does not get a whole group of slices"
        out.append(Problem("model.moe.router.kind", why, "use a router of tokens, or --method copy"))
    elif moe.router.kind == "sparsemixer" and slices > 1:
        why = "is sparsemixer, whose gates differ between slices of one layer"
        out.append(Problem("model.moe.router.kind", why, "use another router, or --method copy"))
    elif moe.top_k % slices:
        why = f"{moe.top_k} choices are no whole number of groups of {slices} slices: a token would get part of a layer"
        out.append(Problem("model.moe.top_k", why, f"use a multiple of {slices}, or another model.moe.d_ff"))
    limited = moe.router.topk_groups not in (None, moe.router.groups)
    if limited and moe.experts // moe.router.groups % slices:
        size = moe.experts // moe.router.groups
        why = f"groups of {size} experts are no whole number of groups of {slices} slices"
        out.append(Problem("model.moe.router.groups", why, f"let each hold a multiple of {slices} experts"))
    if out:
        raise Refused(*out)
    return slices


def upcycle(params: Any, m: ModelConfig, method: Method, *, noise: float = 0.0, seed: int = 0) -> Weights:
    """Weights of the model `m` from the parameters of the dense model that is `m` without `moe`.

    Attention, norms, embedding and dense layers are the dense model's, bit for bit. Each MoE layer gets experts made of
    the feed-forward layer in its place, a fresh router (one column a virtual group) and selection biases of 0.

    Args:
        params: tree with a leading axis of layers, as in `train.state.State`.
        noise: standard deviation of a normal number added to each weight of the routed experts, in units of that of a
            fresh dense matrix, 1/sqrt(fan-in). Makes copies differ; nothing is preserved exactly then.
        seed: of router and noise.
    Returns:
        Parameters and biases, ordered by `m.runs`; the same numbers on every mesh.
    Raises:
        Refused: see `cut`; and parameters that are not those of the dense model.
    """
    how = cut(m, method)
    _check_params(params, m)
    fresh, bias = _new(m, seed)
    key = jax.random.key(seed)

    def layers(dense: Any, fresh: Any, runs: Sequence[tuple[tuple[str, ...], int]], key: jax.Array) -> dict[str, Any]:
        """The parameters of a decoder or encoder, with those of its layers made anew."""
        source = _in_order(dense["stacks"])
        stacks: dict[str, Any] = {}
        done = 0
        for i, (kinds, repeats) in enumerate(runs):
            stop = done + repeats * len(kinds)
            blocks: dict[str, Any] = {}
            for j, kind in enumerate(kinds):
                mine = slice(done + j, stop, len(kinds))
                block = jax.tree.map(operator.itemgetter(mine), source)  # [layers, ...] -> [repeats, ...]
                if kind == "moe":
                    like = fresh["stacks"][str(i)]["blocks"][str(j)]["ffn"]
                    own = jax.random.fold_in(key, 1 + done + j)
                    block |= {"ffn": _experts(block["ffn"], like, m, how, noise, own)}
                blocks[str(j)] = block
            stacks[str(i)] = {"blocks": blocks}
            done = stop
        return dense | {"stacks": stacks}

    out = layers(params, fresh, m.runs, key)
    if m.encoder is not None:
        out["encoder"] = layers(params["encoder"], fresh["encoder"], m.encoder_runs, jax.random.fold_in(key, 0))
    return Weights(out, bias)


def _in_order(stacks: Any) -> Any:
    """The parameters of dense layers, [layers, ...] bottom first; where windows alternate a period has many."""

    def layers(*own: jax.Array) -> jax.Array:  # one [repeats, ...] for each layer of the period
        return jnp.stack(own, 1).reshape(-1, *own[0].shape[1:])

    runs = [stacks[str(i)]["blocks"] for i in range(len(stacks))]
    each = [jax.tree.map(layers, *(run[str(j)] for j in range(len(run)))) for run in runs]
    return jax.tree.map(lambda *own: jnp.concatenate(own), *each)


def _new(m: ModelConfig, seed: int) -> Weights:
    """Random weights of a model; inside a compiled program only those that are used are ever drawn."""
    module = Transformer(m, rules=None, rngs=nnx.Rngs(params=seed))
    return Weights(*(plain(state) for state in nnx.split(module, nnx.Param, SelectionBias)[1:]))


def _check_params(params: Any, m: ModelConfig) -> None:
    def shapes(tree: Any) -> dict[str, tuple[int, ...]]:
        return {jax.tree_util.keystr(path): leaf.shape for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}

    got, want = shapes(params), shapes(jax.eval_shape(lambda: _new(m.dense, 0)).params)
    wrong = [k for k in sorted(got.keys() | want.keys()) if got.get(k) != want.get(k)]
    if wrong:
        first = f"{wrong[0]}: {got.get(wrong[0], 'absent')} instead of {want.get(wrong[0], 'absent')}"
        why = f"{len(wrong)} leaves are not those of the dense model, first {first}"
        raise Refused(Problem("params", why, "give the parameters of this model without model.moe"))


def _experts(dense: Any, fresh: Any, m: ModelConfig, how: Cut, noise: float, key: jax.Array) -> Any:
    """Parameters of MoE layers [n, ...] from those of dense feed-forward layers [n, ...] and of fresh MoE layers."""
    G, R, pieces = how.slices, how.copies, how.slices + how.shared
    out = dict(fresh)
    if "router" in fresh:
        out["router"] = jnp.repeat(fresh["router"][..., :R], G, axis=-1)  # [n,D,R] -> [n,D,E]
    routed, shared = {}, {}
    for number, (name, w) in enumerate(sorted(dense.items())):
        piece, shared[name] = _sliced(name, w, pieces, how.shared)
        n = w.shape[0]
        expert = jnp.broadcast_to(piece[:, None], (n, R, *piece.shape[1:])).reshape(n, R * G, *piece.shape[2:])
        if noise and w.ndim == 3:
            drawn = jax.random.normal(jax.random.fold_in(key, number), expert.shape, expert.dtype)
            expert = expert + noise * fan_in(w.shape[1]) * drawn
        routed[name] = expert * _part(how.factor, name, m.ffn)  # [n,E,...]
    out["experts"] = routed
    return out | ({"shared": shared} if how.shared else {})


def _sliced(name: str, w: jax.Array, pieces: int, shared: int) -> tuple[jax.Array, jax.Array]:
    """A parameter of feed-forward layers [n, ...]: the slices [n, pieces - shared, ...] after the shared ones, and the
    shared ones in one. The bias of the output is that of no slice: each gets an equal part."""
    if name == "b_down":
        piece = jnp.repeat(w[:, None], pieces - shared, 1) / pieces
        return piece, w * (shared / pieces)
    axis = 1 if name == "w_down" else w.ndim - 1  # the hidden width
    size = w.shape[axis] // pieces
    cut = jnp.moveaxis(w.reshape(*w.shape[:axis], pieces, size, *w.shape[axis + 1 :]), axis, 1)
    return cut[:, shared:], jax.lax.slice_in_dim(w, 0, shared * size, axis=axis)


def _part(factor: float, name: str, ffn: str) -> float:
    """The part of a factor on the layer's output that goes onto one of its parameters."""
    if name in ("w_gate", "b_gate"):
        return 1.0
    if name == "b_down":
        return factor
    if ffn in ("gelu", "clamped_swiglu"):
        return factor if name == "w_down" else 1.0
    return math.sqrt(factor)
