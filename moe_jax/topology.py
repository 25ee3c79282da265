"""Machines that are not here: devices of TPU slices and GPU clusters for ahead-of-time compilation.

`v5p:8x8x4` is a TPU slice of 8x8x4 chips, `v5e:16x16*2` two slices joined by the data-centre network, `h100:32x8` are
32 hosts of 8 GPUs. The real compiler of each runs on any machine: nothing is executed and no accelerator is needed.
`topology_mesh` is for them what `mesh.build_mesh` is for devices that are here. JAX is imported by the functions that
need it: the names, sizes and memory of machines answer without.
"""

import difflib
import importlib.util
import math
import os
import re
from dataclasses import dataclass
from functools import cache
from math import prod
from typing import TYPE_CHECKING, Any, NamedTuple

from moe_jax.axes import MESH_AXES
from moe_jax.refused import Problem, Refused
from moe_jax.schema import MeshConfig

if TYPE_CHECKING:
    from jax.sharding import Mesh


class TPU(NamedTuple):
    """A TPU generation as its compiler knows it."""

    dimensions: int  # of the torus
    cores: int  # devices a chip
    pod: int  # chips of the largest slice
    memory: int  # bytes that a program may use on one device: what the compiler reports as available
    options: dict[str, Any] = {}  # of the topology  # noqa: RUF012  # never written to


class GPU(NamedTuple):
    """A card: what distinguishes it in XLA's target configuration (openxla/xla, backends/gpu/target_config/specs)."""

    name: str
    capability: int  # major version of the compute capability
    cores: int  # streaming multiprocessors
    fpus: int  # float32 units a core
    clock: float  # GHz
    memory: int  # bytes
    bandwidth: int  # bytes/s
    l2: int  # bytes
    shared: int  # bytes a core


GiB = 2**30
TPUS = {
    "v4": TPU(3, 1, 4096, int(30.75 * GiB), {"chip_config_name": "megacore"}),  # both cores of a chip as one device
    "v5e": TPU(2, 1, 256, int(15.75 * GiB)),
    "v5p": TPU(3, 1, 6144, int(95.74 * GiB)),
    "v6e": TPU(2, 1, 256, int(31.25 * GiB)),
    "tpu7x": TPU(3, 2, 9216, int(94.75 * GiB)),
}
GPUS = {
    "a100": GPU("NVIDIA A100-SXM4-80GB", 8, 108, 64, 1.41, 85_100_068_864, 2_039_040_000_000, 40 * 2**20, 164 * 1024),
    "h100": GPU("NVIDIA H100 80GB HBM3", 9, 132, 128, 1.98, 84_942_979_072, 3_352_320_000_000, 50 * 2**20, 228 * 1024),
    "h200": GPU(
        "NVIDIA H200 141GB HBM3e", 9, 132, 128, 1.98, 151_397_597_184, 4_800_000_000_000, 50 * 2**20, 228 * 1024
    ),
    "b200": GPU("NVIDIA B200", 10, 148, 128, 1.965, 191_514_411_008, 7_672_320_000_000, 132_644_864, 228 * 1024),
}
OTHER_NAMES = {"v5litepod": "v5e", "v5": "v5p", "v6": "v6e", "v7": "tpu7x", "v7x": "tpu7x", "ironwood": "tpu7x"}
EXAMPLES = "v5e:4x4, v5p:8x8x4, tpu7x:4x4x4, v5e:16x16*2 (two slices), h100:32x8 (32 hosts of 8 GPUs)"
NAME = re.compile(r"(?P<chip>[a-z0-9]+):(?P<shape>\d+(?:x\d+)*)(?:\*(?P<slices>\d+))?")


@dataclass(frozen=True)
class Topology:
    """A machine by name. Reading one starts no compiler."""

    chip: str
    shape: tuple[int, ...]  # chips along each dimension of the torus, or (hosts, GPUs a host)
    slices: int = 1

    @property
    def kind(self) -> TPU | GPU:
        return TPUS[self.chip] if self.chip in TPUS else GPUS[self.chip]

    @property
    def platform(self) -> str:
        """`tpu` or `gpu`."""
        return "tpu" if self.chip in TPUS else "gpu"

    @property
    def size(self) -> int:
        """Number of devices."""
        cores = self.kind.cores if isinstance(self.kind, TPU) else 1
        return prod(self.shape) * cores * self.slices

    @property
    def fast(self) -> int:
        """Devices that the fast network joins: those of a slice, or of a GPU host."""
        return self.size // (self.slices if self.platform == "tpu" else self.shape[0])

    @property
    def memory(self) -> int:
        """Bytes of memory of one device."""
        return self.kind.memory

    def __str__(self) -> str:
        return f"{self.chip}:{'x'.join(map(str, self.shape))}" + (f"*{self.slices}" if self.slices > 1 else "")


