"""Estimates squared lengths, inner products and variances of mean gradients without bias, with jackknife standard errors.

The squared length of a sample's mean gradient is too large by the noise of the sample: E|mean|^2 = |E g|^2 + tr Cov / N. So every
inner product here is of two independent gradients: a mean over pairs of different examples, or over repetitions of one example.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from jaxblock.evaluation.statistics import Estimate


class Moment(NamedTuple):
    """Holds an estimate that is an average over independent examples, and what it is without each of them.

    Attributes:
        value: the estimate.
        without: the estimate from all examples but one, for each example: [examples].
    """

    value: float
    without: Float[np.ndarray, " N"]


def mean_of(values: Float[np.ndarray, " N"]) -> Moment:
    """Averages a number over the examples."""
    values = np.asarray(values, np.float64)
    total, n = values.sum(), len(values)
    return Moment(float(total / n), (total - values) / max(n - 1, 1))


def product_of_means(ours: Float[np.ndarray, "N P"], theirs: Float[np.ndarray, "N P"]) -> Moment:
    """Estimates the inner product of two expected gradients by the mean over all pairs of different examples.

    Args:
        ours: a gradient of each example.
        theirs: another gradient of the same examples; the squared length of the expected gradient where it is the same array.

    Returns:
        The estimate; NaN with fewer than two examples (three for what it is without one of them).
    """
    n = len(ours)
    own = np.einsum("np,np->n", ours, theirs, dtype=np.float64)
    total, other = ours.sum(0, dtype=np.float64), theirs.sum(0, dtype=np.float64)
    ours_with_all = ours @ other.astype(theirs.dtype)
    theirs_with_all = theirs @ total.astype(ours.dtype)
    pairs = total @ other - own.sum()
    without = pairs - ours_with_all - theirs_with_all + 2 * own
    with np.errstate(divide="ignore", invalid="ignore"):
        return Moment(
            float(np.divide(pairs, n * (n - 1))), np.asarray(np.divide(without, (n - 1) * (n - 2)), np.float64)
        )


def variance_of(gradients: Float[np.ndarray, "N P"]) -> Moment:
    """Estimates tr Cov of one gradient: the mean squared length less the squared length of the expected one."""
    lengths = mean_of(np.einsum("np,np->n", gradients, gradients, dtype=np.float64))
    expected = product_of_means(gradients, gradients)
    return Moment(lengths.value - expected.value, lengths.without - expected.without)


def estimate(of: Callable[..., np.ndarray | float], *moments: Moment) -> Estimate:
    """Computes a function of several moments of the same examples, with its jackknife standard error over the examples.

    Args:
        of: the function, such as a ratio; it takes the moments' values, or all their values without an example at once.
        moments: the moments.

    Returns:
        The estimate; its standard error is NaN where the function is not finite without some example.
    """
    with np.errstate(divide="ignore", invalid="ignore"):
        value = float(of(*(np.float64(moment.value) for moment in moments)))
        without = np.asarray(of(*(moment.without for moment in moments)))
    n = len(moments[0].without)
    return Estimate(value, float(np.sqrt((n - 1) / n * np.square(without - without.mean()).sum())), n)
