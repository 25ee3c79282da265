"""Export: the newest checkpoint of a workdir as a folder of published weights, which appears whole or not at all."""

import contextlib
import dataclasses
import json
import math
import os
import secrets
import shutil
from collections import Counter
from collections.abc import Generator, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from moe_jax import config
from moe_jax.axes import Rules
from moe_jax.checkpoint import Checkpoints, open_workdir
from moe_jax.config import MeshConfig, ModelConfig, Problem, Refused
from moe_jax.convert.families import FAMILIES, family_of, model_keys
from moe_jax.convert.folder import CONFIG, INDEX, ONE, read_json
from moe_jax.convert.load import DTYPES, UNREAD, widened
from moe_jax.convert.mxfp4 import MXFP4
from moe_jax.convert.names import NameMap, Piece, path_of
from moe_jax.convert.progress import Bar
from moe_jax.convert.tensors import DTYPES as KINDS
from moe_jax.convert.tensors import Stored, Writing, read_header, write
from moe_jax.train.resume import differences
from moe_jax.train.state import Model, Weights, placed
from moe_jax.workdir import PUBLISHED

NAMES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}
TYPES = {kind: name for name, kind in NAMES.items()}
FREE = (
    "moe.dispatch",
    "moe.exchange",
    "moe.capacity_factor",
    "moe.eval_capacity_factor",
    "moe.min_capacity",
    "moe.group_size",
    "moe.priority",
    "moe.overflow",
    "moe.balance",
    "moe.sequence_loss",
    "moe.device_loss",
    "moe.communication_loss",
    "moe.importance_loss",
    "moe.z_loss",
    "moe.bias_",
    "moe.expert_dropout",
    "moe.router.jitter",
    "moe.router.balance",
    "attention_exchange",
    "attention_kernel",
    "dropout",
    "dtype",
    "stack_above",
    "scan",
    "remat",
    "max_length",
    "encoder.length",
    "encoder.start",
)
"""Keys of a model that another library does not ask for: how it is trained, and how it computes."""
PATTERN = ("moe.every", "moe.first_dense", "moe.layers", "encoder.moe_layers")  # which layers are MoE
UNSET = {
    "softmax_topk": {"normalize": "none"},
    "sparsemixer": {"margin": 0.02},
    "deepseek_v2": {"normalize": "none", "group_score": "max"},
    "deepseek_v3": {"normalize": "before", "group_score": "sum2"},
}
"""What unset keys of a router stand for, by its kind."""


def check_target(target: Path) -> Path:
    """Where a folder leads to; refuses one that holds something or cannot be replaced, before anything is read."""
    target = Path(os.path.realpath(target))
    above = next(p for p in target.parents if p.exists())
    if os.path.lexists(target) and (not target.is_dir() or any(target.iterdir())):
        raise Refused(Problem("DST", f"{target} is there and holds something", "name a new or an empty folder"))
    if os.path.ismount(target):
        why = f"{target} is where a disk is mounted, and a complete folder cannot be renamed to it"
        raise Refused(Problem("DST", why, f"name a folder in it, such as {target / 'model'}"))
    if not above.is_dir() or not os.access(above, os.W_OK | os.X_OK):
        raise Refused(Problem("DST", f"{target} cannot be created in {above}", "use a folder that you can write"))
    return target


@contextlib.contextmanager
def whole(target: Path) -> Generator[Path]:
    """A folder that is renamed to `target`, a path without links, when it is complete; where that fails, nothing of it
    stays."""
    created = [p for p in target.parents if not p.exists()]  # innermost first
    draft = target.with_name(f".{target.name}-{secrets.token_hex(6)}")
    try:
        draft.mkdir(parents=True)
        yield draft
        os.replace(draft, target)  # takes the place of an empty folder too
    except BaseException:
        shutil.rmtree(draft, ignore_errors=True)
        for path in created:
            path.rmdir()
        raise


