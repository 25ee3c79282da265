"""`moe-jax upcycle`: from the folder of a dense run to a folder that `moe-jax train` goes on in."""

import contextlib
import dataclasses
import math
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from moe_jax import config
from moe_jax import mesh as meshes
from moe_jax.checkpoint import Checkpoints, check_workdir, open_workdir
from moe_jax.config import Config, ModelConfig, Problem, Refused
from moe_jax.data import load_tokenizer, open_prepared, prepare
from moe_jax.refused import written
from moe_jax.schema import differing
from moe_jax.train.evaluate import Evaluator
from moe_jax.train.resume import checkpoint_info, claimed
from moe_jax.train.state import Model, State, once
from moe_jax.upcycle import Method, cut, upcycle
from moe_jax.workdir import begun, locked

FREE = ("moe", "scan", "remat", "dropout", "dtype", "attention_kernel")  # keys that its parameters do not depend on


def open_dense(folder: Path) -> tuple[Checkpoints, Config]:
    """The checkpoints of a dense run and its config.

    Raises:
        Refused: no run, or one of a model that has experts.
    """
    checkpoints = open_workdir(folder, "DENSE_DIR")
    saved = config.from_dict(checkpoints.info(checkpoints.steps()[-1])["config"])
    if saved.model.moe is not None:
        why = f"{folder} holds a model of {saved.model.moe.experts} experts, and upcycling begins with a dense one"
        raise Refused(Problem("DENSE_DIR", why, "name the workdir of a dense run"))
    return checkpoints, saved


def check_model(dense: ModelConfig, m: ModelConfig) -> None:
    """Refuses a model that differs from the dense one in more than its experts."""

    if dense.encoder is None and m.encoder is not None:
        raise Refused(Problem("model.encoder", "is set, and the dense model has none", "set model.encoder=unset"))
    if m.encoder is None and dense.encoder is not None:
        n = dense.encoder.layers
        why = f"is not set, and the dense model has an encoder of {n} layers"
        raise Refused(Problem("model.encoder", why, f"set model.encoder.layers={n}"))
    was, now = _settings(dense), _settings(m)
    if wrong := [problem for k in now for problem in _differences(f"model.{k}", was[k], now[k])]:
        raise Refused(*wrong)


def _settings(m: ModelConfig) -> dict[str, Any]:
    """The keys that the parameters depend on, with the values that unset ones stand for."""
    m = dataclasses.replace(m, kv_heads=m.resolved_kv_heads, head_dim=m.resolved_head_dim)
    out = {f.name: getattr(m, f.name) for f in dataclasses.fields(m) if f.name not in FREE}
    if m.encoder is None:
        return out
    return out | {"encoder": None, "encoder.layers": m.encoder.layers, "encoder.vocab": m.encoder.vocab}


def _differences(key: str, was: Any, now: Any) -> list[Problem]:
    """How a setting, or each of a table of them, differs from the dense model's, in words that can be typed."""
    if was == now:
        return []
    if dataclasses.is_dataclass(now) and was is None:
        return [Problem(key, "is set, and the dense model has none", f"set {key}=unset")]
    if dataclasses.is_dataclass(was):
        other = type(was)() if now is None else now
        keys = differing(was, other)
        if now is not None:
            return [p for k, v in keys.items() for p in _differences(f"{key}.{k}", v, getattr(now, k))]
        first = dataclasses.fields(was)[0].name  # of a table of defaults: it has to be there
        given = " ".join(f"{key}.{k}={written(v)}" for k, v in (keys or {first: getattr(was, first)}).items())
        return [Problem(key, f"is not set, and the dense model has {given}", f"set {given}")]
    why = f"is {written(now)}, and the dense model has {written(was)}"
    return [Problem(key, why, f"set it to {written(was)}")]


