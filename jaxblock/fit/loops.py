"""Counts how often each computation of a compiled program runs.

XLA's own cost analysis counts the body of a loop once. Here it is counted as often as it runs, so that the costs of a
network whose layers are scanned include all layers.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import NamedTuple

from jaxblock.fit.hlo import Computation, Instruction, Module, root_of

_TRIPS = re.compile(r'known_trip_count[^0-9]*"?(\d+)')
_COPIES = ("copy", "bitcast", "convert", "reshape")


class Executed(NamedTuple):
    """Says how often a computation runs.

    Attributes:
        name: the name of the computation.
        times: the number of times that it runs.
        fused: whether the computation is part of a fusion, so that its intermediate values are not stored in memory.
    """

    name: str
    times: float
    fused: bool


def executed_computations(module: Module) -> Iterator[Executed]:
    """Yields every computation that runs, and how often; one that is called from two places is yielded twice.

    Of a conditional the branch that writes most counts, and a loop whose number of rounds cannot be found is counted once.
    """
    waiting = [Executed(module.entry, 1.0, False)]
    while waiting:
        here = waiting.pop()
        yield here
        for instruction in module.computations.get(here.name, {}).values():
            code = instruction.opcode
            if code == "while":
                count = trip_count(module, here.name, instruction)
                waiting.append(Executed(instruction.attribute("body"), here.times * count, here.fused))
            elif code == "fusion":
                waiting.append(Executed(instruction.attribute("calls"), here.times, True))
            elif code in ("call", "async-start"):
                called = instruction.attribute("calls") or instruction.attribute("to_apply")
                waiting.append(Executed(called, here.times, here.fused))
            elif code == "conditional":
                waiting.append(Executed(costliest_branch(module, instruction), here.times, here.fused))


def costliest_branch(module: Module, conditional: Instruction) -> str:
    """Returns the name of the branch of a conditional that writes the most bytes."""
    branches = conditional.computations("branch_computations") or [
        conditional.attribute("true_computation"),
        conditional.attribute("false_computation"),
    ]

    def written(branch: str) -> float:
        inside = executed_computations(module._replace(entry=branch))
        return sum(
            one.times * sum(instruction.bytes for instruction in module.computations.get(one.name, {}).values())
            for one in inside
            if not one.fused
        )

    return max(branches, key=written)


def trip_count(module: Module, caller: str, loop: Instruction) -> int:
    """Returns an upper bound of the number of times that a ``while`` loop runs; 1 where none can be found.

    XLA writes the number into the program for some backends; else it is found from the condition, which compares a counter
    with a constant.

    Args:
        module: the program.
        caller: the name of the computation that the loop is in.
        loop: the ``while`` instruction.
    """
    noted = _TRIPS.search(loop.rest)
    if noted:
        return int(noted[1])
    condition = module.computations.get(loop.attribute("condition"), {})
    root = root_of(condition)
    bounds = _bounds(module, condition, root, caller, loop) if root is not None else []
    return max(min(bounds), 0) if bounds else 1


def _bounds(module: Module, where: Computation, at: Instruction, caller: str, loop: Instruction) -> list[int]:
    """Returns upper bounds of a loop's number of rounds: one for each comparison in its condition that can be read.

    Args:
        module: the program.
        where: the instructions of the condition by name.
        at: the instruction of the condition that must be true for another round.
        caller: the name of the computation that the loop is in.
        loop: the ``while`` instruction.
    """
    if at.opcode == "and":
        return [
            bound
            for name in at.operands
            if name in where
            for bound in _bounds(module, where, where[name], caller, loop)
        ]
    if at.opcode == "fusion":
        inside = module.computations.get(at.attribute("calls"), {})
        root = root_of(inside)
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
    """Returns the number that a loop's body adds to its counter; it is more than 1 where XLA has merged several rounds."""
    while counter.opcode in _COPIES and counter.operands[0] in where:
        counter = where[counter.operands[0]]
    index = re.search(r"index=(\d+)", counter.rest)
    body = module.computations.get(loop.attribute("body"), {})
    root = root_of(body)
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
    """Returns the integer value of an instruction in a loop's condition before the first round; None if unknown."""
    if at.opcode == "constant":
        found = re.match(r"\((-?\d+)\)", at.rest)
        return int(found[1]) if found else None
    if depth > 8:
        return None
    if at.opcode in _COPIES and at.operands and at.operands[0] in where:
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
