"""Reads texts with marked spans: in "one [[8]] three" eight tokens are to be filled in between the two words."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from jaxblock.data.config import DataConfig
from jaxblock.data.text.examples import Prompt, messages_field, messages_of, prompt_of
from jaxblock.data.text.inputs import read_rows
from jaxblock.data.text.rows import Row
from jaxblock.errors import UserError, shown

Parts = Sequence[str | int]
"""A text in pieces: what is given is text, and a number is a span of so many tokens that are to be filled in."""

_MARKER = re.compile(r"\[\[([0-9]+)\]\]")
_MOST_DIGITS = 7
_MOST_TOKENS = 10**_MOST_DIGITS - 1


class MarkedText(NamedTuple):
    """Holds a text with spans to fill, and what it answers.

    Attributes:
        parts: the text's pieces.
        prompt: the user's text, or the conversation, that the text is the answer to; None for a text that stands alone.
    """

    parts: list[str | int]
    prompt: Prompt | None


class SpannedText(NamedTuple):
    """Holds a text whose spans are masks.

    Attributes:
        parts: the text's pieces.
        ids: the ids of the prompt, where there is one, and of the text.
        spans: the [first, end) of each span in the ids, from left to right.
        prompt_len: the tokens of the prompt that the text answers; 0 where it stands alone.
    """

    parts: Parts
    ids: list[int]
    spans: list[tuple[int, int]]
    prompt_len: int

    @property
    def first(self) -> int:
        """The place of the first mask: all before it is the prompt of the decoder."""
        return self.spans[0][0]


def parts_of(text: Any, where: str) -> list[str | int]:
    """Returns the pieces of a text with at least one span, none of them empty.

    Args:
        text: A text with markers, as in "one [[8]] three"; or its pieces, ["one ", 8, " three"], whose texts are taken as they
            are, so that they may hold what looks like a marker.
        where: The text's name in messages.

    Raises:
        UserError: There is no span, one has no token, they have more than any model takes, or a piece is neither text nor a whole
            number.
    """
    if isinstance(text, str):
        pieces = _MARKER.split(text)
        text = [_length(piece, where) if at % 2 else piece for at, piece in enumerate(pieces)]
    if not isinstance(text, list | tuple):
        raise UserError(
            f"{where} must be a text with spans such as [[8]], or a list of texts and numbers, not {shown(text)}"
        )
    for part in text:
        if not isinstance(part, str | int) or isinstance(part, bool):
            raise UserError(f"{where} holds {shown(part)}: its pieces are texts, and numbers of tokens to fill in")
        if isinstance(part, int) and part < 1:
            raise UserError(f"{where} has a span of {shown(part)} tokens: a span has at least 1")
    total = sum(part for part in text if isinstance(part, int))
    if total > _MOST_TOKENS:
        raise UserError(f"{where} has spans of {shown(total)} tokens in all, more than any model takes: shorten them")
    parts = [part for part in text if part != ""]
    if not any(isinstance(part, int) for part in parts):
        raise UserError(f"{where} has no span to fill: write [[8]] where 8 tokens are to be filled in")
    return parts


def _length(digits: str, where: str) -> int:
    if len(digits) > _MOST_DIGITS:
        raise UserError(f"{where} has a span [[{digits[:20]}]] of more tokens than any model takes")
    return int(digits)


def with_markers(parts: Parts) -> str:
    """Returns the text of pieces, with a marker for each span."""
    return "".join(part if isinstance(part, str) else f"[[{part}]]" for part in parts)


def read_marked(path: str, config: DataConfig) -> Iterator[tuple[str, MarkedText]]:
    """Reads texts with spans from a file of records.

    The text is in the field `data.response_field`, as a text with markers or as a list of its pieces. The field
    `data.prompt_field`, where it is there, is what the text answers. Or the record is a conversation, whose last turn is the
    assistant's and has the markers.

    Args:
        path: A file, as `inputs.open_input` accepts it.
        config: Resolved settings (see `recipes.with_recipe`), which name the fields.

    Yields:
        (the place of a record, for error messages; its text).

    Raises:
        UserError: The file cannot be read, or a record is not as described.
    """
    for row in read_rows(path, "test"):
        field = messages_field(row, config)
        yield row.where, _answer(row, config) if field is None else _conversation(row, field, config)


def _conversation(row: Row, field: str, config: DataConfig) -> MarkedText:
    messages = messages_of(row, field, config)
    if messages[-1]["role"] != "assistant" or len(messages) < 2 or messages[-2]["role"] != "user":
        raise UserError(
            f"{row.where}: {field!r} must end with a turn of the user and one of the assistant, whose spans are to be filled"
        )
    return MarkedText(parts_of(messages[-1]["content"], row.where), messages[:-1])


def _answer(row: Row, config: DataConfig) -> MarkedText:
    name, asked = config.response_field, config.prompt_field
    known = ", ".join(map(repr, row.record)) or "none: it is empty"
    if name not in row.record:
        raise UserError(
            f"{row.where}: no field {name!r} with the text to fill; set data.response_field to one of {known}"
        )
    if asked in row.record:
        return MarkedText(parts_of(row.record[name], row.where), prompt_of(row, config))
    near = difflib.get_close_matches(str(asked), row.record, n=1)
    if near:  # a mistyped name must not drop the prompt
        raise UserError(
            f"{row.where}: no field {asked!r} (did you mean {near[0]!r}?); set data.prompt_field to one of {known}"
        )
    return MarkedText(parts_of(row.record[name], row.where), None)
