"""Loss on held-out text, dropless and at capacity."""

import math
from collections.abc import Callable, Iterable
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from moe_jax.data import Corpus, Windows, heldout_batches
from moe_jax.mesh import fetch
from moe_jax.rules import sharding
from moe_jax.train.state import Model, Weights
from moe_jax.train.step import Sums, make_eval_step


def local_rows(model: Model, mesh: Mesh) -> list[int]:
    """The rows of a batch that the devices of this process hold, in order. Processes may share some."""
    B, L = model.cfg.data.batch, model.cfg.data.length
    held = sharding(mesh, (model.cfg.rules.batch, ())).addressable_devices_indices_map((B, L))
    return sorted({row for index in held.values() if index is not None for row in range(B)[index[0]]})


def to_devices(batch: dict[str, np.ndarray], model: Model, mesh: Mesh) -> dict[str, jax.Array]:
    """The `local_rows` of a batch [rows, L] as arrays [B, L] sharded over the token axes."""
    rows, B = sharding(mesh, (model.cfg.rules.batch, ())), model.cfg.data.batch
    return {n: jax.make_array_from_process_local_data(rows, v, (B, *v.shape[1:])) for n, v in batch.items()}


class Evaluator:
    """Held-out loss of a model on a mesh; each kind of pass is compiled once."""

    def __init__(self, model: Model, mesh: Mesh, corpus: Corpus):
        self.model, self.mesh, self.corpus = model, mesh, corpus
        self.windows = Windows(corpus.heldout, model.cfg.data.length, model.cfg.data.packing, model.cfg.inputs)
        self.steps: dict[float | None, Callable[[Weights, Any], Sums]] = {}

    def batches(self, count: int) -> Iterable[dict[str, np.ndarray]]:
        rows = local_rows(self.model, self.mesh)
        return heldout_batches(self.windows, batch=self.model.cfg.data.batch, count=count, rows=rows)

    def sums(self, weights: Weights, count: int, capacity_factor: float | None) -> Sums:
        """Sums over the first `count` batches of held-out text, on the host."""
        if capacity_factor not in self.steps:
            self.steps[capacity_factor] = jax.jit(make_eval_step(self.model, capacity_factor))
        total = None
        with jax.set_mesh(self.mesh):
            for batch in self.batches(count):
                sums = self.steps[capacity_factor](weights, to_devices(batch, self.model, self.mesh))
                # float64 and Python integers on the host: no count is rounded, whatever the number of batches
                host = jax.tree.map(lambda x: fetch(x).astype(np.int64 if x.dtype == np.int32 else np.float64), sums)
                total = host if total is None else jax.tree.map(np.add, total, host)
        assert total is not None
        return total

    def report(self, weights: Weights, count: int, *, at_capacity: bool = False) -> dict[str, Any]:
        """`eval_loss` (nats a token, dropless), `bits_per_byte`, `tokens`, and counts of the routing.

        Args:
            at_capacity: also `eval_loss_at_capacity` at the evaluation's capacity factor, or else the training's; the
                counts are then of that pass. Without experts they are 0 and both losses equal. And `load` of the
                dropless pass, choices of each expert [MoE layers][E].
        """
        exact = self.sums(weights, count, None)
        loss = float(exact.nats / exact.targets)
        bits = loss / math.log(2) / self.corpus.bytes_per_token
        out: dict[str, Any] = {"eval_loss": loss, "bits_per_byte": bits, "tokens": int(exact.targets)}
        counted, moe = exact, self.model.cfg.model.moe
        if at_capacity:
            factor = None if moe is None else moe.eval_capacity_factor or moe.capacity_factor
            counted = exact if factor is None else self.sums(weights, count, factor)
            out |= {"eval_loss_at_capacity": float(counted.nats / counted.targets), "capacity_factor": factor}
            out["load"] = [] if exact.stats is None else exact.stats.load.tolist()
        stats = counted.stats
        routed, kept = (0, 0) if stats is None else (int(stats.routed.sum()), int(stats.kept.sum()))
        out |= {"routed": routed, "kept": kept, "dropped": routed - kept}
        return out
