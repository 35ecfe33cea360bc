"""Compares the scores of arms, and of ways of decoding, seed by seed and problem by problem."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
from jaxtyping import Float

from jaxblock.study.crossed import crossed_bootstrap
from jaxblock.study.crossover import Crossover, crossover
from jaxblock.study.experiments import Experiment
from jaxblock.study.statistics import Interval, t_interval


@dataclass(frozen=True)
class Curve:
    """Holds what an arm scored at each budget, by one way of decoding.

    Attributes:
        arm: the arm.
        decoding: the way of decoding.
        steps: the steps of the arm at each budget.
        solved: the problems solved, 0 or 1: [budgets, seeds, problems].
        nelbo: the NELBO per text token in nats: [budgets, seeds]; NaN where it was not estimated.
        nfe: the forward passes spent on a problem: [budgets, seeds].
        pace: the text tokens committed per forward pass: [budgets, seeds].
        loss: the training loss before the checkpoint in nats per masked token: [budgets, seeds]; NaN where it was not recorded.
    """

    arm: str
    decoding: str
    steps: tuple[int, ...]
    solved: Float[np.ndarray, "b S P"]
    nelbo: Float[np.ndarray, "b S"]
    nfe: Float[np.ndarray, "b S"]
    pace: Float[np.ndarray, "b S"]
    loss: Float[np.ndarray, "b S"]


@dataclass(frozen=True)
class Contrast:
    """Holds the difference between two arms, two ways of decoding, or matching and other block sizes, along the budgets.

    Attributes:
        says: what is subtracted from what.
        difference: the differences, paired by seed and problem: [budgets, seeds, problems].
        crossed: the interval of the mean difference for new seeds and new problems, at each budget.
        over_seeds: the interval for new seeds on the same problems, at each budget.
        crossing: the last sign change along the budgets; None with fewer than two budgets.
        nelbo: the interval of the difference of NELBOs over seeds, at each budget; empty where there is none.
    """

    says: str
    difference: Float[np.ndarray, "b S P"]
    crossed: list[Interval]
    over_seeds: list[Interval]
    crossing: Crossover | None
    nelbo: list[Interval] = field(default_factory=list)


def compare(one: Experiment, curves: Mapping[tuple[str, str], Curve], on_one_task: bool) -> list[Contrast]:
    """Compares what an experiment of the kind `curve` or `grid` is about.

    A grid has one contrast: arms that are decoded with their own block size and those that are not. A curve has those of the other
    arms to the control in each way of decoding, and of the other ways of decoding to the first one for each arm.

    Args:
        one: the experiment.
        curves: what each arm scored by each way of decoding, with two seeds or more.
        on_one_task: whether all ways of decoding solve the same problems, without which they cannot be compared with each other.
    """
    if one.kind == "grid":
        return [_matching(one, curves)]
    *arms, control = one.arms
    first, *others = one.decodings
    contrasts = []
    for way in one.decodings:
        by = f", {way}" if others else ""
        contrasts += [
            _contrast(f"{arm} - {control}{by}", curves[arm, way], curves[control, way], one.budgets) for arm in arms
        ]
    for arm in one.arms if on_one_task else ():
        contrasts += [
            _contrast(f"{way} - {first}, of {arm}", curves[arm, way], curves[arm, first], one.budgets) for way in others
        ]
    return contrasts


def _contrast(says: str, ours: Curve, theirs: Curve, budgets: tuple[int, ...]) -> Contrast:
    difference = ours.solved - theirs.solved
    nelbo = ours.nelbo - theirs.nelbo
    return Contrast(
        says,
        difference,
        [crossed_bootstrap(at) for at in difference],
        [t_interval(at.mean(-1)) for at in difference],
        crossover(budgets, difference) if len(budgets) > 1 else None,
        [] if np.isnan(nelbo).any() else [t_interval(at) for at in nelbo],
    )


def _matching(one: Experiment, curves: Mapping[tuple[str, str], Curve]) -> Contrast:
    """Compares, in each way of decoding, the arm that was trained for it with the mean of the other arms; averaged over decodings.

    So a way of decoding that suits every arm does not count for the diagonal, and neither does an arm that is good everywhere, since
    each arm is once the matching one and otherwise one of the others.
    """
    parts = []
    for arm, decoding in zip(one.arms, one.decodings, strict=True):
        others = [curves[other, decoding].solved for other in one.arms if other != arm]
        parts.append(curves[arm, decoding].solved - np.mean(others, axis=0))
    difference = np.mean(parts, axis=0)
    intervals = [crossed_bootstrap(at) for at in difference]
    return Contrast(
        "matching - other training blocks", difference, intervals, [t_interval(at.mean(-1)) for at in difference], None
    )
