"""Reads the text of a compiled program (HLO) into computations, instructions and the shapes of their results."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from typing import NamedTuple

_BYTES = {"pred": 1.0, "token": 0.0, "opaque": 0.0, "s4": 0.5, "u4": 0.5, "s2": 0.25, "u2": 0.25}
_SHAPE = re.compile(r"([a-z]\w*)\[([\d,<=]*)\](\{[^}]*\})?")
_HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
_INSTRUCTION = re.compile(r"^\s*(ROOT )?%?([\w.\-]+) = (.*)$")


class Shape(NamedTuple):
    """Describes one array in an instruction's type.

    Attributes:
        kind: the element type, as HLO writes it.
        dims: the sizes of the array's dimensions.
        layout: the text in braces after the sizes, which names the memory space.
    """

    kind: str
    dims: tuple[int, ...]
    layout: str

    @property
    def elements(self) -> int:
        """Returns the number of elements."""
        return math.prod(self.dims)

    @property
    def bytes(self) -> float:
        """Computes the size in bytes, without the padding of tiles."""
        return self.elements * _element_bytes(self.kind)

    @property
    def in_main_memory(self) -> bool:
        """Returns whether the array is in main memory; other memory spaces are marked ``S(n)``."""
        return "S(" not in self.layout


class Instruction(NamedTuple):
    """Describes one instruction, which is one line of the program.

    Attributes:
        name: the name of the result.
        opcode: the name of the operation.
        shapes: the arrays of the result; several, in order, if it is a tuple.
        operands: the names of the operands.
        rest: the text of the attributes; for a constant or parameter preceded by its value or number in parentheses.
        root: whether the instruction's result is the result of its computation.
    """

    name: str
    opcode: str
    shapes: tuple[Shape, ...]
    operands: tuple[str, ...]
    rest: str
    root: bool

    def attribute(self, name: str) -> str:
        """Returns the name of the computation that an attribute names; empty without that attribute."""
        found = re.search(rf"\b{name}=%?([\w.\-]+)", self.rest)
        return found[1] if found else ""

    def computations(self, name: str) -> list[str]:
        """Returns the names of the computations that an attribute lists."""
        found = re.search(rf"\b{name}=\{{([^}}]*)\}}", self.rest)
        return [part.strip().lstrip("%") for part in found[1].split(",")] if found else []

    @property
    def bytes(self) -> float:
        """Computes the size of the result in bytes."""
        return sum((shape.bytes for shape in self.shapes), 0.0)


Computation = dict[str, Instruction]
"""The instructions of a computation by name, in order."""


class Module(NamedTuple):
    """Holds the computations of a program.

    Attributes:
        computations: the computations by name.
        entry: the name of the computation that is run first.
    """

    computations: dict[str, Computation]
    entry: str


def _element_bytes(kind: str) -> float:
    if kind in _BYTES:
        return _BYTES[kind]
    if kind.startswith("f8") or kind.startswith("f4"):
        return 1.0 if kind.startswith("f8") else 0.5
    digits = re.search(r"\d+", kind)
    return int(digits[0]) / 8 if digits else 0.0


def parse_shapes(text: str) -> tuple[Shape, ...]:
    """Returns the arrays that the text of a type describes."""
    return tuple(
        Shape(kind, tuple(int(d.lstrip("<=")) for d in dims.split(",") if d), layout)
        for kind, dims, layout in _SHAPE.findall(text)
    )


def _closing(text: str, begin: int) -> int:
    """Returns the index at which the parenthesis at ``begin`` is closed."""
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
    return Instruction(name, opcode, parse_shapes(kind), operands, rest, bool(root))


def operand_shapes(instruction: Instruction, computation: Computation) -> tuple[Shape, ...]:
    """Returns the arrays of an instruction's operands, in order."""
    return tuple(shape for name in instruction.operands if name in computation for shape in computation[name].shapes)


def total_bytes(shapes: Iterable[Shape]) -> float:
    """Adds up the sizes of arrays, in bytes."""
    return sum((shape.bytes for shape in shapes), 0.0)


def root_of(computation: Computation) -> Instruction | None:
    """Returns the instruction whose result is the result of the computation."""
    return next((instruction for instruction in computation.values() if instruction.root), None)


def parse_program(text: str) -> Module:
    """Reads the text of a compiled program (``compiled.as_text()``)."""
    computations: dict[str, Computation] = {}
    entry, current = "", None
    for line in text.splitlines():
        if current is None:
            header = _HEADER.match(line)
            if header is not None and " = " not in line.split(" (")[0]:
                current = computations.setdefault(header[2], {})
                entry = header[2] if header[1] else entry
        elif line.split("//")[0].rstrip() == "}":  # a kernel's attributes may have lines that begin with "}}"
            current = None
        elif (instruction := _instruction(line)) is not None:
            current[instruction.name] = instruction
    return Module(computations, entry)