def refused(name: str, reason: str, remedy: str) -> Refused:
    return Refused(Problem(f"--topology {name}", reason, remedy))


def parse(name: str) -> Topology:
    """The topology of a name such as `v5e:4x4`, `v5p:8x8x4*2` or `a100:4x8`.

    Raises:
        Refused: another form, an unknown chip, or a shape that such machines do not have.
    """
    m = NAME.fullmatch(name.strip().lower())
    if m is None:
        raise refused(name, "is not CHIP:SHAPE", f"write for example {EXAMPLES}")
    chip, shape, slices = m["chip"], tuple(int(n) for n in m["shape"].split("x")), int(m["slices"] or 1)
    known = [*TPUS, *GPUS]
    if chip not in known:
        near = OTHER_NAMES.get(chip) or next(iter(difflib.get_close_matches(chip, known, 1)), None)
        remedy = f"did you mean {near}? " if near else ""
        raise refused(name, f"names no known chip: {chip!r}", f"{remedy}use one of {', '.join(known)}")
    if min(*shape, slices) < 1:
        raise refused(name, "has a size of 0", f"write for example {EXAMPLES}")
    return gpus(name, chip, shape, slices) if chip in GPUS else slice_of(name, chip, shape, slices)


def gpus(name: str, chip: str, shape: tuple[int, ...], slices: int) -> Topology:
    """A cluster of hosts with as many GPUs each."""
    if len(shape) != 2:
        raise refused(name, f"has {len(shape)} of two numbers", f"give hosts x GPUs a host, for example {chip}:1x8")
    if slices > 1:
        hosts, each = shape
        raise refused(name, "counts slices, and GPUs have none", f"count the hosts: {chip}:{hosts * slices}x{each}")
    return Topology(chip, shape)


def slice_of(name: str, chip: str, shape: tuple[int, ...], slices: int) -> Topology:
    """TPU slices. Hosts hold 2x2 chips, so that the first two sizes are even, or all of them 1."""
    kind, chips = TPUS[chip], prod(shape)
    if len(shape) != kind.dimensions:
        want = "x".join("4" * kind.dimensions)
        why = f"has {len(shape)} dimensions, and {chip} slices have {kind.dimensions}"
        raise refused(name, why, f"write for example {chip}:{want}")
    if chips > 1 and any(n % 2 for n in shape[:2]):
        why = f"does not divide into hosts of 2x2 chips: {shape[0]}x{shape[1]}"
        raise refused(name, why, "make the first two sizes even")
    if chips > kind.pod:
        why = f"has {chips} chips, and the largest {chip} slice {kind.pod}"
        raise refused(name, why, f"use several slices, for example {chip}:SHAPE*{-(-chips // kind.pod)}")
    return Topology(chip, shape, slices)


# Devices

COMPILERS = {
    "tpu": (("libtpu",), "tpu-compiler"),
    "gpu": (("jax_plugins.xla_cuda13", "jax_plugins.xla_cuda12"), "gpu-compiler"),
}


def missing_compiler(platform: str) -> str | None:
    """Why nothing can be compiled for `tpu` or `gpu` here, and what to install; None where it can."""
    modules, extra = COMPILERS[platform]
    for module in modules:
        try:
            if importlib.util.find_spec(module) is not None:
                return None
        except ModuleNotFoundError:  # of the package above it
            continue
    return f"the {platform.upper()} compiler is not installed (extra {extra})"


def quiet_libtpu() -> None:
    """Settings that libtpu reads from the environment when it is loaded; the user's own stand.

    It must ask no metadata server which TPU this is, and another process may have loaded it too.
    """
    for variable, value in {
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_ACCELERATOR_TYPE": "v5litepod-16",
        "TPU_WORKER_HOSTNAMES": "localhost",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    }.items():
        os.environ.setdefault(variable, value)


