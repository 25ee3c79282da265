"""Routers: router logits to a `Routing`. Pure functions on arrays; no Flax, no mesh.

A router is one function of `Inputs` and one row of `ROUTERS`. It gets float32 logits `[..., S, E]` and returns the
chosen experts, best first, their gates and the probabilities that the balance losses use. Noise comes in as numbers
drawn from an explicit key by `draw`; without it a router is deterministic, as in evaluation. Experts are chosen by
their logits where these order them as the scores do: logits keep their order where probabilities underflow.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from moe_jax.config import MoEConfig


class Routing(NamedTuple):
    """Which experts each token goes to. Shapes have any leading dimensions, usually G groups.

    K is `top_k`; E for expert choice, where a token may be chosen by any number of experts.
    """

    expert: jax.Array  # [..., S, K] int32, best first
    gate: jax.Array  # [..., S, K] float32, 0 where not valid
    valid: jax.Array  # [..., S, K] bool, False: padding, a second expert that was not kept, a token not chosen
    prob: jax.Array  # [..., S, E] float32, sums to 1 over the experts
    logits: jax.Array  # [..., S, E] float32
    chance: jax.Array | None = None  # [..., S, E] float32, noisy_topk: probability of being chosen under other noise
    ranked: jax.Array | None = None  # [..., S, K] int32, the K best without bias and groups, for the sequence-wise loss


class Noise(NamedTuple):
    """Random numbers with the leading dimensions of the logits; None where nothing is drawn."""

    # [..., S] or [..., S, E], uniform in [0, 1) for gshard, normal for noisy_topk; [..., S, 2, E+1], uniform, for
    # sparsemixer
    router: jax.Array | None
    priority: jax.Array | None  # [..., S, K], uniform in [0, 1)


QUIET = Noise(None, None)


class Inputs(NamedTuple):
    """What a router may look at."""

    logits: jax.Array  # [..., S, E] float32
    mask: jax.Array | None = None  # [..., S] bool, False for padding
    noise: jax.Array | None = None  # Noise.router
    bias: jax.Array | None = None  # [E] float32, added to the scores that choose, never to the gates
    spread: jax.Array | None = None  # [..., S, E] float32 > 0, noisy_topk: standard deviation of its noise
    ids: jax.Array | None = None  # [..., S] int32, hash: token ids
    slots: int | None = None  # expert_choice: tokens an expert takes
    chosen: jax.Array | None = None  # [..., S, K] int32 experts to take in place of the router's
    asked: jax.Array | None = None  # [..., S, K] bool, which of those are choices; there if `chosen` is


class Choice(NamedTuple):
    """What a router returns; fields as in `Routing`."""

    expert: jax.Array
    gate: jax.Array
    valid: jax.Array
    prob: jax.Array
    chance: jax.Array | None = None


def draw(key: jax.Array | None, moe: MoEConfig, shape: tuple[int, ...]) -> Noise:
    """The noise for logits of `shape` [S, E] of one group; nothing without a key."""
    if key is None:
        return QUIET
    S, E = shape
    router_key, priority_key = jax.random.split(key)
    router = None
    if moe.router.kind == "gshard" and moe.router.second != "always":
        router = jax.random.uniform(router_key, (S,) if moe.router.second == "random" else (S, E))
    if moe.router.kind == "noisy_topk":
        router = jax.random.normal(router_key, (S, E))
    if moe.router.kind == "sparsemixer":
        router = jax.random.uniform(router_key, (S, 2, E + 1))
    priority = jax.random.uniform(priority_key, (S, moe.top_k)) if moe.priority == "random" else None
    return Noise(router, priority)


def jittered(x: jax.Array, jitter: float, key: jax.Array | None) -> jax.Array:
    """x times uniform numbers of [1-jitter, 1+jitter] (Fedus et al. 2021, section 2.4); as it is without a key."""
    if key is None or jitter == 0.0:
        return x
    return x * jax.random.uniform(key, x.shape, x.dtype, 1.0 - jitter, 1.0 + jitter)


def pick(values: jax.Array, index: jax.Array) -> jax.Array:
    """values [..., E] at index [..., K]."""
    return jnp.take_along_axis(values, index, axis=-1)


def best(scores: jax.Array, k: int) -> jax.Array:
    """Index [..., K] of the K largest, best first, equals in the order of the experts."""
    return jax.lax.top_k(scores, k)[1]


def normalized(gate: jax.Array) -> jax.Array:
    """Gates [..., K] divided by their sum."""
    return gate / (gate.sum(-1, keepdims=True) + 1e-9)  # 1e-9 as in mesh-tensorflow's top-2 gating


def gumbel(uniform: jax.Array) -> jax.Array:
    """Gumbel noise from numbers in [0, 1): the largest of logits with it is a draw from their softmax."""
    return -jnp.log(-jnp.log(jnp.clip(uniform, 1e-20, 1.0 - 1e-7)))


def softmax_of(logits: jax.Array, i: Inputs) -> jax.Array:
    """Softmax over the logits [..., K] of the choices."""
    return jax.nn.softmax(logits if i.asked is None else jnp.where(i.asked, logits, jnp.finfo(jnp.float32).min))


def all_of(expert: jax.Array) -> jax.Array:
    return jnp.ones(expert.shape, bool)


def switch(i: Inputs, moe: MoEConfig) -> Choice:
    """Top-1; the gate is the softmax probability, which carries the router's gradient (Fedus et al. 2021, eq. 1-2)."""
    prob = jax.nn.softmax(i.logits)
    expert = jnp.argmax(i.logits, -1, keepdims=True) if i.chosen is None else i.chosen  # [..., S, 1]
    return Choice(expert, pick(prob, expert), all_of(expert), prob)


