"""Reads one row of a run's metrics from its line, and refuses what is no such row."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from jaxblock.io.json_text import parse_json

Row = dict[str, Any]
"""One row of metrics; ``step`` is an integer, ``kind`` a string such as ``train`` or ``eval``."""


def _is_step(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**53


def _is_number(value: Any) -> bool:
    """Tells whether a value is a number as rows hold it: what JSON cannot write is a text."""
    return value in ("nan", "inf", "-inf") or (type(value) in (int, float) and abs(value) < 1e300)


def _are_pairs(value: Any) -> bool:
    return isinstance(value, list) and all(
        isinstance(v, list) and len(v) == 2 and all(map(_is_number, v)) for v in value
    )


def _are_numbers(value: Any) -> bool:
    return isinstance(value, dict) and all(map(_is_number, value.values()))


def _is_score(value: Any) -> bool:
    return _are_numbers(value) and {"correct", "n", "low", "high"} <= value.keys()


_FORMS: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "step": ("a step", _is_step),
    "kind": ("a text", lambda value: isinstance(value, str)),
    "seconds": ("an object of numbers", _are_numbers),
    "step_seconds": ("a number or null", lambda value: value is None or _is_number(value)),
    "loss_by_block": ("pairs of numbers", _are_pairs),
    "loss_by_count": ("pairs of numbers", _are_pairs),
    "nelbo_per_token": ("an object of numbers", _are_numbers),
    "nelbo_per_sequence": ("an object of numbers", _are_numbers),
    "pass_at_1": ("an object of correct, n, low and high", _is_score),
}
"""What the fields that are read again must be: those of which a run goes on, or that are plotted."""


def parse_row(line: str | bytes) -> Row:
    """Parses a line of a metrics file.

    Raises:
        ValueError: it is no row; says why.
    """
    try:
        row = parse_json(line)
    except ValueError as error:
        raise ValueError(f"not JSON ({error})") from error
    if not isinstance(row, dict):
        raise ValueError("not an object")
    needed = {"step", "kind"} | ({"seconds"} if row.get("kind") == "goodput" else set())
    if absent := sorted(needed - row.keys()):
        raise ValueError(f"no {absent[0]!r}")
    for name, (form, fits) in _FORMS.items():
        if name in row and not fits(row[name]):
            raise ValueError(f"{name!r} is not {form}")
    return row
