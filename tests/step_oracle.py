"""A whole train step from its definitions, in float64 on one device: what every mesh and schedule is compared with.

It shares no code with the library. Which expert a token takes is decided in NumPy loops, token by token; the loss is a
plain JAX expression in these choices, over all rows at once, so that its gradients are those of the definition. There
is no scan, no remat, no microbatch and no sharding here, and padding is left out where it would be counted.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import oracle

LOSSES = (
    "balance_loss",
    "sequence_loss",
    "device_loss",
    "communication_loss",
    "importance_loss",
    "load_loss",
    "z_loss",
)


class Case(NamedTuple):
    """What the definitions need to know of a config."""

    kind: str
    top_k: int
    experts: int
    group: int  # tokens that compete for slots
    priority: str
    normalize: str | None = None
    scale: float = 1.0
    threshold: float = 1.0  # gshard: normalised second gate that is always kept
    groups: int = 1
    topk_groups: int = 1
    devices: int = 1
    balance_over: str = "step"


class Choices(NamedTuple):
    """The discrete side of one layer, [T, ...] over all tokens of the batch."""

    expert: np.ndarray  # [T, K]
    asked: np.ndarray  # [T, K] bool
    kept: np.ndarray  # [T, K] bool
    ranked: np.ndarray  # [T, K] best experts without bias and groups
    rival: np.ndarray  # [T, E] noisy_topk: whom expert e has to beat to be among the K best


class Answer(NamedTuple):
    loss: Any
    gradient: Any
    counts: dict[str, np.ndarray]  # tokens, routed, kept [layers], load [layers, E]


def softmax(x):
    e = np.exp(x - x.max())
    return e / e.sum()


def sigmoid(x):
    return 1.0 / (1.0 + np.exp(-x))


def order(score) -> list[int]:
    """Experts from best to worst, equals by number."""
    return sorted(range(len(score)), key=lambda e: (-score[e], e))


def choose(case: Case, logits, noise, spread, bias) -> tuple[list[int], list[bool], list[int], list[int]]:
    """(expert, asked, ranked, rival) of one token with logits [E]; without noise (None) as in evaluation."""
    K, E = case.top_k, case.experts
    asked, rival = [True] * K, [0] * E
    if case.kind == "deepseek_v3":  # DeepSeek-V3, eq. 16 and section 2.1.2: groups by the sum of their two best
        score, size = sigmoid(logits) + bias, E // case.groups
        value = [sum(sorted(score[g * size : (g + 1) * size])[-2:]) for g in range(case.groups)]
        allowed = order(value)[: case.topk_groups]
        expert = [e for e in order(score) if e // size in allowed][:K]
    elif case.kind == "noisy_topk":  # Shazeer et al. 2017, eq. 3-5, and appendix A for the rivals
        noisy = logits if noise is None else logits + noise * spread
        expert = order(noisy)[:K]
        rival = [[o for o in order(noisy) if o != e][K - 1] for e in range(E)]
    else:
        expert = order(logits)[:K]
        if case.kind == "gshard" and noise is not None:  # Lepikhin et al. 2020, Algorithm 1
            p = softmax(logits)[expert]
            asked[1] = noise < p[1] / p.sum() / case.threshold
    return expert, asked, order(logits)[:K], rival


def decide(case: Case, logits, spread, noise, bias, mask, capacity: int) -> Choices:
    """Choices of all tokens from logits [T, E], and who gets a slot in each group of neighbours."""
    T = len(logits)
    rows = [choose(case, logits[t], None if noise is None else noise[t], spread[t], bias) for t in range(T)]
    expert, asked, ranked, rival = (np.asarray(column) for column in zip(*rows, strict=True))
    asked = asked & mask[:, None]
    prob = np.stack([softmax(x) for x in logits])
    kept = np.zeros_like(asked)
    for start in range(0, T, case.group):
        g = slice(start, start + case.group)
        score = np.take_along_axis(prob[g], expert[g], 1)
        kept[g] = oracle.queue(expert[g], asked[g], score, capacity, case.priority)[1]
    return Choices(expert, asked, kept, ranked, rival)


# The differentiable side


def normed(x, scale):
    return x / jnp.sqrt((x * x).mean(-1, keepdims=True) + 1e-6) * scale


def turned(x, positions):
    """Rotary positions (Su et al. 2021): x [B, L, H, N], pairs (i, i + N/2)."""
    half = x.shape[-1] // 2
    angle = (positions[..., None] * 10000.0 ** (-jnp.arange(half) / half))[:, :, None]  # [B,L,1,N/2]
    a, b = x[..., :half], x[..., half:]
    sin, cos = jnp.sin(angle), jnp.cos(angle)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], -1)


def attention(w, x, batch):
    q, k, v = (jnp.einsum("bld,dhn->blhn", x, w[n]) for n in ("w_query", "w_key", "w_value"))
    q, k = turned(q, batch["positions"]), turned(k, batch["positions"])
    score = jnp.einsum("blhn,bmhn->bhlm", q, k) / np.sqrt(q.shape[-1])
    segments, place = batch["segments"], np.arange(x.shape[1])
    seen = (place[:, None] >= place) & (segments[:, :, None] == segments[:, None, :])
    score = jnp.where(seen[:, None], score, -1e30)
    return jnp.einsum("bhlm,bmhn,hnd->bld", jax.nn.softmax(score), v, w["w_out"])


def experts(case: Case, w, x, choices: Choices, noise) -> tuple[Any, dict[str, Any]]:
    """y [T, D] and the router's numbers: every expert computed on every token."""
    logits = x @ w["router"]
    spread = jax.nn.softplus(x @ w["noise"]) if "noise" in w else jnp.ones_like(logits)
    noisy = logits if case.kind != "noisy_topk" else logits + noise * spread
    score = jax.nn.sigmoid(logits) if case.kind == "deepseek_v3" else jax.nn.softmax(logits)
    gate = jnp.take_along_axis(score, choices.expert, 1)  # [T,K]
    if case.kind == "noisy_topk":
        gate = jax.nn.softmax(jnp.take_along_axis(noisy, choices.expert, 1))
    if case.kind in ("gshard", "deepseek_v3"):
        gate = gate / gate.sum(-1, keepdims=True) * case.scale
    gate = jnp.where(choices.asked, gate, 0.0)
    weight = jnp.where(choices.kept, gate, 0.0)
    if case.normalize == "after":
        weight = weight / (weight.sum(-1, keepdims=True) + 1e-9)
    own = jnp.where(choices.expert[..., None] == np.arange(case.experts), weight[..., None], 0.0).sum(1)  # [T,E]
    opened, up = (jnp.einsum("td,edf->tef", x, w["experts"][n]) for n in ("w_gate", "w_up"))
    y = jnp.einsum("te,tef,efd->td", own, jax.nn.silu(opened) * up, w["experts"]["w_down"])
    beaten = jnp.take_along_axis(noisy, choices.rival, 1)  # [T,E]
    chance = jax.scipy.stats.norm.cdf((logits - beaten) / spread)
    prob = score / score.sum(-1, keepdims=True)
    return y, {"logits": logits, "spread": spread, "prob": prob, "gate": gate, "chance": chance}


