"""Redundant experts for inference: recorded loads, a placement by them, the weights in its slots, and the balance.

`moe-jax generate DIR --slots N`. The model stays what it is: its router chooses among E experts, and each choice goes
to one of the slots that hold that expert. Devices send one another the weights that they need, an array at a time.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import reduce
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from moe_jax.axes import Rules
from moe_jax.config import Config, Problem, Refused
from moe_jax.exchange import blocks
from moe_jax.layers.moe import Replicas
from moe_jax.model import Transformer, moe_layers
from moe_jax.placement import Placement, evenness, place
from moe_jax.rules import by_hand, spec
from moe_jax.terminal import shown, table
from moe_jax.train.evaluate import Evaluator
from moe_jax.train.optimizer import names_of
from moe_jax.train.state import Model, Weights, once


class Loads(NamedTuple):
    """Choices of each expert, and where they were counted, in words."""

    counts: np.ndarray  # [MoE layers, E] float64
    source: str


@dataclass(frozen=True)
class Wish:
    """What the options of `generate` ask for: slots of all devices together, nodes, and a file of loads."""

    slots: int
    nodes: int = 1
    file: Path | None = None

    def check(self, cfg: Config) -> None:
        """Refuse slots that the model or its mesh does not admit, before weights are read.

        Raises:
            Refused: with the numbers, the rule and the remedy.
        """
        moe, n = cfg.model.moe, cfg.mesh.over(cfg.rules.experts)
        if moe is None:
            why = f"{cfg.name} is a dense model: no layer has experts"
            raise Refused(Problem("--slots", why, "leave it out"))
        E, axes = moe.experts, " x ".join(f"mesh.{axis}" for axis in cfg.rules.experts)
        if n == 1:
            why = f"all {E} experts lie on one device, where replicas balance nothing"
            raise Refused(Problem("--slots", why, f"split them with {axes or 'rules.experts'}, or leave it out"))
        problems = []
        if not E <= self.slots <= E * n:
            least, most = -(-E // n) * n, E * n
            why = f"is {self.slots}, and {n} devices hold each of {E} experts once to {n} times"
            problems.append(Problem("--slots", why, f"give a multiple of {n} from {least} to {most}"))
        elif self.slots % n:
            why = f"{self.slots} slots do not divide over {n} devices ({axes})"
            problems.append(Problem("--slots", why, f"give {self.slots // n * n} or {-(-self.slots // n) * n}"))
        if self.nodes < 1 or n % self.nodes:
            why = f"{n} devices ({axes}) do not divide over {self.nodes} nodes"
            problems.append(Problem("--nodes", why, f"give a divisor of {n}"))
        elif (groups := moe.router.groups) % self.nodes:
            why = f"{groups} groups of experts (model.moe.router.groups) do not divide over {self.nodes} nodes"
            problems.append(Problem("--nodes", why, f"give a divisor of {groups}; 1 places all experts anywhere"))
        if problems:
            raise Refused(*problems)
        if self.file is not None:
            read_loads(self.file, cfg)

    def place(self, load: np.ndarray, cfg: Config) -> Placement:
        """By EPLB's hierarchical policy on several nodes, on one by its global one."""
        moe = cfg.model.moe
        assert moe is not None
        n, groups = cfg.mesh.over(cfg.rules.experts), moe.router.groups if self.nodes > 1 else 1
        return place(load, self.slots, n, nodes=self.nodes, groups=groups)

    def apply(self, trained: Any) -> "Applied":
        """A `Trained` run becomes that of the placed model; counts loads first where no file has them."""
        loads = count_loads(trained) if self.file is None else read_loads(self.file, trained.cfg)
        placement = self.place(loads.counts, trained.cfg)
        trained.model = Placed.of_model(trained.model, placement)
        trained.weights = trained.model.take(trained.weights, trained.mesh)
        return Applied(self, loads, placement)


# Loads


def read_loads(path: Path, cfg: Config) -> Loads:
    """`load` of a JSON object, such as `moe-jax eval DIR --json` prints.

    Raises:
        Refused: no such object, or one of another model.
    """

    def no(why: str) -> Refused:
        return Refused(Problem("--loads", f"{path} {why}", "write it with moe-jax eval DIR --json > FILE"))

    if not path.is_file():
        raise no("is not a file" if path.exists() else "does not exist")
    raw = path.read_bytes().strip()
    try:
        tree = json.loads(raw if raw.startswith(b"{") else raw.rpartition(b"\n")[2])  # a log may stand before it
    except (ValueError, RecursionError) as e:
        raise no(f"does not end with a JSON object: {str(e)[:100]}") from None
    load = tree.get("load") if isinstance(tree, dict) else None
    if not (isinstance(load, list) and load and all(isinstance(row, list) for row in load)):
        raise no("has no `load`, a list of the choices of each expert for each MoE layer")
    of = tree.get("config", cfg.name)
    if of != cfg.name:
        raise no(f"has the loads of {of!r}, and this is a run of {cfg.name}")
    want, widths = expected(cfg), sorted({len(row) for row in load})
    if [len(load), *widths] != list(want):
        shape = f"{len(load)} layers of {' or '.join(map(str, widths))} experts"
        raise no(f"has {shape}, and the model has {want[0]} MoE layers of {want[1]}")
    wrong = [x for row in load for x in row if type(x) not in (int, float) or not 0 <= x < 2.0**63]
    if wrong:
        raise no(f"has {wrong[0]!r} among the loads, which are counts: finite, and 0 or more")
    counts = np.array(load, np.float64)
    if not counts.any(1).all():
        raise no(f"has no choice in MoE layer {int(counts.any(1).argmin())}: there is nothing to place by")
    known = [f"{key} {shown(str(tree[key]))}" for key in ("text", "workdir", "step") if key in tree]
    return Loads(counts, ", ".join([str(path), *known]))


