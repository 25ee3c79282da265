"""What is wrong with the experts of a run, in numbers, and what to change.

One table of checks, `CHECKS`, serves the train loop, which tells alarms as they come, and `moe-jax doctor`, which reads
the log. A young router is nearly uniform and so may send all of a batch to few experts, which a balance loss or a
moving bias soon mends: where there is one, until `YOUNG` steps after warm-up, an imbalance is told only if it has
lasted from the first step on, or if the router means it by its probabilities.
"""

import math
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np

from moe_jax.checks import BIASED, STEERING
from moe_jax.config import MoEConfig
from moe_jax.metrics import DEAD, Record

WINDOW = 20  # steps looked at together: a rare expert is not a dead one
YOUNG = 200  # steps after warm-up in which loads may still settle
COLLAPSED = 0.9  # part of the choices that K of the experts hold together
DROPPED = 0.2  # part of the choices without a slot
DROPPED_YOUNG = 0.6  # the same while loads settle, if there are as many slots as choices
EQUAL, EQUAL_YOUNG = 0.1, 0.01  # spread of the probabilities around 1/E; a router begins at about 0.1
GREW = 1.25  # factor on the distance from uniform by which a router that learns moves away, over half of its age
NOISE = 1e-6  # nats, of a mean entropy in float32
MEANT = 0.3  # part of 1/E: an expert of less probability is one that the router does not want


class Alarm(NamedTuple):
    """One thing that is wrong. `kind` is a name in `CHECKS`."""

    kind: str
    layer: int | None  # counted over the MoE layers, bottom first; None for all
    step: int  # at which it was first told
    text: str
    remedy: str

    def __str__(self) -> str:
        where = "" if self.layer is None else f"MoE layer {self.layer}: "
        return f"{where}{self.text}\n    remedy: {self.remedy}"


class Window(NamedTuple):
    """The last steps of a run together. Rows are MoE layers, bottom first."""

    steps: int
    warm: bool  # whether the learning rate's warm-up is over
    young: bool
    broken: tuple[int, tuple[str, ...]] | None  # the step from which on numbers are not finite, and their names
    load: np.ndarray  # [layers, E], choices of each expert before dropping
    ever: np.ndarray  # [layers, E], the same since the first step seen
    dropped: np.ndarray  # [layers], choices without a slot
    least: np.ndarray  # [layers], mean probability of the least probable expert
    distance: np.ndarray  # [2, layers], log E - entropy, nats a token: half of the steps ago, and in the last window


Found = Iterator[tuple[int | None, str, str]]
"""Layer, text and remedy of each case of an ill."""


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


def nonfinite(w: Window, moe: MoEConfig | None) -> Found:
    """Losses or gradients that are NaN or infinite, by the first step that had them."""
    if w.broken is None:
        return
    step, names = w.broken
    losses = [n for n in names if "loss" in n]
    groups = [n.removeprefix(GROUP) for n in names if n.startswith(GROUP)]
    what = [f"{' and '.join(losses)} {'is' if len(losses) == 1 else 'are'} not finite"] if losses else []
    what += [f"the gradient of {', '.join(groups)} is not finite"] if groups else []
    remedy = f"go on from a checkpoint before step {step} (remove the later ones) with a smaller "
    remedy += "train.optimizer.learning_rate or a longer train.optimizer.warmup, and with train.optimizer.clip=1"
    if moe is not None and not moe.z_loss and moe.router.kind != "hash":
        remedy += "; model.moe.z_loss=0.001 keeps router logits small"
    yield None, "; ".join(what) or f"{', '.join(names)} is not finite", remedy


def uniform(w: Window, moe: MoEConfig | None) -> Found:
    """Routers that prefer no expert, and do not begin to.

    To second order log E - H = CV^2 / 2, with CV the spread of a token's probabilities around 1/E.
    """
    if moe is None or moe.router.kind == "hash" or not w.warm:
        return
    limit = EQUAL_YOUNG if w.young else EQUAL
    for layer, (before, now) in enumerate(np.maximum(w.distance, NOISE).T):
        spread = math.sqrt(2 * now)
        if spread < limit and now <= GREW * before and w.load.shape[1] > 1:
            set_ones = [f"{n} (now {v:g})" for n in ("z_loss", *STEERING) if (v := getattr(moe, n))]
            lower = f"lower {', '.join(f'model.moe.{n}' for n in set_ones)}; " if set_ones else ""
            text = f"the probabilities of a token spread by {spread:.1%} around 1/{w.load.shape[1]}, and do not part: "
            text += "the router is uniform"
            remedy = f"{lower}raise train.optimizer.learning_rate, or lower train.optimizer.weight_decay"
            yield layer, text, remedy


