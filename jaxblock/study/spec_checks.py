"""Checks that a study can be run and reported before any of it is computed."""

from __future__ import annotations

import dataclasses
import itertools

from jaxblock.config.yaml import config_from_tree
from jaxblock.errors import UserError
from jaxblock.models.architecture import Architecture
from jaxblock.models.config import ModelConfig
from jaxblock.study.experiments import RELATION, Experiment, check_experiment, check_name
from jaxblock.study.gradients.sizes import GRADIENTS
from jaxblock.study.hypotheses import MOST_PRIMARY
from jaxblock.study.spec import SCORED_BY, Study, merged, tokenizer_of

_OF_THE_START = {"init_from"} | vars(ModelConfig()).keys() & {one.name for one in dataclasses.fields(Architecture)} - {
    "alignment"
}
"""The fields of the section `model` that have no effect in an arm that starts from another one, whose network it takes."""


def check_study(study: Study, where: str, has_sizes: bool) -> None:
    """Checks a study as its file describes it.

    Args:
        study: the study.
        where: the file, for messages.
        has_sizes: whether the file has the section ``gradients``.

    Raises:
        UserError: a name is unknown, something would have no effect or cannot be run, or a report of it could not be made.
    """
    _check_names(study, where)
    _check_starts(study, where)
    _check_own_seeds(study, where)
    _check_scores(study, where)
    _check_differences(study, where)
    _check_tasks_of_decodings(study, where)
    _check_gradients(study, where, has_sizes)


def _check_names(study: Study, where: str) -> None:
    """Raises UserError where a name is unknown, arms start from each other in a circle, or an experiment cannot be run."""

    for name, arm in study.arms.items():
        check_name(arm.task, study.tasks, where, f"arms.{name}.task")
        seen = [name]
        while (start := study.arms[seen[-1]].start) is not None:
            check_name(start, study.arms, where, f"arms.{seen[-1]}.start")
            if start in seen:
                raise UserError(f"{where}: arms start from each other in a circle: {' <- '.join([*seen, start])}")
            seen.append(start)
        if arm.start is not None and study.arms[arm.start].steps is None:
            raise UserError(f"{where}: arms.{arm.start}.steps is missing: {name} starts where this arm ends")
    for name, decoding in study.decodings.items():
        if decoding.task is not None:
            check_name(decoding.task, study.tasks, where, f"decodings.{name}.task")
    for task in study.tasks:
        other = tokenizer_of(study, task)
        if other is not None:
            check_name(other, study.tasks, where, f"tasks.{task}.data.tokenizer")
            if study.tasks[other].get("data", {}).get("tokenizer", "train") != "train":
                raise UserError(
                    f"{where}: tasks.{task}.data.tokenizer names task {other}, which trains none: name one that does"
                )
    used = {arm.task for arm in study.arms.values()} | {decoding.task for decoding in study.decodings.values()}
    for task in study.tasks.keys() - used:
        raise UserError(
            f"{where}: no arm is trained or scored on task {task}: leave it out, or name it as the task of an arm"
        )
    of_arms = {name: arm.task for name, arm in study.arms.items()}
    of_decodings = {name: decoding.task for name, decoding in study.decodings.items()}
    for name, one in study.experiments.items():
        check_experiment(one, f"experiments.{name}", where, of_arms, of_decodings, len(study.seeds))
        if one.kind == RELATION and not study.scoring.nelbo_rows:
            raise UserError(f"{where}: experiments.{name} needs the NELBO: set scoring.nelbo_rows to 1 or more")
    scored = {
        (of, way)
        for one in study.experiments.values()
        if one.kind != RELATION
        for of in one.arms
        for way in one.decodings
    }
    for name, one in study.experiments.items():
        for of in one.arms if one.kind == RELATION else ():
            if (of, one.decodings[0]) not in scored:
                raise UserError(
                    f"{where}: experiments.{name} has arm {of}, which no other experiment scores by {one.decodings[0]}: leave it out"
                )


def _check_starts(study: Study, where: str) -> None:
    """Raises UserError where an arm that starts from another one, or its task, sets what the network of that one decides."""
    for name, arm in study.arms.items():
        if arm.start is None:
            continue
        of_start = study.settings(arm.start).get("model", {})
        for place, sections, same in (
            (f"tasks.{arm.task}", study.tasks[arm.task], of_start),
            (f"arms.{name}", arm.sections, {}),
        ):
            for field, value in sections.get("model", {}).items():
                if field in _OF_THE_START and (field not in same or same[field] != value):
                    raise UserError(
                        f"{where}: {place} sets model.{field}, but arms.{name} starts from {arm.start}, whose network it takes: leave "
                        f"it out, or set it for arms.{arm.start}"
                    )


