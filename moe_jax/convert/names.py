"""Name maps: which tensor of a published checkpoint holds which parameter, and how its axes turn.

    Rule("model.layers.{layer}.self_attn.q_proj.weight", Part("attention.w_query", "(h n) d -> d h n"))

reads: of every layer that has the parameter `attention.w_query` [D, H, N], the tensor of that name, a matrix [H*N, D],
is that with its axes in the other order. `{expert}` likewise stands for each expert, whose parameters are stacked. A
tensor that holds several parameters has a `Part` for each, which takes some of the places of one of its axes.
"""

from collections.abc import Sequence
from math import prod
from typing import NamedTuple

import jax
import numpy as np

from moe_jax.config import Problem, Refused
from moe_jax.convert.mxfp4 import Packed
from moe_jax.model import layer_places
from moe_jax.train.state import Model, Weights


class Take(NamedTuple):
    """The places of an axis of the tensor that a parameter has, in its order."""

    axis: str
    places: np.ndarray
    of: int  # places in all


class Part(NamedTuple):
    """What a tensor is to one parameter: a path in a layer, of the encoder's where it begins with `encoder.`, or in the
    model where the name has no {layer}."""

    target: str
    turn: str  # axes of the tensor -> axes of the parameter; (h n) are two axes in one
    take: Take | None = None


ENCODER = "encoder."  # what the paths of its parameters begin with


class Rule:
    """A tensor's name and its parts."""

    def __init__(self, source: str, *parts: Part):
        self.source, self.parts = source, parts
        self.layered, self.expert = "{layer}" in source, "{expert}" in source
        self.stack = ENCODER if self.layered and parts[0].target.startswith(ENCODER) else ""


class Piece(NamedTuple):
    """A `Part` at one layer, and expert."""

    source: str
    part: Part
    leaf: str
    at: tuple[int, ...]  # the place in the leading axes of the leaf
    sizes: dict[str, int]  # of the axes that follow there

    def axes(self) -> list[list[str]]:
        """The axes in each dimension of the tensor."""
        words = self.part.turn.split("->")[0].replace("(", " ( ").replace(")", " ) ").split()
        out, inside = [], False
        for word in words:
            if word in "()":
                inside = word == "("
                out += [[]] if inside else []
            elif inside:
                out[-1].append(word)
            else:
                out.append([word])
        return out

    def size(self, axis: str) -> int:
        """Of an axis in the tensor."""
        take = self.part.take
        return take.of if take is not None and take.axis == axis else self.sizes[axis]

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the tensor."""
        return tuple(prod(self.size(a) for a in group) for group in self.axes())

    def order(self) -> list[str]:
        """The axes of the tensor, one after the other."""
        return [axis for group in self.axes() for axis in group]

    def unfolded(self, tensor: np.ndarray) -> np.ndarray:
        """The tensor with a dimension for each axis; a view."""
        return tensor.reshape([self.size(a) for a in self.order()])

    def read(self, tensor: np.ndarray | Packed, index: Sequence[slice]) -> np.ndarray:
        """A slice of the parameter, by `index` of its axes, out of the tensor; nothing else of it is looked at."""
        target = self.part.turn.split("->")[1].split()
        where = dict(zip(target, index, strict=True))
        chosen = tuple(self.places(a, where[a]) for a in self.order())
        out = tensor.part(chosen) if isinstance(tensor, Packed) else self.unfolded(tensor)[chosen]
        return out.transpose([self.order().index(a) for a in target])

    def write(self, tensor: np.ndarray, value: np.ndarray) -> None:
        """The inverse, of the whole parameter: `value` into its places of the tensor."""
        target = self.part.turn.split("->")[1].split()
        into = self.unfolded(tensor)
        whole = slice(None)
        into[tuple(self.places(a, whole) for a in self.order())] = value.transpose(
            [target.index(a) for a in self.order()]
        )

    def places(self, axis: str, part: slice) -> slice | np.ndarray:
        """Where a slice of the parameter's axis lies in the tensor's; a slice too, where the places are neighbours."""
        take = self.part.take
        if take is None or take.axis != axis:
            return part
        chosen = take.places[part]
        if len(chosen) and (chosen == np.arange(chosen[0], chosen[0] + len(chosen))).all():
            return slice(int(chosen[0]), int(chosen[0]) + len(chosen))
        return chosen


def leaves(model: Model) -> dict[str, tuple[int, ...]]:
    """The shapes of parameters and selection biases by their path."""
    tree = Weights(model.shapes, model.bias_shapes)
    flat = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {path_of(path): tuple(leaf.shape) for path, leaf in flat}


def path_of(path: tuple) -> str:
    """`stacks.0.blocks.0.ffn.router`, of parameters and selection biases alike."""
    return jax.tree_util.keystr(path[1:], simple=True, separator=".")


class NameMap:
    """The rules of a family laid over a model: `tensors` with their shapes, `pieces` by tensor, `parts` by leaf.

    Args:
        unread: tensors that no parameter is read from, each with one that it is written like.
    Raises:
        Refused: parameters that no rule fills, or two do.
    """

    def __init__(self, model: Model, rules: Sequence[Rule], unread: dict[str, str] | None = None):
        self.leaves = leaves(model)
        self.pieces: dict[str, list[Piece]] = {}
        m = model.cfg.model
        where = {"": layer_places(m.runs, ""), ENCODER: layer_places(m.encoder_runs, ENCODER)}
        for rule in rules:
            places = [(n, *place) for n, place in enumerate(where[rule.stack])] if rule.layered else [(0, "", None)]
            for n, prefix, row in places:
                self.add(rule, n, prefix, () if row is None else (row,))
        self.parts: dict[str, list[Piece]] = {leaf: [] for leaf in self.leaves}
        for pieces in self.pieces.values():
            for piece in pieces:
                self.parts[piece.leaf].append(piece)
        self.check()
        self.pieces |= {name: self.pieces[like] for name, like in (unread or {}).items()}
        self.tensors = {name: pieces[0].shape for name, pieces in self.pieces.items()}

    def add(self, rule: Rule, layer: int, prefix: str, at: tuple[int, ...]) -> None:
        """The pieces of a rule in one layer, where the layer has its parameters."""
        for part in rule.parts:
            leaf = prefix + part.target.removeprefix(rule.stack)
            shape = self.leaves.get(leaf)
            if shape is None:
                continue
            numbers = range(shape[len(at)]) if rule.expert else [None]
            axes = part.turn.split("->")[1].split()
            sizes = dict(zip(axes, shape[len(at) + rule.expert :], strict=True))
            for expert in numbers:
                name = rule.source.format(layer=layer, expert=expert)
                own = at if expert is None else (*at, expert)
                self.pieces.setdefault(name, []).append(Piece(name, part, leaf, own, sizes))

    def check(self) -> None:
        """Every place of every leaf has one piece."""
        wrong = []
        for leaf, pieces in self.parts.items():
            depth = max((len(p.at) for p in pieces), default=0)
            found = sorted(p.at for p in pieces)
            if found != list(np.ndindex(self.leaves[leaf][:depth])) or not pieces:
                wrong.append(f"{leaf} {list(self.leaves[leaf])}")
        if wrong:
            why = (
                f"{len(wrong)} of {len(self.leaves)} parameters have no tensor in this family, or two: first {wrong[0]}"
            )
            raise Refused(Problem("model", why, "convert a model that the family has the layers of"))
