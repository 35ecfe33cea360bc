"""Computes intervals of a mean difference between two arms that were scored on crossed seeds and problems.

Every seed is scored on every problem, so a difference has a seed's part, a problem's part and a rest:
d[s, p] = mean + a[s] + b[p] + e[s, p]. The mean is meant for new seeds and new problems alike. Its variance is estimated as in the
two-way analysis of variance with random effects (docs/study/statistics.md has the coverages that were measured).
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from jaxtyping import Float
from scipy import special

from jaxblock.study.statistics import Interval, check_differences, tails

Differences = Float[np.ndarray, "*grid S P"]
OnePerPlace = Float[np.ndarray | np.float64, "*grid"]
"""One number for each place of the axes before seeds and problems."""
_CHUNK = 1000
"""The number of resamples that are computed at once; it bounds the memory."""


class Variance(NamedTuple):
    """Holds what is known of a mean difference over seeds and problems.

    Attributes:
        mean: the mean difference.
        variance: the estimated variance of the mean over new seeds and new problems.
        df: the degrees of freedom of ``variance``, by Satterthwaite's approximation, at least min(S, P) - 1.
        resampled: the variance that resampled means have about ``mean``, exactly.
    """

    mean: OnePerPlace
    variance: OnePerPlace
    df: OnePerPlace
    resampled: OnePerPlace


def crossed_variance(difference: Differences) -> Variance:
    """Estimates the variance of the mean difference over seeds and problems, both of which are random.

    With the mean squares A of seeds, B of problems and E of the rest, the unbiased estimate is (A + B - E) / (S P). A part that
    comes out negative is counted as zero, so that the estimate is at least that of A, B or E alone. A sum of mean squares has no
    fewer degrees of freedom than the least of them, of which there are S - 1, P - 1 and (S - 1) (P - 1); that E is subtracted
    makes Satterthwaite's approximation fall below it, and is why it is bounded from there.

    Args:
        difference: the paired differences, with seeds and problems as the last two axes.

    Returns:
        The estimates, one for each place of the axes before.

    Raises:
        UserError: there are fewer than two seeds or problems, or a difference is not finite.
    """
    check_differences(difference, ("seeds", "problems"))
    seeds, problems = difference.shape[-2:]
    mean = difference.mean((-2, -1), keepdims=True)
    by_seed, by_problem = difference.mean(-1, keepdims=True) - mean, difference.mean(-2, keepdims=True) - mean
    rest = difference - mean - by_seed - by_problem
    sums = [problems * np.square(by_seed), seeds * np.square(by_problem), np.square(rest)]
    a, b, e = (part.sum((-2, -1)) for part in sums)
    resampled = (a / seeds + b / problems + e / (seeds * problems)) / (seeds * problems)
    freedom = (seeds - 1, problems - 1, (seeds - 1) * (problems - 1))
    a, b, e = (part / df for part, df in zip((a, b, e), freedom, strict=True))
    total = np.maximum.reduce([a + b - e, a, b, e])
    spread = sum(np.square(part) / df for part, df in zip((a, b, e), freedom, strict=True))
    df = np.divide(np.square(total), spread, out=np.zeros_like(total), where=spread > 0)
    return Variance(mean[..., 0, 0], total / (seeds * problems), np.maximum(df, min(seeds, problems) - 1.0), resampled)


def resampled_means(difference: Differences, resamples: int, seed: int) -> Float[np.ndarray, "*grid n"]:
    """Computes the mean differences of resampled seeds crossed with resampled problems.

    Seeds and problems are drawn with replacement, each on their own; a resample is the mean over all pairs of drawn seeds and drawn
    problems. Their quantiles alone are no good interval: `crossed_draws` corrects their spread.

    Args:
        difference: the paired differences. A resample takes the same seeds and problems at all places of the axes before.
        resamples: n, the number of resamples.
        seed: the seed of the draws.
    """
    check_differences(difference, ("seeds", "problems"))
    seeds, problems = difference.shape[-2:]
    rng, chunks = np.random.default_rng(seed), []
    for start in range(0, resamples, _CHUNK):
        size = min(_CHUNK, resamples - start)
        of_seeds = rng.multinomial(seeds, np.full(seeds, 1 / seeds), size) / seeds
        of_problems = rng.multinomial(problems, np.full(problems, 1 / problems), size) / problems
        over_problems = np.tensordot(difference, of_problems, axes=(-1, -1))
        chunks.append(np.einsum("...sn,ns->...n", over_problems, of_seeds))
    return np.concatenate(chunks, -1)


def crossed_draws(difference: Differences, resamples: int, seed: int) -> Float[np.ndarray, "*grid n"]:
    """Draws plausible values of the true mean difference; their quantiles are the ends of confidence intervals.

    The deviations of resampled means from the mean are corrected twice. They are scaled to the estimated variance: few seeds
    resampled vary too little (by (S - 1) / S), and the rest counts three times. And each is divided by the root of a chi-squared
    draw over its degrees of freedom, as Student's t does, since the variance is itself estimated from few seeds.

    Args:
        difference: the paired differences. A draw takes the same seeds and problems at all places of the axes before.
        resamples: n, the number of draws.
        seed: the seed of the draws.
    """
    found = crossed_variance(difference)
    mean, variance, df, resampled = (np.expand_dims(value, -1) for value in found)
    ratio = np.divide(variance, resampled, out=np.ones_like(variance), where=resampled > 0)
    chi_squared = special.chdtri(df, np.random.default_rng((seed, 1)).random(resamples))
    return mean + (resampled_means(difference, resamples, seed) - mean) * np.sqrt(ratio * df / chi_squared)


def crossed_bootstrap(
    difference: Float[np.ndarray, "S P"], confidence: float = 0.95, resamples: int = 10_000, seed: int = 0
) -> Interval:
    """Computes the interval of the mean difference for new seeds and new problems, by resampling both.

    Args:
        difference: the paired differences.
        confidence: the coverage of the interval, in (0, 1).
        resamples: the number of draws.
        seed: the seed of the draws.

    Returns:
        The mean difference and its interval.

    Raises:
        UserError: there are fewer than two seeds or problems, a difference is not finite, or ``confidence`` is out of range.
    """
    low, high = np.quantile(crossed_draws(difference, resamples, seed), tails(confidence))
    return Interval(float(difference.mean()), float(low), float(high), confidence)