def expected(cfg: Config) -> tuple[int, int]:
    """MoE layers, those of an encoder first, and experts."""
    assert cfg.model.moe is not None
    return (cfg.model.encoder_kinds + cfg.model.layer_kinds).count("moe"), cfg.model.moe.experts


def count_loads(trained: Any) -> Loads:
    """The choices on `train.eval_batches` batches of the held-out text of a `Trained` run, dropless, as it decodes."""
    evaluator = Evaluator(trained.model, trained.mesh, trained.corpus)
    sums = evaluator.sums(trained.weights, trained.cfg.train.eval_batches, None)
    assert sums.stats is not None
    counts = np.asarray(sums.stats.load, np.float64)
    return Loads(counts, f"{int(sums.targets):,} tokens of held-out text")


# Weights


@dataclass(frozen=True)
class Placed(Model):
    """A model with its experts in the slots of a placement, for calls on whole rows, such as those of `generate`."""

    placement: Placement

    @classmethod
    def of_model(cls, model: Model, placement: Placement) -> "Placed":
        """The same model placed: what it holds of each expert is in as many slots as that has."""
        model = Model.of(replace(model.cfg, rules=model.cfg.rules.by_rows()))
        slots = placement.physical_to_logical.shape[1]

        def wide(shape: jax.ShapeDtypeStruct, axes: tuple[str, ...]) -> jax.ShapeDtypeStruct:
            sizes = (slots if a == "experts" else n for n, a in zip(shape.shape, axes, strict=True))
            return jax.ShapeDtypeStruct(tuple(sizes), shape.dtype)

        given = {name: getattr(model, name) for name in model.__dataclass_fields__}
        return cls(**given | {"shapes": jax.tree.map(wide, model.shapes, model.axes)}, placement=placement)

    def under(self, cfg: Config) -> Model:
        """The same model, placed as it is."""
        return self if cfg == self.cfg else Placed.of_model(Model.of(cfg), self.placement)

    def module(self, params: Any, bias: Any = None) -> Transformer:
        """The Flax module, whose MoE layers know where the replicas of each expert are."""
        net, where = super().module(params, bias), self.placement.logical_to_physical.astype(np.int32)
        for path, mine in moe_layers(self.cfg.model):
            steps = [int(name) if name.isdigit() else name for name in path.split(".")]
            layer: Any = reduce(lambda at, name: at[name] if isinstance(name, int) else getattr(at, name), steps, net)
            axes = ("layers", "router_experts", "bias")
            layer.replicas = nnx.data(Replicas(jnp.asarray(where[mine]), axes=axes))  # [repeats, E, most]
        return net

    def take(self, weights: Weights, mesh: Mesh) -> Weights:
        """The weights with each expert in its slots. Those given are given up, one array of experts after the other."""
        rows = dict(moe_layers(self.cfg.model))

        def one(path: Any, w: jax.Array, axes: tuple[str, ...]) -> jax.Array:
            if "experts" not in axes:
                return w
            sources = self.placement.physical_to_logical[rows[".".join(names_of(path)[:-2])]]
            out = exchanged(w, sources, axes, self.cfg.rules, mesh)
            w.delete()
            return out

        return Weights(jax.tree_util.tree_map_with_path(one, weights.params, self.axes), weights.bias)


class Way(NamedTuple):
    """Who sends which experts to whom, in blocks as large as the largest one."""

    send: np.ndarray  # [layers, n, n, M] int32, by sender and receiver: experts of the sender
    take: np.ndarray  # [layers, n, slots/n] int32, of the blocks that came, the place of the expert of each slot


