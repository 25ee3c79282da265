"""The safetensors format: eight bytes with the length of a JSON header, the header, and the numbers in a row.

https://github.com/huggingface/safetensors. Files are checked against their header before a number is read, and read
and written in pieces: a whole file is never in memory.
"""

import json
import os
from collections.abc import Iterable, Iterator
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from moe_jax.refused import Problem, Refused

DTYPES = {
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "U8": np.dtype(np.uint8),  # of MXFP4
}
LARGEST_HEADER = 100_000_000  # bytes, as the format's own library has it
AGAIN = "download or write the file again"


class Stored(NamedTuple):
    """Where a tensor lies."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    offset: int  # of its first byte in the file

    @property
    def bytes(self) -> int:
        return prod(self.shape) * DTYPES[self.dtype].itemsize

    def view(self) -> np.ndarray:
        """The tensor mapped into memory: only what is looked at is read, and it goes when the view does."""
        if not self.bytes:
            return np.zeros(self.shape, DTYPES[self.dtype])
        return np.memmap(self.file, DTYPES[self.dtype], "r", self.offset, self.shape)

    def __str__(self) -> str:
        return f"{list(self.shape)} {self.dtype}"


def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object whose names are different."""
    out = dict(pairs)
    if len(out) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{next(name for name in names if names.count(name) > 1)!r} is there twice")
    return out


def entry(given: Any) -> tuple[str, tuple[int, ...], int, int]:
    """Type, shape, and where a tensor begins and ends, of its place in the header."""
    dtype, shape, (begin, stop) = given["dtype"], given["shape"], given["data_offsets"]
    if not isinstance(dtype, str) or any(type(n) is not int or n < 0 for n in (*shape, begin, stop)):
        raise ValueError(f"{given!r:.100} is no place of a tensor")
    return dtype, tuple(shape), begin, stop


def read_header(file: Path) -> dict[str, Stored]:
    """The tensors of a file by name, after a check of its size.

    Raises:
        Refused: what is no safetensors file, one that was cut, or a kind of number that is not known here.
    """

    def no(why: str, remedy: str = AGAIN) -> Refused:
        return Refused(Problem(str(file), why, remedy))

    size = file.stat().st_size
    with file.open("rb") as f:
        length = int.from_bytes(f.read(8), "little")
        if size < 8 or length > min(size - 8, LARGEST_HEADER):
            raise no(f"has {size} bytes and asks for a header of {length}: it is cut, or no safetensors file")
        raw = f.read(length)
    try:
        header = json.loads(raw, object_pairs_hook=once)
        header.pop("__metadata__", None)
        rows = [(name, *entry(given)) for name, given in header.items()]
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as e:
        raise no(f"has a header that cannot be read: {e!r:.200}") from None
    out, end = {}, 0
    for name, dtype, shape, begin, stop in sorted(rows, key=lambda row: row[3:]):
        if dtype not in DTYPES:
            raise no(f"{name} is {dtype}, and weights are read from {', '.join(DTYPES)}", "convert it to one of them")
        stored = Stored(file, dtype, shape, 8 + length + begin)
        if begin != end or stop - begin != stored.bytes:
            raise no(f"{name} {stored} lies at bytes {begin} to {stop}, and {end} to {end + stored.bytes} is its place")
        out[name], end = stored, stop
    if 8 + length + end != size:
        last = max(out, key=lambda n: out[n].offset, default="nothing")
        raise no(f"has {size} bytes, and {last} ends at byte {8 + length + end}")
    return out


class Writing(NamedTuple):
    """A tensor to be written."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def bytes(self) -> int:
        return prod(self.shape) * DTYPES[self.dtype].itemsize


def write(file: Path, tensors: Iterable[Writing], values: Iterator[np.ndarray]) -> None:
    """One file of these tensors, whose values come one by one in the same order."""
    tensors = list(tensors)
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for t in tensors:
        header[t.name] = {"dtype": t.dtype, "shape": list(t.shape), "data_offsets": [end, end + t.bytes]}
        end += t.bytes
    raw = json.dumps(header, separators=(",", ":")).encode()
    raw += b" " * (-len(raw) % 8)  # the numbers begin at a multiple of 8
    with file.open("wb") as f:
        f.write(len(raw).to_bytes(8, "little") + raw)
        for t, value in zip(tensors, values, strict=True):
            assert value.shape == t.shape and value.dtype == DTYPES[t.dtype]
            f.write(np.ascontiguousarray(value).view(np.uint8).data)
        f.flush()
        os.fsync(f.fileno())
