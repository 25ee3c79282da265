"""Balance statistics as sums and integer counts, the losses made from them, and the bias that needs no loss.

Sums over tokens add up over groups, devices and microbatches; the losses divide once, over the whole step. So padding,
the mesh, microbatches and remat cannot change a loss or its gradient. A loss is one function of `Stats` and one row of
`LOSSES`, under the name of its coefficient.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from moe_jax.capacity import Slots
from moe_jax.config import MoEConfig
from moe_jax.routing import Routing


class Stats(NamedTuple):
    """Sums over the tokens of one MoE layer (or [layers, ...] of several). Additive.

    The fields with a default are there only where a loss of the config needs them. A sequence is a row of the batch.
    """

    tokens: jax.Array  # [] int32, tokens that are not padding
    routed: jax.Array  # [] int32, choices that asked for a slot
    kept: jax.Array  # [] int32, choices that got one; routed - kept were dropped
    load: jax.Array  # [E] int32, choices per expert before dropping
    count: jax.Array  # [E] int32, choices that the balance loss counts
    prob: jax.Array  # [E] float32, sum of router probabilities
    z: jax.Array  # [] float32, sum of squared logsumexp of the router logits
    entropy: jax.Array  # [] float32, sum of the entropies of the router probabilities, nats
    sequences: jax.Array | None = None  # [] int32, sequences with at least one token
    by_sequence: jax.Array | None = None  # [] float32, sum over sequences of each one's balance loss
    unbiased: jax.Array | None = None  # [] float32, sum over sequences of DeepSeek-V3's loss
    sent: jax.Array | None = None  # [devices] int32, tokens with at least one expert in each group of experts
    importance: jax.Array | None = None  # [E] float32, sum of gates
    chance: jax.Array | None = None  # [E] float32, sum of the probabilities of being chosen (noisy_topk)
    rows: jax.Array | None = None  # [slots] int32, kept choices in each slot, where a placement has put the experts


def hits(expert: jax.Array, valid: jax.Array, experts: int) -> jax.Array:
    """Whether choice k is expert e: [..., K] -> [..., K, E] bool."""
    ids = jax.lax.broadcasted_iota(jnp.int32, (*expert.shape, experts), expert.ndim)
    return (expert[..., None] == ids) & valid[..., None]


def count_experts(expert: jax.Array, valid: jax.Array, experts: int) -> jax.Array:
    """Number of valid choices of each expert, [..., K] -> [E] int32."""
    return hits(expert, valid, experts).sum(tuple(range(expert.ndim)), dtype=jnp.int32)


def first_only(moe: MoEConfig) -> bool:
    """Whether the balance loss counts first choices only (GShard) or all K."""
    choice = moe.router.balance or ("first" if moe.router.kind == "gshard" else "all")
    return choice == "first"


def counted(routing: Routing, moe: MoEConfig) -> tuple[jax.Array, jax.Array]:
    """The choices that the balance loss counts, kept or not, and whether each is one."""
    if first_only(moe):
        return routing.expert[..., :1], routing.valid[..., :1]
    return routing.expert, routing.valid


def statistics(
    routing: Routing, slots: Slots, moe: MoEConfig, mask: jax.Array | None = None, rows: int | None = None
) -> Stats:
    """The sums of one layer over all tokens given, padding left out.

    Args:
        rows: number of sequences that the tokens make, in order; unset: one for each group.
    """
    E = routing.prob.shape[-1]
    mask = jnp.ones(routing.prob.shape[:-1], bool) if mask is None else mask
    lead = tuple(range(routing.prob.ndim - 1))
    load = count_experts(routing.expert, routing.valid, E)
    count = count_experts(*counted(routing, moe), E) if first_only(moe) else load
    log_z = jax.nn.logsumexp(routing.logits, axis=-1)  # [..., S]
    surprise = jax.lax.stop_gradient(-(routing.prob * jnp.log(routing.prob + 1e-30)).sum(-1))
    stats = Stats(
        tokens=mask.sum(dtype=jnp.int32),
        routed=routing.valid.sum(dtype=jnp.int32),
        kept=slots.kept.sum(dtype=jnp.int32),
        load=load,
        count=count,
        prob=jnp.where(mask[..., None], routing.prob, 0.0).sum(lead),
        z=jnp.where(mask, log_z**2, 0.0).sum(),
        entropy=jnp.where(mask, surprise, 0.0).sum(),
    )
    if moe.importance_loss:
        to_expert = hits(routing.expert, routing.valid, E).astype(jnp.float32)  # [..., S, K, E]
        stats = stats._replace(importance=(to_expert * routing.gate[..., None]).sum((*lead, routing.gate.ndim - 1)))
    if moe.load_loss and routing.chance is not None:
        stats = stats._replace(chance=jnp.where(mask[..., None], routing.chance, 0.0).sum(lead))
    if moe.communication_loss:
        stats = stats._replace(sent=sent(routing, moe))
    if moe.sequence_loss or moe.balance_over == "sequence":
        rows = rows or mask.size // mask.shape[-1]
        stats = stats._replace(**by_sequence(routing, mask, moe, rows))
    return stats


def sent(routing: Routing, moe: MoEConfig) -> jax.Array:
    """Tokens with at least one expert in each of `balance_devices` groups of neighbouring experts, [devices] int32."""
    devices = moe.balance_devices or 1
    device = routing.expert // (routing.prob.shape[-1] // devices)
    there = hits(device, routing.valid, devices).any(-2)  # [..., S, devices]
    return there.sum(tuple(range(there.ndim - 1)), dtype=jnp.int32)


def by_sequence(routing: Routing, mask: jax.Array, moe: MoEConfig, rows: int) -> dict[str, jax.Array]:
    """The fields of `Stats` that belong to losses taken sequence by sequence."""
    E = routing.prob.shape[-1]

    def row(x: jax.Array, *last: int) -> jax.Array:
        return x.reshape(rows, -1, *last)

    expert, valid = counted(routing, moe)
    mask = row(mask)  # [rows, L]
    prob = jnp.where(mask[..., None], row(routing.prob, E), 0.0).sum(1)  # [rows, E]
    tokens = jnp.maximum(mask.sum(1), 1).astype(jnp.float32)  # [rows]

    def loss(expert: jax.Array, valid: jax.Array, form: str) -> jax.Array:
        """Sum over sequences of E sum_i f_i P_i."""
        count = hits(expert, valid, E).sum((1, 2), dtype=jnp.int32)  # [rows, E]
        return per_count(count, prob, tokens, form).sum()

    out = {"sequences": mask.any(1).sum(dtype=jnp.int32)}
    if moe.balance_over == "sequence":
        out["by_sequence"] = loss(row(expert, expert.shape[-1]), row(valid, valid.shape[-1]), moe.balance_form)
    if moe.sequence_loss:
        assert routing.ranked is not None
        ranked = row(routing.ranked, moe.top_k)  # [rows, L, K]
        out["unbiased"] = loss(ranked, jnp.broadcast_to(mask[..., None], ranked.shape), "per_choice")
    return out


def per_count(count: jax.Array, prob: jax.Array, tokens: jax.Array, form: str) -> jax.Array:
    """E sum_i f_i P_i, f_i by `balance_form`, from counts and sums of probabilities [..., E] over tokens [...]."""
    counted = jnp.maximum(count.sum(-1, keepdims=True), 1)  # K a token, or 1, or what a random policy kept
    share = count.astype(jnp.float32) / counted.astype(jnp.float32)  # [..., E]
    if form == "per_token":
        share = count.astype(jnp.float32) / tokens[..., None]
    return count.shape[-1] * (share * prob / tokens[..., None]).sum(-1)


def token_count(stats: Stats) -> jax.Array:
    """Number of tokens, at least 1, as float32."""
    return jnp.maximum(stats.tokens, 1).astype(jnp.float32)


def balance_loss(stats: Stats, moe: MoEConfig) -> jax.Array:
    """Load-balance loss `E sum_i f_i P_i`, 1 at perfect balance for every K (Fedus et al. 2021, eq. 4-6).

    f_i is the share of the counted choices that expert i got, before dropping; P_i the mean probability. This equals
    `sum_i f_i P_i` with `f_i = E/(K T) count_i` (DeepSeekMoE: Dai et al. 2024, eq. 12). With
    `balance_form="per_token"` f_i counts choices a token, K times as much, as transformers does for Mixtral. The
    gradient flows through P alone. Works on one layer or on [layers, ...].
    """
    return per_count(stats.count, stats.prob, token_count(stats), moe.balance_form)


def expert_loss(stats: Stats, moe: MoEConfig) -> jax.Array:
    """The balance loss over the step, or its mean over the sequences."""
    if moe.balance_over != "sequence":
        return balance_loss(stats, moe)
    assert stats.by_sequence is not None and stats.sequences is not None
    return stats.by_sequence / jnp.maximum(stats.sequences, 1).astype(jnp.float32)


def sequence_loss(stats: Stats, moe: MoEConfig) -> jax.Array:
    """Sequence-wise balance loss on the unbiased top-K of the scores (DeepSeek-V3, eq. 17-20), mean over sequences."""
    assert stats.unbiased is not None and stats.sequences is not None
    return stats.unbiased / jnp.maximum(stats.sequences, 1).astype(jnp.float32)


def by_device(stats: Stats, moe: MoEConfig) -> tuple[jax.Array, jax.Array]:
    """(f_i [..., devices, E/devices] normalised to mean 1, P_d [..., devices] sum of the mean probabilities)."""
    devices = moe.balance_devices or 1
    E = moe.experts
    counted = jnp.maximum(stats.count.sum(-1, keepdims=True), 1).astype(jnp.float32)
    f = E * stats.count.astype(jnp.float32) / counted  # [..., E]
    mean = stats.prob / token_count(stats)[..., None]

    def split(x: jax.Array) -> jax.Array:
        return x.reshape(*x.shape[:-1], devices, E // devices)

    return split(f), split(mean).sum(-1)


def device_loss(stats: Stats, moe: MoEConfig) -> jax.Array:
    """sum_d f'_d P'_d with f' the mean of f over the experts of a device, P' the sum of P (DeepSeek-V2, eq. 26-28)."""
    f, prob = by_device(stats, moe)
    return (f.mean(-1) * prob).sum(-1)


def communication_loss(stats: Stats, moe: MoEConfig) -> jax.Array:
    """sum_d f''_d P'_d with f''_d = D/(M T) times the tokens sent to device d (DeepSeek-V2, eq. 29-31).

    M is the most devices that a token may use: `router.topk_groups`, or else min(K, D).
    """
    assert stats.sent is not None
    devices = moe.balance_devices or 1
    limit = moe.router.topk_groups or min(moe.top_k, devices)
    f = stats.sent.astype(jnp.float32) * (devices / limit) / token_count(stats)[..., None]
    return (f * by_device(stats, moe)[1]).sum(-1)


def squared_cv(x: jax.Array) -> jax.Array:
    """Squared coefficient of variation over the last axis: population variance over squared mean."""
    mean = x.mean(-1)
    return x.var(-1) / jnp.maximum(mean**2, 1e-20)


def importance_loss(stats: Stats, moe: MoEConfig) -> jax.Array:
    """Squared CV of the sums of gates (Shazeer et al. 2017, eq. 6-7)."""
    assert stats.importance is not None
    return squared_cv(stats.importance)


def load_loss(stats: Stats, moe: MoEConfig) -> jax.Array:
    """Squared CV of the expected loads, which have a gradient (Shazeer et al. 2017, appendix A, eq. 10-11).

    The expectation is over the noise; without noise, in evaluation, the loss is 0.
    """
    return jnp.zeros(stats.tokens.shape) if stats.chance is None else squared_cv(stats.chance)


def z_loss(stats: Stats, moe: MoEConfig | None = None) -> jax.Array:
    """Router z-loss, the mean squared logsumexp of the logits (Zoph et al. 2022, ST-MoE, eq. 5)."""
    return stats.z / token_count(stats)


LOSSES: dict[str, Callable[[Stats, MoEConfig], jax.Array]] = {
    "balance_loss": expert_loss,
    "sequence_loss": sequence_loss,
    "device_loss": device_loss,
    "communication_loss": communication_loss,
    "importance_loss": importance_loss,
    "load_loss": load_loss,
    "z_loss": z_loss,
}


def losses(stats: Stats, moe: MoEConfig) -> dict[str, jax.Array]:
    """Every loss that is on, without its coefficient: [] or [layers].

    0 is off. An array is on whatever its value, so that a traced coefficient can be changed without a new program; the
    layers that made the statistics need a number in its place.
    """
    coefficients = {name: getattr(moe, name) for name in LOSSES}
    return {name: LOSSES[name](stats, moe) for name, c in coefficients.items() if isinstance(c, jax.Array) or c}


def router_loss(stats: Stats, moe: MoEConfig) -> jax.Array:
    """What the router adds to the loss: each loss times its coefficient, summed over layers."""
    total = jnp.zeros(())
    for name, value in losses(stats, moe).items():
        total = total + getattr(moe, name) * value.sum()
    return total


def updated_bias(bias: jax.Array, load: jax.Array, moe: MoEConfig) -> jax.Array:
    """The selection bias after a step, up by `bias_rate` where an expert had less than the mean load, down where more.

    DeepSeek-V3, section 2.1.2; Wang et al. 2024. The comparison is exact in integers. `bias_update="centred"` takes
    the mean of the moves out, so that the biases keep their sum.

    Args:
        bias: [..., E] float32.
        load: [..., E] int32, choices of the whole step, before dropping.
    """
    total = load.sum(-1, keepdims=True)
    mean, rest = total // load.shape[-1], total % load.shape[-1]
    up = (load < mean) | ((load == mean) & (rest > 0))
    move = up.astype(jnp.float32) - (load > mean).astype(jnp.float32)
    if moe.bias_update == "centred":
        move = move - move.mean(-1, keepdims=True)
    return bias + (moe.bias_rate or 0.0) * move
