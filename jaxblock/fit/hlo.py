"""Reads the text of a compiled program (HLO): its computations, how often each runs, and how large things are.

XLA's own cost analysis counts the body of a loop once. Here a loop counts as often as it runs, so that the costs of a
network whose layers are scanned are those of all its layers.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from typing import NamedTuple

_BYTES = {"pred": 1.0, "token": 0.0, "opaque": 0.0, "s4": 0.5, "u4": 0.5, "s2": 0.25, "u2": 0.25}
_SHAPE = re.compile(r"([a-z]\w*)\[([\d,<=]*)\](\{[^}]*\})?")
_HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
_INSTRUCTION = re.compile(r"^\s*(ROOT )?%?([\w.\-]+) = (.*)$")
_TRIPS = re.compile(r'known_trip_count[^0-9]*"?(\d+)')


class Shape(NamedTuple):
    """One array of an instruction's type.

    Attributes:
        kind: element type, as HLO writes it.
        dims: sizes.
        layout: what stands in braces; the memory space is in it.
    """

    kind: str
    dims: tuple[int, ...]
    layout: str

    @property
    def elements(self) -> int:
        """How many."""
        return math.prod(self.dims)

    @property
    def bytes(self) -> float:
        """Size, padding of tiles not counted."""
        return self.elements * _element_bytes(self.kind)

    @property
    def in_main_memory(self) -> bool:
        """Not in the chip's scratch memory (other memory spaces are marked ``S(n)``)."""
        return "S(" not in self.layout


class Instruction(NamedTuple):
    """One line.

    Attributes:
        name: of the result.
        opcode: what is done.
        shapes: arrays of the result's type, a tuple's in order.
        operands: names.
        rest: attributes, and for constants their value.
        root: its result is the computation's.
    """

    name: str
    opcode: str
    shapes: tuple[Shape, ...]
    operands: tuple[str, ...]
    rest: str
    root: bool

    def attribute(self, name: str) -> str:
        """The computation that an attribute names; empty without."""
        found = re.search(rf"\b{name}=%?([\w.\-]+)", self.rest)
        return found[1] if found else ""

    def computations(self, name: str) -> list[str]:
        """The computations of an attribute that lists several."""
        found = re.search(rf"\b{name}=\{{([^}}]*)\}}", self.rest)
        return [part.strip().lstrip("%") for part in found[1].split(",")] if found else []

    @property
    def bytes(self) -> float:
        """Size of the result."""
        return sum((shape.bytes for shape in self.shapes), 0.0)


Computation = dict[str, Instruction]
"""Instructions by name, in order."""


class Module(NamedTuple):
    """A program.

    Attributes:
        computations: by name.
        entry: the name of the one that is run.
    """

    computations: dict[str, Computation]
    entry: str


class Executed(NamedTuple):
    """A computation as it is run.

    Attributes:
        name: the computation.
        times: how often.
        fused: it is the inside of a fusion: its values are in no memory.
    """

    name: str
    times: float
    fused: bool


def _element_bytes(kind: str) -> float:
    if kind in _BYTES:
        return _BYTES[kind]
    if kind.startswith("f8") or kind.startswith("f4"):
        return 1.0 if kind.startswith("f8") else 0.5
    digits = re.search(r"\d+", kind)
    return int(digits[0]) / 8 if digits else 0.0


def shapes(text: str) -> tuple[Shape, ...]:
    """The arrays of a type."""
    return tuple(
        Shape(kind, tuple(int(d.lstrip("<=")) for d in dims.split(",") if d), layout)
        for kind, dims, layout in _SHAPE.findall(text)
    )


def _closing(text: str, begin: int) -> int:
    """Where the parenthesis at ``begin`` closes."""
    depth = 0
    for at in range(begin, len(text)):
        depth += {"(": 1, ")": -1}.get(text[at], 0)
        if depth == 0:
            return at
    return len(text) - 1


def _instruction(line: str) -> Instruction | None:
    found = _INSTRUCTION.match(line)
    if found is None:
        return None
    root, name, body = found.groups()
    end = _closing(body, 0) + 1 if body.startswith("(") else body.find(" ")
    kind, call = body[:end], body[end:].lstrip()
    opening = call.find("(")
    if opening < 0:
        return None
    closing = _closing(call, opening)
    inside = call[opening + 1 : closing]
    operands = tuple(re.findall(r"%([\w.\-]+)", inside)) or tuple(
        part.split()[-1] for part in inside.split(",") if part.strip() and re.match(r"^[A-Za-z_]", part.split()[-1])
    )
    opcode = call[:opening]
    rest = call[closing + 1 :]
    if opcode in ("constant", "parameter"):
        operands, rest = (), f"({inside}){rest}"
    return Instruction(name, opcode, shapes(kind), operands, rest, bool(root))


def parse(text: str) -> Module:
    """Reads ``compiled.as_text()``."""
    computations: dict[str, Computation] = {}
    entry, current = "", None
    for line in text.splitlines():
        if current is None:
            header = _HEADER.match(line)
            if header is not None and " = " not in line.split(" (")[0]:
                current = computations.setdefault(header[2], {})
                entry = header[2] if header[1] else entry
        elif (
            line.split("//")[0].rstrip() == "}"
        ):  # a kernel's attributes run over several lines and may begin with "}}"
            current = None
        elif (instruction := _instruction(line)) is not None:
            current[instruction.name] = instruction
    return Module(computations, entry)


