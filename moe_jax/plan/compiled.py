"""What the real compiler says beside the plan: memory at the peak and collectives. The one file here that needs JAX."""

import re
from typing import Any

from moe_jax.inspect.compile import TooLarge
from moe_jax.inspect.report import inspect
from moe_jax.mesh import build_mesh, prepare_devices
from moe_jax.plan.hardware import Cluster
from moe_jax.schema import Config
from moe_jax.topology import topology_mesh

NEEDS = re.compile(r"(?:Used |required for.*?\()([\d.]+)([KMGT])")
UNITS = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


def compiled(cfg: Config, cluster: Cluster | None) -> dict[str, Any]:
    """Compile the train step for a cluster that is not here, or for fake CPU devices; nothing runs.

    Returns:
        JSON: peak_bytes of a device; collectives[] with op, axes, count, bytes, phase, module; flags[] of what should
        not be there; compile_seconds; refused, why the TPU compiler would not have it, peak_bytes then what it needs.
    Raises:
        Refused: the compiler is not installed, or rules and mesh do not fit.
    """
    if cluster is None:
        prepare_devices(cfg.mesh, cfg.mesh.size)
        mesh = build_mesh(cfg.mesh)
    else:
        mesh = topology_mesh(cfg.mesh, cluster.topology)
    try:
        found = inspect(cfg, mesh, topology=None if cluster is None else cluster.topology)
    except TooLarge as e:
        needs = NEEDS.search(str(e))
        size = None if needs is None else round(float(needs[1]) * UNITS[needs[2]])
        return {"peak_bytes": size, "collectives": [], "flags": [], "compile_seconds": None, "refused": str(e)}
    names = ("peak_bytes", "collectives", "flags", "compile_seconds")
    return {name: found[name] for name in names} | {"refused": None}
