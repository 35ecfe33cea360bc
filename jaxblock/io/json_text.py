"""Parses JSON that somebody else may have written: names given twice and nesting without end are errors, not surprises."""

from __future__ import annotations

import json
from typing import Any


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for at, name in enumerate(names) if name in names[:at])
        raise ValueError(f"the name {twice[:80]!r} is given twice in one object; keep one of them")
    return found


DECODER = json.JSONDecoder(object_pairs_hook=_once)
"""Parses one value after another (``raw_decode``); an object that gives a name twice is a ValueError."""


def parse_json(text: str | bytes) -> Any:
    """Parses a JSON value.

    Raises:
        ValueError: the text is not JSON or not UTF-8, an object gives a name twice, a number has more digits than Python
            converts, or lists and objects are nested too deeply. ``json.JSONDecodeError`` has the place of the first kind.
    """
    try:
        return json.loads(text, object_pairs_hook=_once)
    except RecursionError as error:
        raise ValueError("lists or objects are nested too deeply") from error