def _check_scores(study: Study, where: str) -> None:
    """Raises UserError where the scores would not do for intervals, or a study has more hypotheses than a report tests."""
    if study.scoring.problems < 2:
        raise UserError(
            f"{where}: scoring.problems is {study.scoring.problems}: intervals for new problems need 2 or more"
        )
    if study.scoring.nelbo_rows < 0:
        raise UserError(
            f"{where}: scoring.nelbo_rows is {study.scoring.nelbo_rows}: it must be 1 or more, or 0 for no NELBO"
        )
    asked = [name for name, one in study.experiments.items() if one.primary]
    if len(asked) > MOST_PRIMARY:
        raise UserError(
            f"{where}: {len(asked)} experiments are primary ({', '.join(asked)}), but a study tests {MOST_PRIMARY} hypotheses at most: "
            "leave out primary where an interval will do"
        )


def _check_differences(study: Study, where: str) -> None:
    """Raises UserError where an experiment compares what is the same, or a grid's decodings do not belong to its arms."""
    for name, one in study.experiments.items():
        place = f"{where}: experiments.{name}"
        for arm, other in itertools.combinations(one.arms, 2):
            mine, theirs = study.arms[arm], study.arms[other]
            alike = dataclasses.replace(mine, sections={}) == dataclasses.replace(theirs, sections={})
            if alike and study.config(arm) == study.config(other):
                raise UserError(
                    f"{place} compares {arm} and {other}, whose settings are the same: give one of them others, or leave it out"
                )
        for way, other in itertools.combinations(one.decodings, 2):
            alike = study.decodings[way].task == study.decodings[other].task
            if alike and all(study.config(arm, way) == study.config(arm, other) for arm in one.arms):
                raise UserError(
                    f"{place} decodes by {way} and {other}, whose settings are the same: give one of them others, or leave it out"
                )
        if one.kind == "grid":
            _check_grid(study, one, place)


def _check_tasks_of_decodings(study: Study, where: str) -> None:
    """Raises UserError where an arm is scored on another task, for which the file has other settings than the arm's own task has."""
    for one in study.experiments.values():
        for arm, way in itertools.product(one.arms, one.decodings):
            decoding, mine = study.decodings[way], study.arms[arm]
            task = study.tasks[decoding.task or mine.task]
            theirs = {section: task[section] for section in SCORED_BY if section in task}
            wanted = config_from_tree(merged(study.settings(arm), theirs, mine.sections, decoding.sections), where)
            used = study.config(arm, way)
            for section, field in ((name, field) for name, fields in theirs.items() for field in fields):
                value, there = (getattr(getattr(config, section), field) for config in (used, wanted))
                if value != there:
                    raise UserError(
                        f"{where}: decodings.{way} scores {arm} on task {decoding.task}, which sets {section}.{field} to {there}, but by "
                        f"the settings of {arm}'s own task, where it is {value}: set decodings.{way}.{section}.{field}"
                    )


def _check_grid(study: Study, one: Experiment, place: str) -> None:
    """Raises UserError where the decoding at an arm's place is not by the blocks that the arm was trained with, for every arm."""
    trained: dict[int, str] = {}
    for arm, way in zip(one.arms, one.decodings, strict=True):
        config = study.config(arm)
        block = config.canvas.response_len if config.method.objective == "classical" else config.canvas.block
        if block in trained:
            raise UserError(
                f"{place} is a grid of block sizes, but {trained[block]} and {arm} are both trained with blocks of {block}: leave one out"
            )
        trained[block] = arm
        for other in one.arms:
            decoded = study.config(other, way).canvas.block
            if decoded != block:
                raise UserError(
                    f"{place} is a grid, so {way} must decode every arm by the blocks of {block} that {arm}, at the same place of arms, is "
                    f"trained with, but decodes {other} by {decoded}: change the order, or set decodings.{way}.canvas.block to {block}"
                )


def _check_own_seeds(study: Study, where: str) -> None:
    """Raises UserError where what has one seed is compared with, or starts from, what has those of the study."""
    for name, arm in study.arms.items():
        if arm.seed is not None and arm.start is not None and study.arms[arm.start].seed is None:
            raise UserError(
                f"{where}: arms.{name}.seed is {arm.seed}, so arms.{arm.start}, from which it starts, needs a seed too"
            )
    for name, one in study.experiments.items():
        own = {arm: study.arms[arm].seed for arm in one.arms if study.arms[arm].seed is not None}
        alone = len(own) == len(one.arms) and len(set(own.values())) == 1
        if own and (not alone or one.seeds is not None or one.kind == RELATION):
            raise UserError(
                f"{where}: experiments.{name} has arms with a seed of their own ({', '.join(own)}): give these an experiment of "
                "their own, without seeds"
            )


def _check_gradients(study: Study, where: str, has_sizes: bool) -> None:
    """Raises UserError where gradients cannot be measured, or what belongs to their measurement has no effect."""
    measured = {name: one for name, one in study.experiments.items() if one.kind == GRADIENTS}
    if GRADIENTS in study.decodings:
        raise UserError(f"{where}: decodings.{GRADIENTS} has the name of a kind of experiment: give it another")
    if has_sizes and not measured:
        raise UserError(f"{where}: gradients has no effect, since no experiment is of the kind gradients: leave it out")
    for one in measured.values():
        for arm in one.arms:
            study.gradients.check(study.config(arm), f"{where}: arms.{arm}", where)
