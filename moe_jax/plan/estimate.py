"""A config with all its figures: work, memory, traffic and, on a named cluster, times."""

from dataclasses import dataclass
from functools import cached_property

from moe_jax.plan.hardware import Cluster
from moe_jax.plan.memory import Memory, memory
from moe_jax.plan.roofline import Times, times
from moe_jax.plan.traffic import Move, traffic
from moe_jax.plan.work import Step
from moe_jax.schema import Config


@dataclass(frozen=True)
class Estimate:
    """What a config costs on a cluster; without one there are no times."""

    cfg: Config
    cluster: Cluster | None

    @cached_property
    def step(self) -> Step:
        return Step(self.cfg, "cpu" if self.cluster is None else self.cluster.platform)

    @cached_property
    def memory(self) -> Memory:
        return memory(self.step)

    @cached_property
    def moves(self) -> list[Move]:
        return traffic(self.step)

    @cached_property
    def times(self) -> Times | None:
        return None if self.cluster is None else times(self.step, self.cluster)

    @property
    def fits(self) -> bool | None:
        """Whether the peak is within the device's memory; None without a cluster."""
        return None if self.cluster is None else self.memory.peak <= self.cluster.memory
