"""Bounds the time that a stranger's regular expression can take: nested repetitions and choices can take years to fail."""

from __future__ import annotations

from re import _parser  # type: ignore[attr-defined]  # the standard library's only parser of expressions
from typing import Any, NamedTuple

_LONGEST = 64
"""A length that the names of modules hardly reach."""


class _Bound(NamedTuple):
    """Bounds the matching of a part of an expression at one position of a name.

    Attributes:
        ways: in how many ways it can match; what follows may be tried after each.
        steps: how many steps it takes to try all of them.
        repeats: how many repetitions the expression has up to its end.
    """

    ways: float
    steps: float
    repeats: int


def count_steps(expression: str) -> float:
    """Bounds how many steps it takes to match a name of 64 characters with an expression, which is valid."""
    return _sequence(_parser.parse(expression), 0).steps


def _sequence(part: Any, repeats: int) -> _Bound:
    """Bounds the parts of a sequence one after another; ``repeats`` is the number of repetitions before it."""
    ways, steps = 1.0, 1.0
    for kind, argument in part:
        bound = _item(str(kind), argument, repeats)
        steps = min(steps + ways * bound.steps, 1e200)
        ways, repeats = min(ways * bound.ways, 1e100), bound.repeats
    return _Bound(ways, steps, repeats)


def _item(kind: str, argument: Any, repeats: int) -> _Bound:
    if kind == "BRANCH":
        parts = [_sequence(part, repeats) for part in argument[1]]
        ways = 1 if _exclude_each_other(argument[1]) else sum(part.ways for part in parts)
        return _Bound(ways, sum(part.steps for part in parts), max(part.repeats for part in parts))
    if "REPEAT" in kind:
        least, most, part = argument
        times = min(int(most), _LONGEST)
        inside = _sequence(part, repeats)
        # Ends in order: k repetitions in a name of n characters can end in C(n + k, k) ways, which is this product.
        ends = min(1 + max(times - int(least), 0), (_LONGEST + inside.repeats + 1) / (inside.repeats + 1))
        ways = ends * min(inside.ways, 1e3) ** min(times, 30)
        return _Bound(ways, ways * inside.steps, inside.repeats + 1)
    nested = [
        item
        for item in (argument if isinstance(argument, tuple) else (argument,))
        if isinstance(item, _parser.SubPattern)
    ]
    bound = _Bound(1, 1, repeats)
    for part in nested:
        inside = _sequence(part, bound.repeats)
        bound = _Bound(bound.ways * inside.ways, bound.steps + inside.steps, inside.repeats)
    # What looks ahead, or gives nothing back, is not tried again after it has matched.
    return bound._replace(ways=1) if kind.startswith(("ASSERT", "ATOMIC")) else bound


def _exclude_each_other(choices: list[Any]) -> bool:
    """Tells whether all choices are plain texts of which none begins another, so that at most one matches at a position."""
    texts = [[argument for kind, argument in choice if str(kind) == "LITERAL"] for choice in choices]
    plain = all(len(text) == len(choice) for text, choice in zip(texts, choices, strict=True))
    return plain and not any(a[: len(b)] == b[: len(a)] for at, a in enumerate(texts) for b in texts[:at])
