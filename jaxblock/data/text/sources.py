"""Counts the examples of inputs, and gives those of a split in pieces that any process can read."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from jaxblock.data.config import DataConfig
from jaxblock.data.text.examples import Example
from jaxblock.data.text.hashes import joint_sha256
from jaxblock.data.text.inputs import Input
from jaxblock.data.text.pieces import InOrder, Piece, count_piece, is_filtered
from jaxblock.errors import UserError


@dataclass(frozen=True)
class SourcePart:
    """Holds those examples of an input that belong to a split.

    Attributes:
        input: The input.
        counts: For each of its chunks, the number of examples of each conversation.
        wanted: For each conversation whether it belongs to the split; None where all do.
    """

    input: Input
    counts: Sequence[np.ndarray]
    wanted: np.ndarray | None = None

    def numbers(self) -> tuple[int, int]:
        """Returns how many (examples, conversations) belong to the split."""
        every = np.concatenate(self.counts) if self.counts else np.zeros(0, np.uint32)
        chosen = every if self.wanted is None else every[self.wanted]
        return int(chosen.sum()), len(chosen)


@dataclass(frozen=True)
class Source:
    """Holds the examples of a split, and where they came from.

    Attributes:
        parts: The examples of each input.
        config: Resolved settings, which name the fields and the turns that are supervised.
        filtered: Whether records are left out whose type is one of `data.exclude_types`.
        sha256: The hash of each input.
        dropped: How many records were left out, by reason.
        letters: The number of letters of the texts of the inputs' examples.
        has_fields: Whether a record of the inputs has other fields than prompt and response.
    """

    parts: tuple[SourcePart, ...]
    config: DataConfig
    filtered: bool
    sha256: tuple[str, ...]
    dropped: dict[str, int] = field(default_factory=dict)
    letters: int = 0
    has_fields: bool = False

    def __len__(self) -> int:
        """Returns the number of examples."""
        return sum(part.numbers()[0] for part in self.parts)

    def pieces(self, part: SourcePart) -> Iterator[Piece]:
        """Yields the pieces of one part in their order, without those in which nothing belongs to the split."""
        begin = 0
        for chunk, count in zip(part.input.chunks(), part.counts, strict=True):
            end = begin + len(count)
            wanted = None if part.wanted is None else part.wanted[begin:end]
            if end > begin and (wanted is None or wanted.any()):
                yield Piece(chunk, self.config, self.filtered, wanted)
            begin = end

    def examples(self) -> Iterator[Example]:
        """Yields the examples in their order."""
        for part in self.parts:
            for piece in self.pieces(part):
                yield from piece.examples()

    def described(self) -> dict[str, Any]:
        """Returns the manifest's entry.

        It has "path", "sha256", and the numbers of "records" (examples) and "conversations"; and where there are several
        inputs, "files" with the same of each.
        """
        each: list[dict[str, Any]] = [
            {"path": part.input.path, "sha256": sha256, "records": records, "conversations": conversations}
            for part, sha256 in zip(self.parts, self.sha256, strict=True)
            for records, conversations in [part.numbers()]
        ]
        if len(each) == 1:
            return each[0]
        total = {name: sum(entry[name] for entry in each) for name in ("records", "conversations")}
        paths = ", ".join(entry["path"] for entry in each)
        return {"path": paths, "sha256": joint_sha256(self.sha256), **total, "files": each}


def read_source(
    inputs: Sequence[Input], config: DataConfig, split: str, sha256: Sequence[str], in_order: InOrder = map
) -> Source:
    """Counts the records of inputs, all of which are parsed and checked.

    Args:
        inputs: The inputs.
        config: Resolved settings (see `recipes.with_recipe`), which name the fields, the turns that are supervised, and, for
            the split "train" only, the types that are left out.
        split: "train", "validation" or "test".
        sha256: The inputs' hashes (see `hashes.content_sha256`).
        in_order: Counts the pieces, in this process or in others.

    Raises:
        UserError: If an input cannot be read or holds no record, or if a record is not an object or its fields are missing,
            empty or not text; the message names the file and the line.
    """
    parts, dropped, letters, has_fields = [], Counter[str](), 0, False
    filtered = is_filtered(config, split)
    for each in inputs:
        counts, left_out = [], Counter[str]()
        for found in in_order(count_piece, (Piece(chunk, config, filtered) for chunk in each.chunks())):
            counts.append(found.examples)
            left_out.update(found.dropped)
            letters, has_fields = letters + found.letters, has_fields or found.has_fields
        if not any(map(len, counts)):
            if not left_out:
                raise UserError(f"{each.path}: the file is empty; one JSON object a line is expected")
            raise UserError(f"{each.path}: data.exclude_types leaves none of the {left_out.total()} records")
        parts.append(SourcePart(each, counts))
        dropped.update(left_out)
    return Source(tuple(parts), config, filtered, tuple(sha256), dict(dropped), letters, has_fields)
