"""Holds what a study is: tasks, arms, ways of decoding, and the experiments that compare them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from jaxblock.config.config import Config
from jaxblock.config.yaml import config_from_tree
from jaxblock.study.experiments import Experiment
from jaxblock.study.gradients.sizes import GradientSizes

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


SCORED_BY = ("canvas", "decode", "evaluate")
"""The sections that a way of decoding may replace."""


def merged(*trees: Mapping[str, Any]) -> Tree:
    """Returns sections put together; a field of a later tree replaces that of an earlier one."""
    result: Tree = {}
    for tree in trees:
        for section, values in tree.items():
            result[section] = {**result.get(section, {}), **(values or {})}
    return result


def tokenizer_of(study: Study, task: str) -> str | None:
    """Returns the task whose tokenizer another task uses; None where it has its own."""
    given = study.tasks[task].get("data", {}).get("tokenizer", "")
    return given.removeprefix("task:") if given.startswith("task:") else None
