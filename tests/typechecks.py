"""Chooses what is checked against its annotations in tests."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from beartype import beartype


def checked(function: Callable[..., Any]) -> Callable[..., Any]:
    """Checks the calls of a function, but not of one defined inside another: each definition would be decorated anew."""
    return function if "<locals>" in function.__qualname__ else beartype(function)
