"""Reading collectives out of compiled programs: which operation, over which mesh axes, how often, with how many bytes,
in which phase of the step and in which module of the model.
"""

import re
from collections.abc import Iterator
from math import prod
from typing import NamedTuple

import numpy as np
from jax.sharding import Mesh

from moe_jax.hlo import Instruction, Program, Run, Unreadable, elements

OPS = (
    "all-to-all",
    "all-gather",
    "all-reduce",
    "reduce-scatter",
    "collective-permute",
    "collective-broadcast",
    "ragged-all-to-all",
    "send",  # between TPU slices; what it carries is received as much
)
BITS = {"token": 0, "pred": 8}  # others say it in their name

MESH_FORM = re.compile(
    r"replica_groups=mesh\[(?P<axes>[^]]*)\](?:, device_ids=\(\[(?P<ids>[^)]*\)?)\))? \{(?P<over>[^}]*)\}"
)
IOTA_FORM = re.compile(r"replica_groups=\[(?P<groups>[\d,]+)\]<=\[(?P<dims>[\d,]+)\](?:T\((?P<perm>[\d,]+)\))?")
LIST_FORM = re.compile(r"replica_groups=\{(?P<groups>(?:\{[\d,]*\},?)*)\}")
PAIRS_FORM = re.compile(r"source_target_pairs=\{(?P<pairs>(?:\{\d+,\d+\},?)*)\}")

PHASES = ("forward", "recompute", "backward", "optimizer", "unknown")
BETWEEN = "slices"  # what follows traffic between slices, of which the compiler keeps no source
MODULES = (
    "routing",
    "dispatch",
    "experts",
    "combine",
    "shared_experts",
    "attention",
    "embed",
    "head",
    "ffn",
    "optimizer",
    BETWEEN,
)


class Collective(NamedTuple):
    """One collective instruction of a compiled program."""

    op: str
    axes: tuple[str, ...]  # mesh axes along which its groups extend
    bytes: int  # of its result on one device
    source: str  # the program's scope and operation that it came from
    moved: int = 0  # bytes that a device sends each time, with the best algorithm on links that are alike
    times: int = 1  # how often the program runs it: loops multiplied out
    conditional: bool = False  # it stands in a branch, so it runs at most so often
    parts: tuple[tuple[str, int], ...] = ()  # (source, bytes) of each array in it: compilers merge collectives
    arguments: tuple[str, ...] = ()  # arguments of the program that it moves, if it moves nothing else
    sliced: bool = False  # of its result each device uses its own part alone
    summed: bool = False  # an all-gather that the compiler wrote as the sum of parts in zeros: twice the bytes

    @property
    def phase(self) -> str:
        """`forward`, `recompute` (in the backward pass), `backward`, `optimizer`; `+` joins several."""
        found = {phase_of(source) for source, _ in self.parts}
        return "+".join(p for p in PHASES if p in found)

    @property
    def modules(self) -> tuple[str, ...]:
        """The modules whose arrays are in it, most bytes first; `other` is outside of all."""
        sizes: dict[str, int] = {}
        for source, size in self.parts:
            sizes[module_of(source)] = sizes.get(module_of(source), 0) + size
        return tuple(sorted(sizes, key=lambda m: (-sizes[m], m)))


def phase_of(source: str) -> str:
    """The phase of a step that an operation's scopes tell: JAX names what it transposes and what it recomputes."""
    if source.strip("/") in ("", BETWEEN):
        return "unknown"
    if "rematted_computation" in source:
        return "recompute"
    if "transpose(" in source:
        return "backward"
    return "optimizer" if "optimizer" in re.split(r"[/()]", source) else "forward"


def module_of(source: str) -> str:
    """The innermost module of the model in an operation's scopes."""
    scopes = [scope for scope in re.split(r"[/()\[\]'.]", source) if scope in MODULES]
    return scopes[-1] if scopes else "other"


def ints(text: str) -> list[int]:
    return [int(n) for n in re.findall(r"\d+", text)]


def iota(dims: list[int], perm: list[int] | None) -> np.ndarray:
    """Device ids 0, 1, ... reshaped to `dims`, transposed by `perm` and flattened."""
    grid = np.arange(prod(dims)).reshape(dims)
    return (grid if perm is None else grid.transpose(perm)).ravel()


