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
from moe_jax.refused import Problem, Refused
from moe_jax.schema import Config, MeshConfig

MOST = 1024  # devices that a search for the smallest cluster goes to


class Candidate(NamedTuple):
    """A mesh and what came of it."""

    mesh: MeshConfig
    estimate: Estimate | None  # None: it cannot be built
    problem: Problem | None = None  # why it is out; None for one that fits

    @property
    def reason(self) -> str:
        """Why it is out, in one line; empty for one that fits."""
        return "" if self.problem is None else f"{self.problem.key}: {self.problem.reason}"

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
        return Candidate(cfg.mesh, None, problems[0])
    estimate = Estimate(cfg, cluster)
    if not estimate.fits:
        over = f"{estimate.memory.peak / 1e9:,.1f} GB of {cluster.memory / 1e9:,.1f} GB"
        return Candidate(cfg.mesh, estimate, Problem("memory", over, "split more, or take more devices"))
    return Candidate(cfg.mesh, estimate)


def obstacles(found: list[Candidate], cluster: Cluster, most: int = 3) -> list[Problem]:
    """What stops the most meshes, each with its remedy and an example, the commonest first."""
    stopped: dict[tuple[str, str], list[str]] = {}
    for c in found:
        if c.problem is not None:
            stopped.setdefault((c.problem.key, c.problem.remedy), []).append(f"{c.mesh}: {c.problem.reason}")
    common = sorted(stopped.items(), key=lambda item: -len(item[1]))[:most]
    return [
        Problem(key, f"stops {len(each)} of {len(found)} meshes of {cluster}, for example {each[0]}", remedy)
        for (key, remedy), each in common
    ]


class Smallest(NamedTuple):
    """The outcome of a search for the smallest cluster."""

    found: tuple[Cluster, Candidate] | None  # with its fastest mesh
    without: int  # devices, tried by doubling or too few for the state, of which no mesh fits


def smallest(cfg: Config, cluster: Cluster) -> Smallest:
    """The first of one, two, four, eight, ... times the devices on which some mesh fits, and the fastest such mesh.

    It begins where the state alone would fit, and gives up after four sizes or at `MOST` devices.
    """
    least = devices_at_least(Estimate(cfg, cluster).step, cluster.memory)
    sizes = [cluster.devices * 2**k for k in range(20)]
    most = max(MOST, cluster.devices)
    without = min(least - 1, most)
    for devices in [n for n in sizes if least <= n <= most][:4]:
        try:
            larger = cluster if devices == cluster.devices else parse(cluster.name, devices)
        except Refused:  # no such slice
            break
        best = search(cfg, larger)[0]
        if not best.reason:
            return Smallest((larger, best), without)
        without = devices
    return Smallest(None, without)


def search(cfg: Config, cluster: Cluster) -> list[Candidate]:
    """Every mesh of the cluster's devices: those that fit by step time, then the too large, then the impossible.

    All have the stages of the config: what more are worth depends on `train.microbatches`, which a search leaves alone.

    Raises:
        Refused: devices that do not split into so many stages.
    """
    stages, n = cfg.mesh.stage, cluster.devices
    if n % stages:
        why = f"is {stages}, and {n} devices do not split into as many stages"
        raise Refused(Problem("mesh.stage", why, "set it to a divisor, or leave it out"))
    meshes = factorisations(n // stages, MESH_AXES[1:])
    found = [judge(on_mesh(cfg, {"stage": stages, **sizes}), cluster) for sizes in meshes]
    return sorted(found, key=lambda c: (bool(c.reason), c.estimate is None, c.seconds))
