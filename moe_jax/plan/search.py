"""The meshes of a number of devices, by predicted step time; and why the others do not fit."""

import dataclasses
from collections.abc import Iterator
from typing import NamedTuple

from moe_jax.axes import MESH_AXES
from moe_jax.checks import check
from moe_jax.plan.estimate import Estimate
from moe_jax.plan.hardware import Cluster
from moe_jax.plan.leaves import leaves
from moe_jax.schema import Config, MeshConfig, Problem


class Candidate(NamedTuple):
    """A mesh and what came of it."""

    mesh: MeshConfig
    estimate: Estimate | None  # None: it cannot be built
    reason: str  # why it is out; empty for one that fits

    @property
    def seconds(self) -> float:
        """Predicted step time."""
        return self.estimate.times.step if self.estimate is not None and self.estimate.times is not None else 0.0

    @property
    def peak(self) -> float:
        """Bytes of a device; infinite where it cannot be built."""
        return float("inf") if self.estimate is None else self.estimate.memory.peak


def factorisations(n: int, axes: tuple[str, ...] = MESH_AXES) -> Iterator[dict[str, int]]:
    """Every way to write n as a product over mesh axes."""
    if len(axes) == 1:
        yield {axes[0]: n}
        return
    for size in range(1, n + 1):
        if n % size == 0:
            yield from ({axes[0]: size, **rest} for rest in factorisations(n // size, axes[1:]))


def misfits(cfg: Config) -> list[Problem]:
    """Parameters with a dimension that its mesh axes do not divide, one for each rule."""
    out = {}
    for leaf in leaves(cfg.model):
        for size, name in zip(leaf.shape, leaf.axes, strict=True):
            over = getattr(cfg.rules, name)
            shards = cfg.mesh.over(over)
            if size % shards:
                why = f"{name} of size {size} does not divide over {'x'.join(over)}={shards}"
                remedy = f"set rules.{name}=[], another size, or mesh.{over[-1]} to a divisor"
                out.setdefault((name, size), Problem(f"{leaf.name} {list(leaf.shape)}", why, remedy))
    return list(out.values())


def on_mesh(cfg: Config, sizes: dict[str, int]) -> Config:
    return dataclasses.replace(cfg, mesh=MeshConfig(**sizes))


def judge(cfg: Config, cluster: Cluster) -> Candidate:
    """One mesh: impossible, too large, or with a step time."""
    if problems := [*check(cfg), *misfits(cfg)]:
        return Candidate(cfg.mesh, None, f"{problems[0].key}: {problems[0].reason}")
    estimate = Estimate(cfg, cluster)
    if not estimate.fits:
        over = f"{estimate.memory.peak / 1e9:,.1f} GB of {cluster.memory / 1e9:,.1f} GB"
        return Candidate(cfg.mesh, estimate, f"memory: {over}")
    return Candidate(cfg.mesh, estimate, "")


def search(cfg: Config, cluster: Cluster) -> list[Candidate]:
    """Every mesh of the cluster's devices: those that fit by step time, then the too large, then the impossible."""
    found = [judge(on_mesh(cfg, sizes), cluster) for sizes in factorisations(cluster.devices)]
    order = {True: 0, False: 1}
    return sorted(found, key=lambda c: (order[not c.reason], c.estimate is None, c.seconds))
