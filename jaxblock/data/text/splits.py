"""Decides which examples each split holds."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jaxblock.data.config import DataConfig
from jaxblock.data.text import corpus, sudoku
from jaxblock.data.text.corpus_input import CorpusInput, generate_problems
from jaxblock.data.text.files import is_pipe
from jaxblock.data.text.hashes import content_sha256
from jaxblock.data.text.hub_data import HUB
from jaxblock.data.text.inputs import Input, distinct_names, open_input
from jaxblock.data.text.pieces import InOrder
from jaxblock.data.text.recipes import BUILTIN, with_test_fields
from jaxblock.data.text.sources import Source, SourcePart, read_source
from jaxblock.errors import UserError

SPLIT_NAMES = ("train", "validation", "test")

Inputs = Mapping[str, Sequence[Input]]
"""The inputs of each split that has its own, by the split's name."""


def open_inputs(config: DataConfig) -> dict[str, Sequence[Input]]:
    """Opens the files and data sets of every split.

    Where no file gives validation records, they are taken from the training records (see `read_splits`), or, with the built-in
    corpus, from the held-out problems after the first `builtin_test`.

    Args:
        config: Resolved settings (see `recipes.with_recipe`).

    Raises:
        UserError: If a file cannot be opened or is given twice, the settings leave no training records or mix `builtin` with a
            training file, or splits of the built-in corpus share a problem.
    """
    if config.weights is not None and isinstance(config.train, str):
        raise UserError(
            f"data.weights has no effect on one training file, {config.train!r}: leave it out, or list files in data.train"
        )
    if config.train == BUILTIN:
        return _from_corpus(config)
    for name in ("validation", "test"):
        if getattr(config, name) == BUILTIN:
            more = "your own held-out records (.jsonl), or to null" if name == "test" else "a file, or to null"
            raise UserError(
                f"data.{name} is `builtin` but data.train is {_as_given(config.train)}: set data.{name} to {more}"
            )
    paths = train_paths(config)
    _check_once([*paths, *filter(None, (config.validation, config.test))], len(paths))
    found = {"train": [open_input(*each) for each in zip(paths, ["train"] * len(paths), _names(paths), strict=True)]}
    for split, path in (("validation", config.validation), ("test", config.test)):
        if path is not None:
            found[split] = [open_input(path, split)]
    return dict(found)


def train_paths(config: DataConfig) -> tuple[str, ...]:
    """Returns the training files, of which there may be several."""
    return (config.train,) if isinstance(config.train, str) else config.train


def hash_inputs(inputs: Inputs, config: DataConfig) -> dict[str, list[str]]:
    """Computes the hash of each input of each split that will have examples.

    Args:
        inputs: The inputs of the splits.
        config: Resolved settings.
    """
    found = {
        split: [content_sha256(each, _fields_of(split, config), split) for each in some]
        for split, some in inputs.items()
    }
    if _sets_apart(inputs, config):
        found["validation"] = found["train"]
    return {split: found[split] for split in SPLIT_NAMES if split in found}


def read_splits(
    inputs: Inputs, hashes: Mapping[str, Sequence[str]], config: DataConfig, in_order: InOrder = map
) -> dict[str, Source]:
    """Counts the examples of every split, in the order of `SPLIT_NAMES`; all records are parsed and checked.

    Where no file gives validation records, they are chosen among the training records by a permutation seeded with
    `config.seed`. All examples of one conversation are put into the same split.

    Args:
        inputs: The inputs of the splits, as `open_inputs` gives them.
        hashes: Their hashes, as `hash_inputs` gives them.
        config: Resolved settings (see `recipes.with_recipe`).
        in_order: Counts pieces of the inputs, in this process or in others.

    Raises:
        UserError: If a file or a record is refused (see `sources.read_source`), or two training files are the same.
    """
    same = [sha for at, sha in enumerate(hashes["train"]) if sha in hashes["train"][:at]]
    if same:
        twice = [each.path for each, sha in zip(inputs["train"], hashes["train"], strict=True) if sha == same[0]]
        raise UserError(
            f"data.train: {' and '.join(twice[:2])} hold the same bytes: give one of them; data.weights says how often its "
            "records are read"
        )
    found = {
        split: read_source(some, _fields_of(split, config), split, hashes[split], in_order)
        for split, some in inputs.items()
    }
    if _sets_apart(inputs, config):
        found["train"], found["validation"] = _set_apart(found["train"], config)
    return {split: found[split] for split in SPLIT_NAMES if split in found}


