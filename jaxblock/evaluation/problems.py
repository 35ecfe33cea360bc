"""Writes and reads the per-problem JSONL of an evaluation: one row a problem, keyed by the problem's index.

A row holds at least ``index`` (the record's index in its split), ``grader`` (its name) and ``correct``; ``prompt`` is
compared where both files have it. Other fields of a row (``response``, ``extracted``, ``nfe``) are not looked at.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from jaxblock.errors import UserError
from jaxblock.io.files import read_bytes
from jaxblock.io.paths import PathLike


class Problem(NamedTuple):
    """Holds what a comparison needs of one graded problem.

    Attributes:
        correct: whether the response was graded as correct.
        grader: the name of the grader.
        prompt: the problem's text; None if the file does not hold it.
        where: the row's ``file:line``, for error messages.
    """

    correct: bool
    grader: str
    prompt: str | None
    where: str


def format_problems(rows: Iterable[Mapping[str, Any]]) -> str:
    """Formats rows, each with at least ``index``, ``grader`` and ``correct``, as the text of a per-problem file."""
    return "".join(json.dumps(dict(row), ensure_ascii=False) + "\n" for row in rows)


def read_problems(path: PathLike) -> dict[int, Problem]:
    """Reads a per-problem file.

    Args:
        path: a file of JSON lines as ``format_problems`` makes them.

    Returns:
        The problems by index, in the file's order.

    Raises:
        UserError: the file is absent or empty, or a line is not such a row, or an index occurs twice.
    """
    try:
        text = read_bytes(path).decode("utf-8")
    except (UserError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot read per-problem results ({error}); `evaluate` writes such a file") from error
    problems: dict[int, Problem] = {}
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        where = f"{path}:{number}"
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise UserError(f"{where}: not JSON ({error}); is it the per-problem file of an `evaluate` run?") from error
        _check(row, where)
        if row["index"] in problems:
            raise UserError(f"{where}: problem {row['index']} occurs twice (first at {problems[row['index']].where})")
        problems[row["index"]] = Problem(row["correct"], row["grader"], row.get("prompt"), where)
    if not problems:
        raise UserError(f"{path}: holds no problems; was the evaluation that wrote it interrupted?")
    return problems


def _check(row: Any, where: str) -> None:
    """Raises a UserError where a row lacks one of the three fields or has one of a wrong type."""
    if not isinstance(row, Mapping):
        raise UserError(f"{where}: expected a JSON object with index, grader and correct, got {type(row).__name__}")
    for name, kind in (("index", int), ("grader", str), ("correct", bool)):
        # bool is an int to Python, yet `"index": true` is a mistake.
        if not isinstance(row.get(name), kind) or (kind is int and isinstance(row.get(name), bool)):
            raise UserError(f"{where}: field {name!r} must be a {kind.__name__}, got {row.get(name)!r}")
