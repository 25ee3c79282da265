"""The least that a model's exchange must move, to hold the compiled program against."""

from dataclasses import asdict, dataclass

import jax.numpy as jnp

from moe_jax.config import Config


@dataclass(frozen=True)
class Least:
    """The exchange of every MoE layer, on one device: `f*K*T*D*b*(n-1)/n` bytes each way.

    In two stages, hierarchical, each way is two all-to-alls of n and m shards. Where tensor shards each send a share of
    D (`rules.act_exchange`), a device sends that much less.
    """

    bytes_each_way: int  # one all-to-all
    forward: int  # all-to-alls of a layer in the forward pass, of each microbatch
    recompute: int  # of its recomputation in the backward pass
    backward: int
    layers: int  # with a mixture of experts
    microbatches: int
    shards: int  # n
    tokens: int  # T, of a device and microbatch

    @property
    def count(self) -> dict[str, int]:
        """All-to-alls of a step, by phase."""
        runs = self.layers * self.microbatches
        each = {"forward": self.forward, "recompute": self.recompute, "backward": self.backward}
        return {phase: n * runs for phase, n in each.items()}

    def to_json(self) -> dict:
        total = self.bytes_each_way * sum(self.count.values())
        return asdict(self) | {"count": self.count, "total_bytes": total}


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
    tokens = cfg.data.batch * cfg.data.length // cfg.train.microbatches // cfg.mesh.over(cfg.rules.tokens)
    size = 4 if platform == "cpu" else jnp.dtype(m.dtype).itemsize
    factor = min(moe.capacity_factor or 1.0, moe.experts / moe.top_k)  # of an expert's slots, at most one a token
    stages = [n]
    if moe.exchange == "hierarchical":
        stages = [s for s in (cfg.mesh.over((a,)) for a in cfg.rules.experts) if s > 1]
    buffer = factor * moe.top_k * tokens * m.d_model * size / cfg.mesh.over(cfg.rules.act_exchange)
    each = round(buffer * sum((s - 1) / s for s in stages) / len(stages))
    ways = 2 * len(stages)
    again = ways * ((m.remat in ("full", "dots")) + (cfg.train.microbatches > 1))
    later = (0, 0) if forward_only else (again, ways)
    return Least(each, ways, *later, m.layer_kinds.count("moe"), cfg.train.microbatches, n, tokens)
