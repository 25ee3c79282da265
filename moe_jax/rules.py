"""Logical axis -> mesh axis: shardings of arrays, validation before any compile, and `constrain`.

`constrain` is the only caller of sharding constraints in the library. It raises without a mesh, so that a layer that
was given rules never runs unsharded by accident.
"""

import functools
from collections.abc import Callable, Iterable, Mapping
from contextvars import ContextVar
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.custom_batching import custom_vmap
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from moe_jax.axes import Axes, Layout, Rules
from moe_jax.config import Problem, Refused
from moe_jax.conflicts import Leaf, conflicts
from moe_jax.terminal import table


def spec(layout: Layout) -> PartitionSpec:
    """A layout as JAX's partition spec."""

    def one(axes: Axes | None) -> Any:
        if axes is None:
            return PartitionSpec.UNCONSTRAINED
        return axes[0] if len(axes) == 1 else axes or None

    return PartitionSpec(*map(one, layout))


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


mapped_over: ContextVar[str | None] = ContextVar("mapped_over", default=None)
"""The mesh axis over which what is traced is mapped by `jax.vmap`; set by `pipeline.pipelined`."""


def by_hand(f: Callable, in_specs: Any, out_specs: Any, checked: bool = True) -> Callable:
    """`jax.shard_map` over the current mesh. The only caller of it for what a layer does.

    Mapped over the stages of a pipeline, `f` is traced again for one stage's arrays: JAX would map what it has traced,
    where constants do not vary over the stages and their operands do, which its checks refuse.

    Args:
        checked: JAX follows which arrays vary over which axes; the kernels that it ships do not say that of theirs.
    """
    run = jax.shard_map(f, in_specs=in_specs, out_specs=out_specs, check_vma=checked)
    axis = mapped_over.get()
    if axis is None:
        return run
    mapped = custom_vmap(run)

    @mapped.def_vmap
    def rule(size: int, batched: Any, *args: Any) -> tuple[Any, Any]:
        def wide(given: PartitionSpec, split: bool) -> PartitionSpec:
            return PartitionSpec(axis, *given) if split else given

        def local(*args: Any) -> Any:
            out = f(*jax.tree.map(lambda a, split: a[0] if split else a, args, tuple(batched)))
            return jax.tree.map(lambda a: a[None], out)

        given = in_specs if isinstance(in_specs, tuple) and not isinstance(in_specs, PartitionSpec) else (in_specs,)
        leaf = lambda s: isinstance(s, PartitionSpec)  # noqa: E731
        specs = jax.tree.map(wide, jax.tree.broadcast(given, args, is_leaf=leaf), tuple(batched), is_leaf=leaf)
        outs = jax.tree.map(lambda s: wide(s, True), out_specs, is_leaf=leaf)
        out = jax.shard_map(local, in_specs=specs, out_specs=outs, check_vma=checked)(*args)
        return out, jax.tree.map(lambda _: True, out)

    return mapped


def sharding(mesh: jax.sharding.Mesh | jax.sharding.AbstractMesh, layout: Layout) -> NamedSharding:
    return NamedSharding(mesh, spec(layout))


def any_axes(layouts: Callable[..., Any]) -> Callable[[Callable], Callable]:
    """Decorator of a function that constrains arrays: it also runs on a mesh with Explicit axes.

    There the arrays of its arguments come in typed with their shardings, whatever those are; it computes on Auto axes,
    so that the compiler places the same collectives; and its results are typed with theirs again.

    Args:
        layouts: called with the function's arguments, the partition specs of its results, or of a prefix of their tree.
    """

    def decorate(f: Callable) -> Callable:
        @functools.wraps(f)
        def call(*args: Any, **options: Any) -> Any:
            mesh = jax.sharding.get_abstract_mesh()
            kinds = zip(mesh.axis_names, mesh.axis_types, strict=True)
            explicit = tuple(axis for axis, kind in kinds if kind is AxisType.Explicit)
            if not explicit:
                return f(*args, **options)
            modules = [nnx.split(a) if isinstance(a, nnx.Module) else None for a in args]
            plain = [a if m is None else m[1] for a, m in zip(args, modules, strict=True)]
            leaves, tree = jax.tree.flatten((plain, options))
            arrays = {i: a for i, a in enumerate(leaves) if isinstance(a, jax.Array | np.ndarray)}

            def inner(arrays: dict[int, jax.Array]) -> Any:
                given, options = jax.tree.unflatten(tree, [arrays.get(i, a) for i, a in enumerate(leaves)])
                whole = [a if m is None else nnx.merge(m[0], a) for a, m in zip(given, modules, strict=True)]
                return f(*whole, **options)

            out = layouts(*args, **options)
            return jax.sharding.auto_axes(inner, axes=explicit, out_sharding=out)(arrays)

        return call

    return decorate


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
        v.set_value(jax.device_put(v[...], sharding(mesh, layout)))
