"""Compares two evaluations of the same problems with McNemar's paired test."""

from __future__ import annotations

from collections import Counter
from typing import NamedTuple

from jaxblock.errors import UserError
from jaxblock.evaluation.problems import read_problems
from jaxblock.evaluation.statistics import mcnemar_p
from jaxblock.io.paths import PathLike


class McNemar(NamedTuple):
    """Holds a paired comparison of two runs, A and B, on the same problems.

    Attributes:
        grader: the name of the grader of both runs.
        n: the number of problems.
        both: the number of problems that both runs solved.
        only_a: the number of problems that only A solved.
        only_b: the number of problems that only B solved.
        neither: the number of problems that neither run solved.
        p_value: the exact two-sided p-value of "A and B are equally likely to win a problem on which they differ".
    """

    grader: str
    n: int
    both: int
    only_a: int
    only_b: int
    neither: int
    p_value: float

    def __str__(self) -> str:
        """Formats the comparison like ``A 50.0%, B 62.5% of 8 problems; only A 1, only B 2; McNemar exact p = 1 (gsm8k_strict)``."""
        a, b = (self.both + self.only_a) / self.n, (self.both + self.only_b) / self.n
        return (
            f"A {a:.1%}, B {b:.1%} of {self.n} problems; only A {self.only_a}, only B {self.only_b}; "
            f"McNemar exact p = {self.p_value:.3g} ({self.grader})"
        )


def compare_evaluations(path_a: PathLike, path_b: PathLike) -> McNemar:
    """Compares two per-problem files with McNemar's paired test.

    Args:
        path_a: the per-problem JSONL of run A (the earlier one).
        path_b: the per-problem JSONL of run B.

    Returns:
        The counts and the p-value.

    Raises:
        UserError: a file cannot be read, or the two do not hold the same problems under the same grader; the message
            names the first mismatch.
    """
    a, b = read_problems(path_a), read_problems(path_b)
    for here, there, other in ((a, b, path_b), (b, a, path_a)):
        for index, problem in here.items():
            if index not in there:
                raise UserError(
                    f"{problem.where}: problem {index} is not in {other}; a paired test needs the same problems in "
                    "both: evaluate both runs with the same evaluate.split and evaluate.problems"
                )
    for index, left in a.items():
        right = b[index]
        if left.graded_by != right.graded_by:
            raise UserError(
                f"problem {index}: graded by {left.graded_by} at {left.where} but by {right.graded_by} at {right.where}; "
                "evaluate both with the same evaluate.grader, in the same version"
            )
        if None not in (left.prompt, right.prompt) and left.prompt != right.prompt:
            raise UserError(
                f"problem {index}: {left.where} and {right.where} ask different questions; were the two runs "
                "evaluated on differently prepared data?"
            )
        if None not in (left.reference, right.reference) and left.reference != right.reference:
            raise UserError(
                f"problem {index}: {left.where} and {right.where} have different right answers; were the two runs "
                "evaluated on differently prepared data?"
            )
    pairs = Counter((left.correct, b[index].correct) for index, left in a.items())
    only_a, only_b = pairs[True, False], pairs[False, True]
    grader = next(iter(a.values())).grader
    p_value = mcnemar_p(only_a, only_b)
    return McNemar(grader, len(a), pairs[True, True], only_a, only_b, pairs[False, False], p_value)
