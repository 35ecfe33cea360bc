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

SURE = 0.95
"""The share of the draws that must agree before it is said which arm is ahead at the end, or which course the difference takes."""
_ENDS = np.array([1, -1, 1, -1, 0])
"""The sign of the difference at the end of each course."""


class Crossover(NamedTuple):
    """Holds the last sign change of the mean difference of two arms along their budgets.

    Attributes:
        course: what the mean difference does; said only where enough draws agree (``text``).
        budget: from which budget on the arm that is ahead at the end stays ahead: the last sign change; 0 where the arm is always
            ahead, and infinity where it is always behind (or equal).
        low: the lower end of the interval of ``budget``; 0 means below the smallest budget. Where the draws do not agree which arm
            is ahead at the end, it is the interval of the last sign change, whichever its direction; draws without one count as
            below the budgets here, and as beyond them in ``high``.
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

        Such as ``overtakes at 1,190 steps (95% interval: 870 to 2,400); draws: always behind 2%, overtakes 98% (no crossover: 2%)``.
        Where fewer draws than `SURE` take the course, only which arm is ahead at the end is said; and where they do not agree about
        that either, that it cannot be told.

        Args:
            unit: the unit of the budgets.
        """
        budget, low, high = map(_budget, self[1:4])
        draws = ", ".join(f"{course} {share:.0%}" for course, share in self.shares.items() if round(share, 2))
        draws += f" (no crossover: {self.none:.0%})"
        if self.shares[self.course] >= SURE:
            where = f" at {budget} {unit}" if self.course in ("overtakes", "is overtaken") else ""
            return f"{self.course}{where} ({self.confidence:.0%} interval: {low} to {high}); draws: {draws}"
        says = {1: "ahead after {}", -1: "behind after {}", 0: "which of the two is ahead after {} cannot be told"}
        after = says[self.ahead].format("the last sign change")
        return f"{after} ({self.confidence:.0%} interval in {unit}: {low} to {high}); draws: {draws}"

    @property
    def none(self) -> float:
        """The share of the draws in which the difference has no sign change."""
        return sum(share for course, share in self.shares.items() if course not in ("overtakes", "is overtaken"))

    @property
    def ahead(self) -> int:
        """Returns 1 where enough draws have the arm ahead at the end, -1 where they have the other one, and else 0."""
        return _agreed(np.array([self.shares[course] for course in COURSES]))


def _agreed(shares: Float[np.ndarray, " 5"]) -> int:
    """Returns the sign of the difference at the end in which enough draws agree; 0 where too few do."""
    return next((sign for sign in (1, -1) if shares[sign == _ENDS].sum() >= SURE), 0)


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
    Where the arm is overtaken, or behind at the end without a course that enough draws agree on, the same is said of the other arm.
    Where they do not agree which of the two is ahead at the end, the interval is that of the last sign change (``Crossover.low``).

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
    leads, trails, rises, falls = (COURSES.index(course) for course in COURSES[:4])
    shares = np.bincount(courses[1:], minlength=len(COURSES)) / resamples
    sure, ahead = shares[courses[0]] >= SURE, _agreed(shares)
    if courses[0] == falls or (not sure and ahead < 0):
        leads, rises = trails, falls
    within = np.isin(courses, (rises, falls) if not sure and not ahead else rises)
    # What is said of draws without a sign change, at the lower and at the upper end of the interval.
    without = np.where(courses == leads, 0.0, np.inf)
    least, most = (0.0, np.inf) if not sure and not ahead else (without, without)
    lows, highs = (np.sort(np.where(within, np.exp(changes), end)[1:]) for end in (least, most))
    lower, upper = tails(confidence)
    return Crossover(
        COURSES[courses[0]],
        float(np.where(within, np.exp(changes), without)[0]),
        float(lows[int(np.floor(lower * (resamples - 1)))]),
        float(highs[int(np.ceil(upper * (resamples - 1)))]),
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
