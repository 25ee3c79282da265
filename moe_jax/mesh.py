"""The device mesh: built from the config over real or fake devices; `jax.set_mesh(build_mesh(...))` enters it."""

import contextlib

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh

from moe_jax.axes import MESH_AXES
from moe_jax.checks import check_devices
from moe_jax.config import MeshConfig, Problem, Refused


def prepare_devices(mesh: MeshConfig, fake_devices: int | None, processes: int = 1) -> None:
    """Set the number of fake CPU devices of this process; call it before anything asks JAX for a device.

    Without `fake_devices` the CPUs offer together as many devices as the mesh has places; accelerators are untouched.
    A process that has started JAX, such as a notebook, keeps its devices, and `build_mesh` counts them.

    Raises:
        Refused: the number of fake devices is not the number of places in the mesh, or JAX has started on real ones.
    """
    if problems := check_devices(mesh, fake_devices, processes):
        raise Refused(*problems)
    if fake_devices is not None:
        jax.config.update("jax_platforms", "cpu")
    with contextlib.suppress(RuntimeError):  # JAX has started
        jax.config.update("jax_num_cpu_devices", -(-mesh.size // processes))
    # A JAX that has started ignores the platform, and where there are as many accelerators would run on those.
    if fake_devices is not None and (found := jax.default_backend()) != "cpu":
        why = f"JAX has started on {found} in this process"
        remedy = "start a new process and ask for fake devices first, or leave them out"
        raise Refused(Problem("--fake-devices", why, remedy))


def build_mesh(mesh: MeshConfig, devices: list | None = None) -> Mesh:
    """A mesh of all axes, Auto on each, over all devices there are.

    Raises:
        Refused: the mesh and the devices differ in number.
    """
    devices = jax.devices() if devices is None else devices
    if len(devices) != mesh.size:
        why = f"a mesh of {mesh} needs {mesh.size} devices, and {len(devices)} ({devices[0].platform}) are here"
        remedy = f"choose mesh.<axis> sizes whose product is {len(devices)}, or try it on fake devices: --fake-devices "
        remedy += f'{mesh.size}, or in Python jax.config.update("jax_num_cpu_devices", {mesh.size}) before JAX starts'
        raise Refused(Problem("mesh", why, remedy))
    return jax.make_mesh(mesh.shape, MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES), devices=devices)


def fetch(x: jax.Array) -> np.ndarray:
    """All of an array, on the host. Where no process has all of it, each sends its part: all of them must ask."""
    if x.is_fully_addressable or x.is_fully_replicated:
        return np.asarray(x)
    return np.asarray(multihost_utils.process_allgather(x, tiled=True))
