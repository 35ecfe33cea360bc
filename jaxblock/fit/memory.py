"""Compiles programs, and reads from the compiler how much memory of a device they need."""

from __future__ import annotations

import re
from typing import NamedTuple

import jax

_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
_USED = re.compile(r"Used ([\d.]+)([KMGT]?)B? of ([\d.]+)([KMGT]?)B? (?:hbm|HBM)")
_TEMPORARIES = re.compile(r"HLO temporaries \(([\d.]+)([KMGT]?)B?\) exceeds available HBM \(([\d.]+)([KMGT]?)B?\)")
"""Patterns of the two errors in which TPU compilers say that a program does not fit: one gives all the memory that it would use
(_USED), the other only that of its temporaries (_TEMPORARIES)."""


class Memory(NamedTuple):
    """Holds the bytes of one device that a program needs while it runs, as its compiler planned them.

    Attributes:
        arguments: the bytes of the program's inputs, such as weights, optimizer state and batch.
        outputs: the bytes of its results, except for those that are written in place of an argument.
        temporaries: the bytes of everything in between, such as activations, gradients, gathered weights and logits.
        code: the bytes of the program itself.
        total: the sum of these four. For a program that the compiler refused it is the memory that the program would need, and
            ``temporaries`` then includes outputs and code.
        limit: the bytes that a refused program could have used; None for a program that was compiled.
    """

    arguments: float
    outputs: float
    temporaries: float
    code: float
    total: float
    limit: float | None = None


class CompileResult(NamedTuple):
    """Holds a compiled program and the memory that it needs, or would need if it does not fit.

    Attributes:
        program: the program, which can be called; None where the compiler found that it does not fit.
        memory: the memory that the program needs.
    """

    program: jax.stages.Compiled | None
    memory: Memory


def compile_lowered(lowered: jax.stages.Lowered, arguments: float) -> CompileResult:
    """Compiles a program. If it does not fit into memory, this is reported in the result and raises no error.

    Args:
        lowered: the program.
        arguments: the bytes of the program's arguments on one device, which the compiler's error does not give.

    Raises:
        Exception: the compiler failed for another reason.
    """
    try:
        program = lowered.compile()
    except Exception as error:  # the type of jaxlib's exception differs between versions
        needed = memory_of_error(str(error), arguments)
        if needed is None:
            raise
        return CompileResult(None, needed)
    return CompileResult(program, memory_of_program(program))


def memory_of_program(program: jax.stages.Compiled) -> Memory:
    """Returns the memory of one device that a compiled program needs; zeros where the backend does not report it."""
    found = program.memory_analysis()
    if found is None:
        return Memory(0.0, 0.0, 0.0, 0.0, 0.0)
    outputs = max(found.output_size_in_bytes - found.alias_size_in_bytes, 0)
    parts = (found.argument_size_in_bytes, outputs, found.temp_size_in_bytes, found.generated_code_size_in_bytes)
    arguments, outputs, temporaries, code = map(float, parts)
    return Memory(arguments, outputs, temporaries, code, total=float(sum(parts)))


def memory_of_error(message: str, arguments: float) -> Memory | None:
    """Reads the memory that a program would need from a compiler's error; None where the error is about something else.

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
