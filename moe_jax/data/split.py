"""What of a source is training text and what is held out.

With 100 documents or more, whole documents are held out, by lots drawn from the seed and their names, until they hold
the asked fraction of the bytes. Fewer would be a poor sample, so each of them gives its end.
The source is read twice, first to count and then to hand the text out, so that no more than a document is in memory.
"""

import hashlib
from array import array
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from moe_jax.config import DataConfig
from moe_jax.data.sources import Document, documents, refusal

PARTS = ("train", "heldout")
MANY = 100  # documents from which whole ones are held out
REACH = 200  # characters to go back for a whitespace to cut at; text without any is cut between two characters


@dataclass(frozen=True)
class Survey:
    """The first reading: `content` identifies names and texts, `heldout` [documents] bool marks the documents that are
    held out whole; None if each gives its end."""

    content: str
    documents: int
    bytes: int
    heldout: np.ndarray | None


class _Digest:
    """The content's identity: names and texts, in order."""

    def __init__(self):
        self._hash = hashlib.sha256()

    def add(self, document: Document) -> int:
        """Takes a document in and returns its bytes."""
        name, text = document.name.encode("utf-8"), document.text.encode("utf-8")
        self._hash.update(b"%d %d " % (len(name), len(text)) + name)
        self._hash.update(text)
        return len(text)

    def hexdigest(self) -> str:
        return self._hash.hexdigest()


def survey(cfg: DataConfig) -> Survey:
    """Reads the source once. Raises `Refused` as `documents` does."""
    digest, sizes, lots = _Digest(), array("q"), array("Q")
    for document in documents(cfg):
        sizes.append(digest.add(document))
        drawn = hashlib.blake2b(f"{cfg.seed} {document.name}".encode(), digest_size=8).digest()
        lots.append(int.from_bytes(drawn, "little"))
    heldout = None
    if len(sizes) >= MANY:
        heldout = choose(np.array(sizes), np.array(lots), cfg.heldout)
    return Survey(digest.hexdigest(), len(sizes), sum(sizes), heldout)


def choose(sizes: np.ndarray, lots: np.ndarray, fraction: float) -> np.ndarray:
    """The documents [n] bool that are held out: in the order of their lots, each that brings the sum nearer its aim."""
    chosen, missing = np.zeros(len(sizes), bool), fraction * int(sizes.sum())
    for i in np.argsort(lots, kind="stable"):
        if sizes[i] < 2 * missing:
            chosen[i] = True
            missing -= int(sizes[i])
    return chosen


def cut(text: str, fraction: float) -> int:
    """Where the held-out end of a document begins: after a whitespace; the document's length where it gives none."""
    at = len(text) - round(len(text) * fraction)
    if at == len(text):
        return at
    at = next((i for i in range(at, max(0, at - REACH), -1) if text[i - 1].isspace()), at)
    return at if text[:at].strip() and text[at:].strip() else len(text)


def pieces(cfg: DataConfig, found: Survey) -> Iterator[tuple[str, str]]:
    """(part, text) of the whole source, in order. Raises `Refused` at the end if it is not what the survey saw."""
    digest = _Digest()
    for number, document in enumerate(documents(cfg)):
        digest.add(document)
        if number == found.documents:
            break
        if found.heldout is not None:
            yield PARTS[int(found.heldout[number])], document.text
            continue
        at = cut(document.text, cfg.heldout)
        yield "train", document.text[:at]
        if at < len(document.text):
            yield "heldout", document.text[at:]
    if digest.hexdigest() != found.content:
        raise refusal(f"{cfg.path!r} changed while it was read", "run again when nothing writes to it")
