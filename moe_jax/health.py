"""Alarms on the routing of a run: what is wrong with the experts, in numbers, and what to change."""

from collections import deque
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from moe_jax.checks import BIASED, STEERING
from moe_jax.config import MoEConfig
from moe_jax.metrics import DEAD, dead_experts

WINDOW = 20  # steps looked at together: a rare expert is not a dead one
COLLAPSED = 0.9  # part of the choices that K of the experts hold together
DROPPED = 0.2  # part of the choices without a slot


class Alarm(NamedTuple):
    """One thing that is wrong. `kind` is `collapse`, `dead` or `dropped`."""

    kind: str
    layer: int | None  # counted over the MoE layers, bottom first; None for all
    text: str
    remedy: str

    def __str__(self) -> str:
        where = "" if self.layer is None else f"MoE layer {self.layer}: "
        return f"{where}{self.text}\n    remedy: {self.remedy}"


def balance_remedy(moe: MoEConfig) -> str:
    """What moves tokens to idle experts under these settings."""
    if moe.bias_rate:
        return f"raise model.moe.bias_rate (now {moe.bias_rate:g})"
    if moe.router.kind == "hash":
        return "use a router that learns, model.moe.router.kind=softmax_topk"
    raising = f"raise model.moe.balance_loss (now {moe.balance_loss:g})"
    if moe.router.kind not in BIASED:
        return raising
    steering = [name for name in STEERING if getattr(moe, name)]  # which a moving bias would fight
    instead = f" in place of {' and '.join(steering)}" if steering else ""
    return f"{raising}, or balance by model.moe.bias_rate=0.001{instead}"


def examine(load: np.ndarray, routed: int, kept: int, moe: MoEConfig) -> list[Alarm]:
    """What is wrong with these counts.

    Args:
        load: [layers, E], choices of each expert before dropping, added up over steps.
        routed: choices of all layers that asked for a slot; `kept` of them got one.
    """
    out = []
    for layer, row in enumerate(np.asarray(load, float)):
        total, E, K = row.sum(), row.size, moe.top_k
        if total == 0 or moe.router.force is not None:
            continue
        top = np.sort(row)[-K:].sum() / total
        dead = dead_experts([row])
        if E >= 2 * K and top > COLLAPSED:
            text = f"{K} of {E} experts get {top:.0%} of the choices: the router has collapsed"
            out.append(Alarm("collapse", layer, text, balance_remedy(moe)))
        elif dead:
            text = f"{dead} of {E} experts get less than {DEAD:.0%} of their fair share: they are dead"
            out.append(Alarm("dead", layer, text, balance_remedy(moe)))
    if routed and (routed - kept) / routed > DROPPED:
        factor = "" if moe.capacity_factor is None else f" (now {moe.capacity_factor:g})"
        text = f"{(routed - kept) / routed:.0%} of the choices found no slot"
        out.append(Alarm("dropped", None, text, f"raise model.moe.capacity_factor{factor}; {balance_remedy(moe)}"))
    return out


class Watch:
    """Looks at the last steps together and tells each alarm once, until it has been away for as many steps."""

    def __init__(self, moe: MoEConfig | None, window: int = WINDOW):
        self.moe = moe
        self.steps: deque[tuple[np.ndarray, int, int]] = deque(maxlen=window)
        self.seen: dict[tuple[str, int | None], int] = {}

    def step(self, record: dict[str, Any]) -> Sequence[Alarm]:
        """The alarms that this step's `load`, `routed` and `kept` raise."""
        if self.moe is None or "load" not in record:
            return []
        self.steps.append((np.asarray(record["load"], np.int64), record["routed"], record["kept"]))
        if len(self.steps) < (self.steps.maxlen or 0):
            return []
        load, routed, kept = (sum(parts) for parts in zip(*self.steps, strict=True))
        found = examine(np.asarray(load), int(routed), int(kept), self.moe)
        now, long_ago = record["step"], record["step"] - len(self.steps)
        new = [a for a in found if self.seen.get((a.kind, a.layer), long_ago) <= long_ago]
        self.seen |= {(a.kind, a.layer): now for a in found}
        return new
