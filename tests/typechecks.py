"""Chooses what is checked against its annotations in tests."""

import functools
from collections.abc import Callable
from typing import Any

from beartype import beartype


def checked(function: Callable[..., Any]) -> Callable[..., Any]:
    """Checks the calls of a function, but not of one defined inside another: each definition would be decorated anew.

    The check is made when the function is called first: most of those that a test imports never are.
    """
    if "<locals>" in function.__qualname__:
        return function
    checking = functools.cache(lambda: beartype(function))
    return lambda *args, **named: checking()(*args, **named)
