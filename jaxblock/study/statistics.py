"""Defines intervals of a study's estimates, and computes those over seeds alone; crossed.py has those over problems too."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from jaxtyping import Float
from scipy import special

from jaxblock.errors import UserError
from jaxblock.evaluation.statistics import mean_se


class Interval(NamedTuple):
    """Holds an estimate and its confidence interval.

    Attributes:
        estimate: the estimate, in the unit of the scores.
        low: the lower end of the interval.
        high: the upper end of the interval.
        confidence: the share of such intervals that hold the true value.
    """

    estimate: float
    low: float
    high: float
    confidence: float


def t_interval(by_seed: Float[np.ndarray, " S"], confidence: float = 0.95) -> Interval:
    """Computes Student's interval of the mean over seeds; it speaks of new seeds on these same problems.

    Args:
        by_seed: one number for each seed, such as its mean difference over the problems.
        confidence: the coverage of the interval, in (0, 1).

    Raises:
        UserError: there are fewer than two seeds, or a number is not finite.
    """
    check_differences(by_seed, ("seeds",))
    mean, se, n = mean_se(by_seed)
    half = float(special.stdtrit(n - 1, tails(confidence)[1])) * se
    return Interval(mean, mean - half, mean + half, confidence)


def ratio_interval(
    ours: Float[np.ndarray, " S"], theirs: Float[np.ndarray, " S2"], confidence: float = 0.95
) -> Interval:
    """Computes the mean ratio of two positive quantities paired by seed, such as gradient variances, and its interval.

    It is Student's interval of the log ratio, taken back by the exponential, so that swapping the arms inverts it.

    Args:
        ours: the numerator for each seed.
        theirs: the denominator for each of the same seeds.
        confidence: the coverage of the interval, in (0, 1).

    Returns:
        The geometric mean of the ratios and its interval.

    Raises:
        UserError: the numbers of seeds differ or are less than two, or a quantity is not positive and finite.
    """
    if ours.shape != theirs.shape:
        raise UserError(f"a ratio paired by seed needs the same seeds in both arms, got {ours.size} and {theirs.size}")
    if not (np.all(ours > 0) and np.all(theirs > 0)):
        raise UserError("a ratio needs positive quantities; for others compare their difference")
    log = t_interval(np.log(ours) - np.log(theirs), confidence)
    mean, low, high = np.exp(log[:3]).tolist()
    return Interval(mean, low, high, confidence)


def tails(confidence: float) -> tuple[float, float]:
    """Returns the two quantiles between which a two-sided interval lies, such as 0.025 and 0.975.

    Raises:
        UserError: ``confidence`` is not between 0 and 1.
    """
    if not 0 < confidence < 1:
        raise UserError(f"confidence must be between 0 and 1, such as 0.95, got {confidence}")
    return (1 - confidence) / 2, (1 + confidence) / 2


def check_differences(differences: np.ndarray, axes: tuple[str, ...]) -> None:
    """Checks that differences suffice for an interval.

    Args:
        differences: the differences.
        axes: the names of the last axes, over which the interval is, such as ``seeds``.

    Raises:
        UserError: one of these axes has fewer than two places, or a difference is not finite.
    """
    for name, size in zip(axes, differences.shape[-len(axes) :], strict=True):
        if size < 2:
            raise UserError(f"an interval needs two {name} or more, got {size}: train or score more")
    if not np.isfinite(differences).all():
        raise UserError("a difference is NaN or infinite: score the cell again, or leave its seed out of every arm")
