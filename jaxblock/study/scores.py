"""Holds the scores of an arm (one way of training) and pairs them with another arm's by seed and problem."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Shaped

from jaxblock.errors import UserError, shown


@dataclass(frozen=True)
class Scores:
    """Holds what an arm scored with each training seed on each problem.

    Attributes:
        arm: the name of the arm, for messages.
        values: the scores: True and False (or 1 and 0) for right and wrong, or numbers such as the NELBO in nats. The last two
            axes are seeds and problems; axes before them, such as budgets, are the caller's.
        seeds: the seeds of the axis before the last, each once.
        problems: the problems of the last axis, each once.
    """

    arm: str
    values: Shaped[np.ndarray, "*grid S P"]
    seeds: tuple[Hashable, ...]
    problems: tuple[Hashable, ...]

    def __post_init__(self) -> None:
        """Raises UserError where the shape does not fit, a seed or problem is listed twice, or a score is not finite."""
        sizes = (len(self.seeds), len(self.problems))
        if self.values.shape[-2:] != sizes:
            raise UserError(
                f"{self.arm}: scores of shape {self.values.shape} do not fit {sizes[0]} seeds and {sizes[1]} problems: "
                "the last two axes must be seeds and problems"
            )
        for name, listed in (("seed", self.seeds), ("problem", self.problems)):
            twice = next((one for one in listed if listed.count(one) > 1), None)
            if twice is not None:
                raise UserError(f"{self.arm}: {name} {shown(twice)} is listed twice: give each {name} one place")
        if self.values.dtype.kind not in "biuf":
            raise UserError(f"{self.arm}: scores must be numbers or True and False, got {self.values.dtype}")
        bad = np.argwhere(~np.isfinite(self.values))
        if len(bad):
            *grid, s, p = bad[0]
            where = f" at {tuple(map(int, grid))} of the axes before them" if grid else ""
            raise UserError(
                f"{self.arm}: the score of seed {shown(self.seeds[s])} on problem {shown(self.problems[p])}{where} is "
                f"{self.values[tuple(bad[0])]} (and {len(bad) - 1:,} more are not finite): score the cell again, or leave its "
                "seed out of every arm"
            )


def paired_difference(ours: Scores, theirs: Scores) -> Float[np.ndarray, "*grid S P"]:
    """Subtracts the scores of another arm, seed by seed and problem by problem.

    Args:
        ours: the arm whose advantage is positive (for a score of which more is better).
        theirs: the arm to subtract, with the same seeds and problems in any order.

    Returns:
        ``ours - theirs``, in the order of ``ours``.

    Raises:
        UserError: one arm has a seed or problem that the other has not, or they have other axes before these.
    """
    order = [
        _places(name, (ours.arm, here), (theirs.arm, there))
        for name, here, there in (
            ("seed", ours.seeds, theirs.seeds),
            ("problem", ours.problems, theirs.problems),
        )
    ]
    if ours.values.shape[:-2] != theirs.values.shape[:-2]:
        raise UserError(
            f"{ours.arm} and {theirs.arm} cannot be paired: before seeds and problems their scores have the axes "
            f"{ours.values.shape[:-2]} and {theirs.values.shape[:-2]}; score both at the same budgets"
        )
    return ours.values.astype(np.float64) - theirs.values[..., order[0], :][..., order[1]].astype(np.float64)


def _places(name: str, ours: tuple[str, Sequence[Hashable]], theirs: tuple[str, Sequence[Hashable]]) -> list[int]:
    """Returns where each of our seeds (or problems) stands in the other arm."""
    for (arm, here), (other, there) in ((ours, theirs), (theirs, ours)):
        lacking = [one for one in here if one not in set(there)]
        if lacking:
            raise UserError(
                f"{other} has no scores for {name} {shown(lacking[0])} (of {len(lacking):,} such), which {arm} has: a paired "
                f"comparison needs the same {name}s in both arms"
            )
    place = {one: at for at, one in enumerate(theirs[1])}
    return [place[one] for one in ours[1]]
