"""Import: published weights straight into the shards of a mesh, and a workdir of step 0 that every command opens.

A device's part of a parameter is read by itself, from the files mapped into memory. Parameters are float32, as in
training; what the file has in bfloat16, float16, FP8 or MXFP4 is exact in it.
"""

import contextlib
import dataclasses
import json
import math
import re
import resource
import shutil
import time
from collections import Counter
from collections.abc import Callable, Generator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import ml_dtypes
import numpy as np

from moe_jax import config
from moe_jax import mesh as meshes
from moe_jax.checkpoint import Checkpoints, claim_workdir
from moe_jax.config import Config, DataConfig, EncoderConfig, LatentConfig, MoEConfig, Problem, Refused, RopeConfig
from moe_jax.convert.families import family_of, model_keys
from moe_jax.convert.folder import INDEX, Folder
from moe_jax.convert.names import NameMap, Piece, path_of
from moe_jax.convert.progress import Bar
from moe_jax.convert.tensors import Writing, write
from moe_jax.data import ByteTokenizer, Corpus, TokenFile, load_tokenizer, prepare, wait_prepared
from moe_jax.data.tokenizer import FILES
from moe_jax.train.loop import RSS_UNIT
from moe_jax.train.resume import check_shared, checkpoint_info
from moe_jax.train.state import Model, Weights
from moe_jax.train.upcycling import check_new
from moe_jax.workdir import CHECKPOINTS, MARKER, PUBLISHED, drop, locked

DTYPES = "dtypes.json"
UNREAD = "unread.safetensors"  # tensors that no parameter is read from, for the export
SMALL = 100_000_000  # bytes of a file that is kept beside the weights
EMPTY = TokenFile(np.zeros(0, np.int32), np.zeros(0, np.int64))
NO_TEXT = Corpus(EMPTY, EMPTY, ByteTokenizer(), 0.0, 0, 0, "")

Tell = Callable[[int], None]


def settings(source: Folder, workdir: Path, overrides: Sequence[str]) -> Config:
    """The config of an import: the model of the source's config.json, its tokenizer, and what the overrides say."""
    keys = model_keys(source.config)
    if "moe" in keys:
        keys["moe"] = {"dispatch": "auto"} | keys["moe"]
    data: dict[str, Any] = {"length": min(DataConfig().length, keys["max_length"])}
    name = next((n for n in FILES if (source.path / n).is_file()), None)
    if name is not None and not any(text.startswith("data.tokenizer=") for text in overrides):
        data["tokenizer"] = str(workdir.absolute() / PUBLISHED / name)
        data["bos"] = bool(load_tokenizer(str(source.path / name)).front)  # as the model was trained
    title = source.path.resolve().name.encode("utf-8", "replace").decode()  # a name on disk may be any bytes
    tree: dict[str, Any] = {"name": title, "model": keys, "data": data}
    for text in overrides:
        tree = config.override(tree, text)
    return config.from_dict(tree)


def widened(x: np.ndarray) -> np.ndarray:
    """In float32."""
    if x.dtype != ml_dtypes.bfloat16:
        return x.astype(np.float32, copy=False)
    wide = x.view(np.uint16).astype(np.uint32)  # a bfloat16 is the upper half of a float32
    return np.left_shift(wide, 16, out=wide).view(np.float32)


def room(shape: Sequence[int]) -> np.ndarray:
    """An empty float32 array where JAX on a CPU can take it over without a copy."""
    size = 4 * math.prod(shape)
    raw = np.empty(size + 64, np.uint8)
    begin = -raw.ctypes.data % 64
    return raw[begin : begin + size].view(np.float32).reshape(shape)


def local(source: Folder, pieces: Sequence[Piece], index: Sequence[slice]) -> np.ndarray:
    """A slice of a parameter, by `index` of its axes."""
    out = room([s.stop - s.start for s in index])
    depth = len(pieces[0].at)
    for piece in pieces:
        if all(s.start <= n < s.stop for n, s in zip(piece.at, index, strict=False)):
            at = tuple(n - s.start for n, s in zip(piece.at, index, strict=False))
            out[at] = widened(piece.read(source.parts(piece.source), index[depth:]))
    return out


def filled(source: Folder, pieces: Sequence[Piece], target: Any, tell: Tell) -> jax.Array:
    """A parameter in its shards; one part is read at a time.

    Args:
        target: shape, type and sharding.
        tell: is called with the bytes of each part.
    """
    shape = target.shape
    where: dict[tuple[tuple[int, int], ...], list[Any]] = {}
    for device, index in target.sharding.addressable_devices_indices_map(shape).items():
        spans = tuple(s.indices(n)[:2] for s, n in zip(index, shape, strict=True))
        where.setdefault(spans, []).append(device)
    arrays = []
    for spans, devices in where.items():
        part = local(source, pieces, [slice(*span) for span in spans])
        for device in devices:
            arrays.append(jax.block_until_ready(jax.device_put(part, device)))
            tell(part.nbytes)
    return jax.make_array_from_single_device_arrays(shape, target.sharding, arrays)