def times(expert, asked, E):
    """How often each expert was asked, [.., T, K] -> [.., E]."""
    return ((expert[..., None] == np.arange(E)) & asked[..., None]).sum((-3, -2))


def squared_cv(x):
    return ((x - x.mean()) ** 2).mean() / x.mean() ** 2


def router_losses(case: Case, router, choices: Choices, mask, part) -> dict[str, Any]:
    """Every balance loss of one layer by the formula of its paper; mask [B, L], part [B] the microbatch of a row."""
    E, K, (B, L) = case.experts, case.top_k, mask.shape
    prob = jnp.where(mask[..., None], router["prob"].reshape(B, L, E), 0.0)
    first = case.kind == "gshard"  # GShard counts first choices, kept or not
    expert = (choices.expert[:, :1] if first else choices.expert).reshape(B, L, -1)
    asked = mask[..., None] if first else choices.asked.reshape(B, L, K)

    def balance(part, expert=expert, asked=asked):
        """E sum_i f_i P_i over the rows of each part, summed: Fedus et al. 2021, eq. 4-6; 0 for a part without tokens.

        part: [B], the number of the part that a row is in.
        """
        inside = part == np.arange(B)[:, None]  # [part, B]
        n, tokens = inside @ times(expert, asked, E), inside @ mask.sum(1)
        f, P = n / jnp.maximum(n.sum(1, keepdims=True), 1), inside @ prob.sum(1) / jnp.maximum(tokens, 1)[:, None]
        return E * (f * P).sum()

    rows, filled = np.arange(B), jnp.maximum(mask.any(1).sum(), 1)
    part, parts = {"step": (0 * rows, 1), "microbatch": (part, part.max() + 1), "sequence": (rows, filled)}[
        case.balance_over
    ]
    everyone = jnp.broadcast_to(mask[..., None], (B, L, K))

    T, D = mask.sum(), case.devices
    P = (prob.sum((0, 1)) / T).reshape(D, -1).sum(1)  # DeepSeek-V2, eq. 28
    n = times(expert, asked, E).sum(0)
    f = (E * n / n.sum()).reshape(D, -1).mean(1)
    there = (choices.expert[..., None] // (E // D) == np.arange(D)) & choices.asked[..., None]
    limit = case.topk_groups if case.kind == "deepseek_v3" else min(K, D)
    on = choices.expert[..., None] == np.arange(E)
    return {
        "balance_loss": balance(part) / parts,
        "sequence_loss": balance(rows, choices.ranked.reshape(B, L, K), everyone) / filled,
        "device_loss": (f * P).sum(),
        "communication_loss": (D / (limit * T) * there.any(1).sum(0) * P).sum(),
        "importance_loss": squared_cv(jnp.where(on, router["gate"][..., None], 0.0).sum((0, 1))),
        "load_loss": squared_cv(jnp.where(mask.reshape(-1, 1), router["chance"], 0.0).sum(0)),
        "z_loss": jnp.where(mask.reshape(-1), jax.nn.logsumexp(router["logits"], -1) ** 2, 0.0).sum() / T,
    }


def loss(params, case: Case, batch, choices: list[Choices], noise, coefficients):
    """(cross entropy + coefficients times the layers' losses, the router's numbers of each layer)."""
    x = params["embedding"]["table"][batch["tokens"]]
    mask, routers, total = batch["segments"] > 0, [], 0.0
    for n, chosen in enumerate(choices):
        w = jax.tree.map(lambda a, n=n: a[n], params["stacks"]["0"]["blocks"]["0"])
        x = x + attention(w["attention"], normed(x, w["attention_norm"]["scale"]), batch)
        h = normed(x, w["ffn_norm"]["scale"]).reshape(-1, x.shape[-1])
        y, router = experts(case, w["ffn"], h, chosen, noise[n])
        x = x + y.reshape(x.shape)
        each = router_losses(case, router, chosen, mask, batch["part"])
        total = total + sum(c * each[name] for name, c in coefficients.items())
        routers.append(router)
    logits = normed(x, params["final_norm"]["scale"]) @ params["embedding"]["table"].T
    nats = -jnp.take_along_axis(jax.nn.log_softmax(logits), batch["targets"][..., None], -1)[..., 0]
    return (nats * batch["weights"]).sum() / (batch["weights"] > 0).sum() + total, routers


differentiate = jax.jit(jax.value_and_grad(loss, has_aux=True), static_argnums=1)


def wide(tree):
    """Numbers in float64, the rest as it is."""
    return jax.tree.map(lambda a: np.asarray(a, np.float64) if np.asarray(a).dtype.kind == "f" else np.asarray(a), tree)


def step(case: Case, params, bias, batch, noise, capacity: int | None, methods: list[dict[str, float]]) -> list[Answer]:
    """The step's answer for each method, a dict of coefficients.

    Args:
        bias: [layers, E], zeros without one.
        batch: rows as the library has them, and `part` [B], the microbatch of each.
        noise: [layers, T, ...] numbers that the router draws.
        capacity: slots of an expert in a group; None: evaluation, without a limit and without noise.
    """
    params, bias, batch, noise = wide((params, bias, batch, noise))
    T, layers, mask = batch["tokens"].size, len(bias), batch["segments"] > 0
    quiet = capacity is None
    noise = 0 * noise if quiet else noise
    nobody = np.zeros((T, case.top_k), bool)
    first = Choices(nobody.astype(int), nobody, nobody, nobody.astype(int), np.zeros((T, case.experts), int))
    choices = [first] * layers

    def run(method: dict[str, float]):
        return differentiate(params, case, batch, choices, noise, dict.fromkeys(LOSSES, 0.0) | method)

    loose = jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow")  # it is to read like the formulas
    with jax.enable_x64(True), loose[0], loose[1]:
        for n in range(layers):  # the choices of a layer follow from those below it
            router, own = wide(run({})[0][1][n]), None if quiet else noise[n]
            limit = T if capacity is None else capacity
            choices[n] = decide(case, router["logits"], router["spread"], own, bias[n], mask.reshape(-1), limit)
        answers = [jax.tree.map(np.asarray, run(method)) for method in methods]
    counts = {
        "tokens": np.full(layers, mask.sum()),
        "routed": np.asarray([c.asked.sum() for c in choices]),
        "kept": np.asarray([c.kept.sum() for c in choices]),
        "load": np.stack([times(c.expert, c.asked, case.experts) for c in choices]),
    }
    return [Answer(value, gradient, counts) for (value, _), gradient in answers]


def moved(bias, load, rate: float, centred: bool):
    """Selection biases after a step: up by the rate below the mean load, down above it (DeepSeek-V3, section 2.1.2)."""
    move = np.asarray([[np.sign(row.sum() - n * len(row)) for n in row] for row in load], np.float64)
    return wide(bias) + rate * (move - move.mean(-1, keepdims=True) * centred)
