"""Which examples each split holds, and a hash of where they came from."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from jaxblock.data.config import DataConfig
from jaxblock.data.text import corpus, recipes, sources
from jaxblock.data.text.recipes import BUILTIN
from jaxblock.data.text.sources import Example, Source
from jaxblock.errors import UserError


@dataclass(frozen=True)
class Splits:
    """What each split ("train", "validation", "test") holds; absent if there is none.

    Attributes:
        examples: Its examples.
        inputs: Where they came from: {"path", "sha256", "records", "conversations"}: "records" counts the examples, and
            of a conversation there may be several.
        dropped: Records left out already, by reason.
    """

    examples: dict[str, list[Example]]
    inputs: dict[str, dict[str, Any]]
    dropped: dict[str, dict[str, int]] = field(default_factory=dict)


def load(config: DataConfig) -> Splits:
    """Reads every split.

    A validation split that no file gives is set apart: of a training file by a permutation seeded with `config.seed`,
    of the built-in corpus from its held-out problems beyond the first `builtin_test`. Rows of one conversation stay
    together.

    Args:
        config: Resolved settings (see `recipes.resolve`).

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
            source = _read(split, path, config)
            examples[split], inputs[split] = source.examples, _described(path, source.sha256, source.examples)
    return _without_empty(examples, inputs, {})


def _files(config: DataConfig) -> Splits:
    paths = {"train": config.train, "validation": config.validation, "test": config.test}
    if config.validation == BUILTIN:
        raise UserError(
            f"data.validation is `builtin` but data.train is {config.train!r}: set it to a file, or to null"
        )
    given = {split: path for split, path in paths.items() if path is not None}
    read = {split: _read(split, path, config) for split, path in given.items()}
    examples = {split: source.examples for split, source in read.items()}
    inputs = {split: _described(given[split], source.sha256, source.examples) for split, source in read.items()}
    if config.validation is None:
        examples["train"], examples["validation"] = _set_apart(examples["train"], config)
        inputs["validation"] = _described(config.train, read["train"].sha256, examples["validation"])
        inputs["train"] = _described(config.train, read["train"].sha256, examples["train"])
    return _without_empty(examples, inputs, {"train": read["train"].dropped})


def _read(split: str, path: str, config: DataConfig) -> Source:
    return sources.read(path, recipes.for_test(config) if split == "test" else config, split)


def _set_apart(everything: list[Example], config: DataConfig) -> tuple[list[Example], list[Example]]:
    """(training, validation) examples; whole conversations are drawn, so that none stands in both."""
    conversations = list(dict.fromkeys(example.conversation for example in everything))
    n = config.validation_records
    if n >= len(conversations):
        raise UserError(
            f"data.validation_records = {n} leaves nothing of the {len(conversations)} records of {config.train}; "
            "set it lower, or give data.validation"
        )
    order = np.random.default_rng([config.seed, 0x5E7]).permutation(len(conversations))
    chosen = {conversations[i] for i in order[:n].tolist()}
    return (
        [example for example in everything if example.conversation not in chosen],
        [example for example in everything if example.conversation in chosen],
    )


def _without_empty(
    examples: dict[str, list[Example]], inputs: dict[str, dict[str, Any]], dropped: dict[str, dict[str, int]]
) -> Splits:
    names = [split for split in ("train", "validation", "test") if examples.get(split)]
    return Splits({split: examples[split] for split in names}, {split: inputs[split] for split in names}, dropped)


def _described(path: str, sha256: str, examples: list[Example]) -> dict[str, Any]:
    return {
        "path": path,
        "sha256": sha256,
        "records": len(examples),
        "conversations": len({example.conversation for example in examples}),
    }


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