def weights(source: Folder, names: NameMap, targets: Weights, tell: Tell) -> Weights:
    """All parameters and selection biases, each in its shards."""
    return jax.tree_util.tree_map_with_path(
        lambda path, target: filled(source, names.parts[path_of(path)], target, tell), targets
    )


def shard_bytes(targets: Weights) -> tuple[int, int]:
    """Bytes of the shards on the devices of this process, and of all."""
    leaves = [(t.sharding, 4 * math.prod(t.sharding.shard_shape(t.shape))) for t in jax.tree.leaves(targets)]
    return sum(len(s.addressable_devices) * n for s, n in leaves), sum(len(s.device_set) * n for s, n in leaves)


@contextlib.contextmanager
def renamed() -> Generator[None]:
    """Other commands call the folder by an option."""
    try:
        yield
    except Refused as e:
        named = {"--workdir": "WORKDIR"}
        raise Refused(*(dataclasses.replace(p, key=named.get(p.key, p.key)) for p in e.problems)) from None


def new(workdir: Path) -> Checkpoints:
    """The checkpoints of a folder in which there is no run. Raises `Refused`."""
    with renamed():
        return check_new(workdir)


@contextlib.contextmanager
def fresh(workdir: Path) -> Generator[Checkpoints]:
    """The checkpoints of a workdir that is locked for an import; where that fails, nothing of it stays.

    A killed import leaves no complete checkpoint. One that does not get the lock leaves all to the one that has it.

    Raises:
        Refused: the folder cannot be used, another run is using it, or one has begun in it meanwhile.
    """
    marked = (workdir / MARKER).exists()
    created = [p for p in (workdir, *workdir.parents) if not p.exists()]  # innermost first
    try:
        claim_workdir(workdir)
    except BaseException:
        drop(created)
        raise
    with locked(workdir):
        checkpoints = new(workdir)
        before = set(workdir.iterdir())
        try:
            yield checkpoints
        except BaseException:
            with contextlib.suppress(Exception):
                checkpoints.wait()
            for path in set(workdir.iterdir()) - before:
                shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink()
            if not marked:
                (workdir / MARKER).unlink()
            drop(created)
            raise


# Tables that a config may lack
TABLES = {"moe": MoEConfig(), "latent": LatentConfig(), "rope": RopeConfig(), "encoder": EncoderConfig()}


def own(tree: dict[str, Any], default: dict[str, Any]) -> dict[str, Any]:
    """The keys of a config that are not at their default."""
    out = {}
    for name, value in tree.items():
        below = default.get(name)
        if isinstance(value, dict):
            kept = own(value, config.to_dict(TABLES[name]) if below is None else below)
            out |= {name: kept} if kept or below is None else {}
        elif value != below:
            out[name] = value
    return out


def quoted(value: Any) -> str:
    """A value in TOML, which has no surrogate pairs and no bare DEL."""
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")


def toml(tree: dict[str, Any], path: tuple[str, ...] = ()) -> str:
    """A config as a file in configs/ would have it."""
    lines = [f"{name} = {quoted(value)}" for name, value in tree.items() if not isinstance(value, dict)]
    text = "\n".join([f"[{'.'.join(path)}]" if path else "", *lines]).strip() + "\n"
    tables = [toml(value, (*path, name)) for name, value in tree.items() if isinstance(value, dict)]
    return "\n".join([text, *tables])


def keep(source: Folder, workdir: Path, unread: Sequence[str]) -> None:
    """The small files of the source, for the tokenizer and for export, the types of its numbers, and what is `unread`
    of them."""
    folder = workdir / PUBLISHED
    folder.mkdir(exist_ok=True)
    for path in sorted(source.path.iterdir()):
        kept = path.suffix in (".json", ".jinja", ".model", ".txt") and path.name != INDEX
        if kept and path.is_file() and path.stat().st_size < SMALL:
            shutil.copyfile(path, folder / path.name)
    dtypes = source.dtypes()
    most = Counter(dtypes.values()).most_common(1)[0][0]
    record = {"dtype": most, "others": {name: dtype for name, dtype in dtypes.items() if dtype != most}}
    (folder / DTYPES).write_text(json.dumps(record, indent=1), "utf-8")
    if unread:
        found = [Writing(name, source.tensors[name].dtype, source.tensors[name].shape) for name in unread]
        write(folder / UNREAD, found, (source.tensors[name].view() for name in unread))