def replica_groups(line: str, devices: int) -> list[list[int]]:
    """The groups of devices of a collective, in any of the forms in which XLA writes them.

    Raises:
        Unreadable: a form that is not known; nothing is guessed.
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
            raise Unreadable(f"replica groups over a part of an axis are not read yet: {m.group(0)}")
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
    raise Unreadable(f"no replica groups in: {line.strip()[:200]}")


def axes_of(groups: list[list[int]], mesh: Mesh) -> tuple[str, ...]:
    """The mesh axes along which members of a group differ; devices are numbered in mesh order."""
    where = np.stack(np.unravel_index(np.arange(mesh.size), mesh.devices.shape), -1)  # [devices, axes]
    differ = np.zeros(len(mesh.axis_names), bool)
    for group in groups:
        differ |= (where[group] != where[group[0]]).any(0)
    return tuple(name for name, d in zip(mesh.axis_names, differ, strict=True) if d)


def array_bytes(type: str) -> int:
    """Bytes of an array's type such as `f32[2,8]{1,0}`, or of all in a tuple `(f32[2,8]{1,0}, s32[])`.

    Raises:
        Unreadable: an unknown element type.
    """
    total = 0
    for kind, dims in re.findall(r"\b([a-z][a-z0-9]*)\[([\d,]*)\]", type):
        bits = BITS.get(kind, next(iter(ints(kind)), None))
        if bits is None:
            raise Unreadable(f"unknown element type {kind} in {type[:80]}")
        total += -(-bits * prod(ints(dims)) // 8)
    return total


def base(one: Instruction) -> str:
    """The operation without the ending of its first half."""
    return one.op.removesuffix("-start")


def is_collective(one: Instruction) -> bool:
    return base(one) in OPS


def result(one: Instruction) -> str:
    """The type of what a collective returns; a first half returns its operands with it."""
    parts = elements(one.type)
    if one.op == "send":
        return parts[0]
    return parts[1] if one.op.endswith("-start") and one.op != "all-reduce-start" else one.type


def merged(name: str) -> list[str]:
    """The names in the name of merged operations: `jit(f)/(a/x:b/y)` is `jit(f)/a/x` and `jit(f)/b/y`."""
    begin = 0 if name.startswith("(") else name.find("/(") + 1
    if not name.endswith(")") or (begin == 0 and not name.startswith("(")):
        return [name]
    depth, parts, last = 0, [], begin + 1
    for i in range(begin, len(name)):
        depth += (name[i] == "(") - (name[i] == ")")
        if (name[i] == ":" and depth == 1) or (depth == 0 and i == len(name) - 1):
            parts.append(name[:begin] + name[last:i])
            last = i + 1
        elif depth == 0:
            return [name]  # the parenthesis is a scope's own
    return parts


def parts_of(program: Program, run: Run) -> tuple[tuple[str, int], ...]:
    """`(source, bytes)` of each array that a collective carries: by its own name, or by what made its operands."""
    one, lines = run.instruction, run.computation.instructions
    operands = [name for name in one.operands if lines[name].op != "after-all"]
    names = merged(one.op_name) if one.op_name else []
    kinds = [lines[name].type for name in operands]
    if len(names) == len(operands):
        return tuple((name, array_bytes(t)) for name, t in zip(names, kinds, strict=True))
    if len(operands) == 1 and names:
        return tuple((name, array_bytes(kinds[0])) for name in names)
    otherwise = one.op_name or (run.caller.instruction.op_name if run.caller is not None else "")
    if len(operands) > 1:  # merged under the name of one of them: the others share its phase, perhaps not its module
        otherwise = re.sub(rf"\b({'|'.join(MODULES)})\b", "", otherwise)
    out = []
    for made in (made for operand in operands for made in program.made_by(run.computation, operand)):
        name = made.op_name if module_of(made.op_name) != "other" else otherwise
        if made.op == "recv-done":
            name = f"{otherwise}/{BETWEEN}"
        out.append((name, array_bytes(made.type)))
    return tuple(out)


def reduce_scatter(run: Run) -> Instruction | None:
    """The fusion in which a TPU writes a reduce-scatter as an all-reduce and a slice of it; None elsewhere.

    Raises:
        Unreadable: a collective in another fusion, of which a part may be its work.
    """
    call = run.caller.instruction if run.caller is not None else None
    if call is None or call.op != "fusion":
        return None
    if base(run.instruction) == "all-reduce" and 'AllReduceScatterFusion"' in call.rest:
        return call
    why = f"{run.instruction.op} inside the fusion {call.name}: overlapped with other work"
    raise Unreadable(f"{why}; compile for reading with jax_optimization_level=O0")


def sent(kind: str, size: int, n: int) -> int:
    """Bytes that one of n devices sends for a collective with a result of `size` bytes on it.

    All-reduce is a reduce-scatter and an all-gather, each the least that a device must send.
    """
    if kind == "reduce-scatter":
        return size * (n - 1)
    share = {"all-to-all": 1, "all-gather": 1, "ragged-all-to-all": 1, "all-reduce": 2}.get(kind)
    return size if share is None else share * size * (n - 1) // n


def device_groups(line: str, mesh: Mesh) -> list[list[int]]:
    """The groups of a collective as devices of the mesh. A program of several slices numbers those of one slice."""
    groups = replica_groups(line, mesh.size)
    slices = [getattr(d, "slice_index", 0) or 0 for d in mesh.devices.flat]
    first = [i for i, s in enumerate(slices) if s == min(slices)]
    if len(first) == mesh.size or max(map(max, groups)) >= len(first):
        return groups
    return [[first[i] for i in group] for group in groups]


def slice_groups(line: str, mesh: Mesh) -> list[list[int]]:
    """Groups of devices that exchange over the network between slices, by the target of a send.

    It is `"{1,2}x{0:7}"`, slices and devices in each, or lists of `slice * 100000 + device`, slices counted from 1.
    """
    slices = [getattr(d, "slice_index", 0) or 0 for d in mesh.devices.flat]
    places = {s: [i for i, at in enumerate(slices) if at == s] for s in set(slices)}
    if m := re.search(r'_xla_megascale_target="\{([\d,]+)\}x\{0:(\d+)\}"', line):
        return [[places[s - 1][i] for s in ints(m[1])] for i in range(int(m[2]) + 1)]
    if m := re.search(r"_xla_megascale_target=\{((?:\{[\d,]+\},?)+)\}", line):
        groups = [ints(g) for g in re.findall(r"\{([\d,]+)\}", m[1])]
        return [[places[n // 100_000 - 1][n % 100_000] for n in group] for group in groups]
    raise Unreadable(f"no target in the send {line.strip()[:300]}")


def carried(line: str, size: int, n: int) -> int:
    """Bytes that one device sends to n - 1 other slices, when `size` bytes are handed to the network."""
    m = re.search(r'_xla_megascale_transfer_type="(\w+)"', line)
    kind = m[1].lower().replace("_", "-") if m else ""
    results = {"all-gather": size * n, "reduce-scatter": size // n, "all-reduce": size, "all-to-all": size}
    if kind == "one-to-one":
        return size
    if kind not in results:
        raise Unreadable(f"no known transfer type in the send {line.strip()[:300]}")
    return sent(kind, results[kind], n)


def used_in_part(program: Program, run: Run) -> bool:
    """Whether each device goes on with a part of a collective's result alone, as after a reduce-scatter."""
    table = program.users[run.computation.name]
    waiting, users = [run.instruction], []
    while waiting:
        for user in table.get(waiting.pop().name, []):
            handed_on = user.op in ("get-tuple-element", "bitcast", "copy") or user.op.endswith("-done")
            (waiting if handed_on else users).append(user)
    return bool(users) and all(u.op == "dynamic-slice" or "dynamic-slice" in u.name for u in users)


