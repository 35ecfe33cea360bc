"""Writes and reads the per-problem file of an evaluation: JSON lines with one row per problem, identified by its index.

A row holds at least ``index`` (the record's index in its split), ``grader`` (the grader's name) and ``correct``. A comparison
also checks ``grader_version``, which some graders have, and ``prompt`` where both files have it, and ignores all other fields
(``response``, ``extracted``, ``nfe``).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from jaxblock.errors import UserError, shown
from jaxblock.io.files import read_bytes
from jaxblock.io.json_text import parse_json
from jaxblock.io.paths import PathLike


class Problem(NamedTuple):
    """Holds the fields of one graded problem that a comparison needs.

    Attributes:
        correct: whether the response was graded as correct.
        grader: the name of the grader.
        version: the grader's version; None for a grader without versions.
        prompt: the problem's text; None if the file does not hold it.
        reference: the response that the problem's record gives; None if the file does not hold it.
        where: the row's ``file:line``, for error messages.
    """

    correct: bool
    grader: str
    version: str | None
    prompt: str | None
    reference: str | None
    where: str

    @property
    def graded_by(self) -> str:
        """Returns the grader's name, with its version if it has one."""
        return self.grader if self.version is None else f"{self.grader} ({self.version})"


def format_problems(rows: Iterable[Mapping[str, Any]]) -> str:
    """Formats rows, each with at least ``index``, ``grader`` and ``correct``, as the text of a per-problem file."""
    return "".join(json.dumps(dict(row), ensure_ascii=False) + "\n" for row in rows)


def read_problems(path: PathLike) -> dict[int, Problem]:
    """Reads a per-problem file.

    Args:
        path: a file of JSON lines as ``format_problems`` makes them; a byte-order mark at its start is skipped.

    Returns:
        The problems by index, in the file's order.

    Raises:
        UserError: the file is absent or empty, a line is not a row of the format above, or an index occurs twice.
    """
    try:
        text = read_bytes(path).decode("utf-8-sig")
    except (UserError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot read per-problem results ({error}); `evaluate` writes such a file") from error
    problems: dict[int, Problem] = {}
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        where = f"{path}:{number}"
        try:
            row = parse_json(line)
        except ValueError as error:
            raise UserError(
                f"{where}: not JSON that can be read ({error}); is it the per-problem file of an `evaluate` run?"
            ) from error
        _check(row, where)
        if row["index"] in problems:
            raise UserError(f"{where}: problem {row['index']} occurs twice (first at {problems[row['index']].where})")
        problems[row["index"]] = Problem(
            row["correct"], row["grader"], row.get("grader_version"), row.get("prompt"), row.get("reference"), where
        )
    if not problems:
        raise UserError(f"{path}: holds no problems; was the evaluation that wrote it interrupted?")
    return problems


def texts_hash(problems: Iterable[Problem]) -> str:
    """Returns a hash of the prompts and references of problems, in their order, by which other problems are noticed."""
    texts = [[problem.prompt, problem.reference] for problem in problems]
    return hashlib.sha256(json.dumps(texts).encode()).hexdigest()[:16]


def _check(row: Any, where: str) -> None:
    """Raises a UserError where a row lacks ``index``, ``grader`` or ``correct``, or one of them has the wrong type."""
    if not isinstance(row, Mapping):
        raise UserError(f"{where}: expected a JSON object with index, grader and correct, got {type(row).__name__}")
    for name, kind in (("index", int), ("grader", str), ("correct", bool)):
        # Python's bool is a subclass of int, but `"index": true` is a mistake.
        if not isinstance(row.get(name), kind) or (kind is int and isinstance(row.get(name), bool)):
            raise UserError(f"{where}: field {name!r} must be a {kind.__name__}, got {shown(row.get(name))}")
