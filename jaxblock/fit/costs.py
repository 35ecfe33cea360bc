"""What one step of a compiled program costs a device: operations, memory traffic, and bytes sent to other devices."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np

from jaxblock.fit import hlo
from jaxblock.fit.hlo import Computation, Instruction, Module, Shape

KINDS = ("all-gather", "reduce-scatter", "all-reduce", "all-to-all", "collective-permute")


class Collective(NamedTuple):
    """One collective operation of the program.

    Attributes:
        kind: one of ``KINDS``, or ``across slices`` for what goes over the data-centre network.
        shapes: what it makes (of a reduce-scatter: what goes in).
        group: devices that take part; 0 where the text does not say.
        times: how often it runs in a step.
        sent: bytes that one device sends in all those times, at the least (a ring's share).
        name: where it comes from in our code.
    """

    kind: str
    shapes: tuple[Shape, ...]
    group: int
    times: float
    sent: float
    name: str


class Costs(NamedTuple):
    """Of one step, per device.

    Attributes:
        flops: floating-point operations of matrix products (two per multiplication).
        traffic: bytes read from and written to the chip's main memory, estimated from the program's operations.
        collectives: every collective.
    """

    flops: float
    traffic: float
    collectives: list[Collective]

    def sent(self, kind: str | None = None) -> float:
        """Bytes that a device sends to others of its slice; of one kind, or of all."""
        return sum((c.sent for c in self.collectives if (c.kind == kind if kind else c.kind in KINDS)), 0.0)

    @property
    def across(self) -> float:
        """Bytes that a device sends to other slices."""
        return self.sent("across slices")


def read(module: Module, devices: int) -> Costs:
    """Adds up what a program does.

    Args:
        module: the program of one device.
        devices: how many take part, for collectives among all.

    Returns:
        The costs of running it once.
    """
    flops = traffic = 0.0
    for name, times, fused in hlo.executed(module):
        computation = module.computations.get(name, {})
        for instruction in computation.values():
            flops += times * _flops(instruction, computation)
            if not fused:
                traffic += times * _traffic(module, instruction, computation)
    return Costs(flops, traffic, collectives(module, devices))


# --- collectives


class _Instance(NamedTuple):
    instruction: Instruction
    computation: str
    times: float
    begins: bool


def collectives(module: Module, devices: int) -> list[Collective]:
    """Every collective with what it sends, most first.

    A TPU program may spread one collective over several fusions (start, parts beside other work, end) that share its
    channel: it is counted where it starts. A reduce-scatter may be written as a fusion of an all-reduce and a slice.
    """
    by_channel: dict[str, list[_Instance]] = {}
    for name, times, _ in hlo.executed(module):
        computation = module.computations.get(name, {})
        begins = any("AsyncCollectiveStart" in i.rest for i in computation.values())
        for instruction in computation.values():
            if instruction.opcode.removesuffix("-start") in KINDS or _to_other_slices(instruction):
                channel = re.search(r"channel_id=(\d+)", instruction.rest)
                # Sends number their channels by themselves.
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
    given = _given(instruction, computation)
    group = _group_size(instruction.rest, devices)
    if kind == "send":
        kind, size, made = "across slices", _bytes(given), given
    else:
        if kind == "all-reduce" and instance.computation.startswith("all-reduce-scatter"):
            kind = "reduce-scatter"
        share = (group - 1) / group
        made = given if kind in ("reduce-scatter", "all-reduce", "all-to-all") else _made(instruction, given)
        factor = {"all-reduce": 2 * share, "collective-permute": 1.0}.get(kind, share)
        size = factor * _bytes(made)
    label = re.search(r'op_name="([^"]*)"', instruction.rest)
    return Collective(kind, made, group, instance.times, size * instance.times, label[1] if label else "")


def _given(instruction: Instruction, computation: Computation) -> tuple[Shape, ...]:
    return tuple(shape for name in instruction.operands if name in computation for shape in computation[name].shapes)


def _made(instruction: Instruction, given: tuple[Shape, ...]) -> tuple[Shape, ...]:
    """What a gather or a permutation makes; the type of an asynchronous one repeats what it is given."""
    if not instruction.opcode.endswith("-start"):
        return instruction.shapes
    return instruction.shapes[len(given) : 2 * len(given)]


def _bytes(shapes: Iterable[Shape]) -> float:
    return sum((shape.bytes for shape in shapes), 0.0)


def _group_size(rest: str, devices: int) -> int:
    """Devices of one group, in any of the ways that HLO writes groups."""
    if pairs := re.search(r"source_target_pairs=\{", rest):
        return 2 if pairs else devices
    if listed := re.search(r"replica_groups=\{\{([\d,]*)\}", rest):
        return len(listed[1].split(","))
    if iota := re.search(r"replica_groups=\[(\d+),(\d+)\]<=", rest):
        return int(iota[2])
    if mesh := re.search(r"replica_groups=mesh\[([^\]]*)\][^{]*\{([^}]*)\}", rest):
        sizes = dict(re.findall(r"'([^']+)'=(\d+)", mesh[1]))
        return math.prod(int(sizes[axis]) for axis in re.findall(r"'([^']+)'", mesh[2]) if axis in sizes)
    return max(devices, 1)


# --- operations


def _flops(instruction: Instruction, computation: Computation) -> float:
    code = instruction.opcode
    if code == "dot":
        left = computation[instruction.operands[0]].shapes[0].dims
        contracted = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", instruction.rest)
        inner = math.prod(left[int(d)] for d in contracted[1].split(",") if d) if contracted else 1
        return 2.0 * instruction.shapes[0].elements * inner
    if code == "convolution":
        return _convolution_flops(instruction, computation)
    if code == "custom-call" and instruction.name.startswith("splash_mha_"):
        return _splash_flops(instruction, computation)
    return 0.0


def _convolution_flops(instruction: Instruction, computation: Computation) -> float:
    """TPU programs write matrix products as convolutions, batch dimensions as spatial ones."""
    given, kernel = (computation[name].shapes[0].dims for name in instruction.operands[:2])
    made = instruction.shapes[0].dims
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", instruction.rest)
    if labels is None:
        return 0.0
    left, right, out = labels.groups()
    groups = _number(r"feature_group_count=(\d+)", instruction.rest)
    batches = _number(r"batch_group_count=(\d+)", instruction.rest)
    products = given[left.index("f")] / groups * made[out.index("f")] * given[left.index("b")] / batches
    spatial = sorted(c for c in out if c.isdigit())
    for place, label in enumerate(spatial):
        window = _window(instruction.rest, place)
        products *= _valid(given[left.index(label)], kernel[right.index(label)], made[out.index(label)], *window)
    return 2.0 * products


def _number(pattern: str, text: str) -> int:
    found = re.search(pattern, text)
    return int(found[1]) if found else 1


def _window(rest: str, place: int) -> tuple[int, int, int, int]:
    """(stride, low padding, dilation of the input, dilation of the kernel) of a spatial dimension."""
    window = re.search(r"window=\{([^}]*)\}", rest)
    fields = dict(part.split("=") for part in window[1].split()) if window else {}

    def of(name: str, default: str) -> str:
        return fields[name].split("x")[place] if name in fields else default

    low = of("pad", "0_0").rsplit("_", 1)[0]
    return int(of("stride", "1")), int(low), int(of("lhs_dilate", "1")), int(of("rhs_dilate", "1"))


def _valid(given: int, kernel: int, made: int, stride: int, low: int, dilated: int, kernel_dilated: int) -> int:
    """Pairs of output and kernel positions that meet an input that is there, not padding or a gap."""
    at = np.arange(made)[:, None] * stride - low + np.arange(kernel)[None, :] * kernel_dilated
    return int(np.sum((at >= 0) & (at <= (given - 1) * dilated) & (at % dilated == 0)))


def _splash_flops(instruction: Instruction, computation: Computation) -> float:
    """The kernel's products per score: two forward; backward the scores again and three (keys, values) or two (queries)."""
    given = _given(instruction, computation)
    queries, keys = [s.dims for s in given if s.kind in ("bf16", "f32") and len(s.dims) >= 3 and s.dims[-1] % 128 == 0][
        :2
    ]
    products = {"fwd": 2, "dkv": 4, "dq": 3}[instruction.name.split("_")[2]]
    return 2.0 * products * math.prod(queries) * keys[-2]


# --- memory traffic

_FREE = {
    "parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "conditional", "call", "after-all",
    "copy-done", "slice-done", "send-done", "recv-done", "all-gather-done", "all-reduce-done", "async-done", "async-start",
    "async-update", "collective-permute-done", "partition-id", "replica-id", "iota", "opt-barrier", "domain",
}  # fmt: skip


def _traffic(module: Module, instruction: Instruction, computation: Computation) -> float:
    code = instruction.opcode
    if code in _FREE:
        return 0.0
    operands = [computation.get(name) for name in instruction.operands]
    if code in ("copy-start", "slice-start"):
        made = instruction.shapes[:1] if code == "copy-start" else instruction.shapes[1:2]
        size = min(_bytes(made), _main(operands[0].shapes) if operands[0] else math.inf)
        return _main(made) + (size if operands[0] and _main(operands[0].shapes) else 0.0)
    if code in ("dynamic-slice", "gather", "slice"):
        return _main(instruction.shapes) + (_bytes(instruction.shapes) if _in_main(operands[0]) else 0.0)
    if code == "dynamic-update-slice":
        update = operands[1]
        return (_main(update.shapes) if update else 0.0) + (
            _bytes(update.shapes) if update and _in_main(operands[0]) else 0.0
        )
    if code != "fusion":
        return _main(instruction.shapes) + sum(_main(operand.shapes) for operand in operands if operand is not None)
    inside = module.computations.get(instruction.attribute("calls"), {})
    reads = sum(
        min(_read(module, inside, place), _main(operand.shapes))
        for place, operand in enumerate(operands)
        if operand is not None and _in_main(operand)
    )
    return reads + _written(instruction, inside)


def _main(shapes: Iterable[Shape]) -> float:
    return sum((shape.bytes for shape in shapes if shape.in_main_memory), 0.0)


def _in_main(instruction: Instruction | None) -> bool:
    return instruction is not None and any(shape.in_main_memory for shape in instruction.shapes)


def _read(module: Module, inside: Computation, place: int) -> float:
    """Bytes that a fusion reads of an operand: slices alone, where it only slices it."""
    parameter = next((i for i in inside.values() if i.opcode == "parameter" and i.rest.startswith(f"({place})")), None)
    return 0.0 if parameter is None else _read_of(module, inside, parameter)


def _read_of(module: Module, inside: Computation, value: Instruction) -> float:
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
                total += _read_of(module, inside, user)
            elif user.opcode == "fusion":
                total += _read(module, module.computations.get(user.attribute("calls"), {}), place)
            elif user.opcode != "tuple":
                return math.inf
    return total


def _written(fusion: Instruction, inside: Computation) -> float:
    """Bytes that a fusion writes: of an update in place, the update alone."""
    root = next((i for i in inside.values() if i.root), None)
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
