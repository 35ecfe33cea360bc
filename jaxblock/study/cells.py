"""Lays a study out in cells: one training run each, with the points at which it is scored."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from jaxblock.config.checks import check_config
from jaxblock.config.config import Config
from jaxblock.config.yaml import config_from_tree, to_tree
from jaxblock.errors import UserError
from jaxblock.models.architecture import Architecture
from jaxblock.settings import Section
from jaxblock.study.amounts import equal_steps, per_step
from jaxblock.study.experiments import RELATION, Experiment
from jaxblock.study.gradients.sizes import GRADIENTS
from jaxblock.study.spec import Study, Tree, merged, tokenizer_of


class Point(NamedTuple):
    """Names a score of a cell: after how many steps, and by which way of decoding; ``gradients`` are measured instead."""

    steps: int
    decoding: str

    def __str__(self) -> str:
        """Returns the point's name in results, such as ``400/block_8``."""
        return f"{self.steps}/{self.decoding}"


@dataclass(frozen=True)
class Cell:
    """Describes one training run of a study and its scores.

    Attributes:
        arm: the arm.
        seed: the seed.
        steps: the length of the run.
        points: the scores that the experiments need, sorted.
        start: the name of the cell that this one starts from; None where it starts by itself.
    """

    arm: str
    seed: int
    steps: int
    points: tuple[Point, ...]
    start: str | None

    @property
    def name(self) -> str:
        """Returns the cell's name, which is also that of its files."""
        return cell_name(self.arm, self.seed)


def cell_name(arm: str, seed: int) -> str:
    """Returns the name of the cell of an arm and a seed."""
    return f"{arm}-s{seed}"


class Plan(NamedTuple):
    """Lists what a study computes.

    Attributes:
        cells: the cells: seed after seed, each after the one that it starts from.
        steps: the steps of each arm at each budget, by experiment and arm; without those that relate the scores of others.
    """

    cells: list[Cell]
    steps: dict[str, dict[str, tuple[int, ...]]]

    def cell(self, name: str) -> Cell:
        """Returns the cell of a name.

        Raises:
            UserError: there is none.
        """
        found = next((cell for cell in self.cells if cell.name == name), None)
        if found is None:
            raise UserError(
                f"the study has no cell {name}; its cells are {', '.join(cell.name for cell in self.cells)}"
            )
        return found


ArchitectureOf = Callable[[str], Architecture | None]
"""Returns the architecture of an arm's network."""


def lay_out(study: Study, architecture_of: ArchitectureOf) -> Plan:
    """Lists the cells of a study: seed after seed, so that an interrupted study holds whole repetitions.

    Args:
        study: the study.
        architecture_of: returns the architecture of an arm's network, for the FLOPs of a step.

    Raises:
        UserError: a budget cannot be counted, is less than a step of an arm or as many steps as another one, or is longer than the
            run from which other arms start.
    """
    steps = {
        name: {arm: arm_steps(study, name, arm, architecture_of) for arm in one.arms}
        for name, one in study.experiments.items()
        if one.kind != RELATION
    }
    _check_lengths(study, steps)
    needed: dict[tuple[str, int], set[Point]] = {}
    for name, of_arms in steps.items():
        one = study.experiments[name]
        for arm, seed in itertools.product(of_arms, study.seeds_of(one)):
            points = needed.setdefault((arm, seed), set())
            points.update(Point(at, way) for at in of_arms[arm] for way in ways_to_score(one))
    cells: dict[str, Cell] = {}

    def add(arm: str, of_study: int) -> str:
        """Adds the cell of an arm and a seed of the study, after the one that it starts from; returns its name."""
        seed = study.seed_of(arm, of_study)
        name = cell_name(arm, seed)
        if name not in cells:
            mine = study.arms[arm]
            start = None if mine.start is None else add(mine.start, seed)
            points = tuple(sorted(needed.get((arm, seed), ())))
            length = max([mine.steps or 1, *(point.steps for point in points)])
            cells[name] = Cell(arm, seed, length, points, start)
        return name

    for seed in dict.fromkeys((*study.seeds, *(its_seed for _, its_seed in needed))):
        for arm, its_seed in needed:
            if its_seed == seed:
                add(arm, seed)
    return Plan(list(cells.values()), steps)


