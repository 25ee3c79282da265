"""Faults to plant in the library, each in one function: mistakes that MoE systems have made or could make."""

import dataclasses
from collections.abc import Callable
from types import ModuleType
from typing import NamedTuple

import invariance
import jax
import jax.numpy as jnp
import pytest
from invariance import Cell, Evaluation

from moe_jax import balance, capacity, dispatch, routing
from moe_jax.layers import moe as layer
from moe_jax.layers import ragged
from moe_jax.train import step


@jax.custom_vjp
def twice(x):
    """x, whose gradient comes out doubled."""
    return x


twice.defvjp(lambda x: (x, None), lambda _, g: (2 * g,))


def detached(real, program, stats, moe):
    return jax.lax.stop_gradient(real(stats, moe))


def over_replicas(real, program, stats, moe):
    return real(stats, moe) / jax.sharding.get_abstract_mesh().shape["data"]


def over_microbatches(real, program, stats, moe):
    return real(stats, moe) / program.microbatches


def again_when_recomputed(real, program, *args, **kwargs):
    stats = real(*args, **kwargs)
    return stats if program.remat == "none" else stats._replace(prob=twice(stats.prob))


def in_bfloat16(real, program, expert, valid, experts):
    hit = balance.hits(expert, valid, experts).astype(jnp.bfloat16)
    return hit.sum(tuple(range(expert.ndim))).astype(jnp.int32)


def with_padding(real, program, routing, slots, moe, mask, rows):
    return real(routing, slots, moe, None, rows)


def unmasked(real, program, logits, moe, mask, *args, **kwargs):
    return real(logits, moe, None, *args, **kwargs)


def without_k(real, program, count, prob, tokens, form):
    return count.shape[-1] * (count.astype(jnp.float32) * prob / tokens[..., None] ** 2).sum(-1)


def slots_without_k(real, program, moe, tokens, factor):
    return real(dataclasses.replace(moe, top_k=1), tokens, factor)


def biased_gates(real, program, i, moe, score, measure, normalize):
    expert, _ = real(i, moe, score, measure, normalize)
    gate = routing.pick(score + i.bias.reshape(1, 1, -1), expert)
    return expert, gate / gate.sum(-1, keepdims=True)


def masked_with_zero(real, program, score, moe, measure):
    limited = real(score, moe, measure)
    return jnp.where(jnp.isneginf(limited), 0.0, limited)


def second_first(real, program, routing, priority, uniform):
    line = real(routing, priority, uniform)  # [..., K*S], all first choices first
    *lead, S, K = routing.expert.shape
    return line.reshape(*lead, K, S)[..., ::-1, :].reshape(line.shape)


def normalised_after(real, program, routing, moe, slots, noise):
    out = real(routing, moe, slots, noise)
    return out._replace(gate=moe.router.scale * out.gate / (out.gate.sum(-1, keepdims=True) + 1e-9))


def leaking(real, program, count, prob, tokens, form):
    soft = count.astype(jnp.float32) + prob - jax.lax.stop_gradient(prob)
    share = soft / jnp.maximum(count.sum(-1, keepdims=True), 1).astype(jnp.float32)
    return count.shape[-1] * (share * prob / tokens[..., None]).sum(-1)


def always_keyed(real, program, key, rows):
    return real(jax.random.key(0) if key is None else key, rows)


def after_dropping(real, program, routing, slots, *args, **kwargs):
    return real(routing._replace(valid=slots.kept), slots, *args, **kwargs)


def ranked_with_bias(real, program, *args, **kwargs):
    out = real(*args, **kwargs)
    return out._replace(ranked=out.expert)


def not_centred(real, program, bias, load, moe):
    return real(bias, load, dataclasses.replace(moe, bias_update="sign"))


def empty_rows_too(real, program, routing, mask, moe, rows):
    return real(routing, mask, moe, rows) | {"sequences": jnp.asarray(rows, jnp.int32)}


def keys_of_other_rows(real, program, rows, *how):
    batch, keys = real(rows, *how)
    return batch, jnp.flip(keys, 0)


def gates_detached(real, program, x, rows):
    return jax.lax.stop_gradient(real(x, rows)) if x.shape[-1] == 1 else real(x, rows)