def gshard(i: Inputs, moe: MoEConfig) -> Choice:
    """Top-2 with normalised gates (Lepikhin et al. 2020, Algorithm 1).

    The second expert is kept always, at random with probability min(1, g2 / threshold), or sampled in proportion to
    its weight by the Gumbel-max trick. Without noise (evaluation) it is the second best and always kept.
    """
    prob = jax.nn.softmax(i.logits)
    if i.chosen is None:
        first = jnp.argmax(i.logits, -1, keepdims=True)  # [..., S, 1]
        experts = jax.lax.broadcasted_iota(jnp.int32, i.logits.shape, i.logits.ndim - 1)
        score = i.logits
        if moe.router.second == "sample" and i.noise is not None:
            score = i.logits + gumbel(i.noise)
        second = jnp.argmax(jnp.where(experts == first, -jnp.inf, score), -1, keepdims=True)
        expert = jnp.concatenate([first, second], -1)  # [..., S, 2]
    else:
        expert = i.chosen
    gate = pick(prob, expert)
    share = normalized(gate)
    keep = all_of(expert)
    if moe.router.second == "random" and i.noise is not None and i.chosen is None:
        keep = keep.at[..., 1].set(i.noise < share[..., 1] / moe.router.threshold)
    return Choice(expert, share if moe.router.normalize in (None, "before") else gate, keep, prob)


def topk_softmax(i: Inputs, moe: MoEConfig) -> Choice:
    """Softmax over the K chosen logits (Jiang et al. 2024, Mixtral, section 2.1)."""
    expert = best(i.logits, moe.top_k) if i.chosen is None else i.chosen  # [..., S, K]
    return Choice(expert, softmax_of(pick(i.logits, expert), i), all_of(expert), jax.nn.softmax(i.logits))


def noisy_topk(i: Inputs, moe: MoEConfig) -> Choice:
    """Softmax over the K best of logits plus learned noise (Shazeer et al. 2017, eq. 3-5).

    `chance` is P(x, i), the probability that expert i is among the K best when its own noise is drawn again
    (appendix A, eq. 8-9); its sum over tokens is a load that has a gradient. Evaluation draws no noise.
    """
    prob = jax.nn.softmax(i.logits)
    noisy = i.logits
    if i.noise is not None and i.spread is not None:
        noisy = i.logits + i.noise * i.spread
    expert = best(noisy, moe.top_k) if i.chosen is None else i.chosen  # [..., S, K]
    gate = softmax_of(pick(noisy, expert), i)
    chance = None
    if i.noise is not None and i.spread is not None and i.chosen is None:
        if moe.top_k == moe.experts:
            chance = jnp.ones_like(prob)
        else:
            top = jax.lax.top_k(noisy, moe.top_k + 1)[0]  # [..., S, K+1]
            inside, outside = top[..., -1:], top[..., -2:-1]  # what a chosen expert, and another one, has to beat
            bar = jnp.where(noisy > inside, inside, outside)
            chance = jax.scipy.stats.norm.cdf((i.logits - bar) / i.spread)
    return Choice(expert, gate, all_of(expert), prob, chance)