def check_budgets(study: Study) -> None:
    """Checks the budgets that can be counted without the sizes of a network, which may be known only when the data are prepared.

    Raises:
        UserError: as ``lay_out``.
    """
    for name, one in study.experiments.items():
        if one.kind != RELATION and one.unit != "flops":
            for arm in one.arms:
                arm_steps(study, name, arm, lambda arm: None)


def ways_to_score(one: Experiment) -> tuple[str, ...]:
    """Returns the names of the ways in which an experiment scores each checkpoint: its decodings, or ``gradients``."""
    return (GRADIENTS,) if one.kind == GRADIENTS else one.decodings


def arm_steps(study: Study, experiment: str, arm: str, architecture_of: ArchitectureOf) -> tuple[int, ...]:
    """Returns the steps of an arm at which it has had as much as the reference arm has at each budget of an experiment.

    Raises:
        UserError: a budget cannot be counted, is less than a step, or is as many steps as another one.
    """
    one = study.experiments[experiment]
    reference = one.reference or one.arms[0]
    try:
        of = per_step(study.config(reference), architecture_of(reference), one.unit)
        mine = per_step(study.config(arm), architecture_of(arm), one.unit)
        steps = tuple(equal_steps(budget, of, mine) for budget in one.budgets)
        for (low, first), (high, second) in itertools.pairwise(zip(one.budgets, steps, strict=True)):
            if first == second:
                raise UserError(
                    f"the budgets {low:,} and {high:,} are both {first:,} steps of this arm: leave one of them out"
                )
    except UserError as error:
        raise UserError(f"experiments.{experiment}.budgets, arm {arm}: {error}") from error
    return steps


def _check_lengths(study: Study, steps: dict[str, dict[str, tuple[int, ...]]]) -> None:
    """Raises UserError where an arm is scored beyond the length at which others start, since these begin at its last checkpoint."""
    followed = {arm.start for arm in study.arms.values()}
    for name, of_arms in steps.items():
        for arm in of_arms.keys() & followed:
            most, length = of_arms[arm][-1], study.arms[arm].steps
            if length is not None and most > length:
                raise UserError(
                    f"experiments.{name} scores {arm} after {most:,} steps, but other arms start from it after {length:,}, at its last "
                    f"checkpoint: lower the budgets, raise arms.{arm}.steps, or give a longer run an arm of its own"
                )


def run_config(study: Study, cell: Cell, folder: str) -> Config:
    """Returns the checked settings of a cell's training run.

    Args:
        study: the study.
        cell: the cell.
        folder: the study's folder, which holds `prepared/` and `runs/`.
    """
    config = study.config(cell.arm)
    data = data_config(study, study.arms[cell.arm].task, folder).data
    kept = tuple(sorted({point.steps for point in cell.points}))
    train = replace(
        config.train,
        out=f"{folder}/runs/{cell.name}",
        seed=cell.seed,
        steps=cell.steps,
        keep_steps=kept,
        save_every=min(config.train.save_every, cell.steps),
        keep=1,
        eval_every=0,
        eval_problems=0,
        eval_nelbo_rows=0,
        resume="restart",
    )
    model = config.model if cell.start is None else replace(config.model, init_from=f"{folder}/runs/{cell.start}")
    return check_config(replace(config, data=data, train=train, model=model))


def scored_config(study: Study, arm: str, decoding: str, folder: str) -> Config:
    """Returns the checked settings by which the checkpoints of an arm are scored by a way of decoding.

    Args:
        study: the study.
        arm: the arm.
        decoding: the way of decoding.
        folder: the study's folder, which holds `prepared/`.
    """
    config, scoring = study.config(arm, decoding), study.scoring
    evaluate = replace(
        config.evaluate,
        split=scoring.split,
        problems=scoring.problems,
        nelbo=scoring.nelbo_rows > 0,
        nelbo_rows=scoring.nelbo_rows or None,
    )
    data = data_config(study, study.decodings[decoding].task or study.arms[arm].task, folder).data
    return check_config(replace(config, data=data, evaluate=evaluate), ("data", "canvas", "decode", "evaluate"))


