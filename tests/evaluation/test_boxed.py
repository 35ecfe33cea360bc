r"""Tests answers in ``\boxed{}``: which one is extracted, and which spellings are the same answer."""

from __future__ import annotations

import pytest

from jaxblock.evaluation import boxed
from jaxblock.evaluation.graders import GRADERS

SAME = [
    [r"\frac{1}{2}", r"\dfrac12", r"\tfrac{1}2", "1/2", "0.5", "0.50", ".5", r"$\frac 12$", "x = 1/2", "1/2."],
    ["1234", "1,234", r"1{,}234", r"\$1234", "1234.00", r"1234\text{ dollars}", r"1234~\mbox{cm}"],
    [r"\left(1,2\right)", "(1, 2)", r"(1,\,2)"],
    ["90", r"90^\circ", r"90^{\circ}", r"90\%", "90%"],
    ["Tuesday", r"\text{Tuesday}", r"\textbf{Tuesday}"],
    [r"2\sqrt{3}", r"2\sqrt3", r"2 \sqrt{3}"],
    ["-3", "- 3", "-3.0"],
    [r"\frac{x+1}{2}", r"\frac{x + 1}2"],
]


@pytest.mark.parametrize("group", SAME)
def test_one_answer_has_one_spelling(group: list[str]) -> None:
    assert len({boxed.normalise_latex(text) for text in group}) == 1
    assert boxed.normalise_latex(boxed.normalise_latex(group[0])) == boxed.normalise_latex(group[0])


def test_different_answers_stay_different() -> None:
    found = [boxed.normalise_latex(group[0]) for group in SAME]
    found += [
        boxed.normalise_latex(text)
        for text in ("1,2", "12", "(1,23)", "0.05", "x+1", "1+x", r"\leftarrow", "10", "-1/2")
    ]
    assert len(set(found)) == len(found)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (r"so $\boxed{1}$, no: $\boxed{\frac{1}{2}}$.", r"\frac{1}{2}"),
        (r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
        (r"\fbox{7}", "7"),
        (r"$\boxed 7$", "7"),
        (r"\boxed{}", ""),
        (r"\boxed{1} and cut \boxed{\frac{1}{", None),
        ("The answer is: 5\nThe answer is 7", "7"),
        (r"The answer is 3, or \boxed{4}", "4"),
        ("no answer", None),
    ],
)
def test_which_answer_is_read(text: str, expected: str | None) -> None:
    assert boxed.extract_answer(text) == expected


def test_graded_against_a_solution_and_against_a_bare_answer() -> None:
    grade = GRADERS["math_boxed"]
    solution = r"We have $x = \frac{6}{4}$, so the answer is $\boxed{\frac{3}{2}}$."
    assert grade(r"Then \boxed{\dfrac32}", solution) == (True, r"\dfrac32", r"\frac{3}{2}")
    assert grade("The answer is: 3/2", "3/2").correct
    assert not grade("3/2", solution).correct  # not said to be the answer
    assert not grade("", solution).correct and grade("", solution).extracted is None
    assert not grade(r"\boxed{}", r"\boxed{1}").correct
