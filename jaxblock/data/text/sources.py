"""Reads the examples of a split from a file, a data set or the built-in corpus."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from jaxblock.data.config import DataConfig
from jaxblock.data.text import corpus, sudoku
from jaxblock.data.text.examples import Example, checked_text, examples_of, question_and_answer
from jaxblock.data.text.fields import fields_json
from jaxblock.data.text.files import Row, read_rows
from jaxblock.data.text.recipes import BUILTIN
from jaxblock.errors import UserError


@dataclass(frozen=True)
class Source:
    """Holds the examples of a split, and where they came from.

    Attributes:
        path: The source as the settings name it: a file, a data set or `builtin`.
        sha256: The hash of the file, or of the examples' texts where there is no file.
        examples: The examples in their order.
        dropped: How many records were left out, by reason.
    """

    path: str
    sha256: str
    examples: list[Example]
    dropped: dict[str, int] = field(default_factory=dict)

    def described(self) -> dict[str, Any]:
        """Returns the manifest's entry: "path", "sha256", and the numbers of "records" (examples) and "conversations"."""
        return {
            "path": self.path,
            "sha256": self.sha256,
            "records": len(self.examples),
            "conversations": len({example.conversation for example in self.examples}),
        }


def read_source(path: str, config: DataConfig, split: str) -> Source:
    """Reads the records of a file or a data set.

    Args:
        path: A file or a data set, as `files.read_rows` accepts it.
        config: Resolved settings (see `recipes.with_recipe`), which name the fields, the turns that are supervised, and, for
            the split "train" only, the types that are left out.
        split: "train", "validation" or "test".

    Raises:
        UserError: If the file cannot be read or holds no record, or if a record is not an object or its fields are
            missing, empty or not text; the message names the file and the line.
    """
    examples: list[Example] = []
    dropped: Counter[str] = Counter()
    count = 0
    rows, sha256 = read_rows(path, split)
    for row in rows:
        count += 1
        excluded = _excluded_type(row, config) if split == "train" else None
        if excluded is not None:
            dropped[f"{config.type_field} contains {excluded!r}"] += 1
        else:
            examples += examples_of(row, config)
    if not count:
        raise UserError(f"{path}: the file is empty; one JSON object a line is expected")
    if not examples:
        raise UserError(f"{path}: data.exclude_types leaves none of the {count} records")
    return Source(path, sha256 or _texts_sha256(examples), examples, dict(dropped))


def builtin_examples(split: corpus.CorpusSplit, n: int, config: DataConfig) -> list[Example]:
    """Makes `n` problems of the built-in corpus at the config's level and seed, with sources like "builtin:test:12".

    Raises:
        UserError: If the level is unknown or has fewer than `n` problems.
    """
    try:
        if config.level == sudoku.LEVEL:
            records = sudoku.generate(split, n, seed=config.seed)
        else:
            records = corpus.generate(split, n, level=config.level, seed=config.seed)
    except ValueError as error:
        raise UserError(f"the built-in corpus (data.level, data.builtin_train, data.builtin_test): {error}") from error
    names = [f"{BUILTIN}:{split}:{line}" for line in range(1, n + 1)]
    return [
        question_and_answer(record["question"], record["answer"], config, name, name, {})
        for name, record in zip(names, records, strict=True)
    ]


def builtin_source(examples: list[Example]) -> Source:
    """Makes a source of examples of the built-in corpus; its hash is that of their texts."""
    return Source(BUILTIN, _texts_sha256(examples), examples)


def _texts_sha256(examples: list[Example]) -> str:
    texts: list[Any] = [[[turn["role"], turn["content"]] for turn in example.messages] for example in examples]
    # Other fields are part of what was read; without any the hash is what it always was.
    texts += [fields_json(example.fields, example.where)[0] for example in examples if example.fields]
    content = json.dumps(texts, ensure_ascii=False)
    return hashlib.sha256(content.encode()).hexdigest()


def _excluded_type(row: Row, config: DataConfig) -> str | None:
    """Returns the first text of `data.exclude_types` that the record's type contains; None if it contains none."""
    if not config.exclude_types:
        return None
    if config.type_field not in row.record:
        raise UserError(
            f"{row.where}: no field {config.type_field!r}, which data.exclude_types looks at; set data.type_field to one of "
            f"{', '.join(map(repr, row.record))}, or data.exclude_types to an empty list"
        )
    kind = checked_text(row.record[config.type_field], f"field {config.type_field!r}", row.where)
    return next((text for text in config.exclude_types if text in kind), None)
