"""Checks the arguments of a model's methods that are no field of a section of settings."""

from __future__ import annotations

import operator
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxblock.errors import UserError, shown

LARGEST = 2**31 - 1
"""The largest whole number that a method takes, as a setting does."""

SAVED_TYPES = ("float32", "bfloat16", "float16")
"""The types in which weights can be saved."""


def whole_number(value: Any, name: str, least: int, most: int = LARGEST) -> int:
    """Returns a whole number of any type, Python's or an array's, as Python's.

    Args:
        value: the number that the caller gave.
        name: its name in messages.
        least: the smallest number allowed.
        most: the largest one.

    Raises:
        UserError: it is no whole number, or out of range.
    """
    try:
        found = None if isinstance(value, bool) else operator.index(value)
    except TypeError:
        found = None
    if found is None:
        raise UserError(f"{name} is {shown(value)}: it must be a whole number from {least} to {most:,}")
    if not least <= found <= most:
        raise UserError(f"{name} is {shown(found)}: it must be from {least} to {most:,}")
    return found


def saved_type(dtype: Any) -> np.dtype[Any] | None:
    """Returns the type in which weights are to be saved; None for None, which keeps the type of each tensor.

    Raises:
        UserError: there is no such type, or weights are not saved in it.
    """
    if dtype is None:
        return None
    try:
        found = jnp.dtype(dtype)
    except (
        TypeError,
        ValueError,
        SyntaxError,
    ):  # the last: NumPy reads a text with commas as the types of several fields
        found = None
    if found is None or found.name not in SAVED_TYPES:
        raise UserError(f"dtype is {shown(dtype)}: choose {', '.join(SAVED_TYPES)}, or None for what each tensor has")
    return found