def data_config(study: Study, task: str, folder: str) -> Config:
    """Returns the settings of a task with the places of its prepared data, and of its tokenizer where another task trains that."""
    config = config_from_tree(merged(study.common, study.tasks[task]), f"task {task}")
    data = replace(config.data, prepared=f"{folder}/prepared/{task}-{_how_prepared(study, task)}")
    other = tokenizer_of(study, task)
    if other is not None:
        place = f"{folder}/prepared/{other}-{_how_prepared(study, other)}"
        data = replace(data, tokenizer=f"{place}/tokenizer/tokenizer.model")
    return replace(config, data=data)


def _how_prepared(study: Study, task: str) -> str:
    """Returns a hash of the settings that decide what is prepared for a task, those of its tokenizer included."""
    config = config_from_tree(merged(study.common, study.tasks[task]), f"task {task}")
    other = tokenizer_of(study, task)
    tokenizer = None if other is None else _how_prepared(study, other)
    return _hash([_decides(config.data), config.canvas.prompt_len, config.canvas.response_len, tokenizer])[:8]


def fingerprint(study: Study, cell: Cell) -> str:
    """Returns a hash of what decides the weights of a cell's checkpoints: its settings, its seed, and those of its start.

    Fields that a resumed run may change, such as how often it logs, are left out. So is the length of the run where the
    learning rate does not depend on it, since a longer run then has the same checkpoints.
    """
    config, arm = study.config(cell.arm), study.arms[cell.arm]
    sections = (config.canvas, config.method, config.model, config.lora, config.optimizer, config.train)
    decides = [_decides(section) for section in sections]
    length = None if config.optimizer.schedule == "constant" else cell.steps
    begins = None
    if arm.start is not None:
        first, seed = study.arms[arm.start], study.seed_of(arm.start, cell.seed)
        start = Cell(arm.start, seed, first.steps or 0, (), first.start)
        begins = [fingerprint(study, start), start.steps]
    return _hash([decides, _how_prepared(study, arm.task), length, cell.seed, begins])


def identity(study: Study, cell: Cell) -> str | None:
    """Returns a hash of what is computed for a cell; None where the study does not have its arm or a way in which it is scored.

    Processes that share a folder compare it, since the folder may hold the plan of another file by the time that they read it.
    """
    ways = {point.decoding for point in cell.points} - {GRADIENTS}
    if cell.arm not in study.arms or not ways <= study.decodings.keys():
        return None
    points = [[str(point), how_scored(study, cell.arm, point.decoding)] for point in cell.points]
    return _hash([fingerprint(study, cell), cell.steps, cell.start, points])


def how_scored(study: Study, arm: str, decoding: str) -> str:
    """Returns a hash of how an arm's checkpoints are scored by a way of decoding: on which problems, and with which settings."""
    if decoding == GRADIENTS:
        return _hash([dataclasses.asdict(study.gradients)])
    chosen, config = study.decodings[decoding], study.config(arm, decoding)
    sections = [not_default(section, {"batch_size"}) for section in (config.canvas, config.decode, config.evaluate)]
    task = _how_prepared(study, chosen.task or study.arms[arm].task)
    return _hash([sections, task, dataclasses.asdict(study.scoring)])


def _decides(section: Section) -> Tree:
    """Returns the fields of a section that decide what is learnt, without the length of a run and without those at their defaults.

    So a field that a later version adds does not make other cells of those that were computed before.
    """
    return not_default(section, section.changeable(saved=False) | {"steps"})


def not_default(section: Section, without: Collection[str] = ()) -> Tree:
    """Returns the fields of a section that differ from their defaults, but for those named."""
    default = to_tree(type(section)())
    return {name: value for name, value in to_tree(section).items() if name not in without and value != default[name]}


def _hash(values: list[Any]) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:16]
