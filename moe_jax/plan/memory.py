"""Memory of one device at the peak of a train step, by kind."""

from math import prod
from typing import NamedTuple

from moe_jax.plan.leaves import BATCH_AXES, Leaf
from moe_jax.plan.work import Step

FACTORED = 128  # optax.adafactor: least second-largest dimension of a parameter whose second moment is factored
NOT_MATRICES = ("norm", "position", "vocab", "router_embed")  # as in train/optimizer.py: Muon leaves these to AdamW


def optimizer_elements(kind: str, leaf: Leaf, step: Step) -> int:
    """Elements of optimizer state that a device holds for one parameter, all float32."""
    rules, mesh = step.cfg.rules, step.cfg.mesh
    if kind == "adafactor":
        order = sorted(range(len(leaf.shape)), key=lambda i: leaf.shape[i])  # stable, as numpy's sort of short arrays
        if len(order) < 2 or leaf.shape[order[-2]] < FACTORED:
            return leaf.shard(rules, mesh) + 2
        shards = [mesh.over(getattr(rules, a)) for a in leaf.axes]
        local = [n // s for n, s in zip(leaf.shape, shards, strict=True)]
        return prod(local) // local[order[-1]] + prod(local) // local[order[-2]] + 1
    matrix = sum(a not in BATCH_AXES for a in leaf.axes) >= 2 and not any(a in NOT_MATRICES for a in leaf.axes)
    moments = 1 if kind == "muon" and matrix else 2
    return moments * leaf.shard(rules, mesh)


def state(step: Step) -> dict[str, int]:
    """Bytes of what lives from step to step."""
    rules, mesh, kind = step.cfg.rules, step.cfg.mesh, step.cfg.train.optimizer.kind
    return {
        "parameters": sum(4 * leaf.shard(rules, mesh) for leaf in step.leaves) + 4 * step.count.bias,
        "optimizer": sum(4 * optimizer_elements(kind, leaf, step) for leaf in step.leaves),
    }


def gradients(step: Step) -> int:
    """Bytes of the gradients, float32 like the parameters and split like them."""
    return sum(4 * leaf.shard(step.cfg.rules, step.cfg.mesh) for leaf in step.leaves)


def cache(step: Step, length: int | None = None) -> int:
    """Bytes of keys and values that generation holds for the batch, at `length` places a sequence."""
    m = step.cfg.model
    rows = max(1, step.cfg.data.batch // step.shards)
    width = m.resolved_kv_heads * m.resolved_head_dim // step.over("kv_heads")
    return 2 * m.layers * rows * (length or step.cfg.data.length) * width * step.width


class Memory(NamedTuple):
    """Bytes of one device at the peak of a train step."""

    kinds: dict[str, int]  # what is live at the peak
    moment: str  # when that is
    cache: int  # keys and values of generation for the same batch, not part of the peak

    @property
    def peak(self) -> int:
        return sum(self.kinds.values())


def saved(step: Step) -> dict[str, int]:
    """Bytes that the forward pass leaves for the backward pass, all layers."""
    m, T, b = step.cfg.model, step.tokens, step.width
    row = m.d_model * b // step.over("act_embed")
    out = {"activations": m.layers * T * row}
    if m.moe is not None and m.remat in ("exchange", "none"):
        out["dispatch"] = 2 * step.moe_layers * step.sent_rows * row
    return out


def memory(step: Step) -> Memory:
    """What is live at the peak."""
    m = step.cfg.model
    logits = step.tokens * m.vocab * 4 // step.over("act_vocab")
    held = state(step)
    head = {**held, **saved(step), "logits": 2 * logits}
    layer = {**held, **saved(step), "gradients": gradients(step)}
    moments = {"loss": head, "backward": layer}
    moment = max(moments, key=lambda name: sum(moments[name].values()))
    kinds = {"parameters": 0, "optimizer": 0, "gradients": 0, "activations": 0, "dispatch": 0, "logits": 0}
    return Memory(kinds | moments[moment], moment, cache(step))
