"""Reading collectives out of compiled programs: which operation, over which mesh axes, with how many bytes."""

import re
from math import prod
from typing import NamedTuple

import numpy as np
from jax.sharding import Mesh

OPS = ("all-to-all", "all-gather", "all-reduce", "reduce-scatter", "collective-permute", "ragged-all-to-all")
BYTES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s16": 2, "u16": 2, "f64": 8, "s64": 8, "u64": 8}

INSTRUCTION = re.compile(rf"= (?P<shape>\(.*?\)|\S+) (?P<op>{'|'.join(OPS)})(?:-start)?\((?P<rest>.*)$")
MESH_FORM = re.compile(
    r"replica_groups=mesh\[(?P<axes>[^]]*)\](?:, device_ids=\(\[(?P<ids>[^)]*\)?)\))? \{(?P<over>[^}]*)\}"
)
IOTA_FORM = re.compile(r"replica_groups=\[(?P<groups>[\d,]+)\]<=\[(?P<dims>[\d,]+)\](?:T\((?P<perm>[\d,]+)\))?")
LIST_FORM = re.compile(r"replica_groups=\{(?P<groups>(?:\{[\d,]*\},?)*)\}")
PAIRS_FORM = re.compile(r"source_target_pairs=\{(?P<pairs>(?:\{\d+,\d+\},?)*)\}")


class Collective(NamedTuple):
    """One collective instruction of a compiled program."""

    op: str
    axes: tuple[str, ...]  # mesh axes along which its groups extend
    bytes: int  # of its result on one device
    source: str  # the program's scope and operation that it came from


def ints(text: str) -> list[int]:
    return [int(n) for n in re.findall(r"\d+", text)]


def iota(dims: list[int], perm: list[int] | None) -> np.ndarray:
    """Device ids 0, 1, ... reshaped to `dims`, transposed by `perm` and flattened."""
    grid = np.arange(prod(dims)).reshape(dims)
    return (grid if perm is None else grid.transpose(perm)).ravel()


def replica_groups(line: str, devices: int) -> list[list[int]]:
    """The groups of devices of a collective, in any of the forms in which XLA writes them.

    Raises:
        ValueError: a form that is not known; nothing is guessed.
    """
    if m := MESH_FORM.search(line):
        sizes = [int(size) for _, size in re.findall(r"'([^']+)'=(\d+)", m["axes"])]
        names = [name for name, _ in re.findall(r"'([^']+)'=(\d+)", m["axes"])]
        order = np.arange(devices)
        if m["ids"]:
            dims, _, perm = m["ids"].partition("]T(")
            order = iota(ints(dims), ints(perm) or None)
        over = re.findall(r"'([^']+)'(:)?", m["over"])
        if any(part for _, part in over):
            raise ValueError(f"replica groups over a part of an axis are not read yet: {m.group(0)}")
        grid = order.reshape(sizes)
        last = [names.index(name) for name, _ in over]
        rest = [i for i in range(len(sizes)) if i not in last]
        return grid.transpose(rest + last).reshape(-1, prod(sizes[i] for i in last)).tolist()
    if m := IOTA_FORM.search(line):
        perm = ints(m["perm"]) if m["perm"] else None
        return iota(ints(m["dims"]), perm).reshape(ints(m["groups"])).tolist()
    if m := LIST_FORM.search(line):
        groups = [ints(g) for g in re.findall(r"\{([\d,]*)\}", m["groups"])]
        return groups or [list(range(devices))]
    if m := PAIRS_FORM.search(line):
        return [ints(p) for p in re.findall(r"\{(\d+,\d+)\}", m["pairs"])]
    raise ValueError(f"no replica groups in: {line.strip()[:200]}")


def axes_of(groups: list[list[int]], mesh: Mesh) -> tuple[str, ...]:
    """The mesh axes along which members of a group differ; devices are numbered in mesh order."""
    where = np.stack(np.unravel_index(np.arange(mesh.size), mesh.devices.shape), -1)  # [devices, axes]
    differ = np.zeros(len(mesh.axis_names), bool)
    for group in groups:
        differ |= (where[group] != where[group[0]]).any(0)
    return tuple(name for name, d in zip(mesh.axis_names, differ, strict=True) if d)


def shape_bytes(text: str) -> int:
    """Bytes of a result such as `(f32[2,8]{1,0}, s32[])`."""
    return sum(BYTES.get(t, 4) * prod(ints(dims)) for t, dims in re.findall(r"\b([a-z]+\d+|pred)\[([\d,]*)\]", text))


def read(program: str, mesh: Mesh) -> list[Collective]:
    """The collectives in the text of a compiled program, in the order in which they stand.

    Args:
        program: `jax.jit(f).lower(...).compile().as_text()`.
    """
    out = []
    for line in program.splitlines():
        m = INSTRUCTION.search(line)
        if m is None:
            continue
        source = re.search(r'op_name="([^"]*)"', line)
        axes = axes_of(replica_groups(line, mesh.size), mesh)
        if axes:  # groups of one device move nothing
            out.append(Collective(m["op"], axes, shape_bytes(m["shape"]), source[1] if source else ""))
    return out
