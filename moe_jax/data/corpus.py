"""Token files: a source is tokenized once, split into a training and a held-out part, and mapped into memory.

A prepared folder holds, for `train` and `heldout`, `NAME.bin` (the tokens of all documents in a row, each document with
its eos, as little-endian uint16 or uint32) and `NAME.ends.npy` (int64: where each document ends), and `index.json`.
It appears whole or not at all: everything is written into a folder beside it, which is then renamed.
"""

import hashlib
import json
import os
import secrets
import shutil
import time
from array import array
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np

from moe_jax.config import DataConfig, Problem, Refused
from moe_jax.data.sources import documents
from moe_jax.data.split import PARTS, Survey, pieces, survey
from moe_jax.data.tokenizer import Tokenizer, load_tokenizer, opening

FORMAT = 1
INDEX = "index.json"
SETTINGS = ("path", "field", "tokenizer", "bos", "heldout", "seed")  # what decides the tokens and their split
MOVABLE = "tokenizer"  # its file may lie elsewhere: what it holds is compared


@dataclass(frozen=True)
class TokenFile:
    """`tokens` [T]: all documents in a row, each with its eos; `ends` [documents] int64: where each one ends."""

    tokens: np.ndarray
    ends: np.ndarray

    def __len__(self) -> int:
        return len(self.tokens)


@dataclass(frozen=True)
class Corpus:
    """A prepared corpus. `bytes_per_token` is that of the held-out part: nats / ln 2 / bytes_per_token = bits a byte.

    `documents` and `bytes` count the whole source; `fingerprint` is equal only for equal settings and equal text.
    `first` are the ids that every document begins with.
    """

    train: TokenFile
    heldout: TokenFile
    tokenizer: Tokenizer
    bytes_per_token: float
    documents: int
    bytes: int
    fingerprint: str
    first: tuple[int, ...] = ()

    def prompt(self, text: str, whole: bool = False) -> np.ndarray:
        """The ids [T] int32 of the beginning of a document; `whole`: of all of a text for an encoder, with the special
        tokens that it names, such as T5's <extra_id_0>, and what the tokenizer puts after it."""
        ids = self.tokenizer.encode(text, marked=whole)
        return np.concatenate([self.first, ids, self.tokenizer.back if whole else ()]).astype(np.int32)


def prepare(cfg: DataConfig, folder: Path) -> Corpus:
    """The corpus in `folder`, tokenized first if there is none; a prepared one is used without a look at its source.

    The source is read twice, one document in memory at a time.

    Raises:
        Refused: text that cannot be used or is too short for one sequence of L+1 tokens in each part; a folder with a
            corpus of other settings or with something else in it. Nothing is left behind then.
    """
    folder = Path(os.path.realpath(folder))
    if (folder / INDEX).exists():
        return open_prepared(folder, cfg)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        why = "there is something here that is no prepared corpus"
        raise Refused(Problem(str(folder), why, "give another folder, or move that away"))
    tokenizer = load_tokenizer(cfg.tokenizer)
    found = survey(cfg)
    # The parent may have to be made too, and only once nothing can be refused any more: work in the nearest one.
    above = next(parent for parent in folder.parents if parent.exists())
    temporary = above / f".{folder.name}-{secrets.token_hex(6)}"
    try:
        temporary.mkdir()
    except OSError as e:
        raise Refused(
            Problem(str(folder), f"cannot write in {str(above)!r}: {e.strerror}", "give another folder")
        ) from None
    try:
        _write(cfg, tokenizer, found, temporary)
        folder.parent.mkdir(parents=True, exist_ok=True)
        try:
            os.replace(temporary, folder)  # takes the place of an empty folder too
        except OSError:
            if not (folder / INDEX).exists():  # else another process was faster, with equal or refused settings
                raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return open_prepared(folder, cfg)


