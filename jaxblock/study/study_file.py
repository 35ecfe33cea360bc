"""Reads the file that describes a study."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Collection, Mapping
from typing import Any

from jaxblock.config.config import Config
from jaxblock.config.yaml import build_from_tree, config_from_tree, read_tree
from jaxblock.errors import UserError, shown
from jaxblock.io.paths import PathLike
from jaxblock.study.experiments import experiment_from_tree, nearest
from jaxblock.study.gradients.sizes import GradientSizes
from jaxblock.study.spec import SCORED_BY, Arm, Decoding, Scoring, Study, Tree
from jaxblock.study.spec_checks import check_study

_KEYS = ("title", "seeds", "common", "tasks", "arms", "decodings", "experiments", "scoring", "gradients")
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
_NAME = re.compile(r"\w[\w.+-]{0,99}")
_MOST_SEEDS = 1000


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
    check_study(study, where, "gradients" in tree)
    return study


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
    return Decoding(None if task is None else str(task), _sections(tree, where, name, SCORED_BY))
