"""Chooses what is checked against its annotations in tests."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from beartype import beartype


def checked(function: Callable[..., Any]) -> Callable[..., Any]:
    """Checks the calls of a function, but not of one defined inside another: each definition would be decorated anew.

    The check is made when the function is called first: most of those that a test imports never are.
    """
    if "<locals>" in function.__qualname__:
        return function
    checking: list[Callable[..., Any]] = []

    def check(*args: Any, **named: Any) -> Any:
        if not checking:
            checking.append(beartype(function))
        return checking[0](*args, **named)

    return check