def check_tokenizer(folder: Path, dense: Config, cfg: Config) -> None:
    """Refuses a tokenizer whose ids mean something else than those that the dense model learned."""
    tokens = folder / "tokens"
    old = open_prepared(tokens, dense.data).tokenizer if tokens.exists() else load_tokenizer(dense.data.tokenizer)
    if load_tokenizer(cfg.data.tokenizer).fingerprint() != old.fingerprint():
        was, now = dense.data.tokenizer, cfg.data.tokenizer
        why = f"{now!r} is not the tokenizer of the dense model, {was!r}"
        raise Refused(Problem("data.tokenizer", why, f"set data.tokenizer={was}"))
    if cfg.data.bos != dense.data.bos:
        was, now = (str(c.data.bos).lower() for c in (dense, cfg))
        why = f"is {now}, and the dense model learned with {was}"
        raise Refused(Problem("data.bos", why, f"set data.bos={was}"))


def check_new(workdir: Path) -> Checkpoints:
    """The checkpoints of a folder in which no run has begun; what an upcycling that was cut left there may stay."""
    check_workdir(workdir)
    checkpoints = Checkpoints(workdir / "checkpoints")
    if begun(workdir):
        why = f"{workdir} holds a run already"
        raise Refused(Problem("--workdir", why, "use a new or an empty folder"))
    return checkpoints


def run(
    folder: Path,
    cfg: Config,
    workdir: Path,
    *,
    method: Method = "copy",
    noise: float = 0.0,
    seed: int | None = None,
) -> dict[str, Any]:
    """Write a checkpoint of step 0 of `cfg`'s model, made of the newest checkpoint of the dense run in `folder`.

    Both models are evaluated, dropless, on the first `train.eval_batches` batches of the new run's held-out text.

    Args:
        seed: of router and noise; None: `train.seed`.
    Returns:
        The JSON of `moe-jax upcycle`.
    Raises:
        Refused: whatever cannot work, before anything is written.
    """
    seed = cfg.train.seed if seed is None else seed
    if not (math.isfinite(noise) and noise >= 0):
        raise Refused(Problem("--noise", f"is {noise}", "give 0 or more, and finite"))
    if not 0 <= seed < 2**32:
        raise Refused(Problem("--seed", f"is {seed}", "give 0 to 4294967295"))
    source, saved = open_dense(folder)
    check_model(saved.model, cfg.model)
    how = cut(cfg.model, method)
    check_tokenizer(folder, saved, cfg)
    target = check_new(workdir)
    mesh = meshes.build_mesh(cfg.mesh)
    dense = Model.of(dataclasses.replace(cfg, model=cfg.model.dense))
    model = Model.of(cfg)
    dense.validate()
    model.validate()
    step = source.newest()
    weights = source.restore_weights(dense.weight_targets(mesh), step)

    def create(params: Any) -> State:
        new = upcycle(params, cfg.model, method, noise=noise, seed=seed)
        return State(*new, model.optimizer().init(new.params), jnp.zeros((), jnp.int32))

    with contextlib.ExitStack() as stack:
        with claimed(workdir):
            stack.enter_context(locked(workdir))
            corpus = prepare(cfg.data, workdir / "tokens")
        before = Evaluator(dense, mesh, corpus).report(weights, cfg.train.eval_batches)["eval_loss"]
        with jax.set_mesh(mesh):
            build = jax.jit(create, out_shardings=model.shardings(mesh), compiler_options=once(mesh))
            state = build(weights.params)
        del weights
        after = Evaluator(model, mesh, corpus).report(state.weights, cfg.train.eval_batches)["eval_loss"]
        preserved = how.preserved and not noise
        origin = {"workdir": str(folder), "step": step, "method": method, "noise": noise, "seed": seed}
        target.save(0, state, checkpoint_info(cfg, corpus, 0) | {"upcycled": origin})
        target.wait()
    total, active = model.count()
    return {
        "workdir": str(workdir),
        "step": 0,
        "dense_step": step,
        "method": method,
        "slices": how.slices,
        "copies": how.copies,
        "shared_slices": how.shared,
        "factor": how.factor,
        "preserved": preserved,
        "why": "noise was added" if how.preserved and noise else how.why,
        "params_total_before": dense.count()[0],
        "params_total": total,
        "params_active": active,
        "eval_loss_before": before,
        "eval_loss": after,
    }