def ways(sources: np.ndarray, E: int, n: int) -> Way:
    """The exchange that brings experts, E/n on each of n shards, to the slots of `sources` [layers, slots]. Two slots
    of one shard share what came."""
    wanted = [[sorted(set(part)) for part in np.split(row, n)] for row in sources]  # [layers][n]
    local = E // n
    parcels = [[[[e for e in need if e // local == s] for need in layer] for s in range(n)] for layer in wanted]
    most = max(len(parcel) for layer in parcels for sender in layer for parcel in sender)
    send = np.zeros((len(sources), n, n, most), np.int32)
    taken = np.empty((len(sources), n, sources.shape[1] // n), np.int32)
    for i, layer in enumerate(parcels):
        for s, d in np.ndindex(n, n):
            send[i, s, d, : len(layer[s][d])] = np.array(layer[s][d], np.int32) - s * local
        for d, part in enumerate(np.split(sources[i], n)):
            taken[i, d] = [e // local * most + layer[e // local][d].index(e) for e in part]
    return Way(send, taken)


def exchanged(w: jax.Array, sources: np.ndarray, axes: Sequence[str], rules: Rules, mesh: Mesh) -> jax.Array:
    """An array of experts [layers, E, ...] -> [layers, slots, ...], split over the mesh as it was.

    Layer by layer in one all-to-all: a device holds beside both arrays no more than the blocks of one layer.
    """
    n = int(np.prod([mesh.shape[axis] for axis in rules.experts], dtype=int))
    way = ways(sources, w.shape[1], n)

    def local(w: jax.Array, send: jax.Array, take: jax.Array) -> jax.Array:
        def one(_: None, layer: tuple[jax.Array, jax.Array, jax.Array]) -> tuple[None, jax.Array]:
            w, send, take = layer
            parcels = w[send[0]]  # [n, M, ...]
            came = blocks(parcels, rules.experts, "shard_map") if n > 1 else parcels
            return None, came.reshape(-1, *w.shape[1:])[take[0]]

        return jax.lax.scan(one, None, (w, send, take))[1]

    whole, by_shard = spec(rules.layout(*axes)), spec(rules.layout("layers", "experts"))
    run = by_hand(local, in_specs=(whole, by_shard, by_shard), out_specs=whole)
    with jax.set_mesh(mesh):
        return jax.block_until_ready(jax.jit(run, compiler_options=once(mesh))(w, *way))


# Balance


class Applied(NamedTuple):
    """A placement, what it was made for and by."""

    wish: Wish
    loads: Loads
    placement: Placement


def report(applied: Applied, rows: np.ndarray, repeated: int = 0) -> dict[str, Any]:
    """How even the devices are, mean over maximum load, without replicas and with them: by the recorded loads, which
    are shared evenly, and as counted in the slots of all steps of a generation.

    Args:
        rows: [layers, slots], of `Generated`. repeated: prompts among them that fill up the devices.
    """
    wish, loads, placement = applied
    E, n = placement.count.shape[1], placement.devices
    counted = np.zeros(placement.count.shape)
    for layer, (expert, some) in enumerate(zip(placement.physical_to_logical, rows, strict=True)):
        counted[layer] = np.bincount(expert, some, E)
    columns = {
        "before": placement.balance(loads.counts).before,
        "after": placement.balance(loads.counts).after,
        "measured_before": placement.balance(counted).before,
        "measured_after": evenness(rows.reshape(len(rows), n, -1).sum(2).astype(np.float64)),
    }
    layers = [
        {"layer": i, "replicas": count.tolist()} | {name: float(c[i]) for name, c in columns.items()}
        for i, count in enumerate(placement.count)
    ]
    totals = {name: float(c.mean()) for name, c in columns.items()}
    head = {"slots": wish.slots, "devices": n, "nodes": wish.nodes, "loads": loads.source}
    return head | totals | {"rows": int(rows.sum()), "repeated_prompts": repeated, "layers": layers}


def lines(r: dict[str, Any]) -> list[str]:
    """The report in words, a row a layer."""

    def pair(x: dict[str, Any], kind: str) -> tuple[str, str]:
        return f"{x[f'{kind}before']:.3f}", f"{x[f'{kind}after']:.3f}"

    busiest = [max(x["replicas"]) for x in r["layers"]]
    head = ("MoE layer", "most replicas", "before", "after", "before, here", "after, here")
    body = [
        (str(x["layer"]), str(most), *pair(x, ""), *pair(x, "measured_"))
        for x, most in zip(r["layers"], busiest, strict=True)
    ]
    words = f"{len(r['layers'][0]['replicas'])} experts in {r['slots']} slots on {r['devices']} devices"
    words += f" of {r['nodes']} nodes" if r["nodes"] > 1 else ""
    repeated = f", with those of {r['repeated_prompts']} repeated prompts that fill the devices"
    return [
        f"{words}, placed by {r['loads']}",
        *table(head, body, numbers=True),
        "mean over maximum load of the devices: {} -> {} by those loads".format(*pair(r, ""))
        + ", {} -> {} counted here".format(*pair(r, "measured_"))
        + f", on {r['rows']:,} rows"
        + repeated * (r["repeated_prompts"] > 0),
    ]
