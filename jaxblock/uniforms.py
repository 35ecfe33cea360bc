"""Draws uniform numbers so that a program that needs a few of them compiles quickly.

XLA's compiler for CPUs unrolls an array's last axis where its length is short and no multiple of a vector's, and each array
that is drawn is a program of its own: the numbers that choose 8 tokens of a block once took a third of the time to compile
the whole NELBO. The numbers here are those of ``jax.random.uniform``, bit for bit: its n-th number depends on the key and n
alone (``jax_threefry_partitionable``, JAX's default), so a line may be drawn longer than it is needed.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import jax
from jax import Array
from jax.typing import DTypeLike

_VECTOR = 16
"""A multiple of the float32 numbers in a CPU's vector (4 to 16)."""


def uniform(key: Array, shape: tuple[int, ...]) -> Array:
    """Draws the numbers of ``jax.random.uniform(key, shape)``."""
    return uniform_arrays(key[None], [shape])[0]


def uniform_arrays(keys: Array, shapes: Sequence[tuple[int, ...]], dtype: DTypeLike = float) -> list[Array]:
    """Draws several arrays at once: the n-th is ``jax.random.uniform(keys[n], shapes[n])``.

    Args:
        keys: the random keys [n].
        shapes: the arrays' shapes; each array takes the time of the largest.
        dtype: their type; JAX's default float without one.

    Returns:
        The arrays of float numbers in [0, 1).
    """
    sizes = [math.prod(shape) for shape in shapes]
    longest = -(-max(sizes) // _VECTOR) * _VECTOR
    lines = jax.vmap(lambda key: jax.random.uniform(key, (longest,), dtype))(keys)
    return [line[:size].reshape(shape) for line, size, shape in zip(lines, sizes, shapes, strict=True)]
