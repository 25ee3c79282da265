"""The dense MoE that everything is compared with: loops for the choices, every expert on every token for the sums.

It shares no code with the library. Choices are made in float64 NumPy, one token and one slot at a time; the layer is a
plain JAX expression in the chosen experts, so that its gradients are those of the definition.
"""

import jax
import jax.numpy as jnp
import numpy as np


def softmax(x):
    e = np.exp(x - x.max())
    return e / e.sum()


def choose(logits, kind, k, *, normalize=None, second="always", threshold=0.5, uniform=None):
    """Choices of one group [S, E]: (expert [S, K], gate [S, K], asked [S, K]) by the formulas of the papers."""
    S = len(logits)
    expert, gate, asked = np.zeros((S, k), int), np.zeros((S, k)), np.ones((S, k), bool)
    for s in range(S):
        p = softmax(np.asarray(logits[s], np.float64))
        order = sorted(range(len(p)), key=lambda e: (-logits[s][e], e))[:k]
        if kind == "gshard" and second == "sample" and uniform is not None:
            noisy = np.asarray(logits[s], np.float64) - np.log(-np.log(np.asarray(uniform[s], np.float64)))
            noisy[order[0]] = -np.inf
            order[1] = int(noisy.argmax())
        expert[s], gate[s] = order, p[order]
        share = gate[s] / gate[s].sum()
        if kind == "topk_softmax" or (kind == "gshard" and normalize in (None, "before")) or normalize == "before":
            gate[s] = share
        if kind == "gshard" and second == "random" and uniform is not None:
            asked[s, 1] = uniform[s] < share[1] / threshold
    return expert, gate, asked


def queue(expert, asked, score, capacity, priority, uniform=None):
    """Slots of one group: (position [S, K], kept [S, K]), handing out slots one by one."""
    S, K = expert.shape
    key = {
        "choice": lambda s, k: (k, s),
        "token": lambda s, k: (s, k),
        "probability": lambda s, k: (-score[s, k], k, s),
        "batch": lambda s, k: (k, -score[s].max(), s),
        "random": lambda s, k: (uniform[s, k],),
    }[priority]
    position, kept = np.full((S, K), -1), np.zeros((S, K), bool)
    taken: dict[int, int] = {}
    for s, k in sorted(((s, k) for s in range(S) for k in range(K) if asked[s, k]), key=lambda c: key(*c)):
        position[s, k] = taken.get(expert[s, k], 0)
        taken[expert[s, k]] = position[s, k] + 1
        kept[s, k] = position[s, k] < capacity
    if priority in ("probability", "batch", "random"):  # survivors sit in token order
        taken = {}
        for s, k in zip(*np.nonzero(kept), strict=True):
            position[s, k] = taken.get(expert[s, k], 0)
            taken[expert[s, k]] = position[s, k] + 1
    return position, kept


def layer(x, weights, expert, kept, *, kind, k, normalize=None, ffn="swiglu"):
    """y [T, D] = sum of gate * expert(x) over kept choices, every expert computed on every token, differentiable."""
    logits = jnp.matmul(x, weights["router"], precision="highest")
    prob = jax.nn.softmax(logits)
    chosen = jnp.take_along_axis(logits if kind == "topk_softmax" else prob, expert, axis=-1)
    gate = jax.nn.softmax(chosen) if kind == "topk_softmax" else chosen
    if normalize == "before" or (kind == "gshard" and normalize is None):
        gate = gate / gate.sum(-1, keepdims=True)
    gate = jnp.where(kept, gate, 0.0)
    if normalize == "after":
        gate = gate / (gate.sum(-1, keepdims=True) + 1e-9)
    y = jnp.zeros_like(x)
    for e in range(weights["router"].shape[1]):
        up = x @ weights["w_up"][e]
        h = jax.nn.silu(x @ weights["w_gate"][e]) * up if ffn == "swiglu" else jax.nn.relu(up)
        y = y + jnp.where(expert == e, gate, 0.0).sum(-1, keepdims=True) * (h @ weights["w_down"][e])
    return y, logits, prob
