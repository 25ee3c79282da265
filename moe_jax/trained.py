"""A finished run, opened for reading: `Trained("runs/mine")` holds its config, model, weights and text."""

import dataclasses
from collections.abc import Callable, Sequence
from math import prod
from pathlib import Path

import jax

from moe_jax import config, mesh
from moe_jax.checkpoint import agree, open_workdir
from moe_jax.config import Config, Problem, Refused
from moe_jax.data import Corpus, open_prepared, whole
from moe_jax.model import Transformer
from moe_jax.train.state import Model, unstack, unstacked


class Trained:
    """The newest checkpoint of a run on the mesh of its config, or on another one.

    Args:
        workdir: the folder of the run.
        overrides: `key.path=value`, such as `mesh.expert=1`; `data.path` names another text to evaluate.
        fake_devices: as many CPU devices even where there is an accelerator.
        keep_batch: refuse a mesh that data.batch does not divide over; else the batch is rounded up, which changes no
            result of a whole text.
        decodes: refuse a model that cannot make text token by token, before its weights are read.
        check: refuses what else the config does not admit, before that too.
        processes: how many of them JAX has joined; each holds a part of the weights.
    Attributes:
        cfg: the config with the overrides. mesh: of its devices. step: of the checkpoint.
        model: the model without its numbers. weights: the numbers, each on its devices.
        corpus: the text of the run. other: the path of another text, if an override names one.
    Raises:
        Refused: no run in the folder, or overrides that it does not admit.
    """

    def __init__(
        self,
        workdir: str | Path,
        overrides: Sequence[str] = (),
        fake_devices: int | None = None,
        *,
        keep_batch: bool = False,
        decodes: bool = False,
        check: Callable[[Config], None] | None = None,
        processes: int = 1,
    ):
        self.workdir = Path(workdir)
        checkpoints = open_workdir(self.workdir)
        self.step = checkpoints.steps()[-1]
        saved = checkpoints.info(self.step)["config"]
        tree = {**saved, "train": {**saved["train"], "microbatches": 1, "rounds": 1}}  # of training alone
        for text in overrides:
            tree = config.override(tree, text)
        if not keep_batch and not any(text.startswith("data.batch=") for text in overrides):
            tree = fit_batch(tree)
        self.cfg: Config = config.from_dict(tree)
        if decodes:
            config.require_decoding(self.cfg.model)
        if check is not None:
            check(self.cfg)
        saved_cfg = config.from_dict(saved)
        self.other = None if self.cfg.data.path == saved_cfg.data.path else self.cfg.data.path
        mesh.prepare_devices(self.cfg.mesh, fake_devices, processes)
        self.mesh = mesh.build_mesh(self.cfg.mesh)
        if (newest := agree(self.step)) != self.step:
            why = f"holds step {newest} for process 0, and step {self.step} for process {jax.process_index()}"
            raise Refused(Problem("DIR", why, "wait until the run has saved, on a disk that all of them see"))
        self.model = Model.of(self.cfg)
        self.model.validate()
        check_overrides(saved_cfg, self.model, overrides)
        read = {"tokenizer": self.cfg.data.tokenizer, "length": self.cfg.data.length}
        data = self.cfg.data if self.other is None else dataclasses.replace(saved_cfg.data, **read)
        self.corpus = open_prepared(self.workdir / "tokens", data)
        self.weights = checkpoints.restore_weights(self.model.weight_targets(self.mesh), self.step)

    def take_apart(self) -> None:
        """Each layer by itself, as decoding reads it best (`unstacked`)."""
        self.weights = unstack(self.model, self.weights, self.mesh)
        self.model = unstacked(self.model)

    def text(self) -> Corpus:
        """What `eval` reads, as the held-out part of a corpus: that of the run, or the whole of another text."""
        return self.corpus if self.other is None else whole(self.cfg.data)

    def module(self) -> Transformer:
        """The Flax module; calls need `jax.set_mesh(trained.mesh)`."""
        return self.model.module(*self.weights)


def fit_batch(tree: dict) -> dict:
    """A config with data.batch rounded up to what divides over its mesh in whole groups."""
    try:
        sizes = [tree["mesh"].get(axis, 1) for axis in tree["rules"]["batch"]]
        batch, length = tree["data"]["batch"], tree["data"]["length"]
        group = tree["model"].get("moe", {}).get("group_size")
        unit = prod(sizes) * (max(1, group // length) if isinstance(group, int) else 1)
        return {**tree, "data": {**tree["data"], "batch": -(-batch // unit) * unit}}
    except (AttributeError, KeyError, TypeError, ZeroDivisionError):
        return tree  # which is no config: the one who validates it says why


def check_overrides(saved: Config, model: Model, overrides: Sequence[str]) -> None:
    """Refuses overrides that make a model of other parameters than those of the checkpoint."""
    named = [text for text in overrides if text.startswith("model.")]
    if not named:
        return
    was, now = ({name: list(shape) for name, shape, _ in m.leaves()} for m in (Model.of(saved), model))
    wrong = [name for name in sorted(was.keys() | now.keys()) if was.get(name) != now.get(name)]
    if wrong:
        why = f"makes another model than that of the checkpoint: {len(wrong)} of {len(was)} parameters differ, first "
        why += f"{wrong[0]}: {was.get(wrong[0], 'absent')} there, {now.get(wrong[0], 'absent')} here"
        raise Refused(Problem(", ".join(named), why, "take that override out"))