def gathers(program: Program, run: Run) -> bool:
    """Whether an all-reduce adds up parts that each device has put into zeros: a gather, as TPUs write some."""
    at, caller = run.computation, run.caller
    return all(program.from_zeros(at, caller, name) for name in run.instruction.operands)


def collectives(program: Program, mesh: Mesh) -> Iterator[Collective]:
    """Each collective of a program that moves something."""
    for run in program.runs(is_collective):
        one, fusion = run.instruction, reduce_scatter(run)
        kind = "reduce-scatter" if fusion is not None else base(one)
        summed = kind == "all-reduce" and gathers(program, run)
        groups = slice_groups(one.rest, mesh) if kind == "send" else device_groups(one.rest, mesh)
        if not groups:  # a permutation without pairs, which moves nothing
            continue
        axes, n = axes_of(groups, mesh), max(map(len, groups))
        if not axes:  # groups of one device move nothing
            continue
        size = array_bytes(result(one) if fusion is None else fusion.type)
        parts = parts_of(program, run) if fusion is None else ((fusion.op_name, size),)
        found = [program.origin(run.computation, run.caller, name) for name in one.operands]
        arguments = tuple(name for name in found if name is not None) if None not in found else ()
        source = one.op_name or (fusion.op_name if fusion is not None else "") or (parts[0][0] if parts else "")
        sliced = kind == "all-reduce" and used_in_part(program, run)
        moved = carried(one.rest, size, n) if kind == "send" else sent(kind, size, n)
        kind = "all-gather" if summed else kind
        more = (parts, arguments, sliced, summed)
        yield Collective(kind, axes, size, source, moved, run.times, run.conditional, *more)


def read(program: str, mesh: Mesh) -> list[Collective]:
    """The collectives in the text of a compiled program, in the order in which it reaches them.

    Args:
        program: `jax.jit(f).lower(...).compile().as_text()`; for TPUs compiled with `jax_optimization_level=O0`.
        mesh: the mesh that it was compiled for; its devices are numbered in the mesh's order.
    Raises:
        Unreadable: a form that is not known; nothing is guessed.
    """
    try:
        return list(collectives(Program(program), mesh))
    except Unreadable as e:
        remedy = "try another --topology or fake devices, and report this message with what moe-jax --version says"
        raise Unreadable(f"{e}\n    remedy: {remedy}") from None
