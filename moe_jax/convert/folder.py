"""A folder of published weights, opened and checked: config.json, the index of its files, and their headers."""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from moe_jax.convert.mxfp4 import Packed, joined
from moe_jax.convert.tensors import AGAIN, Stored, once, read_header
from moe_jax.refused import Problem, Refused

ONE = "model.safetensors"
INDEX = "model.safetensors.index.json"
CONFIG = "config.json"
SCALE = "_scale_inv"  # what the name of a tensor of scales adds to that of its matrix in FP8
SHOWN = 5  # tensors named in a message


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        Refused: no such file, or none.
    """
    try:
        found = json.loads(path.read_text("utf-8"), object_pairs_hook=once)
    except (OSError, ValueError, RecursionError) as e:
        why = f"cannot be read: {getattr(e, 'strerror', None) or e}"
        raise Refused(Problem(str(path), why, f"name a folder with {CONFIG} and {ONE} or {INDEX}")) from None
    if not isinstance(found, dict):
        raise Refused(Problem(str(path), f"holds a {type(found).__name__}, not an object", AGAIN))
    return found


class Folder:
    """Published weights: `config`, and `tensors` by name.

    Raises:
        Refused: (key: the file) a file that is missing, cut or damaged, an index that does not agree with the files or
            names some outside of the folder.
    """

    def __init__(self, path: Path):
        if not path.is_dir():
            raise Refused(Problem("SRC", f"{path} is no folder", f"name a folder with {CONFIG} and {ONE}"))
        self.path, self.config = path, read_json(path / CONFIG)
        self.check_quantization()
        indexed = (path / INDEX).exists()
        if indexed and (path / ONE).exists():
            why = f"holds both {ONE} and {INDEX}, and which of them counts is not said"
            raise Refused(Problem(str(path), why, "remove one of them"))
        stored = self.indexed() if indexed else read_header(self.existing(ONE))
        self.scales = {n: s for n, s in stored.items() if n.endswith(SCALE)}
        found = {n: s for n, s in stored.items() if n not in self.scales}
        self.tensors: dict[str, Stored | Packed] = joined(found, self.config)
        self.check_scales()

    def check_quantization(self) -> None:
        """Numbers in blocks are read in FP8, and of GPT-OSS in MXFP4, as it is published."""
        given, family = self.config.get("quantization_config"), self.config.get("model_type")
        method = given.get("quant_method") if isinstance(given, dict) else None
        if method not in (None, "fp8") and (method, family) != ("mxfp4", "gpt_oss"):
            why = f"quantization_config has the quant_method {method!r:.40} for the model_type {family!r:.40}; 'fp8' "
            why += "with block scales is read, and of 'gpt_oss' 'mxfp4'"
            remedy = "load it in transformers with dequantize=True, save it in bfloat16, and convert that"
            raise Refused(Problem(str(self.path / CONFIG), why, remedy))

    def existing(self, name: str) -> Path:
        """A file of the folder."""
        if not (self.path / name).is_file():
            others = sorted(p.name for p in self.path.glob("*.bin"))
            hint = f"{others[0]} is a pickle, which is not read: save it as safetensors" if others else AGAIN
            raise Refused(Problem(str(self.path / name), "is missing", hint))
        return self.path / name

    def indexed(self) -> dict[str, Stored]:
        """The tensors of all files that the index names."""
        file = self.path / INDEX
        chart = read_json(file).get("weight_map")
        if not isinstance(chart, dict) or not all(isinstance(name, str) for name in chart.values()):
            raise Refused(Problem(str(file), "has no weight_map of tensors to files", AGAIN))
        for tensor, name in chart.items():
            if not re.fullmatch(r"[\w.-]+\.safetensors", name):
                why = f"{tensor} is in {name!r:.200}, which is no .safetensors file of this folder"
                raise Refused(Problem(str(file), why, "mend that entry"))
        out: dict[str, Stored] = {}
        for name in sorted(set(chart.values())):
            found = read_header(self.existing(name))
            named = {tensor for tensor, at in chart.items() if at == name}
            if absent := sorted(named - found.keys()):
                why = f"{listed(absent)} should be there, as {INDEX} has it, and is not"
                raise Refused(Problem(str(self.path / name), why, AGAIN))
            if extra := sorted(found.keys() - named):
                why = f"{listed(extra)} is there, and {INDEX} does not say so"
                raise Refused(Problem(str(self.path / name), why, AGAIN))
            out |= found
        return out

    def check_scales(self) -> None:
        """FP8 matrices and their scales come in pairs of shapes that fit."""
        block = self.block()
        for name, stored in self.tensors.items():
            if stored.dtype != "F8_E4M3":
                continue
            scale = self.scales.get(name + SCALE)
            want = tuple(-(-n // b) for n, b in zip(stored.shape, block, strict=False))
            if scale is None or len(stored.shape) != 2 or scale.shape != want or scale.dtype != "F32":
                why = (
                    f"{name} {stored} needs scales {list(want)} F32 for blocks of {list(block)}, and {name}{SCALE} is "
                )
                raise Refused(Problem(str(stored.file), f"{why}{scale or 'absent'}", AGAIN))
        for name, stored in self.scales.items():
            of = self.tensors.get(name.removesuffix(SCALE))
            if of is None or of.dtype != "F8_E4M3":
                why = f"{name} {stored} has scales for {name.removesuffix(SCALE)}, which is {of or 'absent'}"
                raise Refused(Problem(str(stored.file), why, AGAIN))

    def block(self) -> tuple[int, int]:
        """Rows and columns that share a scale."""
        given = self.config.get("quantization_config") or {}
        block = given.get("weight_block_size", [128, 128]) if isinstance(given, dict) else None
        if not isinstance(block, list) or len(block) != 2 or any(not isinstance(n, int) or n < 1 for n in block):
            raise Refused(Problem(CONFIG, f"quantization_config is {given!r:.200}", "give a weight_block_size of two"))
        return block[0], block[1]

    def parts(self, name: str) -> np.ndarray | Packed:
        """What a part of a tensor is read from: one in MXFP4 decodes that part alone."""
        stored = self.tensors[name]
        return stored if isinstance(stored, Packed) else self.values(name)

    def values(self, name: str) -> np.ndarray:
        """A tensor, mapped into memory; one in FP8 or MXFP4 as float32, multiplied out."""
        stored = self.tensors[name]
        if stored.dtype != "F8_E4M3":
            return stored.view()
        out, (rows, columns) = stored.view().astype(np.float32), self.block()
        for i, row in enumerate(self.scales[name + SCALE].view()):
            wide = np.repeat(row, columns)[: out.shape[1]]
            out[i * rows : (i + 1) * rows] *= wide[None]
        return out

    def match(self, wanted: dict[str, tuple[int, ...]], ignored: Sequence[str]) -> list[str]:
        """Hold the tensors against those that a model takes: each is there once, in its shape, and no other is.

        Args:
            ignored: patterns of names that are known to be of no use.
        Returns:
            The names that were ignored.
        Raises:
            Refused: missing, unknown and misshapen tensors, with their names and shapes.
        """
        left = [name for name in self.tensors if name not in wanted]
        unused = [name for name in left if any(re.fullmatch(pattern, name) for pattern in ignored)]
        extra = [f"{n} {self.tensors[n]}" for n in left if n not in unused]
        missing = [f"{n} {list(shape)}" for n, shape in wanted.items() if n not in self.tensors]
        shapes = {n: (self.tensors[n].shape, shape) for n, shape in wanted.items() if n in self.tensors}
        wrong = [f"{n} is {list(a)} and should be {list(b)}" for n, (a, b) in shapes.items() if a != b]
        told = [("missing", missing), ("not of this model", extra), ("of another shape", wrong)]
        problems = [
            Problem(str(self.path), f"{len(names)} tensors are {what}: {listed(names)}", f"mend them, or {CONFIG}")
            for what, names in told
            if names
        ]
        if problems:
            raise Refused(*problems)
        return unused

    def dtypes(self) -> dict[str, str]:
        """The kind of number of each tensor."""
        return {name: stored.dtype for name, stored in self.tensors.items()}


def listed(names: Sequence[str]) -> str:
    """The first names, and how many more there are."""
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more
