"""Finds the collective operations of a compiled program, and what each of them sends."""

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
        shapes: the arrays that it makes; of a reduction and of an all-to-all the arrays that it is given.
        group: the number of devices that take part together.
        times: how often it runs in a step.
        sent: the bytes that one device sends in all those times at the least (its share of a ring).
        name: the name of the operation in our code.
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
    """Lists every collective with the bytes that it sends, the largest first.

    A TPU program may spread one collective over several fusions (start, parts beside other work, end) that share its
    channel: it is counted where it starts. A reduce-scatter may be written as a fusion of an all-reduce and a slice.

    Args:
        module: the program of one device.
        devices: the number of devices that run it, for collectives among all of them.
    """
    by_channel: dict[str, list[_Instance]] = {}
    for name, times, _ in executed_computations(module):
        computation = module.computations.get(name, {})
        begins = any("AsyncCollectiveStart" in i.rest for i in computation.values())
        for instruction in computation.values():
            if instruction.opcode.removesuffix("-start") in COLLECTIVE_KINDS or _to_other_slices(instruction):
                channel = re.search(r"channel_id=(\d+)", instruction.rest)
                # Sends have channel numbers of their own.
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
    """Returns what a gather or a permutation makes; the type of an asynchronous one names its operands first."""
    if not instruction.opcode.endswith("-start"):
        return instruction.shapes
    return instruction.shapes[len(given) : 2 * len(given)]


def _group_size(rest: str, devices: int) -> int:
    """Returns the number of devices of one group, in any of the ways that HLO writes groups."""
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
