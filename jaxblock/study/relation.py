"""Relates the NELBO to Pass@1: do the scores of a study have the same order by both?"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float

from jaxblock.study.cells import Cell, Plan, Point
from jaxblock.study.experiments import Experiment
from jaxblock.study.results import Result
from jaxblock.study.scores import solved
from jaxblock.study.statistics import Interval, t_interval

ALL, SAME, OTHER, LAST = (
    "all pairs",
    "same arm, other steps",
    "different arms",
    "different arms, longest training of each",
)
PAIRS = (ALL, SAME, OTHER, LAST)
"""The sets of pairs of scores whose order is compared, always within a seed."""


class Scored(NamedTuple):
    """Holds a score of a cell: its arm, its seed, after how many steps, the NELBO per text token in nats, and Pass@1."""

    arm: str
    seed: int
    steps: int
    nelbo: float
    rate: float


@dataclass(frozen=True)
class Relation:
    """Holds how well the order by NELBO agrees with that by Pass@1.

    Attributes:
        scores: the scores.
        pairs: the number of pairs of scores in each set of pairs, over all seeds.
        agreement: Kendall's tau-b of each set, a number for each seed; NaN for a set in which one of the two never differs.
    """

    scores: list[Scored]
    pairs: dict[str, int]
    agreement: dict[str, Float[np.ndarray, " S"]]

    @property
    def seeds(self) -> tuple[int, ...]:
        """The seeds of the scores."""
        return tuple(dict.fromkeys(score.seed for score in self.scores))

    def over_seeds(self, kind: str) -> Interval | None:
        """Returns the mean agreement over seeds with Student's interval; None with fewer than two seeds, or one without pairs."""
        found = self.agreement[kind]
        return t_interval(found) if found.size > 1 and np.isfinite(found).all() else None


def relate(one: Experiment, plan: Plan, results: Mapping[str, Result], seeds: tuple[int, ...]) -> Relation:
    """Relates the scores of an experiment's arms by its way of decoding, whichever experiment needs them.

    Args:
        one: the experiment.
        plan: what the study computes.
        results: the results of its cells.
        seeds: the seeds of the study. Those of which a score is missing are left out.
    """
    by_seed: dict[int, list[Scored]] = {}
    for seed, points in scores_to_relate(one, plan, seeds).items():
        if all(str(point) in results.get(cell.name, {"scores": {}})["scores"] for cell, point in points):
            by_seed[seed] = [_scored(cell.arm, seed, point, results[cell.name]) for cell, point in points]
    chosen = {seed: _pairs(scores) for seed, scores in by_seed.items()}
    return Relation(
        list(itertools.chain(*by_seed.values())),
        {kind: sum(int(pairs[kind].sum()) for pairs in chosen.values()) for kind in PAIRS},
        {
            kind: np.array(
                [
                    agreement([-one.nelbo for one in scores], [one.rate for one in scores], chosen[seed][kind])
                    for seed, scores in by_seed.items()
                ]
            )
            for kind in PAIRS
        },
    )


def scores_to_relate(one: Experiment, plan: Plan, seeds: tuple[int, ...]) -> dict[int, list[tuple[Cell, Point]]]:
    """Returns the scores that other experiments need of an experiment's arms, for each seed that all of the arms have."""
    [way] = one.decodings
    found: dict[int, list[tuple[Cell, Point]]] = {}
    for seed in seeds:
        cells = [cell for cell in plan.cells if cell.seed == seed and cell.arm in one.arms]
        points = [(cell, point) for cell in cells for point in cell.points if point.decoding == way]
        if {cell.arm for cell, _ in points} == set(one.arms):
            found[seed] = points
    return found


def _scored(arm: str, seed: int, point: Point, result: Result) -> Scored:
    score = result["scores"][str(point)]
    return Scored(arm, seed, point.steps, score["nelbo_per_token"]["mean"], float(solved(score).mean()))


def _pairs(scores: list[Scored]) -> dict[str, Bool[np.ndarray, "n n"]]:
    """Returns which pairs (i < j) of a seed's scores are in each set."""
    arms, steps = np.array([one.arm for one in scores]), np.array([one.steps for one in scores])
    last = steps == [max(other.steps for other in scores if other.arm == one.arm) for one in scores]
    every = np.triu(np.ones((len(scores), len(scores)), bool), 1)
    same = arms[:, None] == arms
    return {ALL: every, SAME: every & same, OTHER: every & ~same, LAST: every & ~same & last[:, None] & last}


def agreement(ours: list[float], theirs: list[float], pairs: Bool[np.ndarray, "n n"]) -> float:
    """Computes Kendall's tau-b over chosen pairs: 1 where both have the same order in every pair, -1 where they never do.

    With C pairs of the same and D of the opposite order, it is (C - D) / sqrt(p q), where p and q are the numbers of pairs that
    differ in the one and in the other.

    Args:
        ours: one number for each score.
        theirs: another number for each score.
        pairs: the pairs that are counted.

    Returns:
        The agreement; NaN where no pair differs in one of the two.
    """
    first, second = (np.sign(np.subtract.outer(x, x))[pairs] for x in (ours, theirs))
    differ = np.sqrt(float(np.count_nonzero(first)) * np.count_nonzero(second))
    return float((first * second).sum() / differ) if differ else float("nan")


def relation_table(relation: Relation) -> tuple[list[str], list[list[str]]]:
    """Returns the table of the agreement in each set of pairs."""
    rows = []
    for kind in PAIRS:
        found, interval = relation.agreement[kind], relation.over_seeds(kind)
        mean = f"{found.mean():+.2f}" if np.isfinite(found).all() else "no pair differs"
        ends = "" if interval is None else f" [{interval.low:+.2f}, {interval.high:+.2f}]"
        rows.append([kind, f"{relation.pairs[kind]:,}", mean + ends])
    return ["pairs of scores, within a seed", "pairs", "Kendall's tau of -NELBO and Pass@1, mean of seeds"], rows
