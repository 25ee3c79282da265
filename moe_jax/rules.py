"""Logical axis -> mesh axis: shardings of arrays, validation before any compile, and `constrain`.

`constrain` is the only caller of sharding constraints in the library. It raises without a mesh, so that a layer that
was given rules never runs unsharded by accident.
"""

from collections.abc import Iterable, Mapping
from typing import Any

import jax
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from moe_jax.axes import Layout, Rules
from moe_jax.config import Problem, Refused
from moe_jax.conflicts import Leaf, conflicts
from moe_jax.terminal import table


def spec(layout: Layout) -> PartitionSpec:
    """A layout as JAX's partition spec."""
    return PartitionSpec(*(axes[0] if len(axes) == 1 else axes or None for axes in layout))


def current_mesh() -> jax.sharding.AbstractMesh:
    """The mesh entered with `jax.set_mesh`.

    Raises:
        RuntimeError: no mesh was entered.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh is None or mesh.empty:
        raise RuntimeError(
            "a layer with sharding rules was called without a mesh: enter one with `with jax.set_mesh(mesh):`, "
            "or build the layer with rules=None to run it on one device"
        )
    return mesh


def platform() -> str:
    """`cpu`, `gpu` or `tpu`: where programs of the current mesh run, or of the default device without a mesh."""
    device = getattr(jax.sharding.get_abstract_mesh(), "abstract_device", None)
    return jax.default_backend() if device is None else device.platform


def constrain(x: jax.Array, layout: Layout) -> jax.Array:
    """`x` laid out over the current mesh.

    Args:
        layout: the mesh axes of each dimension of `x`, from `Rules.layout`, `token_major` or `expert_major`.
    Raises:
        RuntimeError: no mesh was entered with `jax.set_mesh`.
        ValueError: the layout has another number of dimensions than `x`.
    """
    current_mesh()
    if len(layout) != x.ndim:
        raise ValueError(f"a layout of {len(layout)} dimensions {layout} for an array of shape {x.shape}")
    return jax.lax.with_sharding_constraint(x, spec(layout))


def sharding(mesh: jax.sharding.Mesh, layout: Layout) -> NamedSharding:
    return NamedSharding(mesh, spec(layout))


class RulesError(Refused):
    """Rules and mesh that cannot work together; the message is one table of all conflicts."""

    def __init__(self, problems: list[Problem], mesh: Mapping[str, int]):
        super().__init__(*problems)
        head = f"rules and mesh ({', '.join(f'{a}={n}' for a, n in mesh.items())}) do not fit:"
        rows = [(p.key, p.reason, p.remedy) for p in problems]
        self.args = ("\n".join([head, *table(("where", "conflict", "remedy"), rows)]),)


def validate(rules: Rules, mesh: Mapping[str, int], leaves: Iterable[Leaf]) -> None:
    """Hold rules, mesh sizes and arrays against each other, before any compile.

    Args:
        leaves: `(name, shape, logical axes)` of each parameter, and of activations.
    Raises:
        RulesError: unknown axis, two dimensions on one mesh axis, indivisible dimensions, or expert axes outside the
            token axes; one table of all of them.
    """
    problems = list(dict.fromkeys(conflicts(rules, mesh, leaves)))
    if problems:
        raise RulesError(problems, mesh)


def place(module: Any, mesh: jax.sharding.Mesh, rules: Rules) -> None:
    """Move the parameters and selection biases of a Flax NNX module onto a mesh, in place, by their logical axes.

    Parameters without logical axes, those of layers that are not this library's, are replicated.

    Raises:
        RulesError: rules and mesh that do not fit the parameters, before anything is moved.
    """
    variables = [
        (".".join(map(str, path)), v, v.get_metadata().get("axes"))
        for path, v in nnx.to_flat_state(nnx.state(module))
        if isinstance(v, nnx.Param) or "axes" in v.get_metadata()
    ]
    sizes = dict(zip(mesh.axis_names, mesh.devices.shape, strict=True))
    validate(rules, sizes, [(name, v.shape, axes) for name, v, axes in variables if axes is not None])
    for _, v, axes in variables:
        layout = ((),) * v.ndim if axes is None else rules.layout(*axes)
        v[...] = jax.device_put(v[...], sharding(mesh, layout))
