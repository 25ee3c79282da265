"""Loss, train step and evaluation step: pure functions of (state, batch, key)."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from moe_jax import balance
from moe_jax.axes import Layout
from moe_jax.balance import Stats
from moe_jax.layers.moe import FROM_CONFIG
from moe_jax.rules import constrain
from moe_jax.train.state import Model, State

Batch = dict[str, jax.Array]
"""tokens, targets, segments, positions [B, L] int32 and weights [B, L] float32."""


class Sums(NamedTuple):
    """What a batch adds up to; additive over microbatches and batches."""

    nats: jax.Array  # [] float32, sum of the cross entropies
    targets: jax.Array  # [] int32, number of predicted tokens
    tokens: jax.Array  # [] int32, tokens that are not padding
    stats: Stats | None  # of the MoE layers, [layers, ...]


def cross_entropy(logits: jax.Array, targets: jax.Array) -> jax.Array:
    """-log softmax(logits)[target], [B, L, V] and [B, L] -> [B, L] float32.

    The target is picked by comparison, not by a gather: a sharded vocabulary then needs no all-gather.
    """
    ids = jax.lax.broadcasted_iota(jnp.int32, logits.shape, logits.ndim - 1)
    chosen = jnp.where(ids == targets[..., None], logits, 0.0).sum(-1)
    return jax.nn.logsumexp(logits, axis=-1) - chosen


def forward(model: Model, params: Any, batch: Batch, *, train: bool, keys=None, capacity_factor=FROM_CONFIG) -> Sums:
    """The sums of one (micro)batch."""
    out = model.module(params)(
        batch["tokens"],
        segments=batch["segments"],
        positions=batch["positions"],
        train=train,
        key=keys,
        capacity_factor=capacity_factor,
    )
    nats = cross_entropy(out.logits, batch["targets"]) * batch["weights"]
    targets = (batch["weights"] > 0).sum(dtype=jnp.int32)
    return Sums(nats.sum(), targets, (batch["segments"] > 0).sum(dtype=jnp.int32), out.stats)


def microbatches(model: Model, tree: Any) -> Any:
    """[B, ...] -> [m, B/m, ...]: each device keeps its rows, and rows that share a routing group stay together."""
    cfg = model.cfg
    m, moe = cfg.train.microbatches, cfg.model.moe
    together = max(1, (moe.group_size or 1) // cfg.data.length) if moe is not None else 1
    layout: Layout = ((), cfg.rules.batch)

    def one(x: jax.Array) -> jax.Array:
        parts = x.reshape(-1, m, together, *x.shape[1:]).swapaxes(0, 1).reshape(m, -1, *x.shape[1:])
        return constrain(parts, layout + ((),) * (parts.ndim - 2))

    return jax.tree.map(one, tree)


def mean_nats(sums: Sums) -> jax.Array:
    """Cross entropy a predicted token."""
    return sums.nats / jnp.maximum(sums.targets, 1).astype(jnp.float32)


def total_loss(model: Model, params: Any, batch: Batch, keys: jax.Array) -> tuple[jax.Array, Sums]:
    """Mean cross entropy plus the router losses, each divided once, over the whole step.

    With microbatches the sums are added up inside the differentiated function and each part is recomputed in the
    backward pass: the balance loss is not a mean of per-part losses, so its gradient needs the counts of all parts.
    """
    if model.cfg.train.microbatches == 1:
        sums = forward(model, params, batch, train=True, keys=keys)
    else:

        @jax.checkpoint
        def part(params: Any, batch: Batch, keys: jax.Array) -> Sums:
            return forward(model, params, batch, train=True, keys=keys)

        def add(total: Sums, inputs: tuple[Batch, jax.Array]) -> tuple[Sums, None]:
            return jax.tree.map(jnp.add, total, part(params, *inputs)), None

        inputs = microbatches(model, batch), microbatches(model, keys)
        shapes = jax.eval_shape(part, params, *jax.tree.map(lambda x: x[0], inputs))
        zero = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
        sums, _ = jax.lax.scan(add, zero, inputs)
    loss = mean_nats(sums)
    moe = model.cfg.model.moe
    if sums.stats is not None and moe is not None:
        loss = loss + balance.router_loss(sums.stats, moe)
    return loss, sums


def report(model: Model, total: jax.Array, sums: Sums) -> dict[str, jax.Array]:
    """The numbers of a step that the log shows."""
    out = {"loss": mean_nats(sums), "total_loss": total, "tokens": sums.tokens}
    stats, moe = sums.stats, model.cfg.model.moe
    if stats is None or moe is None:
        return out
    return out | {
        "balance": balance.balance_loss(stats, moe).mean(),
        "z_loss": balance.z_loss(stats).mean(),
        "router_entropy": stats.entropy / balance.token_count(stats),  # [layers]
        "routed": stats.routed,  # [layers]
        "kept": stats.kept,  # [layers]
        "load": stats.load,  # [layers, E]
    }


def make_train_step(model: Model) -> Callable[[State, Batch, jax.Array], tuple[State, dict[str, jax.Array]]]:
    """One optimizer step. The key of a row is a function of (seed, step, row): nothing random is stored."""
    tx, rate = model.optimizer(), model.rate()

    def train_step(state: State, batch: Batch, seed: jax.Array) -> tuple[State, dict[str, jax.Array]]:
        keys = jax.random.split(jax.random.fold_in(seed, state.step), batch["tokens"].shape[0])
        (total, sums), grads = jax.value_and_grad(total_loss, argnums=1, has_aux=True)(model, state.params, batch, keys)
        with jax.named_scope("optimizer"):
            updates, opt_state = tx.update(grads, state.opt_state, state.params)
            params = optax.apply_updates(state.params, updates)
        metrics = report(model, total, sums)
        more = {"grad_norm": jnp.asarray(optax.tree.norm(grads)), "learning_rate": jnp.asarray(rate(state.step))}
        return State(params, opt_state, state.step + 1), metrics | more

    return train_step


def make_eval_step(model: Model, capacity_factor: float | None) -> Callable[[Any, Batch], Sums]:
    """Sums of a batch without noise or dropout, dropless (None) or at a capacity factor."""

    def eval_step(params: Any, batch: Batch) -> Sums:
        return forward(model, params, batch, train=False, capacity_factor=capacity_factor)

    return eval_step