def within_groups(score: jax.Array, moe: MoEConfig, measure: str) -> jax.Array:
    """Scores [..., E] with -inf outside the best `topk_groups` groups of neighbouring experts.

    A group is measured by its best score (DeepSeek-V2), the sum of its two best (V3's code) or of its K/topk_groups
    best (V3's paper, section 2.1.2).
    """
    n, keep = moe.router.groups, moe.router.topk_groups
    if keep is None or keep == n:
        return score
    grouped = score.reshape(*score.shape[:-1], n, -1)  # [..., n, E/n]
    count = {"max": 1, "sum2": 2, "sumk": moe.top_k // keep}[measure]
    value = jax.lax.top_k(grouped, count)[0].sum(-1)  # [..., n]
    chosen = best(value, keep)  # [..., topk_groups]
    ids = jax.lax.broadcasted_iota(jnp.int32, (*value.shape, keep), value.ndim - 1)
    inside = (ids == chosen[..., None, :]).any(-1)  # [..., n]
    return jnp.where(inside[..., None], grouped, -jnp.inf).reshape(score.shape)


def scored(i: Inputs, moe: MoEConfig, score: jax.Array, measure: str, normalize: bool) -> tuple[jax.Array, jax.Array]:
    """(expert, gate) [..., S, K]: the K best of score + bias within the best groups; gates from the unbiased score."""
    if i.chosen is None:
        measure = moe.router.group_score or measure
        limited = moe.router.topk_groups not in (None, moe.router.groups)
        choosing = score
        if i.bias is not None:
            choosing = score + i.bias.reshape((1,) * (score.ndim - 1) + (-1,))
        elif measure == "max" or not limited:
            choosing = i.logits
        expert = best(within_groups(choosing, moe, measure), moe.top_k)
    else:
        expert = i.chosen
    gate = pick(score, expert)
    if i.asked is not None:
        gate = jnp.where(i.asked, gate, 0.0)
    if moe.router.normalize == "before" or (moe.router.normalize is None and normalize):
        gate = shares(gate)
    return expert, gate


def shares(score: jax.Array) -> jax.Array:
    """Scores [..., n] divided by their sum, however small it is; zeros stay zeros."""
    largest = jax.lax.stop_gradient(score.max(-1, keepdims=True))
    score = score / jnp.where(largest > 0, largest, 1.0)  # the quotient does not depend on it, and cannot underflow
    return score / jnp.maximum(score.sum(-1, keepdims=True), 1e-18)


def softmax_topk(i: Inputs, moe: MoEConfig) -> Choice:
    """The K best of the softmax over all experts (Muennighoff et al. 2024, OLMoE); normalised if asked."""
    prob = jax.nn.softmax(i.logits)
    expert, gate = scored(i, moe, prob, "max", normalize=False)
    return Choice(expert, gate, all_of(expert), prob)


def deepseek_v3(i: Inputs, moe: MoEConfig) -> Choice:
    """Sigmoid scores, chosen with a bias within the best groups, gates from the unbiased ones divided by their sum.

    DeepSeek-AI 2024 (V3), eq. 12-16. The balance losses use s / sum(s), eq. 19.
    """
    score = jax.nn.sigmoid(i.logits)
    expert, gate = scored(i, moe, score, "sum2", normalize=True)
    return Choice(expert, gate, all_of(expert), shares(score))


def sparsemixer(i: Inputs, moe: MoEConfig) -> Choice:
    """Two experts, each weighed by the softmax over the logits near the best one left (Liu et al. 2024, GRIN).

    With noise an expert is drawn from that softmax, else it is the best. A drawn expert that is not the best counts a
    third three times in four, with its whole gradient: Heun's third-order method. The gates do not sum to 1.
    """
    margin = 0.02 if moe.router.margin is None else moe.router.margin
    experts = jax.lax.broadcasted_iota(jnp.int32, i.logits.shape, i.logits.ndim - 1)
    left, chosen, gates = i.logits, [], []
    for k in range(2):
        largest, first = left.max(-1, keepdims=True), jnp.argmax(left, -1, keepdims=True)  # [..., S, 1]
        near = largest - i.logits <= margin * jnp.maximum(jnp.abs(i.logits), largest)
        masked = jnp.where(near, left, -jnp.inf)  # [..., S, E]
        expert = first
        if i.chosen is not None:
            expert = i.chosen[..., k : k + 1]
        elif i.noise is not None:
            expert = jnp.argmax(masked + gumbel(i.noise[..., k, :-1]), -1, keepdims=True)
        gate = pick(jax.nn.softmax(masked), expert)
        if i.noise is not None:
            whole = (expert == first) | (i.noise[..., k, -1:] > 0.75)
            gate = gate - jax.lax.stop_gradient(jnp.where(whole, 0.0, gate * (2 / 3)))
        taken = experts == expert
        left = jnp.where(taken if i.asked is None else taken & i.asked[..., k : k + 1], -jnp.inf, left)
        chosen.append(expert)
        gates.append(gate)
    expert = jnp.concatenate(chosen, -1)  # [..., S, 2]
    return Choice(expert, jnp.concatenate(gates, -1), all_of(expert), jax.nn.softmax(i.logits))


def expert_choice(i: Inputs, moe: MoEConfig) -> Choice:
    """Each expert takes its `slots` best tokens of the group by the softmax over experts (Zhou et al. 2022, eq. 1-2).

    Balanced by construction. A token's experts depend on the tokens after it. K is E here: choice k is expert k.
    """
    prob = jax.nn.softmax(i.logits)
    if i.chosen is not None:
        return Choice(i.chosen, pick(prob, i.chosen), all_of(i.chosen), prob)
    if i.slots is None:
        raise ValueError("expert_choice takes a number of tokens an expert: pass it, route(..., slots=capacity(...))")
    score = prob if i.mask is None else jnp.where(i.mask[..., None], prob, -1.0)
    by_expert = jnp.swapaxes(score, -1, -2)  # [..., E, S]
    token = best(by_expert, min(i.slots, score.shape[-2]))  # [..., E, C]
    rank = jax.lax.broadcasted_iota(jnp.int32, token.shape, token.ndim - 1)
    place = jnp.full(by_expert.shape, token.shape[-1], jnp.int32)
    place = jnp.put_along_axis(place, token, rank, axis=-1, inplace=False)
    valid = jnp.swapaxes(place < token.shape[-1], -1, -2)  # [..., S, E]
    expert = jax.lax.broadcasted_iota(jnp.int32, prob.shape, prob.ndim - 1)
    return Choice(expert, prob, valid, prob)


def scramble(ids: jax.Array) -> jax.Array:
    """A fixed hash of 32-bit integers (the finalizer of MurmurHash3), so that neighbouring ids part."""
    h = ids.astype(jnp.uint32)
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        h = (h ^ (h >> jnp.uint32(shift))) * jnp.uint32(factor)
    return h ^ (h >> jnp.uint32(16))


def hashed(i: Inputs, moe: MoEConfig) -> Choice:
    """K neighbouring experts from a hash of the token's id, with equal gates (Roller et al. 2021, section 3).

    The baseline that learns nothing: its probabilities are uniform and its logits are not looked at.
    """
    if i.chosen is None:
        if i.ids is None:
            raise ValueError("the hash router chooses by token id: pass them, MoELayer(x, tokens=ids)")
        first = (scramble(i.ids) % jnp.uint32(moe.experts)).astype(jnp.int32)  # [..., S]
        step = jax.lax.broadcasted_iota(jnp.int32, (*first.shape, moe.top_k), first.ndim)
        expert = (first[..., None] + step) % moe.experts
    else:
        expert = i.chosen
    gate = jnp.full(expert.shape, 1.0 / moe.top_k)
    return Choice(expert, gate, all_of(expert), jnp.full(i.logits.shape, 1.0 / moe.experts))


ROUTERS: dict[str, Callable[[Inputs, MoEConfig], Choice]] = {
    "switch": switch,
    "gshard": gshard,
    "topk_softmax": topk_softmax,
    "softmax_topk": softmax_topk,
    "noisy_topk": noisy_topk,
    "deepseek_v2": softmax_topk,  # V2 is that within the best groups (DeepSeek-AI 2024, V2, section 2.2.2)
    "deepseek_v3": deepseek_v3,
    "sparsemixer": sparsemixer,
    "expert_choice": expert_choice,
    "hash": hashed,
}


def forced(moe: MoEConfig, shape: tuple[int, ...]) -> jax.Array:
    """Experts [..., S, K] for logits of `shape` [..., S, E], for benchmarks whose load must not depend on a model.

    `balanced`: the experts in turn. `biased`: each expert has log odds of a normal distribution with `force_std`.
    Every group gets the same.
    """
    *lead, S, E = shape
    if moe.router.force == "balanced":
        expert = jnp.arange(S * moe.top_k).reshape(S, moe.top_k) % E  # [S,K]
    else:
        odds = moe.router.force_std * jax.random.normal(jax.random.key(0), (1, E))
        expert = best(odds + jax.random.gumbel(jax.random.key(1), (S, E)), moe.top_k)
    return jnp.broadcast_to(expert, (*lead, S, moe.top_k))


def route(
    logits: jax.Array,
    moe: MoEConfig,
    mask: jax.Array | None = None,
    noise: Noise = QUIET,
    *,
    bias: jax.Array | None = None,
    spread: jax.Array | None = None,
    ids: jax.Array | None = None,
    slots: int | None = None,
    chosen: jax.Array | None = None,
) -> Routing:
    """Route tokens to experts.

    Args:
        logits: [..., S, E], computed in float32.
        mask: [..., S] bool, False for padding, which gets no expert.
        noise: from `draw`; empty in evaluation.
        bias: [E] float32, added to the scores by which experts are chosen (softmax_topk, deepseek_v2, deepseek_v3).
        spread: [..., S, E] float32, standard deviation of the noise of noisy_topk.
        ids: [..., S] int32, token ids, for hash.
        slots: tokens that an expert takes of a group, for expert_choice.
        chosen: [..., S, K] int32, experts to take in place of the router's own, from `recorded`; below 0 or not below
            E: none. Gates are still computed from the logits.
    Returns:
        Routing with expert, gate and valid [..., S, K], prob and logits [..., S, E].
    """
    logits = logits.astype(jnp.float32)
    check_mask(mask, logits.shape[:-1])
    if chosen is None and moe.router.force is not None:
        chosen = forced(moe, logits.shape)
    bias = None if bias is None else jax.lax.stop_gradient(bias)
    asked = None
    if chosen is not None:
        asked = (chosen >= 0) & (chosen < logits.shape[-1])  # there is no other: asked for, it would be NaN
        chosen = jnp.clip(jnp.where(chosen < 0, ~chosen, chosen), 0, logits.shape[-1] - 1)
    choice = ROUTERS[moe.router.kind](Inputs(logits, mask, noise.router, bias, spread, ids, slots, chosen, asked), moe)
    valid = choice.valid if asked is None else choice.valid & asked
    if mask is not None:
        valid = valid & mask[..., None]
    gate = jnp.where(valid, choice.gate * moe.router.scale, 0.0)
    ranked = best(logits, moe.top_k) if moe.sequence_loss else None
    return Routing(choice.expert.astype(jnp.int32), gate, valid, choice.prob, logits, choice.chance, ranked)


def check_mask(mask: jax.Array | None, shape: tuple[int, ...]) -> None:
    """Refuse a mask that is not one: integers, such as segment ids, would select some of the tokens only.

    Raises:
        ValueError: another shape or type.
    """
    if mask is not None and (mask.shape != shape or mask.dtype != jnp.bool_):
        why = f"the mask is {mask.dtype}{list(mask.shape)}, and bool{list(shape)} is needed"
        raise ValueError(f"{why}: True for tokens and False for padding, for example segments > 0")


def recorded(routing: Routing) -> jax.Array:
    """Experts [..., S, K] that `route` takes as `chosen`: e, or ~e (negative) where e was not chosen after all.

    Which one that was counts for gshard, where a second expert that is not kept still shares in the first one's gate.
    """
    return jnp.where(routing.valid, routing.expert, ~routing.expert)


def in_slots(routing: Routing, replicas: jax.Array, turn: jax.Array, slots: int) -> Routing:
    """The same routing with the slots that hold the chosen experts in place of their numbers.

    An expert's replicas take its tokens in turn, so that they share its load wherever those come from.

    Args:
        replicas: [E, most] int32, the slots of each expert, padded with -1.
        turn: [..., S] int32, from 0, of each token; tokens that follow one another differ by 1.
    Returns:
        `expert` [..., S, K] counts slots, which differ within a token as experts do. `prob` [..., S, slots] is empty:
        dispatchers take no more than its last dimension.
    """
    count = (replicas >= 0).sum(-1, dtype=jnp.int32)  # [E]
    slot = replicas[routing.expert, turn[..., None] % count[routing.expert]]
    return routing._replace(expert=slot, prob=jnp.zeros((*routing.prob.shape[:-1], slots), jnp.float32))
