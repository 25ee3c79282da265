"""The text of a compiled program as a graph: computations, who calls them and how often, where a value comes from.

Only what reading collectives needs. XLA prints one instruction a line, but for those of some kernels,
`%name = type opcode(%operand, ...), attribute=..., metadata={op_name="..."}`, inside computations. A form that is not
known raises `Unreadable`: nothing is guessed.
"""

import re
from collections.abc import Callable, Iterator
from functools import cached_property
from typing import NamedTuple

HEAD = re.compile(r"^(?P<entry>ENTRY )?%(?P<name>\S+) \(.*\{$")
NAMES = re.compile(r"%([\w.\-]+)")
CALLED = re.compile(r"\b(calls|body|condition|true_computation|false_computation)=%([\w.\-]+)")
BRANCHES = re.compile(r"\bbranch_computations=\{([^}]*)\}")
APPLIED = re.compile(r"\bto_apply=%([\w.\-]+)")
TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
INDEX = re.compile(r"\bindex=(\d+)")
OP_NAME = re.compile(r'\bop_name="((?:[^"\\]|\\.)*)"')
CONTINUED = re.compile(r'\n(?="|}})')  # attributes of a kernel, which hold ends of lines
# What hands on the value of its first operand, in another place, shape or type.
MOVES = {"copy", "copy-start", "copy-done", "bitcast", "convert", "transpose", "reshape", "slice", "dynamic-slice"}


class Unreadable(ValueError):
    """Text of a compiled program in a form that this reader does not know."""


class Instruction(NamedTuple):
    """One line of a computation."""

    name: str
    type: str  # such as `f32[8,4]{1,0}`, or a tuple of such
    op: str
    operands: tuple[str, ...]
    inside: str  # what stands in its parentheses: operands, or the number of a parameter, or a constant
    rest: str  # attributes, metadata and backend configuration

    @property
    def op_name(self) -> str:
        """The program's scopes and operation that it came from; empty where the compiler kept none."""
        m = OP_NAME.search(self.rest)
        return m[1].replace("\\'", "'") if m else ""

    def called(self) -> list[str]:
        """The computations that it runs; not those that reduce two numbers."""
        if self.op.endswith(("-done", "-update")):  # of what an earlier instruction has started
            return []
        out = [name for _, name in CALLED.findall(self.rest)]
        for names in BRANCHES.findall(self.rest):
            out += NAMES.findall(names)
        return out + (APPLIED.findall(self.rest) if self.op == "call" else [])


class Computation(NamedTuple):
    """A function of the program."""

    name: str
    instructions: dict[str, Instruction]
    root: Instruction


class Call(NamedTuple):
    """An instruction that is running a computation, and how it was reached itself."""

    computation: Computation
    instruction: Instruction
    caller: "Call | None"


class Run(NamedTuple):
    """An instruction of the program, and how often it runs."""

    computation: Computation
    instruction: Instruction
    caller: Call | None
    times: int
    conditional: bool  # in a branch, so at most so often


def closing(text: str, start: int) -> int:
    """The place of the parenthesis that closes the one at `start`."""
    depth = 0
    for i in range(start, len(text)):
        depth += (text[i] == "(") - (text[i] == ")")
        if not depth:
            return i
    raise Unreadable(f"a parenthesis stays open: {text[:200]}")


def instruction(line: str) -> tuple[Instruction, bool] | None:
    """The instruction on a line, and whether it is its computation's result; None for other lines."""
    body = line.strip()
    root = body.startswith("ROOT ")
    name, equals, text = body.removeprefix("ROOT ").partition(" = ")
    if not equals or not name.startswith("%"):
        return None
    end = closing(text, 0) + 1 if text.startswith("(") else text.find(" ")
    begin = text.find("(", end)
    if end < 0 or begin < 0:
        raise Unreadable(f"no operation in: {body[:200]}")
    close = closing(text, begin)
    inside = text[begin + 1 : close]
    parts = (name[1:], text[:end], text[end:begin].strip(), tuple(NAMES.findall(inside)), inside, text[close + 1 :])
    return Instruction(*parts), root


def elements(type: str) -> list[str]:
    """The parts of a tuple type; a type that is none is its only part."""
    if not type.startswith("("):
        return [type]
    out, depth, begin = [], 0, 1
    for i, c in enumerate(type):
        depth += (c in "({[") - (c in ")}]")
        if (c == "," and depth == 1) or depth == 0:
            out.append(re.sub(r"/\*.*?\*/", "", type[begin:i]).strip())
            begin = i + 1
    return [part for part in out if part]


