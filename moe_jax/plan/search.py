"""The meshes of a number of devices, by predicted step time; and why the others do not fit."""

import dataclasses
from collections.abc import Iterator
from typing import NamedTuple

from moe_jax.axes import MESH_AXES
from moe_jax.checks import check
from moe_jax.conflicts import activations, conflicts
from moe_jax.plan.estimate import Estimate
from moe_jax.plan.hardware import Cluster, parse
from moe_jax.plan.leaves import leaves
from moe_jax.plan.memory import devices_at_least
from moe_jax.schema import Config, MeshConfig, Problem, Refused

MOST = 1024  # devices that a search for the smallest cluster goes to


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
    """Conflicts of rules and mesh, with one another and with parameters and activations."""
    arrays = [*(leaf[:3] for leaf in leaves(cfg.model)), *activations(cfg.model)]
    return list(dict.fromkeys(conflicts(cfg.rules, cfg.mesh.sizes, arrays)))


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


def smallest(cfg: Config, cluster: Cluster) -> tuple[Cluster, Candidate] | None:
    """The first of two, four, eight, ... times the devices on which some mesh fits, and the fastest such mesh.

    It begins where the state alone would fit, and gives up after three sizes or at `MOST` devices.
    """
    least = devices_at_least(Estimate(cfg, cluster).step, cluster.memory)
    sizes = [cluster.devices * 2**k for k in range(1, 20) if cluster.devices * 2**k >= least]
    for devices in sizes[:3]:
        if devices > MOST:
            return None
        try:
            larger = parse(cluster.name, devices)
        except Refused:  # no such slice
            return None
        best = search(cfg, larger)[0]
        if not best.reason:
            return larger, best
    return None


def search(cfg: Config, cluster: Cluster) -> list[Candidate]:
    """Every mesh of the cluster's devices: those that fit by step time, then the too large, then the impossible."""
    found = [judge(on_mesh(cfg, sizes), cluster) for sizes in factorisations(cluster.devices)]
    return sorted(found, key=lambda c: (bool(c.reason), c.estimate is None, c.seconds))
