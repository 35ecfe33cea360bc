"""Reads the file that describes a study: tasks, arms, ways of decoding, and the experiments that compare them."""

from __future__ import annotations

import dataclasses
import itertools
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from jaxblock.config.config import Config
from jaxblock.config.yaml import build_from_tree, config_from_tree, read_tree
from jaxblock.errors import UserError, shown
from jaxblock.io.paths import PathLike
from jaxblock.models.architecture import Architecture
from jaxblock.models.config import ModelConfig
from jaxblock.study.experiments import RELATION, Experiment, check_experiment, check_name, experiment_from_tree, nearest
from jaxblock.study.gradients.sizes import GRADIENTS, GradientSizes
from jaxblock.study.hypotheses import MOST_PRIMARY

Tree = dict[str, Any]
"""Sections of settings as nested plain values, as they stand in a YAML file."""


@dataclass(frozen=True)
class Arm:
    """Describes a way of training.

    Attributes:
        task: the name of the task that it is trained on.
        start: the arm from whose last checkpoint of the same seed it starts; None for the start that its settings name.
        steps: the length of a run from which other arms start; None where none does.
        seed: the only seed that it is trained with, whatever the seeds of the study; None for all of these. So all seeds of
            other arms may start from one and the same checkpoint.
        sections: its own settings, which replace those of the study and of the task.
    """

    task: str
    start: str | None
    steps: int | None
    seed: int | None
    sections: Tree


@dataclass(frozen=True)
class Decoding:
    """Describes a way of scoring a checkpoint.

    Attributes:
        task: the task whose problems are solved; None for the one that the arm was trained on.
        sections: settings of the sections `canvas`, `decode` and `evaluate`, which replace those of the arm.
    """

    task: str | None
    sections: Tree


@dataclass(frozen=True)
class Scoring:
    """Says what the checkpoints are scored on.

    Attributes:
        split: the split whose problems are solved and whose NELBO is estimated; `validation` while settings are chosen.
        problems: the number of problems, from the first one on.
        nelbo_rows: the number of records of the NELBO, from the first one on; 0 for no NELBO.
    """

    split: Literal["validation", "test"] = "test"
    problems: int = 256
    nelbo_rows: int = 128


@dataclass(frozen=True)
class Study:
    """Holds a study as its file describes it.

    Attributes:
        title: one line for the report.
        seeds: the seeds; each is a whole repetition, from random weights (or the given start) on.
        common: settings of all runs.
        tasks: settings of the data and the canvas of each task. `data.tokenizer` may be `task:NAME`, the tokenizer that is
            trained on the text of another task.
        arms: the ways of training.
        decodings: the ways of decoding.
        experiments: the comparisons, in the order of the report; what an earlier one needs is computed first.
        scoring: what the checkpoints are scored on.
        gradients: how much is drawn where gradients are measured.
    """

    title: str
    seeds: tuple[int, ...]
    common: Tree
    tasks: dict[str, Tree]
    arms: dict[str, Arm]
    decodings: dict[str, Decoding]
    experiments: dict[str, Experiment]
    scoring: Scoring
    gradients: GradientSizes

    def seed_of(self, arm: str, seed: int) -> int:
        """Returns the seed with which an arm is trained for a seed of the study."""
        own = self.arms[arm].seed
        return seed if own is None else own

    def seeds_of(self, experiment: Experiment) -> tuple[int, ...]:
        """Returns the seeds of an experiment: its own number of the study's, or the only one of its arms."""
        own = self.arms[experiment.arms[0]].seed
        return self.seeds[: experiment.seeds] if own is None else (own,)

    def settings(self, arm: str) -> Tree:
        """Returns the sections of an arm's runs: the study's, replaced by the task's, replaced by the arm's own."""
        one = self.arms[arm]
        return merged(self.common, self.tasks[one.task], one.sections)

    def config(self, arm: str, decoding: str | None = None) -> Config:
        """Returns the settings of an arm's runs, as they are scored by a way of decoding where one is given."""
        tree = merged(self.settings(arm), self.decodings[decoding].sections if decoding else {})
        return config_from_tree(tree, f"arm {arm}" + (f", decoding {decoding}" if decoding else ""))


_KEYS = ("title", "seeds", "common", "tasks", "arms", "decodings", "experiments", "scoring", "gradients")
_SCORED_BY = ("canvas", "decode", "evaluate")
_LEAVE_OUT = (
    *(f"train.{field}" for field in ("out", "seed", "steps", "keep", "keep_steps", "resume")),
    *(f"train.{field}" for field in ("eval_every", "eval_problems", "eval_nelbo_rows")),
    "data.prepared",
)
_OURS = dict.fromkeys(_LEAVE_OUT, "leave it out") | {
    "evaluate.split": "set scoring.split instead",
    "evaluate.problems": "set scoring.problems instead",
    "evaluate.nelbo": "set scoring.nelbo_rows instead, which is 0 for no NELBO",
    "evaluate.nelbo_rows": "set scoring.nelbo_rows instead",
}
"""The fields that the study sets, and what to write instead."""
_OF_THE_START = {"init_from"} | vars(ModelConfig()).keys() & {one.name for one in dataclasses.fields(Architecture)} - {
    "alignment"
}
"""The fields of the section `model` that have no effect in an arm that starts from another one, whose network it takes."""
_NAME = re.compile(r"\w[\w.+-]{0,99}")
_MOST_SEEDS = 1000


