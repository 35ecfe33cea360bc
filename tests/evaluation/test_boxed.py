r"""Tests answers in ``\boxed{}``: which one is extracted, which spellings are the same answer, and which values are equal."""

import json
import threading

import pytest

from benchmarks import grader_pairs
from jaxblock.evaluation import boxed
from jaxblock.evaluation.graders import GRADERS
from jaxblock.evaluation.symbolic import LONGEST, Comparer, Comparison

# Spellings of one answer in each line, divided by two blanks.
SAME = r"""
\frac{1}{2}  \dfrac12  \tfrac{1}2  1/2  0.5  0.50  .5  $\frac 12$  1/2.
1234  1,234  1{,}234  \$1234  1234.00  1234\text{ dollars}  1234~\mbox{cm}  1,234 dollars  1 234  1\,234
\left(1,2\right)  (1, 2)  (1,\,2)
90  90^\circ  90^{\circ}  90\%  90%
Tuesday  \text{Tuesday}  \textbf{Tuesday}
2\sqrt{3}  2\sqrt3  2 \sqrt{3}
-3  - 3  -3.0
\frac{x+1}{2}  \frac{x + 1}2
1 1/2
1 2
"""

# A response's answer, the reference's, whether they are equal as mathematics, and by the text rule of the MATH data set.
ANSWERS = [
    (r"\frac12", "0.5", True, True),
    ("x+1", "1+x", True, False),
    (r"\frac{1}{\sqrt2}", r"\frac{\sqrt{2}}{2}", True, False),
    (r"1.5\times10^3", "1500", True, False),
    (r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}", r"\begin{pmatrix}1\\2\end{pmatrix}", True, True),
    (r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}", r"\begin{pmatrix}2\\1\end{pmatrix}", False, False),
    (r"12 \text{ cm}^2", "12", True, True),
    (r"90^\circ", "90", True, True),
    ("5", "x=5", True, True),
    ("y=5", "x=5", False, True),  # the text rule drops both names
    ("x>5", "5<x", True, False),
    ("x>5", r"x\ge5", False, False),
    (r"x\ge5", r"[5,\infty)", True, False),
    ("2 pi", "2", False, False),
    ("(1,2)", "(2,1)", False, False),
    ("(1,2)", r"\{1,2\}", False, False),
    (r"\{2,1\}", r"\{1,2\}", True, False),
    ("[1,2]", "(1,2)", False, False),
    ("1/2", "12", False, False),
    ("1 1/2", "11/2", False, True),  # the text rule drops blanks
    ("-2", "2", False, False),
    ("0.33", "1/3", False, False),
    ("1234567", "1234568", False, False),
    ("BA", "AB", False, False),
    ("ba", "ab", True, False),  # a product
    (r"\text{tuesday}", "Tuesday", True, False),
    ("Monday", "Tuesday", False, False),
    (r"\varnothing", r"\emptyset", True, False),
    ("", "5", False, False),
    ("", "", False, False),
]


def test_one_answer_has_one_spelling_and_different_answers_stay_different():
    found = []
    for group in SAME.strip().splitlines():
        (spelling,) = {boxed.normalise_latex(text) for text in group.split("  ")}
        assert boxed.normalise_latex(spelling) == spelling
        found.append(spelling)
    others = ("1,2", "12", "(1,23)", "0.05", "x+1", "1+x", r"\leftarrow", "10", "-1/2", "11/2", r"2\mathrm{i}", "2")
    found += [boxed.normalise_latex(text) for text in others]
    assert len(set(found)) == len(found)