def _from_corpus(config: DataConfig) -> dict[str, Sequence[Input]]:
    """Makes training problems, and held-out problems for each other split that the settings give no file for."""
    if not config.builtin_train:
        raise UserError("data.builtin_train = 0 leaves nothing to train on")
    n_validation = config.validation_records if config.validation in (None, BUILTIN) else 0
    held_out = generate_problems("test", config.builtin_test + n_validation, config)
    train = generate_problems("train", config.builtin_train, config)
    n_test = config.builtin_test if config.test == BUILTIN else 0
    made = {
        "train": CorpusInput("train", train, 1, config),
        "validation": CorpusInput("test", held_out[config.builtin_test :], config.builtin_test + 1, config),
        "test": CorpusInput("test", held_out[:n_test], 1, config),
    }
    _check_disjoint({split: each.problems for split, each in made.items()}, config.level)
    found: dict[str, Sequence[Input]] = {split: [each] for split, each in made.items() if each.problems}
    for split, path in (("validation", config.validation), ("test", config.test)):
        if path is not None and path != BUILTIN:
            found[split] = [open_input(path, split)]
    return found


def _fields_of(split: str, config: DataConfig) -> DataConfig:
    return with_test_fields(config) if split == "test" else config


def _sets_apart(inputs: Inputs, config: DataConfig) -> bool:
    """Tells whether validation records are taken out of the training records."""
    return config.train != BUILTIN and "validation" not in inputs and config.validation_records > 0


def _set_apart(train: Source, config: DataConfig) -> tuple[Source, Source]:
    """Divides training examples into (training, validation); all examples of a conversation are put into the same one."""
    sizes = [part.numbers()[1] for part in train.parts]
    n, total = config.validation_records, sum(sizes)
    if n >= total:
        raise UserError(
            f"data.validation_records = {n} leaves nothing of the {total} records of {_as_given(config.train)}; "
            "set it lower, or give data.validation"
        )
    chosen = np.zeros(total, bool)
    chosen[np.random.default_rng([config.seed, 0x5E7]).permutation(total)[:n]] = True
    each = np.split(chosen, np.cumsum(sizes)[:-1])
    kept, taken = (
        tuple(
            SourcePart(part.input, part.counts, one if side else ~one)
            for part, one in zip(train.parts, each, strict=True)
        )
        for side in (False, True)
    )
    return dataclasses.replace(train, parts=kept), dataclasses.replace(train, parts=taken, dropped={})


def _as_given(train: Any) -> str:
    return repr(train) if isinstance(train, str) else ", ".join(map(repr, train))


def _names(paths: Sequence[str]) -> list[str | None]:
    """Returns the names of the training files in the sources of records: file names, with folders where those are the same."""
    files = [path for path in paths if not path.startswith(HUB)]
    names = dict(zip(files, distinct_names(files), strict=True)) if files else {}
    return [names.get(path) for path in paths]


def _check_once(paths: Sequence[str], n_train: int) -> None:
    """Raises UserError where a training file is given twice, or a pipe for two splits."""
    real = [path if path.startswith(HUB) or "://" in path else os.path.realpath(path) for path in paths]
    for at, path in enumerate(paths):
        first = real.index(real[at])
        if first < at < n_train:
            raise UserError(
                f"data.train gives {path} twice ({paths[first]}): give it once; data.weights says how often its records are read"
            )
        if first < at and is_pipe(path):
            raise UserError(
                f"{path} is given for two splits, and a pipe can be read only once: write it to a file first"
            )


def _check_disjoint(problems: Mapping[str, list[dict[str, str]]], level: str) -> None:
    """Raises UserError where a problem of the built-in corpus is in two splits, which would make every score meaningless.

    Problems of arithmetic are the same where their chain is, whatever the words; sudokus of the validation and test splits may share a
    solution.
    """
    chains = () if level == sudoku.LEVEL else (lambda problem: corpus.chain_of({"answer": problem["answer"]}),)
    for key in (*chains, lambda problem: problem["question"]):
        seen: set[Any] = set()
        for split, some in problems.items():
            keys = {key(problem) for problem in some}
            if seen & keys:
                raise UserError(
                    f"the built-in corpus's {split} problems repeat those of another split; please report this as a bug"
                )
            seen |= keys
