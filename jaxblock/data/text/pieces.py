"""Reads the examples of a piece of an input, in whatever process."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple, TypeVar

import numpy as np

from jaxblock.data.config import DataConfig
from jaxblock.data.text.examples import Example, examples_of
from jaxblock.data.text.messages import checked_text
from jaxblock.data.text.recipes import BUILTIN
from jaxblock.data.text.rows import Chunk, Row
from jaxblock.errors import UserError

A = TypeVar("A")
B = TypeVar("B")
InOrder = Callable[[Callable[[A], B], Iterable[A]], Iterator[B]]
"""Applies a function to things and yields the results in the order of the things, as `map` does in this process."""


class Piece(NamedTuple):
    """Holds a chunk of an input, and says which of its examples belong to a split.

    Attributes:
        chunk: The chunk.
        config: Resolved settings, which name the fields and the turns that are supervised.
        filtered: Whether records are left out whose type is one of `data.exclude_types`.
        wanted: For each conversation that is not left out, whether it belongs to the split; None where all do.
    """

    chunk: Chunk
    config: DataConfig
    filtered: bool
    wanted: np.ndarray | None = None

    def examples(self) -> list[Example]:
        """Parses the chunk, and returns the examples of the conversations that belong to the split.

        Raises:
            UserError: If a record is not an object or its fields are missing, empty or not text; the message names the file and
                the line.
        """
        found = [talk for talk in _conversations(self) if isinstance(talk, list)]
        kept = found if self.wanted is None else [talk for talk, take in zip(found, self.wanted, strict=True) if take]
        return [example for talk in kept for example in talk]


class PieceCount(NamedTuple):
    """Holds what counting a piece gives.

    Attributes:
        examples: The number of examples of each conversation, uint32.
        dropped: How many records were left out, by reason.
        letters: The number of letters of the examples' texts.
        has_fields: Whether a record has other fields than prompt and response.
    """

    examples: np.ndarray
    dropped: dict[str, int]
    letters: int
    has_fields: bool


def is_filtered(config: DataConfig, split: str) -> bool:
    """Tells whether records of a split are left out whose type is one of `data.exclude_types`: those of training files are."""
    return split == "train" and config.train != BUILTIN


def count_piece(piece: Piece) -> PieceCount:
    """Parses and checks the records of a piece, and counts their examples.

    Raises:
        UserError: If a record is refused (see `Piece.examples`).
    """
    counts, dropped, letters, has_fields = [], Counter[str](), 0, False
    for talk in _conversations(piece):
        if isinstance(talk, str):
            dropped[talk] += 1
            continue
        counts.append(len(talk))
        letters += sum(len(message["content"]) for example in talk for message in example.messages)
        has_fields = has_fields or bool(talk[0].fields)
    return PieceCount(np.array(counts, np.uint32), dict(dropped), letters, has_fields)


def _conversations(piece: Piece) -> Iterator[list[Example] | str]:
    """Yields the examples of each conversation of a chunk, or the reason why a record is left out."""
    for row in piece.chunk.rows():
        kind = _excluded_type(row, piece.config) if piece.filtered else None
        if kind is not None:
            yield f"{piece.config.type_field} contains {kind!r}"
        else:
            yield examples_of(row, piece.config)


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
