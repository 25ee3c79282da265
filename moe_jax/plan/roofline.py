"""From work and traffic to seconds, utilisation and money; and the decode roofline."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

from moe_jax.cost import einsum_overhead, matrices
from moe_jax.plan.hardware import Cluster, Wiring
from moe_jax.plan.leaves import EXPERTS, LOOKED_UP, Leaf, expert_width
from moe_jax.plan.memory import cache
from moe_jax.plan.traffic import Move, gathered, traffic
from moe_jax.plan.work import Step


class Timed(NamedTuple):
    """A kind of collective with its time in a step."""

    move: Move
    seconds: float
    far: bool  # it crosses hosts (GPU) or slices (TPU)


@dataclass(frozen=True)
class Times:
    """Predicted times of a step on a cluster, seconds. A bound from below: peak rates, no kernel is that fast."""

    compute: float  # executed FLOPs at the peak rate
    memory: float  # weights, gradients and optimizer state through HBM
    exposed: float  # collectives that something waits for
    hidden: float  # collectives that can run beside computation
    moves: tuple[Timed, ...]
    bubble: float = 0.0  # share of the ticks of a pipeline in which a stage has no work; it computes all the same

    @property
    def step(self) -> float:
        busy = max(self.compute, self.memory)
        return busy + self.exposed + max(0.0, self.hidden - busy)

    @property
    def dominant(self) -> str:
        """What takes the most of it. Of what goes on side by side, that is the longest."""
        busy = max(self.compute, self.memory)
        parts = {"HBM" if self.memory > self.compute else "compute": busy}
        if self.hidden > busy:
            parts = {"traffic of weights and gradients": self.hidden}
        for timed in self.moves:
            if not timed.move.hidden:
                parts[timed.move.what] = parts.get(timed.move.what, 0.0) + timed.seconds
        return max(parts, key=lambda name: parts[name])


def peak(step: Step, cluster: Cluster) -> float:
    """FLOP/s of one device in the config's compute type."""
    return cluster.chip.bf16 if step.cfg.model.dtype == "bfloat16" else cluster.chip.f32


def wiring(step: Step, cluster: Cluster) -> Wiring:
    return Wiring(cluster, step.cfg.mesh.sizes)


def whole(step: Step, leaves: Iterable[Leaf]) -> int:
    """Elements of parameters that a pass of all layers reads: shards, what is gathered of split widths, all stages."""
    rules, mesh = step.cfg.rules, step.cfg.mesh

    def stages(leaf: Leaf) -> int:
        return mesh.over(rules.layers) if leaf.axes[0] == "layers" else 1

    return sum(leaf.shard(rules, mesh) * mesh.over(gathered(step, leaf)) * stages(leaf) for leaf in leaves)


def times(step: Step, cluster: Cluster) -> Times:
    """Predicted times of one train step."""
    wires = wiring(step, cluster)
    timed = tuple(
        Timed(m, m.count * wires.seconds(m.op, m.axes, m.bytes), wires.route(m.axes)[1] > 1) for m in traffic(step)
    )
    rules, mesh = step.cfg.rules, step.cfg.mesh
    held = sum(leaf.shard(rules, mesh) for leaf in step.leaves)
    passes = step.passes("attn") + 2  # the backward pass reads weights and writes gradients
    layers = whole(step, (x for x in step.leaves if x.axes[0] == "layers"))
    rest = whole(step, (x for x in step.leaves if x.axes[0] != "layers"))
    read = (layers * step.turns + rest * step.table_passes) * step.width * passes
    through = read + held * 4 * 8  # AdamW: 4 reads, 3 writes, and one gradient
    return Times(
        sum(step.executed().values()) / peak(step, cluster),
        through / cluster.chip.hbm_speed,
        sum(t.seconds for t in timed if not t.move.hidden),
        sum(t.seconds for t in timed if t.move.hidden),
        timed,
        0.0 if step.schedule is None else step.schedule.bubble,
    )


class Money(NamedTuple):
    """What a number of tokens takes."""

    tokens: int
    steps: float
    days: float
    device_hours: float
    dollars: float | None


def money(step: Step, cluster: Cluster, seconds: float, tokens: int, price: float | None) -> Money:
    """Time and money of a token budget at so many seconds a step."""
    steps = tokens / (step.cfg.data.batch * step.cfg.data.length)
    hours = steps * seconds / 3600 * cluster.devices
    return Money(tokens, steps, steps * seconds / 86400, hours, None if price is None else hours * price)


def utilisation(step: Step, cluster: Cluster, seconds: float) -> float:
    """MFU (Chowdhery et al. 2022): model FLOPs a second over the peak; remat, drops and empty slots earn nothing."""
    tokens = step.cfg.data.batch * step.cfg.data.length
    return step.flops.train * tokens / seconds / cluster.devices / peak(step, cluster)


class Decode(NamedTuple):
    """One decoding step of the whole batch: a token each.

    Weights of split widths (`mesh.fsdp`) and of all stages are read by each device; the time to gather them over the
    network is not counted.
    """

    experts: float  # distinct experts of a layer that the batch touches
    weights: float  # bytes of weights that a device reads
    cache: float  # bytes of keys and values that a device reads
    exchange: float  # seconds in all-to-alls
    seconds: float
    tokens_per_second: float


def decode(step: Step, cluster: Cluster) -> Decode:
    """The decode roofline: weights touched and the cache through HBM, and two exchanges an MoE layer.

    A batch of n tokens touches E*(1 - (1 - K/E)^n) of E experts where the router chooses evenly.
    """
    m, moe, mesh, batch = step.cfg.model, step.cfg.model.moe, step.cfg.mesh, step.cfg.data.batch
    rules, touched, seconds = step.cfg.rules, 0.0, 0.0
    decoder = [x for x in step.leaves if not x.of_input]
    read: float = whole(step, (x for x in decoder if x.component not in (*EXPERTS, *LOOKED_UP)))
    read += step.count.components["embed"] // mesh.over(rules.vocab) if m.tied_head else 0
    if moe is not None:
        replicas = mesh.over(
            tuple(a for a in rules.tokens if a not in rules.experts)
        )  # each serves a part of the batch
        touched = moe.experts * (1 - (1 - moe.top_k / moe.experts) ** max(1.0, batch / replicas))
        read += whole(step, (x for x in decoder if x.component in EXPERTS)) * touched / moe.experts
        rows = max(1, batch // step.shards) * moe.top_k
        one = wiring(step, cluster).seconds("all-to-all", rules.experts, rows * m.d_model * step.width)
        seconds = 2 * step.moe_layers * one
    kept = cache(step)
    total = (read * step.width + kept) / cluster.chip.hbm_speed + seconds
    return Decode(touched, read * step.width, kept, seconds, total, batch / total)


def rows_to_fill(step: Step, cluster: Cluster) -> float:
    """Rows of an expert below which reading its weights takes longer than multiplying them: peak*b/(2*bandwidth)."""
    return peak(step, cluster) * step.width / 2 / cluster.chip.hbm_speed


def expert_rows(step: Step) -> float:
    """Rows that one expert multiplies at a time, from all the devices that send to it."""
    moe = step.cfg.model.moe
    assert moe is not None
    return step.expert_rows / moe.experts * step.expert_shards


def exchange_overhead(step: Step) -> float:
    """Multiplications of one-hot dispatch and combine in units of those of the experts, 2S/(mF); 0 for other kinds."""
    if step.cfg.model.moe is None or step.dispatch.dispatch != "einsum":
        return 0.0
    return einsum_overhead(step.group, expert_width(step.cfg.model), matrices(step.cfg.model.ffn))
