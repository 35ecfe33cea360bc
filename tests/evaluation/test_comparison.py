"""Tests paired comparisons of per-problem files, and files that do not match or cannot be read."""

from pathlib import Path
from typing import Any

import pytest

from jaxblock.errors import UserError
from jaxblock.evaluation.comparison import compare_evaluations
from jaxblock.evaluation.problems import format_problems, read_problems


def rows(verdicts: list[bool], **changes: Any) -> list[dict[str, Any]]:
    base = {"grader": "gsm8k_strict"} | changes
    return [{"index": i, "correct": v, "prompt": f"question {i}"} | base for i, v in enumerate(verdicts)]


def write(path: Path, content: list[dict[str, Any]]) -> Path:
    path.write_text(format_problems(content), encoding="utf-8")
    return path


def test_compare_counts_the_four_cells_in_any_order_of_lines(tmp_path):
    # U+2028 ends a line for str.splitlines, not for JSON lines
    a = write(tmp_path / "a.jsonl", [r | {"response": "\u2028"} for r in rows([True, True, False, False, False])])
    b = write(tmp_path / "b.jsonl", rows([True, False, True, True, False])[::-1])
    got = compare_evaluations(a, b)
    assert (got.n, got.both, got.only_a, got.only_b, got.neither) == (5, 1, 1, 2, 1)
    assert got.p_value == 1 and got.grader == "gsm8k_strict" and "A 40.0%, B 60.0% of 5" in str(got)


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (rows([True, True]), r"a\.jsonl:3: problem 2 is not in .*b\.jsonl"),
        (rows([True, True, True, True]), r"b\.jsonl:4: problem 3 is not in .*a\.jsonl"),
        (rows([True, True, True], grader="exact"), r"problem 0: graded by gsm8k_strict .* but by exact .*b\.jsonl:1"),
        (rows([True, True, True], prompt="other"), r"problem 0: .* ask different questions"),
    ],
)
def test_compare_names_the_first_mismatch(tmp_path, other, message):
    a = write(tmp_path / "a.jsonl", rows([True, False, True]))
    with pytest.raises(UserError, match=message):
        compare_evaluations(a, write(tmp_path / "b.jsonl", other))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "holds no problems"),
        ("{\n", r"p\.jsonl:1: not JSON"),
        ("[1]\n", r"p\.jsonl:1: expected a JSON object"),
        ('{"index": 0, "grader": "exact", "correct": 1}\n', r"p\.jsonl:1: field 'correct' must be a bool, got 1"),
        ('{"index": true, "grader": "exact", "correct": true}\n', r"field 'index' must be a int"),
        ('{"index": 0, "grader": "exact", "correct": true}\n' * 2, r"p\.jsonl:2: problem 0 occurs twice"),
    ],
)
def test_a_bad_file_is_named_with_its_line(tmp_path, text, message):
    path = tmp_path / "p.jsonl"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(UserError, match=message):
        read_problems(path)
    with pytest.raises(UserError, match="absent"):
        read_problems(tmp_path / "absent.jsonl")