def merged(*trees: Mapping[str, Any]) -> Tree:
    """Returns sections put together; a field of a later tree replaces that of an earlier one."""
    result: Tree = {}
    for tree in trees:
        for section, values in tree.items():
            result[section] = {**result.get(section, {}), **(values or {})}
    return result


def read_study(path: PathLike) -> Study:
    """Reads and checks a study's file.

    Raises:
        UserError: the file cannot be read, a key or a name is unknown, a value has the wrong type, or an experiment cannot be run.
    """
    return study_from_tree(read_tree(path), str(path))


def study_from_tree(tree: Any, where: str) -> Study:
    """Builds a study from nested plain values, and checks it; raises UserError as ``read_study`` does."""
    tree = _mapping(tree, where, "the file", _KEYS)
    missing = [key for key in ("seeds", "tasks", "arms", "experiments") if not tree.get(key)]
    if missing:
        raise UserError(f"{where}: {missing[0]} is missing or empty")
    named = {key: _named(tree.get(key) or {}, where, key) for key in ("tasks", "arms", "decodings", "experiments")}
    study = Study(
        title=str(tree.get("title", where)),
        seeds=_seeds(tree["seeds"], where),
        common=_sections(tree.get("common") or {}, where, "common"),
        tasks={name: _sections(one, where, f"tasks.{name}") for name, one in named["tasks"].items()},
        arms={name: _arm(one, where, f"arms.{name}") for name, one in named["arms"].items()},
        decodings={name: _decoding(one or {}, where, f"decodings.{name}") for name, one in named["decodings"].items()},
        experiments={name: experiment_from_tree(one, where, name) for name, one in named["experiments"].items()},
        scoring=build_from_tree(Scoring, tree.get("scoring") or {}, where, "scoring."),
        gradients=build_from_tree(GradientSizes, tree.get("gradients") or {}, where, "gradients."),
    )
    _check(study, where)
    _check_starts(study, where)
    _check_own_seeds(study, where)
    _check_scores(study, where)
    _check_differences(study, where)
    _check_tasks_of_decodings(study, where)
    _check_gradients(study, where, "gradients" in tree)
    return study


def tokenizer_of(study: Study, task: str) -> str | None:
    """Returns the task whose tokenizer another task uses; None where it has its own."""
    given = study.tasks[task].get("data", {}).get("tokenizer", "")
    return given.removeprefix("task:") if given.startswith("task:") else None


def _mapping(value: Any, where: str, name: str, known: Collection[str] | None = None) -> Tree:
    """Returns a mapping; raises UserError where the value is none, or has a key that is not known."""
    if not isinstance(value, Mapping):
        raise UserError(f"{where}: {name} must be a mapping of keys, not {shown(value)}")
    for key in value:
        if not isinstance(key, str):
            raise UserError(f"{where}: {name} has the key {shown(key)}, which is no text: put it in quotes")
        if known is not None and key not in known:
            raise UserError(f"{where}: {name} has no key {shown(key)}{nearest(key, known)}")
    return dict(value)


def _named(value: Any, where: str, name: str) -> Tree:
    """Returns a mapping whose keys are plain names; raises UserError where one is not, since files are named by them."""
    tree = _mapping(value, where, name)
    for key in tree:
        if not _NAME.fullmatch(key):
            raise UserError(
                f"{where}: {name} has the name {shown(key)}: give it one of letters, digits and _ . + -, such as block_8"
            )
    return tree


def _seeds(value: Any, where: str) -> tuple[int, ...]:
    """Returns the seeds of a study; raises UserError where they are neither a number of seeds nor a list of them."""
    given = range(value) if type(value) is int and value <= _MOST_SEEDS else value
    whole = isinstance(given, range | list | tuple) and all(type(seed) is int and seed >= 0 for seed in given)
    if not whole or not given or len(set(given)) < len(given):
        raise UserError(
            f"{where}: seeds must be a number of seeds, or a list of different whole numbers, not {shown(value)} (at most "
            f"{_MOST_SEEDS:,} seeds)"
        )
    return tuple(given)


def _sections(value: Any, where: str, name: str, known: Collection[str] | None = None) -> Tree:
    """Returns sections of settings whose names and types were checked; raises UserError where they are wrong."""
    tree = _mapping(value, where, name, known or [field.name for field in dataclasses.fields(Config)])
    config_from_tree(tree, f"{where}: {name}")
    for field in (f"{section}.{field}" for section, values in tree.items() for field in values or {}):
        if field in _OURS:
            raise UserError(f"{where}: {name} sets {field}, which the study sets itself: {_OURS[field]}")
    return {section: values or {} for section, values in tree.items()}


def _arm(value: Any, where: str, name: str) -> Arm:
    tree = _mapping(value, where, name)
    if "data" in tree:
        raise UserError(f"{where}: {name} has settings of data: give them to a task, and name that as the arm's task")
    task, start, steps, seed = (tree.pop(key, None) for key in ("task", "start", "steps", "seed"))
    for key, number, least in (("steps", steps, 1), ("seed", seed, 0)):
        if number is not None and (type(number) is not int or number < least):
            raise UserError(f"{where}: {name}.{key} must be a whole number of at least {least}, not {shown(number)}")
    return Arm(str(task), None if start is None else str(start), steps, seed, _sections(tree, where, name))


def _decoding(value: Any, where: str, name: str) -> Decoding:
    tree = _mapping(value, where, name)
    task = tree.pop("task", None)
    return Decoding(None if task is None else str(task), _sections(tree, where, name, _SCORED_BY))


def _check(study: Study, where: str) -> None:
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
            theirs = {section: task[section] for section in _SCORED_BY if section in task}
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
