"""The train state: abstract first, then created directly in its shards, a plain pytree throughout."""

import dataclasses
import re
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from moe_jax.axes import MESH_AXES
from moe_jax.config import Config
from moe_jax.conflicts import activations
from moe_jax.layers.moe import SelectionBias
from moe_jax.model import Transformer, layer_places
from moe_jax.rules import sharding, validate
from moe_jax.train import optimizer


class Weights(NamedTuple):
    """The numbers of a model: what the gradient moves, and the selection biases, which it does not."""

    params: Any
    bias: Any  # {} without biases


class State(NamedTuple):
    """What a checkpoint holds."""

    params: Any
    bias: Any
    opt_state: Any
    step: Any  # [] int32, optimizer steps done

    @property
    def weights(self) -> Weights:
        return Weights(self.params, self.bias)


def text_keys(tree: Any) -> Any:
    """A pure dict with string keys throughout: list positions of NNX become "0", "1", ..."""
    return {str(k): text_keys(v) for k, v in tree.items()} if isinstance(tree, dict) else tree


def nnx_keys(tree: Any) -> Any:
    """The inverse of `text_keys`."""
    if not isinstance(tree, dict):
        return tree
    return {int(k) if k.isdigit() else k: nnx_keys(v) for k, v in tree.items()}


def plain(state: Any) -> Any:
    """The values of an NNX state as nested dicts."""
    return text_keys(nnx.to_pure_dict(state))


def logical(state: Any) -> Any:
    """The logical axes of an NNX state's values, as nested dicts."""
    axes = jax.tree.map(lambda v: v.get_metadata("axes"), state, is_leaf=lambda v: isinstance(v, nnx.Variable))
    return plain(axes)


@dataclass(frozen=True)
class Model:
    """A config's transformer without its numbers: how to rebuild it, and shape and logical axes of each parameter."""

    cfg: Config
    graph: Any
    shapes: Any  # tree of ShapeDtypeStruct
    axes: Any  # tree of tuples of logical axes
    bias_shapes: Any  # likewise, of the selection biases
    bias_axes: Any

    @classmethod
    def of(cls, cfg: Config) -> "Model":
        """Traced without computing anything."""
        abstract = nnx.eval_shape(lambda: Transformer(cfg.model, rules=cfg.rules, rngs=nnx.Rngs(params=0)))
        graph, *states = nnx.split(abstract, nnx.Param, SelectionBias)
        return cls(cfg, graph, *(part for state in states for part in (plain(state), logical(state))))

    def under(self, cfg: Config) -> "Model":
        """The same model under a config that differs in what moves no parameter."""
        return self if cfg == self.cfg else Model.of(cfg)

    def module(self, params: Any, bias: Any = None) -> Transformer:
        """The Flax module with these numbers; unset biases are 0."""
        if bias is None:
            bias = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), self.bias_shapes)
        return nnx.merge(self.graph, nnx_keys(params), nnx_keys(bias))

    def leaves(self) -> list[tuple[str, tuple[int, ...], tuple[str, ...]]]:
        """`(name, shape, logical axes)` of every parameter."""
        shapes = jax.tree_util.tree_leaves_with_path(self.shapes)
        axes = jax.tree.leaves(self.axes, is_leaf=optimizer.is_axes)
        return [(".".join(optimizer.names_of(p)), s.shape, a) for (p, s), a in zip(shapes, axes, strict=True)]

    def validate(self) -> None:
        """Hold the mesh and the rules against parameters and activations.

        Raises:
            RulesError: one table of all conflicts.
        """
        arrays = [*self.leaves(), *activations(self.cfg.model)]
        validate(self.cfg.rules, dict(zip(MESH_AXES, self.cfg.mesh.shape, strict=True)), arrays)

    def count(self) -> tuple[int, int]:
        """Parameters in total, and active: those that one token touches."""
        total = active = 0
        moe = self.cfg.model.moe
        for _, shape, axes in self.leaves():
            size = 1
            for n in shape:
                size *= n
            total += size
            if moe is not None and "experts" in axes:
                size = size * moe.top_k // moe.experts
            active += size
        return total, active

    def optimizer(self) -> optax.GradientTransformation:
        return optimizer.build(self.cfg.train.optimizer, self.cfg.train.steps, self.axes)

    def rate(self) -> optax.Schedule:
        """Learning rate by step."""
        return optimizer.schedule(self.cfg.train.optimizer, self.cfg.train.steps)

    def weight_shardings(self, mesh: Mesh | AbstractMesh) -> Weights:
        def where(axes: Any) -> Any:
            return jax.tree.map(lambda a: sharding(mesh, self.cfg.rules.layout(*a)), axes, is_leaf=optimizer.is_axes)

        return Weights(where(self.axes), where(self.bias_axes))

    def weight_targets(self, mesh: Mesh) -> Weights:
        """Shapes of the weights with shardings, for restoring a checkpoint without its optimizer."""
        return placed(Weights(self.shapes, self.bias_shapes), self.weight_shardings(mesh))

    def shardings(self, mesh: Mesh | AbstractMesh) -> State:
        """Where every leaf of the train state lives; optimizer state lies like its parameters."""
        rules, replicated = self.cfg.rules, NamedSharding(mesh, PartitionSpec())
        opt = jax.eval_shape(self.optimizer().init, self.shapes)
        axes = optimizer.state_axes(opt, self.shapes, self.axes)
        leaves = [sharding(mesh, rules.layout(*a)) for a in jax.tree.structure(opt).flatten_up_to(axes)]
        return State(*self.weight_shardings(mesh), jax.tree.unflatten(jax.tree.structure(opt), leaves), replicated)

    def targets(self, mesh: Mesh) -> State:
        """Shapes with shardings, for restoring a checkpoint."""
        opt = jax.eval_shape(self.optimizer().init, self.shapes)
        shapes = State(self.shapes, self.bias_shapes, opt, jax.ShapeDtypeStruct((), jnp.int32))
        return placed(shapes, self.shardings(mesh))

    def create(self, mesh: Mesh) -> State:
        """Random parameters and a fresh optimizer, each array born in its shards and equal on every mesh."""

        def init() -> State:
            module = Transformer(self.cfg.model, rules=None, rngs=nnx.Rngs(params=self.cfg.train.seed))
            params, bias = (plain(state) for state in nnx.split(module, nnx.Param, SelectionBias)[1:])
            return State(params, bias, self.optimizer().init(params), jnp.zeros((), jnp.int32))

        with jax.set_mesh(mesh):
            return jax.jit(init, out_shardings=self.shardings(mesh), compiler_options=once(mesh))()

    def begin(self, weights: Weights, mesh: Mesh) -> State:
        """Weights that lie in their shards, and a fresh optimizer."""
        where = self.shardings(mesh).opt_state
        with jax.set_mesh(mesh):
            init = jax.jit(self.optimizer().init, out_shardings=where, compiler_options=once(mesh))
            return State(*weights, init(weights.params), jnp.zeros((), jnp.int32))


