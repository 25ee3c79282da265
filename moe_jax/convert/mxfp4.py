"""MXFP4, in which GPT-OSS is published: blocks of 32 numbers of four bits, which share a scale of eight.

OCP Microscaling Formats (MX) Specification v1.0, sections 5.3.3 (E2M1) and 5.4.1 (E8M0): a number is a sign, two bits
of an exponent and one of a fraction, times 2^(scale - 127), and a scale of 255 is NaN. In GPT-OSS the first of the two
numbers of a byte is in its lower half, and a matrix of experts is `NAME_blocks` [E, F, D/32, 16] and `NAME_scales`
[E, F, D/32] for what its model calls NAME [E, D, F]: blocks go along the axis that is summed over.
"""

import fnmatch
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from moe_jax.convert.tensors import AGAIN, DTYPES, Stored
from moe_jax.refused import Problem, Refused

MXFP4 = "MXFP4"
BLOCKS, SCALES = "_blocks", "_scales"
BLOCK = 32  # numbers that share a scale
BYTES = BLOCK // 2
NAN = 255
MAGNITUDES = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], np.float32)  # by the lower three bits
NUMBERS = np.concatenate([MAGNITUDES, -MAGNITUDES])
PAIRS = np.stack([np.tile(NUMBERS, 16), np.repeat(NUMBERS, 16)], 1)  # [256, 2] of a byte, the lower half first
FACTORS = np.ldexp(np.float32(1), np.arange(NAN) - 127)  # the first is subnormal in float32, and exact
LISTED = "modules_to_not_convert"


class Packed(NamedTuple):
    """A tensor [E, D, F] of two on disk; what of it is indexed is read and decoded, and nothing else."""

    name: str
    blocks: Stored
    scales: Stored
    dtype: str = MXFP4

    @property
    def file(self) -> Path:
        return self.blocks.file

    @property
    def shape(self) -> tuple[int, ...]:
        E, F, n, _ = self.blocks.shape
        return E, n * BLOCK, F

    def __str__(self) -> str:
        return f"{list(self.shape)} {self.dtype}"

    def view(self) -> np.ndarray:
        """All of it, in float32."""
        return self.part([slice(None)] * 3)

    def part(self, index: Sequence[slice | np.ndarray]) -> np.ndarray:
        """float32, by places of the three axes; those of D are neighbours. One expert is decoded at a time.

        Raises:
            Refused: a scale that is NaN, or numbers beyond float32.
        """
        e, d, f = index
        assert isinstance(e, slice) and isinstance(d, slice)
        (E, D, F), codes, scales = self.shape, self.blocks.view(), self.scales.view()
        first, stop, _ = d.indices(D)
        grid = slice(first // BLOCK, -(-stop // BLOCK))
        experts, before = range(E)[e], first - grid.start * BLOCK
        out = np.empty((len(experts), len(np.arange(F)[f]), stop - first), np.float32)
        for own, expert in zip(out, experts, strict=True):
            own[:] = self.decoded(codes[expert, f, grid], scales[expert, f, grid])[:, before : before + stop - first]
        return out.swapaxes(1, 2)

    def decoded(self, codes: np.ndarray, scales: np.ndarray) -> np.ndarray:
        """Bytes [F, n, 16] and scales [F, n] as float32 [F, 32*n]."""
        if (scales == NAN).any():
            why = f"{self.name}{SCALES} holds the scale {NAN}, which is NaN in E8M0"
            raise Refused(Problem(str(self.scales.file), why, AGAIN))
        with np.errstate(over="ignore"):
            out = PAIRS[codes].reshape(*scales.shape, BLOCK) * FACTORS[scales][..., None]
        if (largest := scales.max(initial=0)) > NAN - 3 and not np.isfinite(out).all():  # 6 * 2^125 is the last to fit
            why = f"{self.name} has numbers of a scale of {largest}, 2^{int(largest) - 127}, that float32 cannot hold"
            raise Refused(Problem(str(self.scales.file), why, AGAIN))
        return out.reshape(len(scales), -1)


def joined(tensors: dict[str, Stored], config: dict[str, Any]) -> dict[str, Stored | Packed]:
    """The tensors of a folder, blocks and scales as one, under the name that a model has for it.

    Args:
        config: config.json; without the quant_method mxfp4 nothing is joined.
    Raises:
        Refused: one without the other, shapes that do not fit, a tensor that is there in two forms or that
            `modules_to_not_convert` says not to be in this one, and other bytes.
    """
    given = config.get("quantization_config")
    out: dict[str, Stored | Packed] = dict(tensors)
    if isinstance(given, dict) and given.get("quant_method") == "mxfp4":
        kept = unconverted(given)
        ends = tuple(n for n, stored in tensors.items() if n.endswith((BLOCKS, SCALES)) and stored.dtype == "U8")
        for name in dict.fromkeys(end.removesuffix(BLOCKS).removesuffix(SCALES) for end in ends):
            out[name] = pair(name, tensors)
            del out[name + BLOCKS], out[name + SCALES]
            if pattern := next((p for p in kept if listed(name, p)), None):
                why = f"{name} is stored in MXFP4, and {LISTED} of config.json has {pattern!r}"
                raise Refused(Problem(str(tensors[name + BLOCKS].file), why, "take that entry out"))
    for name, stored in out.items():
        if stored.dtype == "U8":
            known = ", ".join(kind for kind in DTYPES if kind != "U8")
            why = f"{name} is U8, and weights are read from {known}, or pairs of {BLOCKS} and {SCALES} in MXFP4"
            raise Refused(Problem(str(stored.file), why, "convert it to one of them"))
    return out


def pair(name: str, tensors: dict[str, Stored]) -> Packed:
    """Blocks and scales that fit. Raises `Refused`."""
    blocks, scales = tensors.get(name + BLOCKS), tensors.get(name + SCALES)
    there = blocks or scales
    assert there is not None
    if blocks is None or scales is None:
        absent, other = (BLOCKS, SCALES) if blocks is None else (SCALES, BLOCKS)
        raise Refused(Problem(str(there.file), f"{name}{other} {there} is there, and {name}{absent} is missing", AGAIN))
    if name in tensors:
        both = f"{name} {tensors[name]} and {name}{BLOCKS} {blocks}"
        raise Refused(Problem(str(blocks.file), f"{both} are the same weights twice", "remove one of them"))
    whole = len(blocks.shape) == 4 and blocks.shape[-1] == BYTES
    if not whole or scales.shape != blocks.shape[:-1] or {blocks.dtype, scales.dtype} != {"U8"}:
        why = f"{name}{BLOCKS} {blocks} and {name}{SCALES} {scales} should be U8 of [E, F, D/{BLOCK}, {BYTES}] and "
        raise Refused(Problem(str(blocks.file), f"{why}[E, F, D/{BLOCK}]", AGAIN))
    return Packed(name, blocks, scales)


def unconverted(given: dict[str, Any]) -> list[str]:
    """The patterns of modules that are not in MXFP4. Raises `Refused`."""
    found = given.get(LISTED) or []
    if not isinstance(found, list) or not all(isinstance(p, str) and p for p in found):
        why = f"quantization_config.{LISTED} is {found!r:.80}"
        raise Refused(Problem("config.json", why, "give a list of the names of modules"))
    return found


def listed(name: str, pattern: str) -> bool:
    """Whether a tensor is of a module that the pattern names, from its beginning or by its last parts."""
    parts = name.split(".")
    modules = [".".join(parts[:i]) for i in range(1, len(parts) + 1)]
    return any(fnmatch.fnmatchcase(m, pattern) or m.endswith(f".{pattern}") for m in modules)
