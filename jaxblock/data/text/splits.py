"""Decides which examples each split holds."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from jaxblock.data.config import DataConfig
from jaxblock.data.text import corpus, sudoku
from jaxblock.data.text.files import is_pipe
from jaxblock.data.text.recipes import BUILTIN, with_test_fields
from jaxblock.data.text.sources import Source, builtin_examples, builtin_source, read_source
from jaxblock.errors import UserError

SPLIT_NAMES = ("train", "validation", "test")


def read_splits(config: DataConfig) -> dict[str, Source]:
    """Reads every split that has examples, in the order of `SPLIT_NAMES`.

    Where no file gives validation records, they are taken from the training file, chosen by a permutation seeded with
    `config.seed`, or, with the built-in corpus, from the held-out problems after the first `builtin_test`. All examples of
    one conversation are put into the same split.

    Args:
        config: Resolved settings (see `recipes.with_recipe`).

    Raises:
        UserError: If a file or a record is refused (see `sources.read_source`), the settings leave no training records or
            mix `builtin` with a training file, or splits of the built-in corpus share a problem.
    """
    if config.train != BUILTIN and config.test == BUILTIN:
        raise UserError(
            f"data.test is `builtin` but data.train is {config.train!r}: set data.test to your own held-out records "
            "(.jsonl), or to null"
        )
    found = _from_corpus(config) if config.train == BUILTIN else _from_files(config)
    return {split: found[split] for split in SPLIT_NAMES if split in found and found[split].examples}


def _from_corpus(config: DataConfig) -> dict[str, Source]:
    """Makes training problems, and held-out problems for each other split that the settings give no file for."""
    if not config.builtin_train:
        raise UserError("data.builtin_train = 0 leaves nothing to train on")
    n_validation = config.validation_records if config.validation in (None, BUILTIN) else 0
    held_out = builtin_examples("test", config.builtin_test + n_validation, config)
    train, validation = builtin_examples("train", config.builtin_train, config), held_out[config.builtin_test :]
    test = held_out[: config.builtin_test] if config.test == BUILTIN else []
    found = {split: builtin_source(some) for split, some in zip(SPLIT_NAMES, (train, validation, test), strict=True)}
    _check_disjoint(found, config.level)
    for split, path in (("validation", config.validation), ("test", config.test)):
        if path is not None and path != BUILTIN:
            found[split] = _read_file(split, path, config)
    return found


def _from_files(config: DataConfig) -> dict[str, Source]:
    """Reads the files of the splits, and takes validation examples out of the training file where none is given."""
    if config.validation == BUILTIN:
        raise UserError(
            f"data.validation is `builtin` but data.train is {config.train!r}: set it to a file, or to null"
        )
    paths = zip(SPLIT_NAMES, (config.train, config.validation, config.test), strict=True)
    given = {split: path for split, path in paths if path is not None}
    twice = [path for at, path in enumerate(given.values()) if path in list(given.values())[:at] and is_pipe(path)]
    if twice:
        raise UserError(
            f"{twice[0]} is given for two splits, and a pipe can be read only once: write it to a file first"
        )
    found = {split: _read_file(split, path, config) for split, path in given.items()}
    if config.validation is None:
        found["train"], found["validation"] = _set_apart(found["train"], config)
    return found


def _read_file(split: str, path: str, config: DataConfig) -> Source:
    return read_source(path, with_test_fields(config) if split == "test" else config, split)


def _set_apart(train: Source, config: DataConfig) -> tuple[Source, Source]:
    """Divides training examples into (training, validation); all examples of a conversation are put into the same one."""
    conversations = list(dict.fromkeys(example.conversation for example in train.examples))
    n = config.validation_records
    if n >= len(conversations):
        raise UserError(
            f"data.validation_records = {n} leaves nothing of the {len(conversations)} records of {config.train}; "
            "set it lower, or give data.validation"
        )
    order = np.random.default_rng([config.seed, 0x5E7]).permutation(len(conversations))
    chosen = {conversations[i] for i in order[:n].tolist()}
    kept = [example for example in train.examples if example.conversation not in chosen]
    taken = [example for example in train.examples if example.conversation in chosen]
    return dataclasses.replace(train, examples=kept), dataclasses.replace(train, examples=taken, dropped={})


def _check_disjoint(splits: dict[str, Source], level: str) -> None:
    """Raises UserError where a problem of the built-in corpus is in two splits, which would make every score meaningless.

    Problems of arithmetic are the same where their chain is, whatever the words; sudokus of the validation and test splits may share a
    solution.
    """
    chains = () if level == sudoku.LEVEL else (lambda example: corpus.chain_of({"answer": example.response}),)
    for key in (*chains, lambda example: example.prompt):
        seen: set[Any] = set()
        for split, source in splits.items():
            keys = {key(example) for example in source.examples}
            if seen & keys:
                raise UserError(
                    f"the built-in corpus's {split} problems repeat those of another split; please report this as a bug"
                )
            seen |= keys
