"""Tests graders on hand-made cases, also those on which strict and flexible are known to differ."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from jaxblock.errors import UserError
from jaxblock.evaluation.graders import GRADERS, find_grader, normalise_gsm8k

REFERENCE = "She sells 9 * 2 = 18 a day. #### 18"

# response, reference, strict correct, flexible correct
CASES = [
    ("9 * 2 = 18\n#### 18", REFERENCE, True, True),
    ("#### 18.", REFERENCE, True, True),
    ("#### 18.00", REFERENCE, False, False),  # compared as text, not as numbers
    ("#### $18", REFERENCE, False, True),  # strict takes no currency sign
    ("####18", REFERENCE, False, True),  # strict wants the space
    ("The answer is 18.", REFERENCE, False, True),
    ("The answer is \\boxed{18}", REFERENCE, False, True),
    ("#### 18 or maybe 20", REFERENCE, True, False),  # first against last
    ("#### 20 #### 18", REFERENCE, False, True),
    ("#### 18\nQuestion 2", REFERENCE, True, False),  # run on after the answer
    ("18, so the total is 18 ...", REFERENCE, False, False),  # "..." is the last run of number characters
    ("#### 1,800", "#### 1800", True, True),
    ("#### 1800", "#### 1,800", True, True),
    ("#### -5", "#### -5", True, True),
    ("#### 5", "#### -5", False, False),
    ("10-5", "#### 5", False, False),  # flexible reads the minus as a sign
    ("#### 3.5", "#### 3.5", True, True),
    ("#### 7", "#### 7", True, True),
    ("no number at all", REFERENCE, False, False),
    ("", REFERENCE, False, False),
    ("#### ", REFERENCE, False, False),
    ("#### 18", "18", True, True),  # a bare reference
]


@pytest.mark.parametrize(("response", "reference", "strict", "flexible"), CASES)
def test_gsm8k_graders_agree_with_the_table(response: str, reference: str, strict: bool, flexible: bool) -> None:
    assert GRADERS["gsm8k_strict"](response, reference).correct is strict
    assert GRADERS["gsm8k_flexible"](response, reference).correct is flexible


def test_what_is_extracted_and_expected() -> None:
    graded = GRADERS["gsm8k_strict"]("so #### 1,234.", "a #### b #### $1,234")
    assert graded == (True, "1,234.", "1234")
    assert GRADERS["gsm8k_strict"]("The answer is 4", REFERENCE).extracted is None
    assert GRADERS["gsm8k_flexible"]("4 then -12", REFERENCE).extracted == "-12"


def test_nothing_extracted_is_never_correct() -> None:
    assert not GRADERS["gsm8k_strict"]("", "").correct
    assert not GRADERS["gsm8k_flexible"]("none", "none").correct


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("$1,000.", "1000"),
        ("ABC.", "abc"),
        ("x\ny #### 7", "7"),
        ("3.5", "3.5"),
        ("#### 1 #### 2", "2"),
        ("a..", "a."),
        ("#### 5\n", "5"),
    ],
)
def test_normalise(text: str, expected: str) -> None:
    assert normalise_gsm8k(text) == expected


def test_exact_forgives_outer_space_alone() -> None:
    exact = GRADERS["exact"]
    assert exact(" a b\n", "a b").correct
    assert not exact("A b", "a b").correct and not exact("a  b", "a b").correct and not exact("a b.", "a b").correct


def test_an_unknown_grader_is_named() -> None:
    with pytest.raises(UserError, match="gsm8k_strct.*gsm8k_strict"):
        find_grader("gsm8k_strct")


def test_every_gsm8k_reference_is_right_about_itself(shared: Path) -> None:
    lines = (shared / "data" / "gsm8k" / "test.jsonl").read_text(encoding="utf-8").splitlines()
    answers = [json.loads(line)["answer"] for line in lines]
    assert len(answers) == 1319
    for name in GRADERS.keys() - {"math_boxed"}:  # these answers have no box
        assert all(GRADERS[name](answer, answer).correct for answer in answers), name