def once(mesh: Mesh) -> dict[str, Any] | None:
    """Compiler options for a program that runs a single time: CPU code generation would take longer than the run."""
    if mesh.devices.flat[0].platform != "cpu":
        return None
    return {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}


def placed(shapes: Any, shardings: Any) -> Any:
    """Shape structs with their shardings."""
    return jax.tree.map(lambda s, h: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=h), shapes, shardings)


def unstacked(model: Model) -> Model:
    """The same model with every layer by itself, as decoding reads it best: a loop over stacked layers copies weights
    and caches at each token. A pipeline's layers stay in the stacks that its stages share."""
    m = model.cfg.model
    if model.cfg.mesh.stage > 1:
        return model
    alone = dataclasses.replace(m, stack_above=max(len(m.layer_kinds), len(m.encoder_kinds)))
    return model.under(dataclasses.replace(model.cfg, model=alone))


def unstack(model: Model, weights: Weights, mesh: Mesh) -> Weights:
    """The weights of `unstacked(model)` on the mesh. Arrays that are taken apart are deleted one by one, so that memory
    holds the largest of them twice and the others once."""
    target = unstacked(model)
    if target is model:
        return weights
    where, tree = jax.tree_util.tree_flatten_with_path(target.weight_shardings(mesh))
    m, layout, found = model.cfg.model, {full_path(path): sharding for path, sharding in where}, {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(weights):
        name = full_path(path)
        layer = re.match(r"(params|bias)\.((encoder\.)?stacks\.\d+\.blocks\.\d+\.)", name)
        if layer is None:
            found[name] = leaf
            continue
        part, prefix = f"{layer[1]}.", layer[3] or ""
        places = layer_places(m.encoder_runs if prefix else m.runs, prefix)
        mine = [n for n, (stack, _) in enumerate(places) if stack == layer[2]]
        names = [f"{part}{prefix}stacks.{n}.blocks.0.{name[layer.end() :]}" for n in mine]
        if len(mine) == 1:
            found[names[0]] = leaf
            continue
        with jax.set_mesh(mesh):
            split = jax.jit(lambda a: [a[r : r + 1] for r in range(len(a))], out_shardings=[layout[n] for n in names])
            found.update(zip(names, jax.block_until_ready(split(leaf)), strict=True))
        leaf.delete()
    return jax.tree.unflatten(tree, [found[full_path(path)] for path, _ in where])


def full_path(path: tuple) -> str:
    """`params.stacks.0.blocks.0.ffn.router`."""
    return jax.tree_util.keystr(path, simple=True, separator=".")
