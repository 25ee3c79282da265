"""The dense MoE that everything is compared with: loops for the choices, every expert on every token for the sums.

It shares no code with the library. Choices are made in float64 NumPy, one token and one slot at a time; the layer is a
plain JAX expression in the chosen experts, so that its gradients are those of the definition.
"""

import math
from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np


def weights_of(x, router, xp=np):
    """What makes an expert eligible, from logits x [..., E]: softmax, or in DeepSeek-V3 a sigmoid."""
    if router.kind == "deepseek_v3":
        return 1.0 / (1.0 + xp.exp(-x))
    e = xp.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def probabilities(x, router, xp=np):
    """Weights that sum to 1 over the experts, for the balance losses."""
    w = weights_of(x, router, xp)
    return w / w.sum(-1, keepdims=True)


def gates_of(x, expert, router, xp=np):
    """Gates [..., K] of the experts from (noisy) logits [..., E], before dropping; softmax of K logits is p / sum p."""
    if router.kind == "hash":
        return xp.ones(expert.shape) / expert.shape[-1]
    gate = xp.take_along_axis(weights_of(x, router, xp), expert, -1)
    papers = ("gshard", "topk_softmax", "noisy_topk", "deepseek_v3")
    if router.normalize == "before" or (router.normalize is None and router.kind in papers):
        gate = gate / gate.sum(-1, keepdims=True)
    return gate * router.scale


def best(score, k):
    """The k largest, best first, equals in order."""
    return sorted(range(len(score)), key=lambda i: (-score[i], i))[:k]


