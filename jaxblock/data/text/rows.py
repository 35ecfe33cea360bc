"""Parses chunks of files and data sets into rows: records, each with its place.

A chunk is a piece of an input that can be parsed alone, in any process. It is all of the input that is in memory at a time.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any, NamedTuple

from jaxblock.errors import UserError
from jaxblock.io.json_text import parse_json

CHUNK = 1 << 18
"""The size of a chunk in bytes, or letters, or more where one record is larger."""


class Row(NamedTuple):
    """Holds one record of a file and its place.

    Attributes:
        record: The record's fields.
        where: The path and the place in the file, for error messages.
        source: The file name and the place in the file, which the prepared record keeps.
    """

    record: dict[str, Any]
    where: str
    source: str


class LineChunk(NamedTuple):
    """Holds some lines of a file of JSON lines.

    Attributes:
        path: The file's path, for error messages.
        name: The file's name in the source of a record.
        content: The bytes of whole lines.
        line: The number of the first of these lines, from 1.
        offset: The place of the first byte in the file.
    """

    path: str
    name: str
    content: bytes
    line: int
    offset: int

    def rows(self) -> Iterator[Row]:
        """Parses the lines that are not blank.

        Raises:
            UserError: If a line cannot be parsed or is not an object; the message names it.
        """
        offset = self.offset
        for line, raw in enumerate(self.content.split(b"\n"), self.line):
            text = decoded(raw, self.path, line, offset)
            offset += len(raw) + 1
            if text.strip():
                where = f"{self.path}:{line}"
                yield _row(_parsed_line(text, where), where, f"{self.name}:{line}")


class ElementChunk(NamedTuple):
    """Holds some elements of a file with one JSON array.

    Attributes:
        path: The file's path, for error messages.
        name: The file's name in the source of a record.
        elements: For each element the number of its first line, from 1, and its text.
        index: The place of the first of these elements in the array, from 0.
    """

    path: str
    name: str
    elements: list[tuple[int, str]]
    index: int  # type: ignore[assignment]  # hides tuple.index, which no chunk needs

    def rows(self) -> Iterator[Row]:
        """Parses the elements of the array as JSON objects, one after the other.

        Raises:
            UserError: If an element cannot be used or is not an object; the message names its line.
        """
        for index, (line, text) in enumerate(self.elements, self.index):
            where = f"{self.path}:{line}"
            try:
                value = parse_json(text)
            except ValueError as error:
                raise UserError(f"{where}: not usable JSON: {error}") from error
            yield _row(value, f"{where} (record {index})", f"{self.name}[{index}]")


class RecordChunk(NamedTuple):
    """Holds some records that need not be parsed: of a Parquet file, a data set or the built-in corpus.

    Attributes:
        where: What stands before and after the number of a record, for error messages.
        name: The same in the source of a record.
        records: The records.
        first: The number of the first of these records.
    """

    where: tuple[str, str]
    name: tuple[str, str]
    records: list[Any]
    first: int

    def rows(self) -> Iterator[Row]:
        """Gives the records their places.

        Raises:
            UserError: If a record is not an object.
        """
        for number, record in enumerate(self.records, self.first):
            where, source = (str(number).join(around) for around in (self.where, self.name))
            yield _row(record, where, source)


Chunk = LineChunk | ElementChunk | RecordChunk
"""A piece of an input. It can be pickled; `rows` yields its records in their order."""


def decoded(raw: bytes, path: str, line: int, offset: int) -> str:
    """Decodes UTF-8; the bytes begin at line `line` and byte `offset` of the file, which an error names.

    Raises:
        UserError: If the bytes are not UTF-8.
    """
    try:
        return raw.decode()
    except UnicodeDecodeError as error:
        raise not_utf8(error, path, line, offset) from error


def not_utf8(error: UnicodeDecodeError, path: str, line: int, offset: int) -> UserError:
    """Returns the error about bytes that are not UTF-8 and begin at line `line` and byte `offset` of the file."""
    line += error.object.count(b"\n", 0, error.start)
    return UserError(
        f"{path}:{line}: not UTF-8: byte 0x{error.object[error.start]:02x} at offset {offset + error.start} of the file; "
        "convert it (iconv -t UTF-8)"
    )


def json_type(value: Any) -> str:
    """Names the JSON type of a value for an error message, as in "a number"."""
    if value is None or value == []:
        return "null" if value is None else "an empty list"
    names = {bool: "a boolean", int: "a number", float: "a number", str: "a string", list: "a list", dict: "an object"}
    return names.get(type(value), f"a {type(value).__name__}")


def _row(value: Any, where: str, source: str) -> Row:
    if not isinstance(value, dict):
        raise UserError(f"{where}: a JSON object is expected, not {json_type(value)}")
    return Row(value, where, source)


def _parsed_line(text: str, where: str) -> Any:
    try:
        value = parse_json(text)
    except json.JSONDecodeError as error:
        raise UserError(
            f"{where}: not JSON at column {error.colno}: {error.msg}; one JSON object a line is expected"
        ) from error
    except ValueError as error:
        raise UserError(f"{where}: not usable JSON: {error}") from error
    return value
