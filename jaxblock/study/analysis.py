"""Turns the results of a study's cells into what its experiments ask: means, paired differences, crossovers and findings."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field

import numpy as np
from jaxtyping import Float

from jaxblock.errors import UserError
from jaxblock.study.cells import Plan, Point, cell_name, ways_to_score
from jaxblock.study.crossed import crossed_bootstrap
from jaxblock.study.crossover import Crossover, crossover
from jaxblock.study.gradients.sizes import GRADIENTS
from jaxblock.study.hypotheses import Finding, primary_findings
from jaxblock.study.results import Result, solved
from jaxblock.study.spec import Experiment, Study
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
    """

    arm: str
    decoding: str
    steps: tuple[int, ...]
    solved: Float[np.ndarray, "b S P"]
    nelbo: Float[np.ndarray, "b S"]
    nfe: Float[np.ndarray, "b S"]


@dataclass(frozen=True)
class Contrast:
    """Holds the difference between two arms, or between matching and other block sizes, along the budgets.

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


@dataclass(frozen=True)
class Analysis:
    """Holds what an experiment found.

    Attributes:
        name: the experiment's name.
        experiment: the experiment.
        budgets: the budgets, in steps of the reference arm.
        seeds: the seeds whose cells are all done.
        curves: what each arm scored by each way of decoding, by (arm, decoding).
        contrasts: the differences of the other arms to the control, or the one contrast of a grid; empty with fewer than two seeds.
        measured: the measurements of gradients of each seed, by (arm, steps); empty in other experiments.
    """

    name: str
    experiment: Experiment
    budgets: tuple[int, ...]
    seeds: tuple[int, ...]
    curves: dict[tuple[str, str], Curve]
    contrasts: list[Contrast]
    measured: dict[tuple[str, int], list[Result]] = field(default_factory=dict)


def analyse(study: Study, plan: Plan, results: dict[str, Result]) -> list[Analysis]:
    """Analyses every experiment with the seeds for which all of its scores are there."""
    return [_analysed(name, one, study, plan, results) for name, one in study.experiments.items()]


def primary(analyses: list[Analysis]) -> dict[str, Finding]:
    """Tests the primary hypotheses that have two seeds or more, with a correction for the number of all of them in the study.

    The hypothesis of a curve is about the last budget and the first arm, that of a grid about its one contrast.
    """
    asked = {one.name: one.contrasts[0].difference[-1] for one in analyses if one.experiment.primary and one.contrasts}
    return primary_findings(asked) if asked else {}


def _analysed(name: str, one: Experiment, study: Study, plan: Plan, results: dict[str, Result]) -> Analysis:
    """Gathers the scores of an experiment and compares them."""
    steps = plan.steps[name]
    seeds = tuple(
        seed
        for seed in study.seeds[: one.seeds]
        if all(
            str(Point(at, decoding)) in results.get(cell_name(arm, seed), {"scores": {}})["scores"]
            for arm in one.arms
            for at in steps[arm]
            for decoding in ways_to_score(one)
        )
    )
    _check_problems(name, one, steps, seeds, results)
    curves = {
        (arm, decoding): _curve(arm, decoding, steps[arm], seeds, results)
        for arm in one.arms
        for decoding in one.decodings
        if seeds
    }
    measured = {
        (arm, at): [results[cell_name(arm, seed)]["scores"][str(Point(at, GRADIENTS))] for seed in seeds]
        for arm in one.arms
        for at in steps[arm]
        if one.kind == GRADIENTS and seeds
    }
    contrasts = []
    if len(seeds) > 1 and len(one.arms) > 1 and one.decodings:
        contrasts = [_matching(one, curves)] if one.kind == "grid" else _against_control(one, curves)
    return Analysis(name, one, one.budgets, seeds, curves, contrasts, measured)


def _check_problems(
    name: str, one: Experiment, steps: dict[str, tuple[int, ...]], seeds: tuple[int, ...], results: dict[str, Result]
) -> None:
    """Raises UserError where cells of an experiment were scored on other numbers of problems, so that they cannot be paired."""
    cells: dict[int, str] = {}
    for arm in one.arms:
        for seed, at, decoding in itertools.product(seeds, steps[arm], one.decodings):
            cell, point = cell_name(arm, seed), str(Point(at, decoding))
            cells.setdefault(results[cell]["scores"][point]["problems"], f"results/{cell}.json, point {point}")
    if len(cells) > 1:
        (few, here), (more, there) = sorted(cells.items())[:2]
        raise UserError(
            f"experiment {name}: {here} has {few} problems but {there} has {more}, and differences are paired by problem: remove "
            "the file that does not belong to this study, and run the study again"
        )


def _curve(
    arm: str, decoding: str, steps: tuple[int, ...], seeds: tuple[int, ...], results: dict[str, Result]
) -> Curve:
    found = [[results[cell_name(arm, seed)]["scores"][str(Point(at, decoding))] for seed in seeds] for at in steps]
    nan = {"mean": float("nan")}
    return Curve(
        arm,
        decoding,
        steps,
        np.array([[solved(score) for score in row] for row in found], np.float64),
        np.array([[score.get("nelbo_per_token", nan)["mean"] for score in row] for row in found]),
        np.array([[score["nfe"] for score in row] for row in found]),
    )


def _against_control(one: Experiment, curves: dict[tuple[str, str], Curve]) -> list[Contrast]:
    """Compares each arm with the control, by the first way of decoding."""
    *arms, control = one.arms
    base = curves[control, one.decodings[0]]
    return [_contrast(f"{arm} - {control}", curves[arm, one.decodings[0]], base, one.budgets) for arm in arms]


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


def _matching(one: Experiment, curves: dict[tuple[str, str], Curve]) -> Contrast:
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