def unlike(m: ModelConfig, fields: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Keys in which the model of a config.json differs from `m`."""
    found = config.from_dict({"model": model_keys(fields), "data": {"length": 1}}).model
    pairs = differences(resolved(m), resolved(found))
    alike = (m.layer_kinds, m.encoder_kinds) == (found.layer_kinds, found.encoder_kinds)
    free = (*FREE, *(PATTERN if alike else ()))
    return {k: pair for k, pair in pairs.items() if not k.startswith(free) and not close(*pair)}


def resolved(m: ModelConfig) -> dict[str, Any]:
    """The keys of a model in which unset ones have what they stand for; equal for equal models."""
    table = config.to_dict(config.Config(model=m))["model"]
    table |= {"head_dim": m.resolved_head_dim, "kv_heads": m.resolved_kv_heads, "attention_scale": m.score_scale}
    if m.rope is not None and m.rope.kind == "plain" and m.rope.fraction == 1.0:
        del table["rope"]
    if m.rope is not None and m.rope.kind == "longrope":
        table["rope"] |= {"attention_factor": m.rope.turned, "long_attention_factor": m.rope.turned_long}
        table["rope"].pop("factor", None)
    if m.latent is not None:
        table["latent"]["value"] = m.value_dim
    if m.moe is not None:
        width, router = m.moe.d_ff or m.d_ff, table["moe"]["router"]
        shared = m.moe.shared_width(width)
        table["moe"] |= {"d_ff": width, "shared_experts": min(m.moe.shared_experts, 1), "shared_d_ff": shared}
        if "bias_rate" in table["moe"]:  # whether there is a selection bias, not how it moves
            table["moe"]["selection_bias"] = True
        router |= {k: v for k, v in UNSET.get(m.moe.router.kind, {}).items() if k not in router}
        if m.moe.router.topk_groups in (None, m.moe.router.groups):  # a token may use them all
            for name in ("groups", "topk_groups", "group_score"):
                router.pop(name, None)
    return table


def close(ours: Any, theirs: Any) -> bool:
    """Whether two numbers differ by rounding alone, as 1/(1/x) does."""
    numbers = isinstance(ours, float) and isinstance(theirs, float)
    return numbers and math.isclose(ours, theirs, rel_tol=1e-12)


def description(workdir: Path, m: ModelConfig, family: str | None) -> dict[str, Any]:
    """The config.json of an export: the imported one, or one of a family that the model is of.

    Raises:
        Refused: a model that is of no family, or another one than was imported.
    """
    file = workdir / PUBLISHED / CONFIG
    if file.exists():
        found = read_json(file)
        if family not in (None, found.get("model_type")):
            why = f"is {family!r}, and {workdir} was imported as {found.get('model_type')!r}"
            raise Refused(Problem("--family", why, "leave it out"))
        if wrong := unlike(m, found):
            key, (ours, theirs) = next(iter(wrong.items()))
            why = f"model.{key} is {ours!r}, and the imported config.json has {theirs!r}"
            raise Refused(Problem(str(file), why, "put the file back, or import again without that override"))
        return found
    if family is not None and family not in FAMILIES:
        raise Refused(Problem("--family", f"is {family!r}", f"use one of {', '.join(FAMILIES)}"))
    told = {}
    for kind in FAMILIES if family is None else [family]:
        if (wrong := foreign(m, kind)) is None:
            return described(m, kind)
        told[kind] = wrong
    why = f"is of no family that is known here; {'; '.join(f'{kind}: {wrong}' for kind, wrong in told.items())}"
    raise Refused(Problem("model", why, "train a model of one of them"))


def described(m: ModelConfig, kind: str) -> dict[str, Any]:
    """A config.json for a model of that family."""
    return {"model_type": kind, **FAMILIES[kind].fields(m), "dtype": "float32"}


def foreign(m: ModelConfig, kind: str) -> str | None:
    """In what a model is not of a family; None if it is."""
    try:
        if m.moe is None:
            return "its models have experts"
        wrong = unlike(m, described(m, kind))
    except Refused as e:
        return e.problems[0].key + " " + e.problems[0].reason
    if not wrong:
        return None
    key, (ours, theirs) = next(iter(wrong.items()))
    return f"model.{key} is {ours!r} and would be {theirs!r}"


def narrowed(name: str, value: np.ndarray, kind: str) -> np.ndarray:
    """float32 in another type.

    Raises:
        Refused: numbers too large for float16.
    """
    if kind == "F32":
        return value
    with np.errstate(over="ignore"):
        out = value.astype(KINDS[kind])
    if kind == "F16" and not np.isfinite(out).all() and np.isfinite(value).all():
        why = f"{name} holds {np.abs(value).max():g}, which float16 cannot"
        raise Refused(Problem("--dtype", why, "use bfloat16 or float32"))
    return out


def made(pieces: Sequence[Piece], leaves: dict[str, np.ndarray], kind: str) -> np.ndarray:
    """A published tensor out of our parameters."""
    out = np.empty(pieces[0].shape, KINDS[kind])
    for piece in pieces:
        piece.write(out, narrowed(piece.source, leaves[piece.leaf][piece.at], kind))
    return out


def files(tensors: Sequence[Writing], largest: float) -> dict[str, list[Writing]]:
    """The tensors of each file; one file has more than `largest` bytes only where a single tensor has."""
    parts: list[list[Writing]] = []
    size = math.inf
    for t in tensors:
        if size + t.bytes > largest:
            parts.append([])
            size = 0
        parts[-1].append(t)
        size += t.bytes
    n = len(parts)
    return {ONE if n == 1 else f"model-{i + 1:05}-of-{n:05}.safetensors": part for i, part in enumerate(parts)}


def kinds(workdir: Path, names: NameMap, biases: set[str], dtype: str | None) -> dict[str, str]:
    """The type of each tensor: the imported one, or `dtype`, which selection biases are spared."""
    file = workdir / PUBLISHED / DTYPES
    if dtype is None and file.exists():
        record = read_json(file)
        found = {name: record["others"].get(name, record["dtype"]) for name in names.tensors}
        return {name: "BF16" if kind in ("F8_E4M3", MXFP4) else kind for name, kind in found.items()}
    chosen = NAMES[dtype or "float32"]
    return {n: "F32" if pieces[0].leaf in biases else chosen for n, pieces in names.pieces.items()}


def run(
    workdir: Path,
    target: Path,
    *,
    dtype: str | None = None,
    shard_gb: float = 5.0,
    family: str | None = None,
    quiet: bool = True,
) -> dict[str, Any]:
    """Write the newest checkpoint of `workdir` into the folder `target`.

    Returns:
        The JSON of `moe-jax convert export`.
    Raises:
        Refused: whatever cannot work; nothing is left behind.
    """
    if not 0 < shard_gb < math.inf:
        raise Refused(Problem("--shard-gb", f"is {shard_gb:g}", "give more than 0"))
    checkpoints = open_workdir(workdir, "WORKDIR")
    place = check_target(target)
    step = checkpoints.newest()
    cfg = config.from_dict(checkpoints.info(step)["config"])
    cfg = dataclasses.replace(cfg, mesh=MeshConfig(), rules=Rules())
    about = description(workdir, cfg.model, family)
    kind, row = family_of(about)
    model = Model.of(cfg)
    names = NameMap(model, row.names(cfg.model), row.unread(cfg.model))
    bias_leaves = {path_of(path) for path, _ in jax.tree_util.tree_flatten_with_path((model.bias_shapes,))[0]}
    types = kinds(workdir, names, bias_leaves, dtype)
    leaves = numbers(checkpoints, model, step)
    tensors = [Writing(name, types[name], shape) for name, shape in names.tensors.items()]
    unread = read_header(file) if (file := workdir / PUBLISHED / UNREAD).exists() else {}
    parts = files(tensors, shard_gb * 1e9)
    most = Counter(types.values()).most_common(1)[0][0]
    total = sum(t.bytes for t in tensors)
    with whole(place) as draft:
        with Bar(total, "exporting", quiet=quiet) as bar:
            for file, part in parts.items():
                write(draft / file, part, values(part, names, leaves, unread, bar))
        if len(parts) > 1:
            chart = {t.name: file for file, part in parts.items() for t in part}
            index = {"metadata": {"total_size": total}, "weight_map": chart}
            (draft / INDEX).write_text(json.dumps(index, indent=2), "utf-8")
        accompany(workdir, draft, about, TYPES[most] if dtype or about.get("quantization_config") else None)
    return {
        "target": str(target),
        "family": kind,
        "step": step,
        "tensors": len(tensors),
        "params_total": model.count()[0],
        "files": len(parts),
        "dtype": TYPES[most],
        "bytes": total,
    }


def numbers(checkpoints: Checkpoints, model: Model, step: int) -> dict[str, np.ndarray]:
    """Parameters and selection biases by their path, on the host."""
    here = jax.sharding.SingleDeviceSharding(jax.devices("cpu")[0])
    shapes = Weights(model.shapes, model.bias_shapes)
    tree = checkpoints.restore_weights(placed(shapes, jax.tree.map(lambda _: here, shapes)), step)
    return {path_of(path): np.asarray(x) for path, x in jax.tree_util.tree_flatten_with_path(tree)[0]}


def values(
    part: Sequence[Writing], names: NameMap, leaves: dict[str, np.ndarray], unread: dict[str, Stored], bar: Bar
) -> Iterator[np.ndarray]:
    """The numbers of a file, tensor by tensor; those that were not read, as the import left them."""
    for t in part:
        if t.name in unread:
            yield narrowed(t.name, widened(unread[t.name].view()), t.dtype)
        else:
            yield made(names.pieces[t.name], leaves, t.dtype)
        bar(t.bytes)


def accompany(workdir: Path, draft: Path, about: dict[str, Any], dtype: str | None) -> None:
    """config.json and the other small files; `dtype` is that of the numbers where it is another one than imported."""
    if (workdir / PUBLISHED).is_dir():
        for path in sorted((workdir / PUBLISHED).iterdir()):
            if path.name not in (CONFIG, DTYPES, UNREAD):
                shutil.copyfile(path, draft / path.name)
    if dtype is not None:
        about = {k: v for k, v in about.items() if k != "quantization_config"}
        about["torch_dtype" if "torch_dtype" in about else "dtype"] = dtype
    (draft / CONFIG).write_text(json.dumps(about, indent=2) + "\n", "utf-8")
