"""Tests the primary hypotheses of a study, each a mean difference of two arms, with a correction for their number."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
from jaxtyping import Float
from scipy import special

from jaxblock.errors import UserError
from jaxblock.evaluation.statistics import mean_se
from jaxblock.study.crossed import Differences, OnePerPlace, crossed_bootstrap, crossed_variance
from jaxblock.study.statistics import Interval, t_interval

MOST_PRIMARY = 3
"""The number of primary hypotheses that a study may have: every further one costs the others power."""
_MOST_EXACT = 16
"""The number of seeds up to which all 2^S sign flips are enumerated; with more seeds, 2^16 of them are drawn."""


class Finding(NamedTuple):
    """Holds what was found about one primary hypothesis.

    Attributes:
        interval: the mean difference and its interval for new seeds and new problems.
        over_seeds: the interval for new seeds on the same problems (Student's).
        p_sign_flip: the p-value of the sign-flip test over seeds.
        p_student: the p-value of Student's test over seeds, for comparison; nothing follows from it.
        p_crossed: the p-value for new seeds and new problems.
        p: the larger of ``p_sign_flip`` and ``p_crossed``, which is the p-value of the hypothesis.
        p_adjusted: ``p``, corrected for the number of hypotheses (Holm).
        found: whether ``p_adjusted`` is at most the level, so that a difference is claimed.
    """

    interval: Interval
    over_seeds: Interval
    p_sign_flip: float
    p_student: float
    p_crossed: float
    p: float
    p_adjusted: float
    found: bool


def sign_flip_p(by_seed: Float[np.ndarray, "*grid S"]) -> OnePerPlace:
    """Computes the two-sided p-value of "the difference of a seed is as likely to be negative as positive".

    It is the share of all 2^S ways to flip the seeds' signs whose mean is at least as far from 0. It is exact without any assumption
    about the shape of the distribution. Its smallest value is 2 / 2^S: 0.0078 for 8 seeds, but 0.25 for 3. With more than 16
    seeds, 65,536 flips are drawn from a fixed seed, and the observed one is counted with them.

    Args:
        by_seed: the difference of each seed, such as its mean over the problems.
    """
    seeds = by_seed.shape[-1]
    if seeds <= _MOST_EXACT:
        signs = 1.0 - 2.0 * ((np.arange(2**seeds)[:, None] >> np.arange(seeds)) & 1)
    else:
        drawn = np.random.default_rng(0).integers(0, 2, (2**_MOST_EXACT, seeds))
        signs = np.vstack([np.ones(seeds), 1.0 - 2.0 * drawn])
    rounding = 1e-12 * np.abs(by_seed).sum(-1)
    return np.mean(np.abs(by_seed @ signs.T) >= (np.abs(by_seed.sum(-1)) - rounding)[..., None], -1)


def student_p(by_seed: Float[np.ndarray, " S"]) -> float:
    """Computes the two-sided p-value of Student's test of "the mean over new seeds is 0", for the problems at hand.

    Args:
        by_seed: the difference of each seed, such as its mean over the problems.
    """
    mean, se, n = mean_se(by_seed)
    return float(_two_sided(np.float64(mean), np.float64(se), np.float64(n - 1)))


def crossed_p(difference: Differences) -> OnePerPlace:
    """Computes the two-sided p-value of "the mean over new seeds and new problems is 0".

    It is Student's, with the variance and degrees of freedom of `jaxblock.study.crossed.crossed_variance`.

    Args:
        difference: the paired differences, with seeds and problems as the last two axes.
    """
    found = crossed_variance(difference)
    return _two_sided(found.mean, np.sqrt(found.variance), found.df)


def primary_p(difference: Differences) -> OnePerPlace:
    """Computes the p-value of a primary hypothesis: the larger of `sign_flip_p` and `crossed_p`.

    The first needs no normal distribution, but takes the problems as given; the second allows for other problems. A difference is
    claimed where both see it, which happens no more often by chance than either alone.

    Args:
        difference: the paired differences, with seeds and problems as the last two axes.
    """
    return np.maximum(sign_flip_p(difference.mean(-1)), crossed_p(difference))


def holm(p_values: Float[np.ndarray, "*grid k"]) -> Float[np.ndarray, "*grid k"]:
    """Adjusts p-values for their number by Holm's method (1979).

    Claiming what has an adjusted p-value of at most 5% claims any difference that is not there in at most 5% of studies.

    Args:
        p_values: the p-values of one family on the last axis.
    """
    k = p_values.shape[-1]
    order = np.argsort(p_values, -1)
    stepped = np.take_along_axis(p_values, order, -1) * (k - np.arange(k))
    adjusted = np.empty_like(p_values)
    np.put_along_axis(adjusted, order, np.minimum(np.maximum.accumulate(stepped, -1), 1), -1)
    return adjusted


def primary_findings(
    differences: Mapping[str, Float[np.ndarray, "S P"]], level: float = 0.05, untested: int = 0
) -> dict[str, Finding]:
    """Tests all primary hypotheses of a study at once.

    Args:
        differences: for each hypothesis the paired differences, by its name. At most three, with those that are untested.
        level: the chance of claiming any difference that is not there, over all hypotheses together.
        untested: the number of hypotheses whose scores are not all there. They count as if they had a p-value of 1, so that what
            is claimed now is claimed whatever their scores will be.

    Returns:
        What was found, by the names of the hypotheses.

    Raises:
        UserError: there are no hypotheses or more than three; or one has fewer than two seeds or problems, or a difference that is
            not finite.
    """
    number = len(differences) + untested
    if not 1 <= number <= MOST_PRIMARY:
        raise UserError(
            f"a study has one to {MOST_PRIMARY} primary hypotheses, got {number}: each costs the others power; report the "
            "rest with intervals, as exploratory"
        )
    p_values = [float(primary_p(difference)) for difference in differences.values()]
    adjusted = holm(np.array(p_values + [1.0] * untested))[: len(p_values)]
    findings = {}
    for (name, difference), p_adjusted in zip(differences.items(), adjusted.tolist(), strict=True):
        by_seed = difference.mean(-1)
        findings[name] = Finding(
            crossed_bootstrap(difference, 1 - level),
            t_interval(by_seed, 1 - level),
            float(sign_flip_p(by_seed)),
            student_p(by_seed),
            float(crossed_p(difference)),
            float(primary_p(difference)),
            p_adjusted,
            p_adjusted <= level,
        )
    return findings


def _two_sided(mean: OnePerPlace, se: OnePerPlace, df: OnePerPlace) -> OnePerPlace:
    """Returns the two-sided p-value of a t statistic; without any spread it is 0, or 1 where the mean is 0 too."""
    with np.errstate(divide="ignore"):
        t = np.divide(np.abs(mean), se, out=np.zeros_like(mean), where=mean != 0)
    return 2 * special.stdtr(df, -t)