class Program:
    """A compiled program, from `compiled.as_text()`."""

    def __init__(self, text: str):
        self.computations: dict[str, Computation] = {}
        entry = name = None
        lines: dict[str, Instruction] = {}
        last: Instruction | None = None
        for line in CONTINUED.sub("", text).splitlines():
            if name is None:
                if m := HEAD.match(line):
                    name, lines, last = m["name"], {}, None
                    entry = name if m["entry"] else entry
            elif line.startswith("}"):
                if last is None:
                    raise Unreadable(f"computation {name} has no result")
                self.computations[name], name = Computation(name, lines, last), None
            elif (found := instruction(line)) is not None:
                one, root = found
                lines[one.name] = one
                last = one if root else last
        if entry is None:
            raise Unreadable("no program in this text: give that of `jax.jit(f).lower(...).compile().as_text()`")
        self.entry = self.computations[entry]

    def runs(self, wanted: Callable[[Instruction], bool]) -> Iterator[Run]:
        """Every instruction that is wanted, once for each way in which the program reaches it."""
        holds: dict[str, bool] = {}

        def inside(name: str) -> bool:
            if name not in holds:
                lines = self.computations[name].instructions.values()
                holds[name] = any(wanted(i) or any(inside(n) for n in i.called()) for i in lines)
            return holds[name]

        def walk(at: Computation, caller: Call | None, times: int, conditional: bool) -> Iterator[Run]:
            for i in at.instructions.values():
                if wanted(i):
                    yield Run(at, i, caller, times, conditional)
                names = [name for name in i.called() if inside(name)]
                if not names:
                    continue
                call = Call(at, i, caller)
                trips = self.trips(call) if i.op == "while" else 1
                for name in names:
                    yield from walk(self.computations[name], call, times * trips, conditional or i.op == "conditional")

        yield from walk(self.entry, None, 1, False)

    # Loops

    def trips(self, loop: Call) -> int:
        """How often a loop runs: as the compiler says, or by a counter that begins, grows and ends at constants."""
        if m := TRIPS.search(loop.instruction.rest):
            return int(m[1])
        called = dict(CALLED.findall(loop.instruction.rest))
        condition, body = self.computations[called["condition"]], self.computations[called["body"]]
        try:
            index, limit = self.limit(condition)
            start = number(self.settled(loop.computation, self.initial(loop, index)))
            step = self.step(body, index)
        except Unreadable as e:
            raise Unreadable(f"loop {loop.instruction.name} has no trip count that can be read: {e}") from None
        return max(0, -(-(limit - start) // step))

    def limit(self, condition: Computation) -> tuple[int, int]:
        """The element of the loop's state that a condition compares, and with what: `state[i] < n`."""
        root, at = condition.root, condition
        if root.op == "fusion":  # the comparison alone, with the state's element and perhaps the limit as operands
            at = self.computations[root.called()[0]]
            root = at.root
        if root.op != "compare" or "direction=LT" not in root.rest:
            raise Unreadable(f"its condition is {root.op} {root.rest[:40]}")
        sides = [self.outside(condition, at, name) for name in root.operands]
        element = sides[0]
        if element.op != "get-tuple-element":
            raise Unreadable(f"its condition compares {element.op}")
        return int(INDEX.search(element.rest)[1]), number(sides[1])  # ty: ignore[not-subscriptable]

    def outside(self, condition: Computation, at: Computation, name: str) -> Instruction:
        """An operand of a comparison, seen from the condition when the comparison stands in a fusion of it."""
        one = at.instructions[name]
        if at is not condition and one.op == "parameter":
            return condition.instructions[condition.root.operands[int(one.inside)]]
        return one

    def step(self, body: Computation, index: int) -> int:
        """By how much a loop's body raises an element of its state."""
        one = self.settled(body, self.element(body, index))
        if one.op != "add":
            raise Unreadable(f"its counter is made by {one.op}")
        values = [self.settled(body, body.instructions[name]) for name in one.operands]
        raised = [int(INDEX.search(v.rest)[1]) for v in values if v.op == "get-tuple-element"]  # ty: ignore[not-subscriptable]
        steps = [number(v) for v in values if v.op == "constant"]
        if raised != [index] or len(steps) != 1 or steps[0] < 1:
            raise Unreadable(f"its counter is the sum of {' and '.join(v.op for v in values)}")
        return steps[0]

    def element(self, body: Computation, index: int) -> Instruction:
        """What a body returns as an element of the loop's state."""
        if body.root.op != "tuple":
            raise Unreadable(f"its body returns {body.root.op}")
        return body.instructions[body.root.operands[index]]

    def initial(self, loop: Call, index: int) -> Instruction:
        """What an element of a loop's state begins as."""
        state = loop.computation.instructions[loop.instruction.operands[0]]
        if state.op != "tuple":
            raise Unreadable(f"its first state is {state.op}")
        return loop.computation.instructions[state.operands[index]]

    def settled(self, at: Computation, one: Instruction) -> Instruction:
        """What an instruction hands on."""
        while one.op in MOVES:
            one = at.instructions[one.operands[0]]
        return one

    # Where a value comes from

    def origin(self, at: Computation, caller: Call | None, name: str) -> str | None:
        """The argument of the program that a value is a part or a copy of, such as `state.params['w']`, or None."""
        end = self.trace(at, caller, name)
        one = end.instruction
        return (one.op_name or one.name) if one.op == "parameter" and end.caller is None else None

    def from_zeros(self, at: Computation, caller: Call | None, name: str) -> bool:
        """Whether a value is zeros but for a part that was written into them."""
        end = self.trace(at, caller, name, stored=False)
        if end.instruction.op != "dynamic-update-slice":
            return False
        under = self.trace(end.computation, end.caller, end.instruction.operands[0], stored=False).instruction
        return under.op in ("broadcast", "constant")

    def trace(self, at: Computation, caller: Call | None, name: str, *, stored: bool = True) -> Call:
        """What a value is a part or a copy of, and where that stands.

        Follows what only moves numbers: copies, slices, reshapes and casts, through fusions and loops that hand the
        value on unchanged or, with `stored`, put it away layer by layer. It ends at what computes, or at an argument.
        """
        one = at.instructions[name]
        index: int | None = None  # of a tuple on the way, where one is
        while True:
            if one.op in MOVES or one.op == "get-tuple-element":
                if one.op == "get-tuple-element":
                    index = int(INDEX.search(one.rest)[1])  # ty: ignore[not-subscriptable]
                one = at.instructions[one.operands[0]]
            elif one.op in ("tuple", "opt-barrier") and index is not None:
                one = at.instructions[one.operands[index if one.op == "tuple" else 0]]
                index = index if one.op == "opt-barrier" else None
            elif one.op == "dynamic-update-slice" and stored:
                one = at.instructions[one.operands[1]]
            elif one.op == "while" and index is not None and self.unchanged(one, index):
                one = at.instructions[one.operands[0]]
            elif one.op == "fusion" or (one.op == "while" and index is not None):
                caller = Call(at, one, caller)
                at = self.computations[dict(CALLED.findall(one.rest))["body" if one.op == "while" else "calls"]]
                one = at.root
            elif one.op == "parameter" and caller is not None and self.hands_on(caller.instruction, index):
                operands, number = caller.instruction.operands, int(one.inside)
                at, caller = caller.computation, caller.caller
                one = at.instructions[operands[number]]
            else:
                return Call(at, one, caller)

    def hands_on(self, call: Instruction, index: int | None) -> bool:
        """Whether a parameter of what an instruction runs is, each time, the operand at the parameter's place."""
        if call.op == "while":
            return index is not None and self.unchanged(call, index)
        return call.op in ("fusion", "call", "async-start")

    def unchanged(self, loop: Instruction, index: int) -> bool:
        """Whether a loop hands an element of its state on as it is."""
        body = self.computations[dict(CALLED.findall(loop.rest))["body"]]
        try:
            one = self.element(body, index)
        except Unreadable:
            return False
        while one.op in ("copy", "bitcast"):
            one = body.instructions[one.operands[0]]
        same = one.op == "get-tuple-element" and INDEX.search(one.rest)[1] == str(index)  # ty: ignore[not-subscriptable]
        return same and body.instructions[one.operands[0]].op == "parameter"

    def made_by(self, at: Computation, name: str, depth: int = 8) -> Iterator[Instruction]:
        """What computed a value, past what only moves or packs it."""
        one = at.instructions[name]
        packs = one.op in MOVES or one.op in ("get-tuple-element", "concatenate", "tuple", "fusion", "pad")
        packs |= one.op.endswith(("-start", "-done")) and not one.op.startswith("recv")
        if one.op_name or not packs or not depth or not one.operands:
            yield one
            return
        for operand in one.operands:
            yield from self.made_by(at, operand, depth - 1)

    @cached_property
    def users(self) -> dict[str, dict[str, list[Instruction]]]:
        """Of each computation and value, the instructions that use it."""
        out: dict[str, dict[str, list[Instruction]]] = {}
        for c in self.computations.values():
            table = out[c.name] = {}
            for i in c.instructions.values():
                for name in i.operands:
                    table.setdefault(name, []).append(i)
        return out


def number(one: Instruction) -> int:
    """The value of a constant."""
    if one.op != "constant" or not re.fullmatch(r"-?\d+", one.inside):
        raise Unreadable(f"{one.op}({one.inside[:40]}) is no whole number")
    return int(one.inside)