def text_of(cfg: Config, workdir: Path) -> Corpus | None:
    """The text of the run, which process 0 prepares; None where the tokenizer has more ids than the model."""
    if load_tokenizer(cfg.data.tokenizer).size > cfg.model.vocab:
        return None
    if jax.process_index() != 0:
        return wait_prepared(workdir / "tokens", cfg.data)
    return prepare(cfg.data, workdir / "tokens")


class Opened(NamedTuple):
    """A folder of published weights, and the model that it fills; all of it is checked, and no parameter read yet."""

    source: Folder
    family: str
    cfg: Config
    model: Model
    names: NameMap
    unread: list[str]  # tensors of the map that no parameter is read from
    unused: list[str]  # tensors that are known to be of no use


def opened(path: Path, workdir: Path, overrides: Sequence[str] = ()) -> Opened:
    """The folder `path`, for an import into `workdir`. Asks JAX for no device, and reads only what may be a copy.

    Raises:
        Refused: files or a config.json that cannot be used, tensors that are not those of the model.
    """
    source = Folder(path)
    kind, family = family_of(source.config)
    cfg = settings(source, workdir, overrides)
    model = Model.of(cfg)
    model.validate()
    unread, copies = family.unread(cfg.model), family.copies(cfg.model)
    names = NameMap(model, family.names(cfg.model), unread)
    unused = source.match(names.tensors, [*family.ignored(source.config), *map(re.escape, copies)])
    check_copies(source, copies)
    return Opened(source, kind, cfg, model, names, list(unread), unused)


def check_copies(source: Folder, copies: dict[str, str]) -> None:
    """Further names of a tensor hold the same numbers. Raises `Refused`."""
    for name, of in copies.items():
        if name in source.tensors and not np.array_equal(source.values(name), source.values(of)):
            file, both = source.tensors[name].file, f"{name} {source.tensors[name]} and {of} {source.tensors[of]}"
            why = f"{both} differ, and config.json makes them one by tie_word_embeddings"
            raise Refused(Problem(str(file), why, "set it to false, or mend one of them"))


def run(
    path: Path,
    workdir: Path,
    overrides: Sequence[str] = (),
    fake_devices: int | None = None,
    *,
    quiet: bool = True,
    processes: int = 1,
    join: Callable[[], None] = lambda: None,
) -> dict[str, Any]:
    """Write a checkpoint of step 0 with the weights in the folder `path`, on the mesh that the overrides say.

    Args:
        processes: how many do so together; each reads what its devices hold, and process 0 the text and small files.
        join: joins them in JAX; called once this one has found nothing to refuse in the folders.
    Returns:
        The JSON of `moe-jax convert import`.
    Raises:
        Refused: whatever cannot work, before anything is written.
    """
    started = time.perf_counter()
    new(workdir)  # here, where process 0 cannot have begun to write: it waits for all to join
    source, kind, cfg, model, names, unread, unused = opened(path, workdir, overrides)
    join()
    meshes.prepare_devices(cfg.mesh, fake_devices, processes)
    targets = model.weight_targets(meshes.build_mesh(cfg.mesh))
    here, total = shard_bytes(targets)
    main = jax.process_index() == 0
    with fresh(workdir) if main else contextlib.nullcontext(Checkpoints(workdir / CHECKPOINTS)) as checkpoints:
        if main:
            keep(source, workdir, unread)
            (workdir / "config.toml").write_text(toml(own(config.to_dict(cfg), config.to_dict(Config()))), "utf-8")
        with renamed():
            check_shared(workdir)
        corpus = text_of(cfg, workdir)
        with Bar(here, "importing", quiet=quiet) as bar:
            numbers = weights(source, names, targets, bar)
        origin = {"source": str(path), "family": kind}
        checkpoints.save(0, numbers, checkpoint_info(cfg, corpus or NO_TEXT, 0) | {"imported": origin})
        checkpoints.wait()
    count, active = model.count()
    return {
        "workdir": str(workdir),
        "family": kind,
        "step": 0,
        "tensors": len(names.tensors),
        "ignored": unused,
        "params_total": count,
        "params_active": active,
        "shard_bytes": total,
        "mesh": cfg.mesh.sizes,
        "processes": processes,
        "tokenizer": cfg.data.tokenizer,
        "text": corpus is not None,
        "training": {
            **{key: getattr(cfg.data, key) for key in ("path", "batch", "length")},
            "learning_rate": cfg.train.optimizer.learning_rate,
        },
        "seconds": time.perf_counter() - started,
        "peak_rss_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * RSS_UNIT,
    }