def renew(cfg: DataConfig, folder: Path) -> Corpus:
    """The corpus of `cfg` in place of the one in `folder`, which stays where the new one is refused.

    Raises:
        Refused: as `prepare`; another tokenizer than that of the corpus in `folder`.
    """
    folder = Path(os.path.realpath(folder))
    if (folder / INDEX).exists():
        known = json.loads((folder / INDEX).read_text("utf-8")).get("tokenizer")
        if load_tokenizer(cfg.tokenizer).fingerprint() != known:
            why = f"{cfg.tokenizer!r} is another one than that of the corpus in {folder}"
            raise Refused(Problem("data.tokenizer", why, "set it back"))
    draft = folder.with_name(f"{folder.name}.new")
    shutil.rmtree(draft, ignore_errors=True)  # of a process that was killed
    prepare(cfg, draft)
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(draft, folder)
    return open_prepared(folder, cfg)


def wait_prepared(folder: Path, cfg: DataConfig) -> Corpus:
    """The corpus that another process prepares in `folder`, once it is there. Raises `Refused` as `open_prepared`."""
    while not (folder / INDEX).exists():  # it is renamed into place when it is complete
        time.sleep(0.1)
    return open_prepared(folder, cfg)


def whole(cfg: DataConfig) -> Corpus:
    """All of a source as the held-out part of a corpus without a training part, in memory; nothing is written.

    Raises:
        Refused: text that cannot be used, or less than one sequence of L+1 tokens.
    """
    tokenizer, rows, size = load_tokenizer(cfg.tokenizer), [], 0
    first = opening(tokenizer, cfg.bos)
    for document in documents(cfg):
        rows.append(ids_of(tokenizer, first, document.text))
        size += len(document.text.encode("utf-8"))
    tokens, ends = np.concatenate(rows), np.cumsum([len(row) for row in rows])
    if len(tokens) < cfg.length + 1:
        why = f"{cfg.path!r} has {len(tokens)} tokens, and one sequence of data.length={cfg.length} takes"
        remedy = f"give more text, or data.length={len(tokens) - 1} or less"
        raise Refused(Problem("data.path", f"{why} {cfg.length + 1}", remedy))
    nothing = TokenFile(tokens[:0], ends[:0])
    return Corpus(nothing, TokenFile(tokens, ends), tokenizer, size / len(tokens), len(rows), size, "", first)


def ids_of(tokenizer: Tokenizer, first: tuple[int, ...], text: str) -> np.ndarray:
    """The ids [T] int32 of a document: what it begins with, its text, and the end."""
    return np.concatenate([first, tokenizer.encode(text), [tokenizer.eos]]).astype(np.int32)


def open_prepared(folder: Path, cfg: DataConfig) -> Corpus:
    """The corpus that `prepare` left in `folder`; neither reads the source nor writes.

    Raises:
        Refused: there is none, it is damaged, it has other settings, or a part is too short for `cfg.length`.
    """
    folder = Path(folder)
    again = "delete the folder and prepare it again, by training with the same data settings"
    try:
        index = json.loads((folder / INDEX).read_text("utf-8"))
        if index["format"] != FORMAT:
            why = f"has format {index['format']}, and this version reads format {FORMAT}"
            raise Refused(Problem(str(folder), why, again))
        tokenizer = _same_settings(cfg, index, folder)
        _enough(cfg, {name: index[name]["tokens"] for name in PARTS})
        train, heldout = (_open_part(folder, name, index) for name in PARTS)
        per_token = index["heldout"]["bytes"] / index["heldout"]["tokens"]
        counts, first = (index["documents"], index["bytes"]), opening(tokenizer, cfg.bos)
        return Corpus(train, heldout, tokenizer, per_token, *counts, index["fingerprint"], first)
    except FileNotFoundError as e:
        why = f"no prepared corpus: {Path(e.filename or INDEX).name} is missing"
        raise Refused(Problem(str(folder), why, "prepare it, by training with these data settings")) from None
    except (OSError, ValueError, KeyError, TypeError) as e:
        raise Refused(Problem(str(folder), f"a damaged corpus: {e!r}", again)) from None


