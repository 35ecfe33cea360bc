"""Estimates the bytes that the instructions of a compiled program read from and write to main memory."""

from __future__ import annotations

import math
from collections.abc import Iterable

from jaxblock.fit.hlo import Computation, Instruction, Module, Shape, root_of, total_bytes

# Instructions that are counted as moving no data: they move none, or another instruction is counted for it.
_FREE = {
    "parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "conditional", "call", "after-all",
    "copy-done", "slice-done", "send-done", "recv-done", "all-gather-done", "all-reduce-done", "async-done", "async-start",
    "async-update", "collective-permute-done", "partition-id", "replica-id", "iota", "opt-barrier", "domain",
}  # fmt: skip


def instruction_traffic(module: Module, instruction: Instruction, computation: Computation) -> float:
    """Estimates the bytes of main memory that one instruction reads and writes.

    A slice counts its own size and not that of the array it is cut from; an update in place counts only the updated part.
    """
    code = instruction.opcode
    if code in _FREE:
        return 0.0
    operands = [computation.get(name) for name in instruction.operands]
    if code in ("copy-start", "slice-start"):
        made = instruction.shapes[:1] if code == "copy-start" else instruction.shapes[1:2]
        size = min(total_bytes(made), _main(operands[0].shapes) if operands[0] else math.inf)
        return _main(made) + (size if operands[0] and _main(operands[0].shapes) else 0.0)
    if code in ("dynamic-slice", "gather", "slice"):
        return _main(instruction.shapes) + (total_bytes(instruction.shapes) if _in_main(operands[0]) else 0.0)
    if code == "dynamic-update-slice":
        if (update := operands[1]) is None:
            return 0.0
        return _main(update.shapes) + (total_bytes(update.shapes) if _in_main(operands[0]) else 0.0)
    if code != "fusion":
        return _main(instruction.shapes) + sum(_main(operand.shapes) for operand in operands if operand is not None)
    inside = module.computations.get(instruction.attribute("calls"), {})
    reads = sum(
        min(_bytes_read(module, inside, place), _main(operand.shapes))
        for place, operand in enumerate(operands)
        if operand is not None and _in_main(operand)
    )
    return reads + _bytes_written(instruction, inside)


def _main(shapes: Iterable[Shape]) -> float:
    """Adds up the sizes of the arrays that are in main memory."""
    return sum((shape.bytes for shape in shapes if shape.in_main_memory), 0.0)


def _in_main(instruction: Instruction | None) -> bool:
    return instruction is not None and any(shape.in_main_memory for shape in instruction.shapes)


def _bytes_read(module: Module, inside: Computation, place: int) -> float:
    """Returns the bytes that a fusion reads of an operand: those of the slices that it cuts, or infinity if it reads all of it."""
    parameter = next((i for i in inside.values() if i.opcode == "parameter" and i.rest.startswith(f"({place})")), None)
    return 0.0 if parameter is None else _bytes_read_of(module, inside, parameter)


def _bytes_read_of(module: Module, inside: Computation, value: Instruction) -> float:
    """Returns the bytes that the instructions of a fusion read of a value; infinity if one of them reads the whole value."""
    total = 0.0
    for user in inside.values():
        for place, name in enumerate(user.operands):
            if name != value.name:
                continue
            if user.opcode in ("dynamic-slice", "slice", "gather") and place == 0:
                total += user.bytes
            elif user.opcode == "dynamic-update-slice" and place == 0:
                continue  # written in place
            elif user.opcode == "bitcast":
                total += _bytes_read_of(module, inside, user)
            elif user.opcode == "fusion":
                total += _bytes_read(module, module.computations.get(user.attribute("calls"), {}), place)
            elif user.opcode != "tuple":
                return math.inf
    return total


def _bytes_written(fusion: Instruction, inside: Computation) -> float:
    """Returns the bytes that a fusion writes; an update in place counts only the updated part."""
    root = root_of(inside)
    results = [inside.get(name) for name in root.operands] if root is not None and root.opcode == "tuple" else [root]
    if len(results) != len(fusion.shapes):
        return _main(fusion.shapes)
    total = 0.0
    for shape, result in zip(fusion.shapes, results, strict=True):
        if not shape.in_main_memory:
            continue
        while result is not None and result.opcode == "bitcast":
            result = inside.get(result.operands[0])
        if result is not None and result.opcode == "dynamic-update-slice" and result.operands[1] in inside:
            total += inside[result.operands[1]].bytes
        else:
            total += shape.bytes
    return total
