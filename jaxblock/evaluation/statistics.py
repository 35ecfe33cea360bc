"""Intervals, standard errors and the paired test that go with every number an evaluation reports."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from jaxblock.errors import UserError
from jaxblock.evaluation import problems
from jaxblock.io.paths import PathLike

Numbers = Sequence[int | float] | np.ndarray


class Proportion(NamedTuple):
    """A share of successes with its interval.

    Attributes:
        correct: successes.
        n: trials.
        low: lower end of the interval, in [0, 1].
        high: upper end.
    """

    correct: int
    n: int
    low: float
    high: float

    @property
    def rate(self) -> float:
        """correct / n; NaN without trials."""
        return self.correct / self.n if self.n else math.nan

    def __str__(self) -> str:
        """Reads like ``62.5% (160/256, 95% interval 56.4% to 68.2%)``."""
        if not self.n:
            return "none scored"
        return f"{self.rate:.1%} ({self.correct}/{self.n}, 95% interval {self.low:.1%} to {self.high:.1%})"


class Estimate(NamedTuple):
    """A mean and its standard error.

    Attributes:
        mean: the estimate.
        se: one standard error; NaN with fewer than two observations.
        n: observations.
    """

    mean: float
    se: float
    n: int

    def __str__(self) -> str:
        """Reads like ``1.234 ± 0.056``."""
        return f"{self.mean:.4g}" if math.isnan(self.se) else f"{self.mean:.4g} ± {self.se:.2g}"


class McNemar(NamedTuple):
    """A paired comparison of two runs, A and B, on the same problems.

    Attributes:
        grader: the grader of both.
        n: problems.
        both: right in both.
        only_a: right in A alone.
        only_b: right in B alone.
        neither: right in neither.
        p_value: exact two-sided p-value of "A and B are equally likely to win a problem on which they differ".
    """

    grader: str
    n: int
    both: int
    only_a: int
    only_b: int
    neither: int
    p_value: float

    def __str__(self) -> str:
        """Reads like ``A 50.0%, B 62.5% of 8 problems; only A 1, only B 2; McNemar exact p = 1 (gsm8k_strict)``."""
        a, b = (self.both + self.only_a) / self.n, (self.both + self.only_b) / self.n
        return (
            f"A {a:.1%}, B {b:.1%} of {self.n} problems; only A {self.only_a}, only B {self.only_b}; "
            f"McNemar exact p = {self.p_value:.3g} ({self.grader})"
        )


def wilson(correct: int, n: int, confidence: float = 0.95) -> Proportion:
    """Wilson's score interval of a proportion.

    Args:
        correct: successes.
        n: trials.
        confidence: coverage, in (0, 1).

    Returns:
        The share and its interval; without trials the interval is [0, 1].

    Raises:
        ValueError: ``correct`` is not in 0..n.
    """
    if not 0 <= correct <= n:
        raise ValueError(f"{correct} correct of {n}")
    if n == 0:
        return Proportion(0, 0, 0.0, 1.0)
    interval = _binomial_test(correct, n).proportion_ci(confidence, method="wilson")
    return Proportion(correct, n, float(interval.low), float(interval.high))


def _binomial_test(successes: int, trials: int) -> Any:
    from scipy import stats  # type: ignore[import-untyped,unused-ignore]  # a second and a half: training starts without

    return stats.binomtest(successes, trials)


def mean_se(values: Numbers) -> Estimate:
    """The mean of independent observations and its standard error (sample deviation, n - 1, over root n).

    Args:
        values: observations, shape [n].

    Returns:
        The estimate; the mean is NaN without observations.
    """
    x = np.asarray(values, np.float64)
    mean = float(x.mean()) if x.size else math.nan
    se = float(x.std(ddof=1) / math.sqrt(x.size)) if x.size > 1 else math.nan
    return Estimate(mean, se, x.size)


def ratio_se(totals: Numbers, weights: Numbers) -> Estimate:
    """A ratio of sums with its delta-method standard error: NELBO per text token from rows of unequal length.

    With r = Σy / Σw the linearised residual of a row is y - r w, so se² = n/(n-1) Σ(y - r w)² / (Σw)². Rows are the
    observations: Monte Carlo noise within a row is part of its residual and must not be added again.

    Args:
        totals: y, each row's sum (nats), shape [n].
        weights: w, each row's divisor (text tokens), shape [n].

    Returns:
        The estimate; NaN where the weights sum to 0.

    Raises:
        ValueError: the shapes differ.
    """
    y, w = np.asarray(totals, np.float64), np.asarray(weights, np.float64)
    if y.shape != w.shape or y.ndim != 1:
        raise ValueError(f"totals and weights must be vectors of one length, got {y.shape} and {w.shape}")
    n, weight = y.size, float(w.sum())
    if weight == 0:
        return Estimate(math.nan, math.nan, n)
    ratio = float(y.sum()) / weight
    if n < 2:
        return Estimate(ratio, math.nan, n)
    return Estimate(ratio, math.sqrt(n / (n - 1) * float(np.square(y - ratio * w).sum())) / weight, n)


def mcnemar_p(only_a: int, only_b: int) -> float:
    """The exact two-sided McNemar p-value: a fair-coin binomial test on the discordant pairs.

    Args:
        only_a: pairs that A alone got right.
        only_b: pairs that B alone got right.

    Returns:
        The p-value; 1 without discordant pairs.
    """
    discordant = only_a + only_b
    return float(_binomial_test(only_a, discordant).pvalue) if discordant else 1.0


def compare(path_a: PathLike, path_b: PathLike) -> McNemar:
    """McNemar's paired test from two per-problem files.

    Args:
        path_a: per-problem JSONL of run A (the earlier one).
        path_b: per-problem JSONL of run B.

    Returns:
        The counts and the p-value.

    Raises:
        UserError: a file cannot be read, or the two do not hold the same problems under the same grader; the first
            mismatch is named.
    """
    a, b = problems.read(path_a), problems.read(path_b)
    for here, there, other in ((a, b, path_b), (b, a, path_a)):
        for index, problem in here.items():
            if index not in there:
                raise UserError(
                    f"{problem.where}: problem {index} is not in {other}; a paired test needs the same problems in "
                    "both: evaluate both runs with the same evaluate.split and evaluate.problems"
                )
    for index, left in a.items():
        right = b[index]
        if left.grader != right.grader:
            raise UserError(
                f"problem {index}: graded by {left.grader} at {left.where} but by {right.grader} at {right.where}; "
                "set evaluate.grader to the same grader for both"
            )
        if None not in (left.prompt, right.prompt) and left.prompt != right.prompt:
            raise UserError(
                f"problem {index}: {left.where} and {right.where} ask different questions; were the two runs "
                "evaluated on differently prepared data?"
            )
    return _paired([(left.correct, b[index].correct) for index, left in a.items()], next(iter(a.values())).grader)


def _paired(pairs: Sequence[tuple[bool, bool]], grader: str) -> McNemar:
    both = sum(x and y for x, y in pairs)
    only_a = sum(x and not y for x, y in pairs)
    only_b = sum(y and not x for x, y in pairs)
    neither = len(pairs) - both - only_a - only_b
    return McNemar(grader, len(pairs), both, only_a, only_b, neither, mcnemar_p(only_a, only_b))
