"""The least that a model's exchange must move, to hold the compiled program against."""

from dataclasses import asdict, dataclass
from fractions import Fraction

from moe_jax.config import Config
from moe_jax.plan.work import Step


@dataclass(frozen=True)
class Least:
    """The exchange of every MoE layer, on one device: `f*K*T*D*b*(n-1)/n` bytes each way.

    In stages, hierarchical, each way is an all-to-all over each axis of the experts. Where tensor shards each send a
    share of D (`Rules.travelling`), a device sends that much less.
    """

    bytes_each_way: int  # of one all-to-all, the mean of its stages, and of an encoder's and the decoder's layers
    forward: int  # all-to-alls of a layer in a forward pass
    recompute: int  # of its recomputation in the backward pass
    backward: int
    layers: int  # with a mixture of experts
    passes: float  # of a device through all layers: its microbatches, or its share of the layers in each tick
    shards: int  # n
    stages: tuple[int, ...]  # shards of each all-to-all of a way
    tokens: int  # T, of a device and microbatch; with an encoder the mean over the layers

    @property
    def count(self) -> dict[str, int]:
        """All-to-alls of a step, by phase."""
        runs = self.layers * self.passes
        each = {"forward": self.forward, "recompute": self.recompute, "backward": self.backward}
        return {phase: round(n * runs) for phase, n in each.items()}

    @property
    def total_bytes(self) -> int:
        """Of a step."""
        return self.bytes_each_way * sum(self.count.values())

    def to_json(self) -> dict:
        return asdict(self) | {"count": self.count, "total_bytes": self.total_bytes}


def least_exchange(cfg: Config, platform: str, *, forward_only: bool = False) -> Least | None:
    """The least exchange of a train step, or of its forward pass; None without experts on several devices.

    The bytes of an element are those of `model.dtype`, and 4 on a CPU, whose compiler widens bfloat16. Without a
    capacity factor nothing can be dropped and f is 1. Full rematerialisation, and that of microbatches, recomputes
    the forward exchange; `model.remat=exchange` saves what was exchanged.
    """
    m, moe = cfg.model, cfg.model.moe
    n = cfg.mesh.over(cfg.rules.experts)
    if moe is None or n == 1:
        return None
    step = Step(cfg, platform)
    layers = sum(stack.moe_layers for stack in step.stacks)
    tokens = Fraction(sum(stack.moe_layers * stack.tokens for stack in step.stacks), layers)  # the mean
    size = 4 if platform == "cpu" else step.width
    factor = min(moe.capacity_factor or 1.0, moe.experts / moe.top_k)  # of an expert's slots, at most one a token
    stages: tuple[int, ...] = (n,)
    if moe.exchange == "hierarchical":
        stages = tuple(s for s in (cfg.mesh.over((a,)) for a in cfg.rules.experts) if s > 1)
    buffer = factor * moe.top_k * float(tokens) * m.d_model * size / cfg.mesh.over(cfg.rules.travelling)
    each = round(buffer * sum((s - 1) / s for s in stages) / len(stages))
    ways = 2 * len(stages)
    return Least(
        bytes_each_way=each,
        forward=ways,
        recompute=0 if forward_only else ways * step.exchanged_again,
        backward=0 if forward_only else ways,
        layers=layers,
        passes=step.turns,
        shards=n,
        stages=stages,
        tokens=round(tokens),
    )
