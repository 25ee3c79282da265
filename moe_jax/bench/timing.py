"""Timing by turns: each function once, then again, so that a busy machine slows all of them alike."""

import os
import resource
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, TypeVar

import jax

Name = TypeVar("Name")


class Times(NamedTuple):
    """One number for each round."""

    wall: list[float]  # seconds
    cpu: list[float]  # seconds of all threads of this process
    faults: list[int]  # pages that the kernel had to provide

    @property
    def seconds(self) -> float:
        return statistics.median(self.wall)

    @property
    def cpu_seconds(self) -> float:
        return statistics.median(self.cpu)


def by_turns(functions: Mapping[Name, Callable[[], Any]], rounds: int, warm: int = 1) -> dict[Name, Times]:
    """Run each function `rounds` times, one after the other, `warm` more rounds come first and do not count."""
    times = {name: Times([], [], []) for name in functions}
    for turn in range(warm + rounds):
        for name, f in functions.items():
            faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
            cpu, wall = time.process_time(), time.perf_counter()
            jax.block_until_ready(f())
            if turn >= warm:
                times[name].wall.append(time.perf_counter() - wall)
                times[name].cpu.append(time.process_time() - cpu)
                times[name].faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - faults)
    return times


def ratio(times: Times, floor: Times) -> float:
    """Median over the rounds of the time in units of the floor's in the same round."""
    return statistics.median(a / b for a, b in zip(times.wall, floor.wall, strict=True))


def cpu_ratio(times: Times, floor: Times) -> float:
    """The same in CPU seconds, which other processes disturb less."""
    return statistics.median(a / max(b, 1e-9) for a, b in zip(times.cpu, floor.cpu, strict=True))


def machine() -> dict[str, Any]:
    """What a reader needs to judge a timing."""
    device = jax.devices()[0]
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
    return {
        "platform": device.platform,
        "device": device.device_kind,
        "processors": os.cpu_count(),
        "load_average": load,
        "jax": jax.__version__,
    }