def _same_settings(cfg: DataConfig, index: dict, folder: Path) -> Tokenizer:
    """The tokenizer, if the corpus was prepared as `cfg` says."""
    problems = []
    for name in SETTINGS:
        was, now = index["settings"].get(name, getattr(DataConfig, name)), getattr(cfg, name)
        if was != now and (name != MOVABLE or load_tokenizer(now).fingerprint() != index["tokenizer"]):
            why = f"is {now!r}, and the corpus in {folder} was prepared with {was!r}"
            remedy = f"set data.{name}={was if isinstance(was, str) else json.dumps(was)}, or use another folder"
            problems.append(Problem(f"data.{name}", why, remedy))
    if problems:
        raise Refused(*problems)
    tokenizer = load_tokenizer(cfg.tokenizer)
    if tokenizer.fingerprint() != index["tokenizer"]:
        why = f"{cfg.tokenizer!r} has changed since the corpus in {folder} was prepared"
        raise Refused(Problem("data.tokenizer", why, "bring the old file back, or use another folder"))
    return tokenizer


def _enough(cfg: DataConfig, tokens: dict[str, int]) -> None:
    """Refuses a part without one whole sequence."""
    for name, title in zip(PARTS, ("training", "held-out"), strict=True):
        count = tokens[name]
        if count < cfg.length + 1:
            has = f"has {count} tokens" if count else "is empty"
            why = f"the {title} part of {cfg.path!r} {has}, and one sequence of data.length={cfg.length} takes"
            shorter = f", data.length={count - 1} or less" if count > 1 else ""
            more = "smaller" if name == "train" else "larger"
            remedy = f"give more text{shorter}, or a {more} data.heldout than {cfg.heldout:g}"
            raise Refused(Problem("data.path", f"{why} {cfg.length + 1}", remedy))


def _open_part(folder: Path, name: str, index: dict) -> TokenFile:
    tokens = np.memmap(folder / f"{name}.bin", np.dtype(index["dtype"]), mode="r")
    ends = np.load(folder / f"{name}.ends.npy", mmap_mode="r", allow_pickle=False)
    if len(tokens) != index[name]["tokens"] or len(ends) != index[name]["documents"] or ends[-1] != len(tokens):
        raise ValueError(f"{name}: {len(tokens)} tokens of {index[name]['tokens']}")
    return TokenFile(tokens, ends)


# Writing


class _Part:
    """Writes one token file."""

    def __init__(self, file: BinaryIO, dtype: np.dtype, tokenizer: Tokenizer, first: tuple[int, ...]):
        self.file, self.dtype, self.tokenizer, self.first = file, dtype, tokenizer, first
        self.ends, self.tokens, self.bytes = array("q"), 0, 0

    def add(self, text: str) -> None:
        ids = ids_of(self.tokenizer, self.first, text).astype(self.dtype)
        self.file.write(ids.tobytes())
        self.tokens += len(ids)
        self.bytes += len(text.encode("utf-8"))
        self.ends.append(self.tokens)


def _write(cfg: DataConfig, tokenizer: Tokenizer, found: Survey, folder: Path) -> None:
    """Everything of a prepared corpus into an empty folder, the index last."""
    dtype = np.dtype("<u2" if tokenizer.size <= 2**16 else "<u4")
    with ExitStack() as stack:
        files = {name: stack.enter_context(open(folder / f"{name}.bin", "wb")) for name in PARTS}
        first = opening(tokenizer, cfg.bos)
        parts = {name: _Part(file, dtype, tokenizer, first) for name, file in files.items()}
        for name, text in pieces(cfg, found):
            parts[name].add(text)
    _enough(cfg, {name: part.tokens for name, part in parts.items()})
    settings = {name: getattr(cfg, name) for name in SETTINGS if name != "bos" or cfg.bos}  # older corpora lack the key
    identity = {"settings": settings, "tokenizer": tokenizer.fingerprint(), "content": found.content}
    index = {
        "format": FORMAT,
        **identity,
        "fingerprint": hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest(),
        "documents": found.documents,
        "bytes": found.bytes,
        "dtype": dtype.str,
    }
    for name, part in parts.items():
        np.save(folder / f"{name}.ends.npy", np.array(part.ends, np.int64), allow_pickle=False)
        index[name] = {"tokens": part.tokens, "documents": len(part.ends), "bytes": part.bytes}
    (folder / INDEX).write_text(json.dumps(index, indent=1), "utf-8")
