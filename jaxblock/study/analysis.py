"""Turns the results of a study's cells into what its experiments ask: means, paired differences, crossovers and findings."""

from __future__ import annotations

import itertools
from collections import Counter
from dataclasses import dataclass, field

import numpy as np

from jaxblock.errors import UserError
from jaxblock.study.cells import Plan, Point, cell_name, ways_to_score
from jaxblock.study.contrasts import Contrast, Curve, compare
from jaxblock.study.experiments import RELATION, Experiment
from jaxblock.study.gradients.sizes import GRADIENTS
from jaxblock.study.hypotheses import Finding, primary_findings
from jaxblock.study.pace import PaceRatio, pace_ratios
from jaxblock.study.relation import Relation, relate, scores_to_relate
from jaxblock.study.results import Result
from jaxblock.study.scores import made_by, solved
from jaxblock.study.spec import Study


@dataclass(frozen=True)
class Analysis:
    """Holds what an experiment found.

    Attributes:
        name: the experiment's name.
        experiment: the experiment.
        budgets: the budgets, in steps of the reference arm.
        seeds: the seeds whose cells are all done.
        planned: the number of seeds that the experiment has when it is finished.
        curves: what each arm scored by each way of decoding, by (arm, decoding).
        contrasts: the differences (``contrasts.compare``) of a curve or a grid; empty with fewer than two seeds.
        measured: the measurements of gradients of each seed, by (arm, steps); empty in other experiments.
        paces: the comparisons with the control of an experiment about pace; empty with fewer than two seeds.
        relation: how the NELBO and Pass@1 are related; None in other experiments.
        versions: how many cells were trained, or scored for this experiment, by each version (``scores.made_by``).
    """

    name: str
    experiment: Experiment
    budgets: tuple[int, ...]
    seeds: tuple[int, ...]
    planned: int
    curves: dict[tuple[str, str], Curve]
    contrasts: list[Contrast]
    measured: dict[tuple[str, int], list[Result]] = field(default_factory=dict)
    paces: list[PaceRatio] = field(default_factory=list)
    relation: Relation | None = None
    versions: Counter[str] = field(default_factory=Counter)

    @property
    def complete(self) -> bool:
        """Tells whether all seeds of the experiment are there."""
        return len(self.seeds) == self.planned

    @property
    def has_losses(self) -> bool:
        """Tells whether the training loss is known of all that is shown."""
        return bool(self.curves) and all(np.isfinite(curve.loss).all() for curve in self.curves.values())


def analyse(study: Study, plan: Plan, results: dict[str, Result]) -> list[Analysis]:
    """Analyses every experiment with the seeds for which all of its scores are there."""
    return [_analysed(name, one, study, plan, results) for name, one in study.experiments.items()]


def primary(analyses: list[Analysis]) -> dict[str, Finding]:
    """Tests the primary hypotheses that have all their seeds, with a correction for the number of all of them in the study.

    The hypothesis of a curve is about the last budget and the first arm, that of a grid about its one contrast. One of which
    seeds are missing is not tested: a study that is looked at again and again would claim too much.
    """
    asked = [one for one in analyses if one.experiment.primary]
    tested = {one.name: one.contrasts[0].difference[-1] for one in asked if one.complete and one.contrasts}
    return primary_findings(tested, untested=len(asked) - len(tested)) if tested else {}


def _analysed(name: str, one: Experiment, study: Study, plan: Plan, results: dict[str, Result]) -> Analysis:
    """Gathers the scores of an experiment and compares them."""
    if one.kind == RELATION:
        relation = relate(one, plan, results, study.seeds)
        made = _versions(one, relation.seeds, None, results)
        planned = len(scores_to_relate(one, plan, study.seeds))
        return Analysis(name, one, (), relation.seeds, planned, {}, [], relation=relation, versions=made)
    steps = plan.steps[name]
    seeds = tuple(
        seed
        for seed in study.seeds_of(one)
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
    contrasts, paces = [], []
    if len(seeds) > 1 and one.kind in ("curve", "grid"):
        contrasts = compare(one, curves, len({study.decodings[way].task for way in one.decodings}) == 1)
    if len(seeds) > 1 and one.kind == "pace":
        paces = pace_ratios(one, curves)
    made = _versions(one, seeds, steps, results)
    planned = len(study.seeds_of(one))
    return Analysis(name, one, one.budgets, seeds, planned, curves, contrasts, measured, paces, versions=made)


def _versions(
    one: Experiment, seeds: tuple[int, ...], steps: dict[str, tuple[int, ...]] | None, results: dict[str, Result]
) -> Counter[str]:
    """Counts the cells of an experiment by the versions that trained and scored them; a cell of two versions counts for both."""
    counts: Counter[str] = Counter()
    for arm, seed in itertools.product(one.arms, seeds):
        result = results[cell_name(arm, seed)]
        points = (
            result["scores"]
            if steps is None
            else [Point(*at) for at in itertools.product(steps[arm], ways_to_score(one))]
        )
        counts.update(made_by(result, map(str, points)))
    return counts


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
    unknown = (float("nan"), 1.0)
    return Curve(
        arm,
        decoding,
        steps,
        np.array([[solved(score) for score in row] for row in found], np.float64),
        np.array([[score.get("nelbo_per_token", nan)["mean"] for score in row] for row in found]),
        np.array([[score["nfe"] for score in row] for row in found]),
        np.array([[score["tokens_per_forward"] for score in row] for row in found]),
        np.array([[np.divide(*score.get("loss", unknown)) for score in row] for row in found]),
    )
