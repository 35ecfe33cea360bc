"""Finds the budget at which one arm overtakes another, with an interval and the chance that there is no such budget."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple, get_args

import numpy as np
from jaxtyping import Float, Int

from jaxblock.errors import UserError
from jaxblock.study.crossed import crossed_draws
from jaxblock.study.statistics import tails

Course = Literal["always ahead", "always behind", "overtakes", "is overtaken", "equal"]
"""How a mean difference runs along the budgets; the last sign change decides between overtaking and being overtaken."""
COURSES: tuple[Course, ...] = get_args(Course)


class Crossover(NamedTuple):
    """Holds the last sign change of the mean difference of two arms along their budgets.

    Attributes:
        course: what the mean difference does.
        budget: from which budget on the arm that is ahead at the end stays ahead: the last sign change; 0 where the arm is always
            ahead, and infinity where it is always behind (or equal).
        low: the lower end of the interval of ``budget``; 0 means below the smallest budget.
        high: its upper end; infinity means beyond the largest budget.
        confidence: the coverage of the interval.
        shares: the share of the draws that take each course.
    """

    course: Course
    budget: float
    low: float
    high: float
    confidence: float
    shares: dict[Course, float]

    def text(self, unit: str) -> str:
        """Says what the mean difference does along the budgets, from which one on it stays, and how many draws agree.

        Such as ``overtakes at 1,190 steps (95% interval: below the range to 2,400); draws: always behind 12%, overtakes 88%``.

        Args:
            unit: the unit of the budgets.
        """
        budget, low, high = map(_budget, self[1:4])
        where = f" at {budget} {unit}" if self.course in ("overtakes", "is overtaken") else ""
        draws = ", ".join(f"{course} {share:.0%}" for course, share in self.shares.items() if round(share, 2))
        return f"{self.course}{where} ({self.confidence:.0%} interval: {low} to {high}); draws: {draws}"


def _budget(end: float) -> str:
    """Formats a budget of a crossover, or the end of its interval."""
    if end == 0:
        return "below the range"
    if np.isinf(end):
        return "beyond the range"
    return f"{end:,.0f}" if end >= 100 else f"{end:.1f}"


def crossover(
    budgets: Sequence[int | float],
    differences: Float[np.ndarray, "b S P"],
    confidence: float = 0.95,
    resamples: int = 10_000,
    seed: int = 0,
) -> Crossover:
    """Finds the last sign change of the mean difference along the budgets.

    Between two budgets the mean difference is taken to be linear in the logarithm of the budget. A difference of exactly 0 has no
    sign: between a negative and a positive one, the sign changes where the zeros end. The interval takes draws that are ahead from
    the smallest budget on as below it, and draws that are not ahead at the largest as beyond it, so that it says what is not known.
    Where the arm is overtaken, the same is said of the other arm.

    Args:
        budgets: two budgets or more, positive and rising.
        differences: the paired differences at each budget.
        confidence: the coverage of the interval, in (0, 1).
        resamples: the number of draws; a draw takes the same seeds and problems at all budgets.
        seed: the seed of the draws.

    Raises:
        UserError: the budgets are not so, or not as many as the differences; there are fewer than two seeds or problems; a difference
            is not finite.
    """
    x = np.asarray(budgets, np.float64)
    if x.ndim != 1 or x.size < 2 or not (np.isfinite(x).all() and x[0] > 0 and np.all(np.diff(x) > 0)):
        raise UserError(f"a crossover needs two budgets or more, positive and rising, got {list(budgets)}")
    if len(differences) != x.size:
        raise UserError(
            f"{x.size} budgets but differences at {len(differences)}: give one [seeds, problems] for each budget"
        )
    draws = crossed_draws(differences, resamples, seed)
    courses, changes = last_changes(np.log(x), np.vstack([differences.mean((-2, -1)), draws.T]))
    leads, trails = (COURSES.index(course) for course in ("always ahead", "always behind"))
    rises, falls = (COURSES.index(course) for course in ("overtakes", "is overtaken"))
    if courses[0] == falls:
        leads, rises = trails, falls
    below, within = courses == leads, courses == rises
    found = np.where(within, np.exp(changes), np.where(below, 0.0, np.inf))
    ordered, (lower, upper) = np.sort(found[1:]), tails(confidence)
    shares = np.bincount(courses[1:], minlength=len(COURSES)) / resamples
    return Crossover(
        COURSES[courses[0]],
        float(found[0]),
        float(ordered[int(np.floor(lower * (resamples - 1)))]),
        float(ordered[int(np.ceil(upper * (resamples - 1)))]),
        confidence,
        dict(zip(COURSES, shares.tolist(), strict=True)),
    )


def last_changes(
    at: Float[np.ndarray, " b"], curves: Float[np.ndarray, "n b"]
) -> tuple[Int[np.ndarray, " n"], Float[np.ndarray, " n"]]:
    """Finds the last sign change of each of several curves.

    Args:
        at: where the curves are known, rising; between these places they are linear.
        curves: the values of each curve there.

    Returns:
        The place of each curve's course in `COURSES`, and where its sign changes for the last time (NaN where it does not).
    """
    places, rows = np.arange(at.size), np.arange(len(curves))
    last = np.where(curves != 0, places, 0).max(-1)
    final = np.sign(curves[rows, last])
    ours = curves * final[:, None]  # positive at the end
    before = np.where(ours < 0, places, -1).max(-1)
    after = np.argmax((ours > 0) & (places > before[:, None]), -1)
    left = np.maximum(after - 1, 0)  # negative, or the last of the zeros between
    low, high = ours[rows, left], ours[rows, after]
    share = np.divide(-low, high - low, out=np.zeros_like(low), where=high > low)
    changed = (before >= 0) & (final != 0)
    where = np.where(changed, at[left] + share * (at[after] - at[left]), np.nan)
    course = np.select([final == 0, final > 0], [COURSES.index("equal"), 2 * changed], 1 + 2 * changed)
    return course, where
