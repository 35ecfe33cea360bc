"""Writes a record's other fields, which only graders look at, as compact JSON."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from jaxblock.errors import UserError

MOST_BYTES = 1 << 20
"""The number of bytes that the JSON of one record's other fields may have."""


def fields_json(fields: Mapping[str, Any], where: str) -> tuple[str, list[str]]:
    """Writes fields as compact JSON, in ASCII.

    Args:
        fields: The fields of a record that are neither prompt nor response nor messages.
        where: The place of the record, for error messages.

    Returns:
        (the JSON of an object, empty where there are no fields; the names of the fields that are not in it, since JSON cannot
        hold their values: bytes, times and pictures, which only Parquet files and data sets have).

    Raises:
        UserError: If the JSON has more than `MOST_BYTES` bytes, or lists and objects are nested too deeply to be written.
    """
    kept = dict(fields)
    try:
        text = _written(kept)
        if text is None:
            kept = {name: value for name, value in fields.items() if _written(value) is not None}
            text = _written(kept) or ""
    except RecursionError as error:
        raise UserError(
            f"{where}: the lists or objects of a field are nested too deeply to be kept for graders"
        ) from error
    if len(text) > MOST_BYTES:
        largest = max(kept, key=lambda name: len(_written(kept[name]) or ""))
        raise UserError(
            f"{where}: the fields beside prompt and response, which are kept for graders, have {len(text):,} bytes, more than "
            f"{MOST_BYTES:,}: take out what no grader needs (the largest is {largest[:80]!r})"
        )
    return (text if kept else ""), [name for name in fields if name not in kept]


def _written(value: Any) -> str | None:
    """Returns a value as compact JSON; None where JSON cannot hold it."""
    try:
        return json.dumps(value, separators=(",", ":"))
    except TypeError:
        return None