def test_which_answer_is_read():
    for text, expected in [
        (r"so $\boxed{1}$, no: $\boxed{\frac{1}{2}}$.", r"\frac{1}{2}"),
        (r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
        (r"\fbox{7}", "7"),
        (r"$\boxed 7$", "7"),
        (r"$\boxed x$", "x"),
        (r"\boxed{5}, as asked: in \boxed form", "5"),
        (r"\boxed{}", ""),
        (r"\boxed{7}, which I put in \boxed{}", "7"),
        ("The answer is $3$ and $4$.", "3 and 4"),
        (r"The answer is $\$5$.", r"\$5"),
        ("answer is" + "\n" * 50_000, None),  # read in bounded time
        (r"\boxed{1} and cut \boxed{\frac{1}{", None),
        ("The answer is: 5\nThe answer is 7", "7"),
        ("The answer is 3.5. I hope it is correct.", "3.5"),
        (r"The final answer is $\frac{1}{2}$. I hope it is correct.", r"\frac{1}{2}"),
        ("**Answer:** \\(x^2\\)", "x^2"),
        (r"The answer is 3, or \boxed{4}", "4"),
        ("no answer", None),
    ]:
        assert boxed.extract_answer(text) == expected, text


@pytest.mark.parametrize(("given", "expected", "equal", "same_text"), ANSWERS)
def test_answers_are_compared_as_mathematics_and_as_text(given, expected, equal, same_text):
    pair = rf"\boxed{{{given}}}", rf"\boxed{{{expected}}}"
    assert GRADERS["math_boxed"](*pair).correct is equal
    assert GRADERS["hendrycks_math"](*pair).correct is same_text


def test_graded_against_a_solution_and_against_a_bare_answer():
    grade = GRADERS["math_boxed"]
    solution = r"We have $x = \frac{6}{4}$, so the answer is $\boxed{\frac{3}{2}}$."
    assert grade(r"Then \boxed{\dfrac32}", solution) == (True, r"\dfrac32", r"\frac{3}{2}", None)
    assert grade("The answer is: 3/2", "3/2").correct
    assert not grade("3/2", solution).correct  # not said to be the answer
    assert not grade("", solution).correct and grade("", solution).extracted is None


def test_answers_that_were_graded_wrong_once(shared):
    cases = [json.loads(line) for line in (shared / "cases" / "grading.jsonl").read_text("utf-8").splitlines()]
    graded = [GRADERS[case["grader"]](case["response"], case["reference"]).correct for case in cases]
    assert len(cases) == 60 and graded == [case["right"] for case in cases]


def test_references_are_right_about_themselves_and_not_about_others(shared):
    gsm8k = [str(shared / "data" / "gsm8k" / "test.jsonl"), "--grader"]
    for grader in ("gsm8k_strict", "gsm8k_flexible"):
        found = grader_pairs.main([*gsm8k, grader, "--others", "4"])
        assert found["references"] == found["right_about_themselves"] == 1319
        assert found["pairs_of_different_answers"] == 351 * 4 and found["right_pairs"] == []
    for grader in ("math_boxed", "hendrycks_math"):
        found = grader_pairs.main([*gsm8k, grader, "--box", "--others", "1"])
        assert found["right_about_themselves"] == 1319 and found["right_pairs"] == []


def test_a_hostile_answer_ends_and_harms_no_later_one():
    comparer = Comparer(seconds=0.5)
    found: list[Comparison] = []

    def compare() -> None:
        """Runs in a thread, where the library's own alarm signals fail."""
        hostile = ["9^{9^{9^9}}", "{" * 100_000, r"\frac{" * 50]
        found.extend(comparer.compare(text, "5") for text in hostile)
        comparer.seconds = 60.0
        found.append(comparer.compare("2+3", "5"))

    thread = threading.Thread(target=compare)
    thread.start()
    thread.join()
    slow, long, nested, later = found
    assert slow == (False, "not compared within 0.5 s")
    assert long == (False, f"longer than {LONGEST} characters") and not nested.equal
    assert later == (True, None)
    assert comparer._worker is not None
    comparer._worker.kill()  # as a system does that runs out of memory
    assert comparer.compare("2+3", "5").undecided and comparer.compare("2+3", "5").equal
    comparer.close()
    grade = GRADERS["math_boxed"](rf"\boxed{{{'1+' * LONGEST}1}}", r"\boxed{5}")
    assert not grade.correct and grade.undecided is not None and "longer" in grade.undecided
