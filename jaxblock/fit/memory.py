"""What a compiled program needs of a device's memory, and whether it is there."""

from __future__ import annotations

import re
from typing import NamedTuple

import jax

_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
_USED = re.compile(r"Used ([\d.]+)([KMGT]?)B? of ([\d.]+)([KMGT]?)B? (?:hbm|HBM)")
_TEMPORARIES = re.compile(r"HLO temporaries \(([\d.]+)([KMGT]?)B?\) exceeds available HBM \(([\d.]+)([KMGT]?)B?\)")
"""Two ways in which TPU compilers say that a program does not fit: by all that it uses, or by its temporaries."""


class Memory(NamedTuple):
    """Bytes of one device while a program runs, as its compiler planned them.

    Attributes:
        arguments: what goes in: weights, optimizer state, batch.
        outputs: what comes out, less what takes the place of an argument.
        temporaries: all between: activations, gradients, gathered weights, logits.
        code: the program itself.
        total: all of it. Where the compiler gave up this is what it would have taken, and the parts but for the
            arguments are in ``temporaries``.
        limit: what the compiler would give it; None where it has no limit.
    """

    arguments: float
    outputs: float
    temporaries: float
    code: float
    total: float
    limit: float | None = None


class Built(NamedTuple):
    """A program that was compiled, or would not fit.

    Attributes:
        program: what can be called; None where the compiler found that it cannot fit.
        memory: what it needs.
    """

    program: jax.stages.Compiled | None
    memory: Memory


def build(lowered: jax.stages.Lowered, arguments: float) -> Built:
    """Compiles a program and reads its memory off the compiler.

    Args:
        lowered: the program.
        arguments: bytes of its arguments on one device, for programs that do not fit.

    Raises:
        Exception: whatever the compiler raises, but for being out of memory.
    """
    try:
        program = lowered.compile()
    except Exception as error:  # jaxlib's, whose type moved between versions
        found = over(str(error), arguments)
        if found is None:
            raise
        return Built(None, found)
    return Built(program, of(program))


def of(program: jax.stages.Compiled) -> Memory:
    """The memory of a compiled program on one device. Zeros where a backend does not tell."""
    found = program.memory_analysis()
    if found is None:
        return Memory(0.0, 0.0, 0.0, 0.0, 0.0)
    outputs = max(found.output_size_in_bytes - found.alias_size_in_bytes, 0)
    parts = (found.argument_size_in_bytes, outputs, found.temp_size_in_bytes, found.generated_code_size_in_bytes)
    given, made, between, code = map(float, parts)
    return Memory(given, made, between, code, total=float(sum(parts)))


def over(message: str, arguments: float) -> Memory | None:
    """What a compiler's complaint says that a program would need; None for another complaint."""
    used, between = _USED.search(message), _TEMPORARIES.search(message)
    found = used or between
    if found is None:
        return None
    size, limit = float(found[1]) * _UNITS[found[2]], float(found[3]) * _UNITS[found[4]]
    temporaries = max(size - arguments, 0.0) if used else size
    return Memory(arguments, 0.0, temporaries, 0.0, arguments + temporaries, limit)


def device_limit(device: jax.Device) -> float | None:
    """Bytes that a device will give to programs; None where the platform does not say (CPU)."""
    return _statistic(device, "bytes_limit")


def device_peak(device: jax.Device) -> float | None:
    """The most bytes that have been in use on a device; None where the platform does not say (CPU)."""
    return _statistic(device, "peak_bytes_in_use")


def _statistic(device: jax.Device, name: str) -> float | None:
    try:
        found = device.memory_stats()
    except Exception:  # some platforms raise where others return None
        return None
    return float(found[name]) if found and name in found else None


def gib(size: float) -> str:
    """Bytes for people: ``3.33 GiB``, ``12.5 MiB``."""
    for unit, name in ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB")):
        if size >= unit:
            return f"{size / unit:.2f} {name}"
    return f"{size:.0f} B"
