"""Which examples each split holds, and a hash of where they came from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from jaxblock import storage
from jaxblock.config import DataConfig
from jaxblock.data import corpus, sources
from jaxblock.data.sources import BUILTIN, Example
from jaxblock.errors import UserError


@dataclass(frozen=True)
class Splits:
    """Examples and a description of their source, by split ("train", "validation", "test"; absent if there is none)."""

    examples: dict[str, list[Example]]
    inputs: dict[str, dict[str, Any]]


def load(config: DataConfig) -> Splits:
    """Reads every split.

    A validation split that no file gives is set apart: of a training file by a permutation seeded with `config.seed`,
    of the built-in corpus from its held-out problems beyond the first `builtin_test`.

    Raises:
        UserError: For what `sources` refuses, settings that fit no split, and a built-in corpus that is not disjoint.
    """
    for name in ("validation_records", "builtin_train", "builtin_test"):
        if getattr(config, name) < 0:
            raise UserError(f"data.{name} = {getattr(config, name)}: it cannot be below 0")
    if config.train != BUILTIN and config.test == BUILTIN:
        raise UserError(
            f"data.test is `builtin` but data.train is {config.train!r}: set data.test to your own held-out records "
            "(.jsonl), or to null"
        )
    return _builtin(config) if config.train == BUILTIN else _files(config)


def _builtin(config: DataConfig) -> Splits:
    n_validation = config.validation_records if config.validation in (None, BUILTIN) else 0
    if not config.builtin_train:
        raise UserError("data.builtin_train = 0 leaves nothing to train on")
    held_out = sources.builtin("test", config.builtin_test + n_validation, config)
    examples = {"train": sources.builtin("train", config.builtin_train, config)}
    examples["validation"] = held_out[config.builtin_test :]
    if config.test == BUILTIN:
        examples["test"] = held_out[: config.builtin_test]
    _check_disjoint(examples)
    inputs = {split: _described(BUILTIN, sources.digest(some), some) for split, some in examples.items()}
    for split in ("validation", "test"):
        path = getattr(config, split)
        if path not in (None, BUILTIN):
            examples[split] = sources.read_jsonl(path, config)
            inputs[split] = _described(path, storage.sha256(path), examples[split])
    return _without_empty(examples, inputs)


def _files(config: DataConfig) -> Splits:
    paths = {"train": config.train, "validation": config.validation, "test": config.test}
    if config.validation == BUILTIN:
        raise UserError(
            f"data.validation is `builtin` but data.train is {config.train!r}: set it to a file, or to null"
        )
    given = {split: path for split, path in paths.items() if path is not None}
    examples = {split: sources.read_jsonl(path, config) for split, path in given.items()}
    inputs = {split: _described(path, storage.sha256(path), examples[split]) for split, path in given.items()}
    if config.validation is None:
        everything, n = examples["train"], config.validation_records
        if n >= len(everything):
            raise UserError(
                f"data.validation_records = {n} leaves nothing of the {len(everything)} records of {config.train}; "
                "set it lower, or give data.validation"
            )
        chosen = set(np.random.default_rng([config.seed, 0x5E7]).permutation(len(everything))[:n].tolist())
        examples["train"] = [example for i, example in enumerate(everything) if i not in chosen]
        examples["validation"] = [example for i, example in enumerate(everything) if i in chosen]
        inputs["validation"] = {**inputs["train"], "records": n}
        inputs["train"]["records"] -= n
    return _without_empty(examples, inputs)


def _without_empty(examples: dict[str, list[Example]], inputs: dict[str, dict[str, Any]]) -> Splits:
    names = [split for split in ("train", "validation", "test") if examples.get(split)]
    return Splits({split: examples[split] for split in names}, {split: inputs[split] for split in names})


def _described(path: str, sha256: str, examples: list[Example]) -> dict[str, Any]:
    return {"path": path, "sha256": sha256, "records": len(examples)}


def _check_disjoint(examples: dict[str, list[Example]]) -> None:
    """The built-in corpus promises it; a silent breach would make every score meaningless."""
    for view in (lambda example: corpus.chain_of({"answer": example.response}), lambda example: example.prompt):
        seen: set[Any] = set()
        for split, some in examples.items():
            keys = {view(example) for example in some}
            if seen & keys:
                raise UserError(
                    f"the built-in corpus's {split} problems repeat those of another split; please report this as a bug"
                )
            seen |= keys
