"""Finds the collective operations of a compiled program, and counts the bytes that each of them sends."""

from __future__ import annotations

import math
import re
from typing import NamedTuple

from jaxblock.fit.hlo import Instruction, Module, Shape, operand_shapes, total_bytes
from jaxblock.fit.loops import executed_computations

COLLECTIVE_KINDS = ("all-gather", "reduce-scatter", "all-reduce", "all-to-all", "collective-permute")
"""The kinds of collective operations, as HLO names them."""


class Collective(NamedTuple):
    """Describes one collective operation of a program.

    Attributes:
        kind: one of ``COLLECTIVE_KINDS``, or ``across slices`` for a transfer over the data-centre network.
        shapes: the results of an all-gather or collective-permute; the operands of an all-reduce, reduce-scatter, all-to-all or
            transfer across slices.
        group: the number of devices that exchange data with each other.
        times: the number of times that the operation runs when the program runs once.
        sent: the least bytes that one device sends in all these runs together (with a ring algorithm).
        name: the operation's ``op_name``, which says where in the Python code it comes from.
    """

    kind: str
    shapes: tuple[Shape, ...]
    group: int
    times: float
    sent: float
    name: str


class _Instance(NamedTuple):
    instruction: Instruction
    computation: str
    times: float
    begins: bool


def find_collectives(module: Module, devices: int) -> list[Collective]:
    """Lists every collective with the bytes that it sends; those that send most come first.

    A TPU program may spread one collective over several fusions (a start, parts that overlap with other work, an end) that
    share its channel; it is counted once, at the start. A reduce-scatter may be a fusion of an all-reduce and a slice.

    Args:
        module: the program of one device.
        devices: the number of devices that run the program, which is the group of a collective that names no groups.
    """
    by_channel: dict[str, list[_Instance]] = {}
    for name, times, _ in executed_computations(module):
        computation = module.computations.get(name, {})
        begins = any("AsyncCollectiveStart" in i.rest for i in computation.values())
        for instruction in computation.values():
            if instruction.opcode.removesuffix("-start") in COLLECTIVE_KINDS or _to_other_slices(instruction):
                channel = re.search(r"channel_id=(\d+)", instruction.rest)
                # Sends and other collectives may use the same channel numbers.
                key = f"{instruction.opcode == 'send'}/{channel[1]}" if channel else f"{name}/{instruction.name}"
                by_channel.setdefault(key, []).append(_Instance(instruction, name, times, begins))
    found = []
    for instances in by_channel.values():
        starts = [i for i in instances if i.begins]
        spread = any("async_collective_fusion" in i.computation for i in instances)
        counted = starts or (instances[:1] if spread else instances)
        found += [_collective(module, instance, devices) for instance in counted]
    return sorted(found, key=lambda collective: -collective.sent)


def _to_other_slices(instruction: Instruction) -> bool:
    return instruction.opcode == "send" and "megascale" in instruction.rest


def _collective(module: Module, instance: _Instance, devices: int) -> Collective:
    instruction, computation = instance.instruction, module.computations[instance.computation]
    kind = instruction.opcode.removesuffix("-start")
    given = operand_shapes(instruction, computation)
    group = _group_size(instruction.rest, devices)
    if kind == "send":
        kind, size, made = "across slices", total_bytes(given), given
    else:
        if kind == "all-reduce" and instance.computation.startswith("all-reduce-scatter"):
            kind = "reduce-scatter"
        share = (group - 1) / group
        made = given if kind in ("reduce-scatter", "all-reduce", "all-to-all") else _made(instruction, given)
        factor = {"all-reduce": 2 * share, "collective-permute": 1.0}.get(kind, share)
        size = factor * total_bytes(made)
    label = re.search(r'op_name="([^"]*)"', instruction.rest)
    return Collective(kind, made, group, instance.times, size * instance.times, label[1] if label else "")


def _made(instruction: Instruction, given: tuple[Shape, ...]) -> tuple[Shape, ...]:
    """Returns the results of a gather or permutation. The type of an asynchronous operation lists its operands first."""
    if not instruction.opcode.endswith("-start"):
        return instruction.shapes
    return instruction.shapes[len(given) : 2 * len(given)]


def _group_size(rest: str, devices: int) -> int:
    """Returns the number of devices of one group, from any of the notations that HLO has for groups."""
    if "source_target_pairs={" in rest:
        return 2
    if listed := re.search(r"replica_groups=\{\{([\d,]*)\}", rest):
        return len(listed[1].split(","))
    if iota := re.search(r"replica_groups=\[(\d+),(\d+)\]<=", rest):
        return int(iota[2])
    if mesh := re.search(r"replica_groups=mesh\[([^\]]*)\][^{]*\{([^}]*)\}", rest):
        sizes = dict(re.findall(r"'([^']+)'=(\d+)", mesh[1]))
        return math.prod(int(sizes[axis]) for axis in re.findall(r"'([^']+)'", mesh[2]) if axis in sizes)
    return max(devices, 1)
