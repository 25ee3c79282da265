"""Sequences of fixed length out of a token file, by index: every target token once, none across documents."""

from collections.abc import Callable, Sequence

import numpy as np

from moe_jax.data.corpus import TokenFile


class Windows:
    """Random access to the sequences of a token file.

    `pack`: window i holds the L+1 tokens from i*L of all documents in a row, so that only the last one is padded.
    `pad`: a row holds one document or one piece of it; pieces overlap by one token, so that no target is lost.

    Each item is a dict of arrays [L]: `tokens`, `targets` (the next token), `segments` (1, 2, ... per document in the
    window; 0 is padding), `positions` (from 0 in each segment), all int32, and `weights` float32: 1 where token and
    target belong to one document, its eos included, and 0 at the first token of the next document and at padding.

    `before` M, for an encoder: also `inputs` [M], the tokens in front of the window, with `input_segments`, which count
    on with those of the window so that each document is one segment, and `input_positions` likewise.
    """

    def __init__(self, file: TokenFile, length: int, packing: str, before: int = 0):
        kinds: dict[str, Callable] = {"pack": self._packed, "pad": self._padded}
        if packing not in kinds:
            raise ValueError(f"packing is {packing!r}; use one of {', '.join(kinds)}")
        if length < 1:
            raise ValueError(f"length is {length}; a window holds at least 1 token")
        self.file, self.length, self.packing, self.before = file, length, packing, before
        # Plain arrays over the same mapped memory: indexing a memmap makes another one each time.
        self._tokens, self._ends = np.asarray(file.tokens), np.asarray(file.ends)
        self._span = kinds[packing]
        if packing == "pack":
            self._count = -(-max(0, len(file) - 1) // length)
        else:
            pieces = -(-(np.diff(self._ends, prepend=0) - 1) // length)
            self._rows = np.cumsum(pieces)  # rows of the documents up to each one
            self._count = int(self._rows[-1]) if len(self._rows) else 0

    def __len__(self) -> int:
        return self._count

    @property
    def any_in_front(self) -> bool:
        """Whether any window has text in front of it, for an encoder to read."""
        return self._count > (1 if self.packing == "pack" else len(self._ends))

    def _packed(self, index: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The first token of windows [B] and the end of the text they may read."""
        return index * self.length, np.full(len(index), len(self._tokens))

    def _padded(self, index: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        document = np.searchsorted(self._rows, index, side="right")
        before = np.where(document > 0, self._rows[document - 1], 0)
        return self._begin(document) + (index - before) * self.length, self._ends[document]

    def _begin(self, document: np.ndarray) -> np.ndarray:
        return np.where(document > 0, self._ends[document - 1], 0)

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        """Window `index`: five arrays [L]. Raises `IndexError` outside 0 to len-1."""
        if not 0 <= index < self._count:
            raise IndexError(f"window {index} of {self._count}")
        return {name: rows[0] for name, rows in self.gather([int(index)]).items()}

    def gather(self, indices: Sequence[int]) -> dict[str, np.ndarray]:
        """Several windows at once: five arrays [B,L]; an index of len or more gives a row of nothing but padding."""
        index = np.asarray(indices, np.int64)  # [B]
        start, stop = self._span(np.minimum(index, self._count - 1))
        stop = np.where(index < self._count, stop, 0)
        place = start[:, None] + np.arange(self.length + 1)  # [B,L+1]
        real = place[:, 1:] < stop[:, None]  # [B,L]: there is a target
        place = np.minimum(place, len(self._tokens) - 1)
        chunk = self._tokens[place].astype(np.int32)
        document = np.searchsorted(self._ends, place, side="right")
        inputs, first = document[:, :-1], document[:, :1]
        begins = np.maximum(start[:, None], self._begin(inputs))
        out = {}
        if self.before:
            out, first = self._in_front(start, stop, first)
        return out | {
            "tokens": np.where(real, chunk[:, :-1], 0),
            "targets": np.where(real, chunk[:, 1:], 0),
            "segments": np.where(real, inputs - first + 1, 0).astype(np.int32),
            "positions": np.where(real, place[:, :-1] - begins, 0).astype(np.int32),
            "weights": (real & (inputs == document[:, 1:])).astype(np.float32),
        }

    def _in_front(
        self, start: np.ndarray, stop: np.ndarray, own: np.ndarray
    ) -> tuple[dict[str, np.ndarray], np.ndarray]:
        """The tokens in front of windows that begin at `start` [B] in documents `own` [B, 1], and the first document
        [B, 1] of each; in rows of one document those of it."""
        place = start[:, None] - self.before + np.arange(self.before)  # [B,M]
        document = np.searchsorted(self._ends, np.maximum(place, 0), side="right")
        real = (place >= 0) & (stop > 0)[:, None] & ((self.packing == "pack") | (document == own))
        first = np.where(real, document, own).min(1, keepdims=True)
        begins = np.maximum(start[:, None] - self.before, self._begin(document))
        rows = {
            "inputs": self._tokens[np.maximum(place, 0)].astype(np.int32),
            "input_segments": (document - first + 1).astype(np.int32),
            "input_positions": (place - begins).astype(np.int32),
        }
        return {name: np.where(real, row, 0) for name, row in rows.items()}, first