def settling(w: Window, moe: MoEConfig) -> bool:
    """Whether the loads of a young run are about to be balanced."""
    return w.young and any(getattr(moe, name) for name in (*STEERING, "sequence_loss", "bias_rate"))


def lasting(w: Window, layer: int, moe: MoEConfig) -> bool:
    """Whether an imbalance of the window will stay by itself."""
    return not settling(w, moe) or bool(w.least[layer] < MEANT / w.load.shape[1])


def top_share(load: np.ndarray, K: int) -> float:
    """Part of the choices [E] that K experts hold together."""
    return float(np.sort(load)[-K:].sum() / load.sum())


def collapse(w: Window, moe: MoEConfig | None) -> Found:
    """Few experts do all the work."""
    if moe is None:
        return
    for layer, row in enumerate(w.load):
        E, K = row.size, moe.top_k
        if row.sum() == 0 or E < 2 * K or (top := top_share(row, K)) <= COLLAPSED:
            continue
        if lasting(w, layer, moe) or top_share(w.ever[layer], K) > COLLAPSED:
            text = f"{K} of {E} experts get {top:.0%} of the choices: the router has collapsed"
            yield layer, text, balance_remedy(moe)


def idle(load: np.ndarray) -> np.ndarray:
    """Which experts [E] get next to nothing."""
    return load < DEAD * load.mean()


def dead(w: Window, moe: MoEConfig | None) -> Found:
    """Experts without tokens, and so without gradients."""
    if moe is None:
        return
    for layer, row in enumerate(w.load):
        gone = idle(row) if lasting(w, layer, moe) else idle(row) & idle(w.ever[layer])
        if gone.any():
            which = ", ".join(map(str, np.flatnonzero(gone)[:8])) + (", ..." if gone.sum() > 8 else "")
            text = f"{gone.sum()} of {row.size} experts ({which}) get less than {DEAD:.0%} of their fair share: "
            yield layer, f"{text}they are dead", balance_remedy(moe)


def dropped(w: Window, moe: MoEConfig | None) -> Found:
    """Choices without a slot. A young router sends neighbouring tokens to the same expert, whatever its slots."""
    if moe is None:
        return
    settles = settling(w, moe) and (moe.capacity_factor is None or moe.capacity_factor >= 1)
    limit = (DROPPED_YOUNG if w.warm else 1.0) if settles else DROPPED
    for layer, (lost, row) in enumerate(zip(w.dropped, w.load, strict=True)):
        if row.sum() and lost / row.sum() > limit:
            factor = "" if moe.capacity_factor is None else f" (now {moe.capacity_factor:g})"
            text = f"{lost / row.sum():.0%} of the choices found no slot"
            yield layer, text, f"raise model.moe.capacity_factor{factor}; {balance_remedy(moe)}"


CHECKS: dict[str, Callable[[Window, MoEConfig | None], Found]] = {
    "nonfinite": nonfinite,
    "uniform": uniform,
    "collapse": collapse,
    "dead": dead,
    "dropped": dropped,
}
ROUTING = ("uniform", "collapse", "dead")  # the first of them is told of a layer: the others follow from it


def examine(w: Window, moe: MoEConfig | None, step: int) -> list[Alarm]:
    """What is wrong with a window. Where numbers are not finite, nothing else can be told."""
    out: list[Alarm] = []
    for kind, check in CHECKS.items():
        if out and out[0].kind == "nonfinite":
            break
        if kind in ROUTING and (moe is None or moe.router.force is not None):  # as it was asked for
            continue
        told = {a.layer for a in out if a.kind in ROUTING} if kind in ROUTING else ()
        out += [Alarm(kind, layer, step, *rest) for layer, *rest in check(w, moe) if layer not in told]
    return out


