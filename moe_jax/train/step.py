"""Loss, train step and evaluation step: pure functions of (state, batch, key)."""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, PartitionSpec

from moe_jax import balance
from moe_jax.balance import Stats
from moe_jax.config import Config
from moe_jax.layers.moe import FROM_CONFIG
from moe_jax.pattern import Schedule
from moe_jax.pipeline import split
from moe_jax.rules import any_axes, current_mesh, sharding
from moe_jax.sequence import ordered, shards
from moe_jax.train.optimizer import names_of
from moe_jax.train.state import Model, State, Weights, nnx_keys, text_keys

Batch = dict[str, jax.Array]
"""tokens, targets, segments, positions [B, L] int32 and weights [B, L] float32; for an encoder also inputs,
input_segments and input_positions [B, M] int32."""
INPUTS = ("inputs", "input_segments", "input_positions")
Metrics = dict[str, Any]
"""Arrays by name; `grad_norms` is a table of them."""


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


def together(cfg: Config) -> int:
    """Rows that share a routing group, and so a microbatch."""
    moe = cfg.model.moe
    size = moe.group_size if moe is not None and isinstance(moe.group_size, int) else 1
    return max(1, size // cfg.data.length)


def schedule(cfg: Config) -> Schedule | None:
    """How the rows of a batch pass through the stages of the mesh; None where it has one stage."""
    if cfg.mesh.stage == 1:
        return None
    return Schedule(cfg.mesh.stage, cfg.train.microbatches, cfg.train.rounds, together(cfg))


def forward(model: Model, weights: Weights, batch: Batch, *, train: bool, keys=None, capacity_factor=FROM_CONFIG):
    """The `Sums` of one (micro)batch, or of a whole batch whose microbatches pass through the stages of a pipeline.

    Split rows are put in the order of their shards here, once: nothing after it moves a token, and all that is summed
    does not know the order.
    """
    rules = model.cfg.rules
    batch = {name: ordered(rows, rules, shards(rules)) for name, rows in batch.items()}
    out = model.module(*weights)(
        batch["tokens"],
        segments=batch["segments"],
        positions=batch["positions"],
        train=train,
        key=keys,
        capacity_factor=capacity_factor,
        balanced=True,
        schedule=schedule(model.cfg),
        **{name: rows for name, rows in batch.items() if name in INPUTS},
    )
    nats = cross_entropy(out.logits, batch["targets"]) * batch["weights"]
    targets = (batch["weights"] > 0).sum(dtype=jnp.int32)
    return Sums(nats.sum(), targets, (batch["segments"] > 0).sum(dtype=jnp.int32), out.stats)


def mean_nats(sums: Sums) -> jax.Array:
    """Cross entropy a predicted token."""
    return sums.nats / jnp.maximum(sums.targets, 1).astype(jnp.float32)


@any_axes(lambda *_: PartitionSpec())
def total_loss(model: Model, params: Any, batch: Batch, keys: jax.Array, bias: Any = None) -> tuple[jax.Array, Sums]:
    """Mean cross entropy plus the router losses, each divided once, over the whole step.

    With microbatches the sums are added up inside the differentiated function and each part is recomputed in the
    backward pass: the balance loss is not a mean of per-part losses, so its gradient needs the counts of all parts.
    With `balance_over="microbatch"` the balance loss is the mean of the parts' own. In a pipeline the microbatches are
    parts of one pass, which adds them up itself.
    """
    m, moe = model.cfg.train.microbatches if model.cfg.mesh.stage == 1 else 1, model.cfg.model.moe
    own = moe is not None and moe.balance_over == "microbatch"
    rest = dataclasses.replace(moe, balance_loss=0.0) if moe is not None and own else moe

    def part(params: Any, batch: Batch, keys: jax.Array) -> tuple[Sums, jax.Array]:
        sums = forward(model, Weights(params, bias), batch, train=True, keys=keys)
        if moe is None or sums.stats is None or not own:
            return sums, jnp.zeros(())
        return sums, moe.balance_loss * balance.balance_loss(sums.stats, moe).sum()

    if m == 1:
        sums, balancing = part(params, batch, keys)
    else:
        again = jax.checkpoint(part)

        def add(total: Any, inputs: tuple[Batch, jax.Array]) -> tuple[Any, None]:
            return jax.tree.map(jnp.add, total, again(params, *inputs)), None

        inputs = split((batch, keys), m, together(model.cfg), model.cfg.rules)
        shapes = jax.eval_shape(part, params, *jax.tree.map(lambda x: x[0], inputs))
        zero = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
        (sums, balancing), _ = jax.lax.scan(add, zero, inputs)
    loss = mean_nats(sums) + balancing / m
    return (loss if sums.stats is None or rest is None else loss + balance.router_loss(sums.stats, rest)), sums


def report(model: Model, total: jax.Array, sums: Sums) -> dict[str, jax.Array]:
    """The numbers of a step that the log shows."""
    out = {"loss": mean_nats(sums), "total_loss": total, "tokens": sums.tokens}
    stats, moe = sums.stats, model.cfg.model.moe
    if stats is None or moe is None:
        return out
    return out | {
        "balance": balance.balance_loss(stats, dataclasses.replace(moe, balance_form="per_choice")).mean(),
        "z_loss": balance.z_loss(stats).mean(),
        **{n: v.mean() for n, v in balance.losses(stats, moe).items() if n not in ("balance_loss", "z_loss")},
        "router_entropy": stats.entropy / balance.token_count(stats),  # [layers]
        "least_prob": stats.prob.min(-1) / balance.token_count(stats),  # [layers], of the least probable expert
        "routed": stats.routed,  # [layers]
        "kept": stats.kept,  # [layers]
        "load": stats.load,  # [layers, E]
    }


GROUPS = {  # a name on the way to a parameter -> what it is; the first that fits counts
    "experts": "experts",
    "shared": "shared",
    "shared_gate": "shared",
    "router": "router",
    "router_bias": "router",
    "gate_in": "gate_in",
    "noise": "noise",
    "cross_attention": "cross_attention",
    "attention": "attention",
    "ffn": "ffn",
    "embedding": "embedding",
}


def grouped(params: Any) -> dict[str, list]:
    """Parameters, or their gradients, by what they are: one of `GROUPS`, `norm` or their own name."""
    out: dict[str, list] = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        names = names_of(path)
        norm = "norm" if names[-2:-1] and names[-2].endswith("norm") else names[-1]
        out.setdefault(next((group for name, group in GROUPS.items() if name in names), norm), []).append(leaf)
    return out


def make_train_step(model: Model) -> Callable[[State, Batch, jax.Array], tuple[State, Metrics]]:
    """One optimizer step. The key of a row is a function of (seed, step, row): nothing random is stored."""
    tx, rate = model.optimizer(), model.rate()

    def typed(*_: Any) -> Any:
        return jax.tree.map(lambda s: s.spec, model.shardings(current_mesh())), PartitionSpec()

    @any_axes(typed)
    def train_step(state: State, batch: Batch, seed: jax.Array) -> tuple[State, Metrics]:
        keys = jax.random.split(jax.random.fold_in(seed, state.step), batch["tokens"].shape[0])
        loss = jax.value_and_grad(total_loss, argnums=1, has_aux=True)
        (total, sums), grads = loss(model, state.params, batch, keys, state.bias)
        with jax.named_scope("optimizer"):
            updates, opt_state = tx.update(grads, state.opt_state, state.params)
            params = optax.apply_updates(state.params, updates)
            more = {
                "grad_norm": jnp.asarray(optax.tree.norm(grads)),
                "grad_norms": {name: jnp.asarray(optax.tree.norm(part)) for name, part in grouped(grads).items()},
                "learning_rate": jnp.asarray(rate(state.step)),
            }
        metrics: Metrics = report(model, total, sums)
        return State(params, moved(model, state.bias, sums.stats), opt_state, state.step + 1), metrics | more

    return train_step


def batch_targets(model: Model, mesh: Mesh) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes of the batch of a step, with its rows in their shards."""
    data = model.cfg.data
    rows = sharding(mesh, (model.cfg.rules.batch, ()))
    names = dict.fromkeys(("tokens", "targets", "segments", "positions"), jnp.int32) | {"weights": jnp.float32}
    out = {n: jax.ShapeDtypeStruct((data.batch, data.length), t, sharding=rows) for n, t in names.items()}
    before = jax.ShapeDtypeStruct((data.batch, model.cfg.inputs), jnp.int32, sharding=rows)
    return out | (dict.fromkeys(INPUTS, before) if model.cfg.inputs else {})


def lower_train_step(model: Model, mesh: Mesh) -> jax.stages.Lowered:
    """The train step as `moe-jax train` runs it, from shapes alone; the old state's memory is reused for the new."""
    seed = jax.eval_shape(lambda: jax.random.key(0))
    step = jax.jit(make_train_step(model), donate_argnums=0, out_shardings=(model.shardings(mesh), None))
    with jax.set_mesh(mesh):
        return step.lower(model.targets(mesh), batch_targets(model, mesh), seed)


def lower_forward(model: Model, mesh: Mesh) -> jax.stages.Lowered:
    """The loss of a train step without its gradient, from shapes alone."""
    seed = jax.eval_shape(lambda: jax.random.key(0))

    def loss(params: Any, bias: Any, batch: Batch, seed: jax.Array) -> tuple[jax.Array, Sums]:
        keys = jax.random.split(seed, batch["tokens"].shape[0])
        return total_loss(model, params, batch, keys, bias)

    with jax.set_mesh(mesh):
        return jax.jit(loss).lower(*model.weight_targets(mesh), batch_targets(model, mesh), seed)


def moved(model: Model, bias: Any, stats: Stats | None) -> Any:
    """The selection biases after a step, by the loads of the whole step.

    A run of `repeats` periods with m MoE layers has m biases [repeats, E]; its loads are [repeats * m, E].
    """
    moe = model.cfg.model.moe
    if stats is None or moe is None or moe.bias_rate is None:
        return bias
    loads, done = [], 0
    for kinds, repeats in (*model.cfg.model.encoder_runs, *model.cfg.model.runs):
        m = kinds.count("moe")
        by_layer = stats.load[done : done + repeats * m].reshape(repeats, m, moe.experts)
        loads += [by_layer[:, j] for j in range(m)]
        done += repeats * m
    leaves, tree = jax.tree.flatten(nnx_keys(bias))  # with numbers for keys: in the order of the layers
    new = [balance.updated_bias(b, load, moe) for b, load in zip(leaves, loads, strict=True)]
    return text_keys(jax.tree.unflatten(tree, new))


def make_eval_step(model: Model, capacity_factor: float | None) -> Callable[[Weights, Batch], Sums]:
    """Sums of a batch without noise or dropout, dropless (None) or at a capacity factor."""

    def eval_step(weights: Weights, batch: Batch) -> Sums:
        return forward(model, weights, batch, train=False, capacity_factor=capacity_factor)

    return eval_step