def dropped_rows_too(real, program, routing, slots, capacity):
    return real(routing, slots._replace(kept=routing.valid, gate=routing.gate), capacity)


def dropping_after_all(real, program, moe_layer, tokens, routing, limited, everyone, *args):
    return moe_layer.buffered(tokens, routing, limited, *args, None)


class Fault(NamedTuple):
    """`wrong(real, program, *arguments)` in the place of one function of the library."""

    module: ModuleType | type
    function: str
    wrong: Callable
    cell: Cell
    differ: str  # what it changes and the battery has to see, in the order of `Step`

    def plant(self, patch: pytest.MonkeyPatch) -> None:
        real, program, wrong = getattr(self.module, self.function), self.cell.program, self.wrong
        patch.setattr(self.module, self.function, lambda *args, **kwargs: wrong(real, program, *args, **kwargs))


PROGRAMS = {(p.mesh, p.router): p for p in invariance.programs()}
ONE = PROGRAMS["data=8", "deepseek_v3"]
PARTS = PROGRAMS["data=8", "gshard"]
SORTED = PROGRAMS["data=2,expert=2,tensor=2", "noisy_topk"]
ALL_KEPT = PROGRAMS["data=8", "softmax_topk"]
assert PARTS.microbatches > 1 and PARTS.remat != "none"
assert [p.dispatch for p in (PARTS, SORTED, ALL_KEPT)] == ["gather", "ragged", "fallback"]

V3 = Cell(ONE, 30, "balance")
GSHARD = Cell(PARTS, 30, "balance")
EVALUATION = Cell(Evaluation("expert=8", "noisy_topk", "ragged"), 30)
ALL = "loss, gradient, counts"
FAULTS = {
    "aux loss detached": Fault(balance, "router_loss", detached, V3, "gradient"),
    "aux loss scaled by 1/dp": Fault(balance, "router_loss", over_replicas, V3, "loss, gradient"),
    "aux loss scaled by 1/microbatches": Fault(balance, "router_loss", over_microbatches, GSHARD, "loss, gradient"),
    "aux loss counted twice under remat": Fault(
        balance, "statistics", again_when_recomputed, GSHARD._replace(method="device"), "gradient"
    ),
    "bf16 counts": Fault(balance, "count_experts", in_bfloat16, V3, "gradient, counts"),
    "padding counted": Fault(balance, "statistics", with_padding, V3, ALL),
    "padding takes slots": Fault(layer, "route", unmasked, V3, ALL),
    "K forgotten": Fault(balance, "per_count", without_k, V3, "loss, gradient"),
    "K forgotten in the capacity": Fault(layer, "capacity", slots_without_k, V3, ALL),
    "weights taken from biased scores": Fault(routing, "scored", biased_gates, V3, ALL),
    "mask 0 instead of -inf": Fault(routing, "within_groups", masked_with_zero, V3, ALL),
    "second choices before first": Fault(capacity, "queue", second_first, V3, ALL),
    "drop before normalise": Fault(layer, "assign", normalised_after, V3, ALL),
    "gradient through the counts": Fault(balance, "per_count", leaking, V3, "gradient"),
    "noise left on in evaluation": Fault(layer, "row_keys", always_keyed, EVALUATION, "loss, counts"),
    "load counted after dropping": Fault(balance, "statistics", after_dropping, V3, ALL),
    "sequence-wise loss on biased choices": Fault(
        layer, "route", ranked_with_bias, V3._replace(method="sequence"), "loss, gradient"
    ),
    "bias not centred": Fault(balance, "updated_bias", not_centred, V3._replace(method="centred"), "bias"),
    "row of padding counted as a sequence": Fault(balance, "by_sequence", empty_rows_too, GSHARD, "loss, gradient"),
    "noise of other rows in microbatches": Fault(step, "split", keys_of_other_rows, GSHARD, ALL),
    "gradient of the gates lost in the tables": Fault(dispatch, "gather_rows", gates_detached, GSHARD, "gradient"),
    "dropped choices among the sorted rows": Fault(
        ragged, "ragged_plan", dropped_rows_too, Cell(SORTED, 30, "balance"), ALL
    ),
    "fallback that drops": Fault(
        layer.MoELayer, "with_fallback", dropping_after_all, Cell(ALL_KEPT, 30, "balance"), ALL
    ),
}