GROUP = "grad_norms."


def not_finite(record: Record) -> tuple[str, ...]:
    """Losses and gradient norms of a record that are not finite: of the loop, or of the log, where they are null."""
    if "nonfinite" in record:
        return tuple(n for n in record["nonfinite"] if n in ("loss", "total_loss", "grad_norm") or n.startswith(GROUP))
    values = {n: record[n] for n in ("loss", "total_loss", "grad_norm") if n in record}
    values |= {GROUP + n: v for n, v in record.get("grad_norms", {}).items()}
    return tuple(n for n, v in values.items() if not math.isfinite(v))


class Watch:
    """Looks at the last steps together and tells each alarm once, until it has been away for as many steps.

    Args:
        moe: None for a dense model, of which only numbers that are not finite are told.
        warmup: steps of the learning rate's warm-up.
    Attributes:
        present: the alarms of the last step, each with the step at which it was told.
    """

    def __init__(self, moe: MoEConfig | None, warmup: int = 0, window: int = WINDOW):
        self.moe, self.warmup, self.window = moe, warmup, window
        self.loads: deque[np.ndarray] = deque()
        self.lost: deque[np.ndarray] = deque()
        self.least: deque[np.ndarray] = deque(maxlen=window)
        self.distances: list[np.ndarray] = []  # [layers], a mean for each full window of steps
        self.part: list[np.ndarray] = []  # of the window that is not full yet
        self.sums: tuple[Any, Any, Any] = 0, 0, 0  # load and dropped of the window, and load since the first step
        self.broken: tuple[int, tuple[str, ...]] | None = None
        self.sound = 0  # finite steps in a row
        self.seen: dict[tuple[str, int | None], int] = {}
        self.since: dict[tuple[str, int | None], int] = {}
        self.present: list[Alarm] = []

    def add(self, record: Record) -> None:
        """Take a step in."""
        if names := not_finite(record):
            self.broken, self.sound = self.broken or (record["step"], names), 0
        elif (sound := self.sound + 1) >= self.window:
            self.broken, self.sound = None, sound
        else:
            self.sound = sound
        if self.moe is None:
            return
        load, lost = np.asarray(record["load"], np.int64), np.asarray(record["dropped_by_layer"], np.int64)
        self.loads.append(load)
        self.lost.append(lost)
        self.least.append(np.asarray(record["least_prob"], float))  # null in the log is NaN
        old = (self.loads.popleft(), self.lost.popleft()) if len(self.loads) > self.window else (0, 0)
        self.sums = self.sums[0] + load - old[0], self.sums[1] + lost - old[1], self.sums[2] + load
        self.part.append(math.log(load.shape[1]) - np.asarray(record["router_entropy"], float))
        if len(self.part) == self.window:
            self.distances.append(np.mean(self.part, 0))
            self.part = []

    def look(self, step: int) -> Window:
        """The window that ends at a step."""
        n, warm, young = len(self.distances), step > self.warmup, step <= self.warmup + YOUNG
        if not self.loads:
            none = np.zeros((0, 0))
            return Window(0, warm, young, self.broken, none, none, none.sum(1), none.sum(1), none)
        # Where there is no half to compare with, a router may still be learning
        growing = np.stack([np.zeros(len(self.loads[0])), np.full(len(self.loads[0]), np.inf)])
        distance = np.stack([self.distances[(n - 1) // 2], self.distances[-1]]) if n > 1 else growing
        load, lost, ever = self.sums
        return Window(len(self.loads), warm, young, self.broken, load, ever, lost, np.mean(self.least, 0), distance)

    def step(self, record: Record) -> list[Alarm]:
        """The alarms that this step raises: of its losses and gradients, and of the window that it completes."""
        self.add(record)
        now = record["step"]
        w = self.look(now)
        full = w.steps >= self.window or w.broken is not None
        found = examine(w, self.moe, now) if full else []
        gone = now - self.window
        new = [a for a in found if self.seen.get(a[:2], gone) <= gone]
        self.since |= {a[:2]: now for a in new}
        self.seen |= {a[:2]: now for a in found}
        self.present = [a._replace(step=self.since[a[:2]]) for a in found]
        return new
