"""Accelerators and how they are wired: a table with its sources, and the time of a collective.

All bandwidths are bytes a second in one direction; published figures that add up both directions are halved.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from math import prod

from moe_jax import topology
from moe_jax.axes import MESH_AXES
from moe_jax.files import nearest
from moe_jax.refused import Problem, Refused
from moe_jax.topology import GPUS, Topology

GB, TERA = 1e9, 1e12


@dataclass(frozen=True)
class Chip:
    """Speeds and price of one JAX device."""

    bf16: float  # FLOP/s of dense bfloat16 products
    f32: float  # of float32 products at JAX's default precision: TF32 on GPU, bfloat16 passes on TPU
    hbm_speed: float  # bytes/s
    link: float  # bytes/s one way: of a GPU into its host's switch, of a TPU through one of its links
    slow: float  # bytes/s one way a device: between hosts (GPU), between slices (TPU)
    price: float | None  # US dollars a device-hour; None: no public list price is known here
    ring: int = 0  # TPU: a dimension of the torus closes to a ring at multiples of this


# GPU: NVIDIA's data sheets, dense rates without sparsity. Links: NVLink 3, 4 and 5 of 600, 900 and 1800 GB/s both ways.
#   Between hosts one network card a GPU: 200 Gb/s (DGX A100), 400 Gb/s (DGX H100, H200, B200). Memory and its speed:
#   topology.py, from XLA's target configurations.
# TPU: cloud.google.com/tpu/docs/{v4,v5e,v5p,v6e,tpu7x}: peak, HBM bandwidth, "bidirectional ICI bandwidth per chip"
#   divided by links and directions, "DCN bandwidth per chip". A chip of TPU7x is two devices, each with half of it.
# Prices: $2 a GPU-hour is what DeepSeek-V3, table 1, assumes for an H800, an H100 with slower links; assumed for the
#   A100 too. For TPU cloud.google.com/tpu/pricing, on demand, US regions. `--price` overrides them.
CHIPS = {
    "a100": Chip(312e12, 156e12, GPUS["a100"].bandwidth, 300 * GB, 25 * GB, 2.0),
    "h100": Chip(989.4e12, 494.7e12, GPUS["h100"].bandwidth, 450 * GB, 50 * GB, 2.0),
    "h200": Chip(989.4e12, 494.7e12, GPUS["h200"].bandwidth, 450 * GB, 50 * GB, None),
    "b200": Chip(2250e12, 1125e12, GPUS["b200"].bandwidth, 900 * GB, 50 * GB, None),
    "v4": Chip(275e12, 275e12, 1.228 * TERA, 50 * GB, 6.25 * GB, 3.22, ring=4),
    "v5e": Chip(197e12, 197e12, 0.819 * TERA, 50 * GB, 3.125 * GB, 1.20, ring=16),
    "v5p": Chip(459e12, 459e12, 2.765 * TERA, 100 * GB, 6.25 * GB, 4.20, ring=4),
    "v6e": Chip(918e12, 918e12, 1.638 * TERA, 100 * GB, 12.5 * GB, 2.70, ring=16),
    "tpu7x": Chip(1153.5e12, 1153.5e12, 3.69 * TERA, 50 * GB, 6.25 * GB, None, ring=4),
}
PER_HOST = 8  # GPUs of one NVLink domain, where only a number of devices is given
# Seconds before the first byte of one step of a collective. ICI: about 1 us a hop (jax-ml.github.io/scaling-book, part
# 3). NVLink and InfiniBand: orders of magnitude, 3 and 10 us; the table of NCCL's src/graph/tuning.cc is finer.
LATENCY = {"tpu": (1e-6, 10e-6), "gpu": (3e-6, 10e-6)}


@dataclass(frozen=True)
class Cluster:
    """A machine by name with the speeds of its devices."""

    topology: Topology

    @property
    def chip(self) -> Chip:
        return CHIPS[self.topology.chip]

    @property
    def name(self) -> str:
        """Of one device."""
        return self.topology.chip

    @property
    def platform(self) -> str:
        """`tpu` or `gpu`."""
        return self.topology.platform

    @property
    def devices(self) -> int:
        return self.topology.size

    @property
    def memory(self) -> int:
        """Bytes of one device, as in `Topology.memory`."""
        return self.topology.memory

    def __str__(self) -> str:
        return str(self.topology)


def parse(text: str, devices: int) -> Cluster:
    """The cluster of a name such as `v5p:8x8x4`, `h100:32x8`, `v5e:16x16*2` (slices), or of a chip and a number.

    Args:
        devices: how many, where only the chip is named.
    Raises:
        Refused: an unknown chip, a shape that it cannot have.
    """
    name = text.strip().lower()
    if ":" in name:
        return Cluster(topology.parse(name))
    if name not in CHIPS:
        hint = f"{nearest(name, list(CHIPS))}use one of {', '.join(CHIPS)}"
        raise Refused(Problem(f"--topology {text}", f"names no known chip: {name!r}", hint))
    return Cluster(topology.parse(f"{name}:{'x'.join(map(str, shaped(name, devices)))}"))


def shaped(name: str, devices: int) -> tuple[int, ...]:
    """The most even shape of so many devices: hosts of eight GPUs, or sides of a torus as equal as can be, the first
    two even, as hosts of 2x2 chips ask for."""
    if name in GPUS:
        host = max(n for n in range(1, PER_HOST + 1) if devices % n == 0)
        return devices // host, host
    kind = topology.TPUS[name]
    chips = devices // kind.cores
    first = [n for n in range(1, chips + 1) if chips % n == 0 and (n % 2 == 0 or chips == 1)]
    if kind.dimensions == 2:
        shapes = [(a, chips // a) for a in first]
    else:
        shapes = [(a, b, chips // a // b) for a in first for b in first if chips % (a * b) == 0]
    shapes = [s for s in shapes if s[1] % 2 == 0 or chips == 1]
    if devices % kind.cores or not shapes:
        why = f"{devices} devices make no slice of {name}, whose hosts hold 2x2 chips"
        raise Refused(Problem("--devices", why, f"give a multiple of {4 * kind.cores}"))
    return min(shapes, key=lambda s: (max(s) / min(s), s))


Route = tuple[tuple[int, ...], int, int]
"""How a group of devices lies: sides along the torus (TPU) or members in a host (GPU), hosts or slices, members."""


@dataclass(frozen=True)
class Wiring:
    """A mesh laid over a cluster, slowest mesh axis first, neighbours of the fastest axis beside one another."""

    cluster: Cluster
    sizes: Mapping[str, int]  # mesh axis -> devices

    @cached_property
    def sides(self) -> dict[str, tuple[int, ...]]:
        """TPU: the sides of the torus that each mesh axis takes, from the fastest axis on. What it cannot take from
        the torus lies between slices."""
        machine = self.cluster.topology
        left, out = [self.cluster.devices // machine.slices // prod(machine.shape), *machine.shape[::-1]], {}
        for axis in reversed(MESH_AXES):
            need, took = self.sizes.get(axis, 1), []
            for i, side in enumerate(left):
                part = max(n for n in range(1, side + 1) if side % n == 0 and need % n == 0)
                if part > 1:
                    took.append(part)
                    left[i] //= part
                    need //= part
            out[axis] = tuple(took)
        return out

    def route(self, axes: tuple[str, ...]) -> Route:
        """How the group of devices along some mesh axes lies."""
        axes = tuple(a for a in axes if self.sizes.get(a, 1) > 1)
        n = prod(self.sizes[a] for a in axes)
        if self.cluster.platform == "tpu":
            took = tuple(s for a in axes for s in self.sides[a])
            return took, n // max(prod(took), 1), n
        stride, near = 1, 1  # members of the group among the devices of one host
        for axis in reversed(MESH_AXES):
            size = self.sizes.get(axis, 1)
            fits = (d for d in range(1, size + 1) if size % d == 0 and stride * d <= self.cluster.topology.fast)
            near *= max(fits, default=1) if axis in axes else 1
            stride *= size
        return (near,), n // near, n

    def seconds(self, op: str, axes: tuple[str, ...], size: float) -> float:
        """Time of one collective, from alpha (latency) and beta (bandwidth).

        Args:
            op: all-to-all: `size` bytes lie on each device before and after; all-gather: its result has `size` bytes;
                reduce-scatter: its input; all-reduce: both, in two passes; collective-permute: `size` bytes to a
                neighbour, of which some are far where the axis is.
        """
        local, far, n = self.route(axes)
        if n == 1:
            return 0.0
        if op == "collective-permute":
            fast, slow = LATENCY[self.cluster.platform]
            return size / self.cluster.chip.slow + slow if far > 1 else size / self.cluster.chip.link + fast
        if op == "all-reduce":
            return 2 * self.seconds("all-gather", axes, size)
        steps = self.torus if self.cluster.platform == "tpu" else self.switched
        return steps(op, local, far, size)

    def switched(self, op: str, local: tuple[int, ...], far: int, size: float) -> float:
        """GPU: a switch in the host, a network card a GPU between hosts; latency linear in the members.

        All-to-all: each device sends 1/n of its bytes to each other. Rings: a host takes what it lacks through the
        cards of its members, and hands it on inside, both at once.
        """
        (near,), n = local, local[0] * far
        fast, slow = LATENCY["gpu"]
        chip = self.cluster.chip
        alpha = (near - 1) * fast + (far - 1) * slow
        if op == "all-to-all":
            return max(size * (near - 1) / n / chip.link, size * (n - near) / n / chip.slow) + alpha
        return max(size * (n - 1) / n / chip.link, size * (far - 1) / far / near / chip.slow) + alpha

    def torus(self, op: str, local: tuple[int, ...], far: int, size: float) -> float:
        """TPU: rings of links in each dimension; between slices the data centre's network.

        All-to-all: an item goes a quarter of each ring on average, so the longest side decides (GShard, section 4:
        O(sqrt D) on a square torus, where a switch would take O(D)). Rings: all dimensions carry a part at once, in
        both directions. A side that does not close to a ring has half of that.
        """
        fast, slow = LATENCY["tpu"]
        chip, n = self.cluster.chip, prod(local) * far
        links = [(2 if side % chip.ring == 0 else 1) * chip.link for side in local]
        if op == "all-to-all":
            beta = max((size * side / 4 / rate for side, rate in zip(local, links, strict=True)), default=0.0)
            beta += size * (far - 1) / far / chip.slow
        else:
            beta = size * (n - 1) / n / sum(links) if local else 0.0
            beta += size * (far - 1) / far / prod(local) / chip.slow
        return beta + (sum(local) - len(local)) * fast + (far - 1) * slow