def inside_groups(score, router, k):
    """Scores [E] with -inf outside the best groups of neighbouring experts."""
    measure = router.group_score or ("sum2" if router.kind == "deepseek_v3" else "max")
    count = {"max": 1, "sum2": 2, "sumk": k // router.topk_groups}[measure]
    groups = np.split(score, router.groups)
    chosen = best([np.sort(g)[-count:].sum() for g in groups], router.topk_groups)
    return np.concatenate([g if i in chosen else np.full(len(g), -np.inf) for i, g in enumerate(groups)])


def fmix32(h):
    """The finalizer of MurmurHash3 for 32 bits (Appleby 2011), in integers without end."""
    h ^= h >> 16
    h = h * 0x85EBCA6B % 2**32
    h ^= h >> 13
    h = h * 0xC2B2AE35 % 2**32
    return h ^ h >> 16


def choose(logits, router, k, *, mask=None, noise=None, spread=None, bias=None, slots=None, ids=None, replay=None):
    """Choices of one group [S, E]: (expert [S, K], gate [S, K], asked [S, K]) by the formulas of the papers."""
    x = np.asarray(logits, np.float64)
    mask = np.ones(len(x), bool) if mask is None else mask
    if router.kind == "expert_choice" and replay is None:
        return experts_choose(x, router, mask, slots)
    if router.kind == "noisy_topk" and noise is not None:
        x = x + np.asarray(noise, np.float64) * spread
    S, E = x.shape
    expert, gate, asked = np.zeros((S, k), int), np.zeros((S, k)), np.ones((S, k), bool)
    for s in range(S):
        score = x[s]  # in the order of the weights
        if bias is not None or router.topk_groups is not None:
            score = weights_of(x[s], router) + (0.0 if bias is None else bias)
        if router.topk_groups is not None:
            score = inside_groups(score, router, k)
        order = best(score, k) if replay is None else replay[s]
        if router.kind == "hash" and replay is None:  # the expert that the token's id falls on, and its neighbours
            order = [(fmix32(int(ids[s])) + i) % E for i in range(k)]
        if router.second == "sample" and noise is not None:
            gumbel = x[s] - np.log(-np.log(np.asarray(noise[s], np.float64)))
            order[1] = best(np.where(np.arange(E) == order[0], -np.inf, gumbel), 1)[0]
        expert[s] = order
        gate[s] = gates_of(x[s], expert[s], router)
        if router.second == "random" and noise is not None:
            share = weights_of(x[s], router)[order]
            asked[s, 1] = noise[s] < share[1] / share.sum() / router.threshold
    return expert, gate, asked & mask[:, None]


def experts_choose(x, router, mask, slots):
    """Each expert takes the tokens with its largest softmax weights; choice k of a token is expert k."""
    gate = weights_of(x, router)
    asked = np.zeros(x.shape, bool)
    tokens = np.nonzero(mask)[0]
    for e in range(x.shape[1]):
        asked[tokens[best(gate[tokens, e], slots)], e] = True
    return np.tile(np.arange(x.shape[1]), (len(x), 1)), gate * router.scale, asked


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


def layer(x, weights, expert, kept, router, *, noise=None, ffn="swiglu"):
    """y [T, D] = sum of gate * expert(x) over kept choices, every expert computed on every token, differentiable."""
    logits = jnp.zeros((len(x), len(weights["w_up"])))
    if router.kind != "hash":
        logits = jnp.matmul(x, weights["router"], precision="highest")
    if noise is not None:
        logits = logits + noise * jax.nn.softplus(jnp.matmul(x, weights["noise"], precision="highest"))
    gate = jnp.where(kept, gates_of(logits, expert, router, jnp), 0.0)
    if router.normalize == "after":
        gate = gate / (gate.sum(-1, keepdims=True) + 1e-9)
    y = jnp.zeros_like(x)
    for e in range(len(weights["w_up"])):
        bias = {name: weights[name][e][None] if name in weights else 0.0 for name in ("b_gate", "b_up", "b_down")}
        up = x @ weights["w_up"][e] + bias["b_up"]
        swiglu = ffn.startswith("swiglu")
        h = jax.nn.silu(x @ weights["w_gate"][e] + bias["b_gate"]) * up if swiglu else jax.nn.relu(up)
        out = h @ weights["w_down"][e] + bias["b_down"]
        y = y + jnp.where(expert == e, gate, 0.0).sum(-1, keepdims=True) * out
    return y


# Balance: sums over the tokens that are not padding, one by one


def expert_loss(prob, expert, asked, mask, *, per_token=False):
    """E sum_i f_i P_i (Switch, eq. 4-6): f_i the share of the counted choices, P_i the mean probability."""
    f, P = shares(prob, expert, asked, mask, per_token)
    return prob.shape[1] * (f * P).sum()


def shares(prob, expert, asked, mask, per_token=False):
    count, mean = np.zeros(prob.shape[1]), np.zeros(prob.shape[1])
    for t in np.nonzero(mask)[0]:
        mean += prob[t] / mask.sum()
        for e in expert[t][asked[t]]:
            count[e] += 1
    return count / max(1, mask.sum() if per_token else count.sum()), mean


def over_rows(loss, rows, *arrays):
    """Mean of a loss over the sequences that are not all padding; the mask comes last."""
    parts = zip(*(np.split(a, rows) for a in arrays), strict=True)
    values = [loss(*part) for part in parts if part[-1].any()]
    return sum(values) / max(1, len(values))


def device_loss(prob, expert, asked, mask, devices):
    """sum_d mean(E f over the experts of d) sum(P over them) (DeepSeek-V2, eq. 26-28)."""
    f, P = shares(prob, expert, asked, mask)
    pairs = zip(np.split(len(f) * f, devices), np.split(P, devices), strict=True)
    return sum(a.mean() * b.sum() for a, b in pairs)


def communication_loss(prob, expert, asked, mask, devices, limit):
    """sum_d D/(M T) (tokens sent to d) sum(P over the experts of d) (DeepSeek-V2, eq. 29-31)."""
    sent, size = np.zeros(devices), prob.shape[1] // devices
    for t in np.nonzero(mask)[0]:
        for d in set(expert[t][asked[t]] // size):
            sent[d] += devices / limit / mask.sum()
    _, P = shares(prob, expert, asked, mask)
    return sum(sent[d] * P[d * size : (d + 1) * size].sum() for d in range(devices))


def squared_cv(x):
    return x.var() / x.mean() ** 2 if x.any() else 0.0


def importance_loss(gate, expert, asked, experts):
    """Squared CV of the sums of gates (Shazeer et al. 2017, eq. 6-7)."""
    return squared_cv(np.array([gate[asked & (expert == e)].sum() for e in range(experts)]))


def chance(x, noise, spread, k):
    """P(x, i) of one token: that expert i is among the K best if its own noise is drawn again (appendix A, eq. 8-9)."""
    noisy, out = x + noise * spread, np.ones(len(x))
    for i in range(len(x)):
        others = np.sort(np.delete(noisy, i))[::-1]
        if k <= len(others):
            out[i] = 0.5 * (1.0 + math.erf((x[i] - others[k - 1]) / spread[i] / math.sqrt(2.0)))
    return out


def z_loss(logits, mask):
    """Mean of squared logsumexp (ST-MoE, eq. 5)."""
    return np.mean([np.log(np.exp(x).sum()) ** 2 for x in logits[mask]]) if mask.any() else 0.0


def moves(load, centred=False):
    """Where the selection biases go, in steps: up below the mean load, down above it, exactly."""
    mean = Fraction(sum(load), len(load))
    out = [Fraction((n < mean) - (n > mean)) for n in load]
    return [m - sum(out) / len(out) for m in out] if centred else out