def executed(module: Module) -> Iterator[Executed]:
    """Every computation that runs, with the times that it does; one that is called from two places comes twice.

    Both branches of a conditional count, and a loop whose length nothing in the program says counts once.
    """
    waiting = [Executed(module.entry, 1.0, False)]
    while waiting:
        here = waiting.pop()
        yield here
        for instruction in module.computations.get(here.name, {}).values():
            code = instruction.opcode
            if code == "while":
                count = trips(module, here.name, instruction)
                waiting.append(Executed(instruction.attribute("body"), here.times * count, here.fused))
            elif code == "fusion":
                waiting.append(Executed(instruction.attribute("calls"), here.times, True))
            elif code in ("call", "async-start"):
                called = instruction.attribute("calls") or instruction.attribute("to_apply")
                waiting.append(Executed(called, here.times, here.fused))
            elif code == "conditional":
                branches = instruction.computations("branch_computations") or [
                    instruction.attribute("true_computation"),
                    instruction.attribute("false_computation"),
                ]
                waiting.extend(Executed(branch, here.times, here.fused) for branch in branches)


def trips(module: Module, caller: str, loop: Instruction) -> int:
    """How often a ``while`` loop runs at the most.

    XLA notes it for some backends; else it is read off the condition, whose counter goes up to a constant.
    """
    noted = _TRIPS.search(loop.rest)
    if noted:
        return int(noted[1])
    condition = module.computations.get(loop.attribute("condition"), {})
    root = next((i for i in condition.values() if i.root), None)
    bounds = _bounds(module, condition, root, caller, loop) if root is not None else []
    return max(min(bounds), 0) if bounds else 1


def _bounds(module: Module, where: Computation, at: Instruction, caller: str, loop: Instruction) -> list[int]:
    """Upper bounds of a loop that goes on while ``at`` holds."""
    if at.opcode == "and":
        return [
            bound
            for name in at.operands
            if name in where
            for bound in _bounds(module, where, where[name], caller, loop)
        ]
    if at.opcode == "fusion":
        inside = module.computations.get(at.attribute("calls"), {})
        root = next((i for i in inside.values() if i.root), None)
        if root is None:
            return []
        inlined = dict(inside)
        for instruction in inside.values():
            if instruction.opcode == "parameter":
                given = where.get(at.operands[int(re.findall(r"\d+", instruction.rest)[0])])
                if given is not None:
                    inlined[instruction.name] = given
        return _bounds(module, {**where, **inlined}, root, caller, loop)
    if at.opcode != "compare":
        return []
    direction = re.search(r"direction=(\w\w)", at.rest)
    sides = [where.get(name) for name in at.operands]
    if direction is None or direction[1] not in ("LT", "LE", "NE", "GT", "GE") or None in sides:
        return []
    counter, limit = (sides[0], sides[1]) if direction[1] in ("LT", "LE", "NE") else (sides[1], sides[0])
    assert counter is not None and limit is not None
    start = _value(module, where, counter, caller, loop) or 0
    stop = _value(module, where, limit, caller, loop)
    if stop is None:
        return []
    step = _stride(module, where, counter, loop)
    return [-(-(stop - start + (direction[1] in ("LE", "GE"))) // step)]


def _stride(module: Module, where: Computation, counter: Instruction, loop: Instruction) -> int:
    """What a loop's body adds to its counter: more than one where XLA has put several rounds into one."""
    while counter.opcode in ("copy", "bitcast", "convert", "reshape") and counter.operands[0] in where:
        counter = where[counter.operands[0]]
    index = re.search(r"index=(\d+)", counter.rest)
    body = module.computations.get(loop.attribute("body"), {})
    root = next((i for i in body.values() if i.root), None)
    if counter.opcode != "get-tuple-element" or index is None or root is None or root.opcode != "tuple":
        return 1
    at, step = body.get(root.operands[int(index[1])]), 0
    while at is not None and at.opcode in ("add", "copy", "bitcast"):
        given = [body[name] for name in at.operands if name in body]
        numbers = [int(n[1]) for i in given if i.opcode == "constant" and (n := re.match(r"\((-?\d+)\)", i.rest))]
        step += sum(numbers)
        at = next((i for i in given if i.opcode != "constant"), None)
    return max(step, 1)


def _value(
    module: Module, where: Computation, at: Instruction, caller: str, loop: Instruction, depth: int = 0
) -> int | None:
    """The integer that an instruction of a loop's condition has before the first round; None where it is not known."""
    if at.opcode == "constant":
        found = re.match(r"\((-?\d+)\)", at.rest)
        return int(found[1]) if found else None
    if depth > 8:
        return None
    if at.opcode in ("copy", "bitcast", "convert", "reshape") and at.operands and at.operands[0] in where:
        return _value(module, where, where[at.operands[0]], caller, loop, depth + 1)
    index = re.search(r"index=(\d+)", at.rest)
    if at.opcode != "get-tuple-element" or index is None:
        return None
    outside = module.computations.get(caller, {})
    before = outside.get(loop.operands[0]) if loop.operands else None
    if before is None or before.opcode != "tuple" or int(index[1]) >= len(before.operands):
        return None
    given = outside.get(before.operands[int(index[1])])
    if given is None or given.opcode == "get-tuple-element":
        return None
    return _value(module, outside, given, caller, loop, depth + 1)