def target_config(card: GPU) -> str:
    """The card as text of XLA's GpuTargetConfigProto."""
    extension = "NONE" if card.capability < 9 else "ACCELERATED_FEATURES"
    return f"""
gpu_device_info {{
  threads_per_block_limit: 1024
  threads_per_warp: 32
  shared_memory_per_block: {48 * 1024}
  shared_memory_per_core: {card.shared}
  shared_memory_per_block_optin: {card.shared - 1024}
  threads_per_core_limit: 2048
  core_count: {card.cores}
  fpus_per_core: {card.fpus}
  block_dim_limit_x: {2**31 - 1}
  block_dim_limit_y: {2**16 - 1}
  block_dim_limit_z: {2**16 - 1}
  thread_dim_limit_x: 1024
  thread_dim_limit_y: 1024
  thread_dim_limit_z: 64
  registers_per_core_limit: {2**16}
  registers_per_block_limit: {2**16}
  memory_bandwidth: {card.bandwidth}
  l2_cache_size: {card.l2}
  clock_rate_ghz: {card.clock}
  device_memory_size: {card.memory}
  cuda_compute_capability {{ major: {card.capability} feature_extension: {extension} }}
  runtime_version: "12.8.0"
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 10 }}
device_description_str: "{card.name}"
"""


@cache
def devices(topology: Topology) -> tuple[Any, ...]:
    """Devices to compile for, in the compiler's order; they cannot run anything. JAX then starts no accelerator.

    Raises:
        Refused: the compiler is not installed, or does not know such a machine.
    """
    if why := missing_compiler(topology.platform):
        raise refused(str(topology), why, f"pip install 'moe-jax[{COMPILERS[topology.platform][1]}]'")
    quiet_libtpu()
    import jax
    from jax.experimental import topologies

    jax.config.update("jax_platforms", "cpu")
    kind, shape = topology.kind, "x".join(map(str, topology.shape))
    if isinstance(kind, TPU):
        options = dict(kind.options)
        if prod(topology.shape) == 1:
            options["chips_per_host_bounds"] = [1, 1, 1]
        if topology.slices > 1:
            options["num_slices"] = topology.slices
        arguments = {"platform": "tpu", "topology_name": f"{topology.chip}:{shape}", **options}
    else:
        where = {"target_config": target_config(kind), "topology": f"1x{shape}"}  # slices x hosts x GPUs
        arguments = {"platform": "cuda", "topology_name": topology.chip, **where}
    try:
        return tuple(topologies.get_topology_desc(**arguments).devices)
    except jax.errors.JaxRuntimeError as e:
        raise refused(str(topology), f"the compiler says: {e}", f"write for example {EXAMPLES}") from None


def over_slices(shape: tuple[int, ...], slices: int) -> tuple[int, ...]:
    """How many slices lie along each axis of a mesh: the slow network under the slowest axes that divide."""
    out = []
    for size in shape:
        out.append(math.gcd(size, slices))
        slices //= out[-1]
    return tuple(out)


def topology_mesh(mesh: MeshConfig, topology: Topology) -> "Mesh":
    """A mesh of all axes, Auto on each, over the devices of a machine that is not here.

    Neighbours of the mesh are neighbours of the torus where its axes are products of the torus' dimensions. Several
    slices lie along the slowest axes.

    Raises:
        Refused: the mesh and the topology differ in number of devices, or the compiler is not installed.
    """
    if mesh.size != topology.size:
        why = f"has {topology.size} devices, and a mesh of {mesh} needs {mesh.size}"
        remedy = f"choose mesh.<axis> sizes whose product is {topology.size}, or another topology"
        raise refused(str(topology), why, remedy)
    import numpy as np
    from jax.experimental import mesh_utils
    from jax.sharding import AxisType, Mesh

    here, kinds = list(devices(topology)), (AxisType.Auto,) * len(MESH_AXES)
    if topology.platform == "gpu":  # hosts one after the other: fast axes of the mesh inside a host
        return Mesh(np.array(here).reshape(mesh.shape), MESH_AXES, axis_types=kinds)
    if topology.slices > 1:
        dcn = over_slices(mesh.shape, topology.slices)
        ici = tuple(n // d for n, d in zip(mesh.shape, dcn, strict=True))
        grid = mesh_utils.create_hybrid_device_mesh(ici, dcn, here, allow_split_physical_axes=True)
    else:
        grid = mesh_utils.create_device_mesh(mesh.shape, here, allow_split_physical_axes=True)
    return Mesh(grid, MESH_AXES, axis_types=kinds)
