"""Computes the intervals, standard errors and the paired test that an evaluation reports."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import NormalDist
from typing import NamedTuple

import numpy as np

Numbers = Sequence[int | float] | np.ndarray


class Proportion(NamedTuple):
    """Holds a share of successes and its confidence interval.

    Attributes:
        correct: the number of successes.
        n: the number of trials.
        low: the lower end of the interval, in [0, 1].
        high: the upper end of the interval, in [0, 1].
    """

    correct: int
    n: int
    low: float
    high: float

    @property
    def rate(self) -> float:
        """Returns ``correct / n``; NaN without trials."""
        return self.correct / self.n if self.n else math.nan

    def __str__(self) -> str:
        """Formats the share like ``62.5% (160/256, 95% interval 56.4% to 68.2%)``."""
        if not self.n:
            return "none scored"
        return f"{self.rate:.1%} ({self.correct}/{self.n}, 95% interval {self.low:.1%} to {self.high:.1%})"


class Estimate(NamedTuple):
    """Holds a mean and its standard error.

    Attributes:
        mean: the estimate of the mean.
        se: the standard error of the mean; NaN with fewer than two observations.
        n: the number of observations.
    """

    mean: float
    se: float
    n: int

    def __str__(self) -> str:
        """Formats the estimate like ``1.234 ± 0.056``."""
        return f"{self.mean:.4g}" if math.isnan(self.se) else f"{self.mean:.4g} ± {self.se:.2g}"


def wilson(correct: int, n: int, confidence: float = 0.95) -> Proportion:
    """Computes Wilson's score interval of a proportion.

    Args:
        correct: the number of successes.
        n: the number of trials.
        confidence: the coverage of the interval, in (0, 1).

    Returns:
        The share and its interval; without trials the interval is [0, 1].

    Raises:
        ValueError: ``correct`` is not in 0..n.
    """
    if not 0 <= correct <= n:
        raise ValueError(f"{correct} correct of {n}")
    if n == 0:
        return Proportion(0, 0, 0.0, 1.0)
    z = NormalDist().inv_cdf((1 + confidence) / 2)  # not scipy's: training would wait for its import, 0.8 s
    centre, half = correct + z * z / 2, z * math.sqrt(correct * (n - correct) / n + z * z / 4)
    low = (centre - half) / (n + z * z) if correct > 0 else 0.0
    high = (centre + half) / (n + z * z) if correct < n else 1.0
    return Proportion(correct, n, low, high)


def mean_se(values: Numbers) -> Estimate:
    """Computes the mean of independent observations and its standard error.

    The standard error is the sample deviation (divided by n - 1) over the square root of n.

    Args:
        values: the observations, shape [n].

    Returns:
        The estimate; its mean is NaN without observations.
    """
    x = np.asarray(values, np.float64)
    mean = float(x.mean()) if x.size else math.nan
    se = float(x.std(ddof=1) / math.sqrt(x.size)) if x.size > 1 else math.nan
    return Estimate(mean, se, x.size)


def ratio_se(totals: Numbers, weights: Numbers) -> Estimate:
    """Computes a ratio of sums, such as the NELBO per text token of rows of unequal length, and its standard error.

    The standard error is computed by the delta method. With r = Σy / Σw the linearised residual of a row is y - r w, so
    se² = n/(n-1) Σ(y - r w)² / (Σw)². Rows are the observations: Monte Carlo noise within a row is part of its residual and
    must not be added again.

    Args:
        totals: y, the total of each row, as in its NELBO in nats; shape [n].
        weights: w, the weight of each row, as in its number of text tokens; shape [n].

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
    """Computes the exact two-sided McNemar p-value, a fair-coin binomial test on the discordant pairs.

    Args:
        only_a: the number of pairs that only A got right.
        only_b: the number of pairs that only B got right.

    Returns:
        The p-value; 1 without discordant pairs.
    """
    from scipy import stats  # type: ignore[import-untyped,unused-ignore]  # imported here because it takes 0.8 s

    discordant = only_a + only_b
    return float(stats.binomtest(only_a, discordant).pvalue) if discordant else 1.0
