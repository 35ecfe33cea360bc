"""Compiles programs, and reads what they need of a device's memory off the compiler."""

from __future__ import annotations

import re
from typing import NamedTuple

import jax

_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
_USED = re.compile(r"Used ([\d.]+)([KMGT]?)B? of ([\d.]+)([KMGT]?)B? (?:hbm|HBM)")
_TEMPORARIES = re.compile(r"HLO temporaries \(([\d.]+)([KMGT]?)B?\) exceeds available HBM \(([\d.]+)([KMGT]?)B?\)")
"""Two ways in which TPU compilers say that a program does not fit: by all that it uses, or by its temporaries."""


class Memory(NamedTuple):
    """Holds the bytes of one device that a program needs while it runs, as its compiler planned them.

    Attributes:
        arguments: what goes in: weights, optimizer state, batch.
        outputs: what comes out, except for what takes the place of an argument.
        temporaries: all between: activations, gradients, gathered weights, logits.
        code: the program itself.
        total: all of it. Where the compiler gave up this is what it would have taken, and all parts but the arguments
            are counted in ``temporaries``.
        limit: what the compiler would give it; None where it has no limit.
    """

    arguments: float
    outputs: float
    temporaries: float
    code: float
    total: float
    limit: float | None = None


class CompileResult(NamedTuple):
    """Holds a compiled program, or what is known of one that would not fit.

    Attributes:
        program: the program, which can be called; None where the compiler found that it cannot fit.
        memory: what it needs.
    """

    program: jax.stages.Compiled | None
    memory: Memory


def compile_lowered(lowered: jax.stages.Lowered, arguments: float) -> CompileResult:
    """Compiles a program; one that does not fit is a result, not an error.

    Args:
        lowered: the program.
        arguments: the bytes of its arguments on one device, which a compiler that gives up does not tell.

    Raises:
        Exception: any other error of the compiler.
    """
    try:
        program = lowered.compile()
    except Exception as error:  # jaxlib's, whose type moved between versions
        needed = memory_of_error(str(error), arguments)
        if needed is None:
            raise
        return CompileResult(None, needed)
    return CompileResult(program, memory_of_program(program))


def memory_of_program(program: jax.stages.Compiled) -> Memory:
    """Returns what a compiled program needs of one device; zeros where a backend does not tell."""
    found = program.memory_analysis()
    if found is None:
        return Memory(0.0, 0.0, 0.0, 0.0, 0.0)
    outputs = max(found.output_size_in_bytes - found.alias_size_in_bytes, 0)
    parts = (found.argument_size_in_bytes, outputs, found.temp_size_in_bytes, found.generated_code_size_in_bytes)
    arguments, outputs, temporaries, code = map(float, parts)
    return Memory(arguments, outputs, temporaries, code, total=float(sum(parts)))


def memory_of_error(message: str, arguments: float) -> Memory | None:
    """Reads off a compiler's error what the program would need; None where the error is about something else.

    Args:
        message: the error's text.
        arguments: the bytes of the program's arguments on one device.
    """
    used, between = _USED.search(message), _TEMPORARIES.search(message)
    found = used or between
    if found is None:
        return None
    size, limit = float(found[1]) * _UNITS[found[2]], float(found[3]) * _UNITS[found[4]]
    temporaries = max(size - arguments, 0.0) if used else size
    return Memory(arguments, 0.0, temporaries, 0.0, arguments + temporaries, limit)
