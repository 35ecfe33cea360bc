"""Reads a file with one JSON array piece by piece, so that it need not fit in memory."""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Iterator
from io import BufferedIOBase

from jaxblock.data.text.rows import CHUNK, ElementChunk, not_utf8
from jaxblock.errors import UserError

_BLANK = re.compile(r"[ \t\r\n]*")
_SCANNER = json.JSONDecoder()  # finds where an element ends; `ElementChunk.rows` parses it and checks its names
# An error this close to the end of what was read may be due to the end alone; "-Infinity" is the longest word of JSON.
_NEAR_END = 16


def element_chunks(stream: BufferedIOBase, path: str, name: str, offset: int) -> Iterator[ElementChunk]:
    """Reads the elements of a JSON array.

    Args:
        stream: The file, after its byte-order mark.
        path: The file's path, for error messages.
        name: The file's name in the source of a record.
        offset: The number of bytes before the stream's place.

    Raises:
        UserError: If the file is not a JSON array in UTF-8; the message names the line.
    """
    text, index, size = _Text(stream, path, offset), 0, 0
    found: list[tuple[int, str]] = []
    text.skip_blanks()
    text.at += 1  # the bracket
    text.skip_blanks()
    while text.letter() != "]":
        found.append((text.line(), text.element()))
        size += len(found[-1][1])
        text.skip_blanks()
        if text.letter() not in (",", "]"):
            what = repr(text.letter()) if text.letter() else "the file ends"
            at = index + len(found) - 1
            raise UserError(f"{path}:{text.line()}: not a JSON array: a comma or ] must follow record {at}, but {what}")
        if text.letter() == ",":
            text.at += 1
            text.skip_blanks()
        if size >= CHUNK:
            yield ElementChunk(path, name, found, index)
            index, size, found = index + len(found), 0, []
    if found:
        yield ElementChunk(path, name, found, index)
    text.at += 1
    text.skip_blanks()
    if text.letter():
        raise UserError(f"{path}:{text.line()}: more follows the end of the JSON array")


class _Text:
    """Holds the part of a file's text that is being read, and knows its place in the file."""

    def __init__(self, stream: BufferedIOBase, path: str, offset: int) -> None:
        self._stream, self._path, self._offset = stream, path, offset
        self._decoder = codecs.getincrementaldecoder("utf-8")()
        self._buffer, self._ended = "", False
        self.at = 0
        """The place in the buffer that is read next."""
        # The line that letter `_counted` of the buffer is in, and how many letters of the buffer's first line were dropped.
        self._line, self._counted, self._dropped = 1, 0, 0

    def letter(self) -> str:
        """Returns the next letter; empty at the end of the file."""
        return self._buffer[self.at : self.at + 1]

    def line(self) -> int:
        """Returns the number of the line that is being read, from 1."""
        self._line += self._buffer.count("\n", self._counted, self.at)
        self._counted = self.at
        return self._line

    def skip_blanks(self) -> None:
        """Goes on to the next letter that is not blank, or to the end of the file."""
        while True:
            blanks = _BLANK.match(self._buffer, self.at)
            self.at = blanks.end() if blanks else self.at
            if self.at < len(self._buffer) or self._ended:
                return
            self._read_on()

    def element(self) -> str:
        """Returns the text of the JSON value that begins here, and goes on to its end."""
        while True:
            try:
                _, end = _SCANNER.raw_decode(self._buffer, self.at)
            except json.JSONDecodeError as error:
                cut_off = error.msg.startswith("Unterminated") or error.pos > len(self._buffer) - _NEAR_END
                if cut_off and not self._ended:
                    self._read_on()
                    continue
                line, column = self._place_of(error.pos)
                raise UserError(f"{self._path}:{line}: not JSON at column {column}: {error.msg}") from error
            except (ValueError, RecursionError) as error:
                raise UserError(f"{self._path}:{self.line()}: not usable JSON: {error}") from error
            text, self.at = self._buffer[self.at : end], end
            return text

    def _place_of(self, at: int) -> tuple[int, int]:
        """Returns the line and the column of a place after the one that is being read."""
        line_start = self._buffer.rfind("\n", 0, at) + 1
        return self.line() + self._buffer.count("\n", self.at, at), 1 + at - line_start + (
            0 if line_start else self._dropped
        )

    def _read_on(self) -> None:
        """Drops what was read before, and reads at least as much as is left."""
        self.line()
        last = self._buffer.rfind("\n", 0, self.at)
        self._dropped = self.at - last - 1 if last >= 0 else self._dropped + self.at
        rest = self._buffer[self.at :]
        content = self._stream.read(max(CHUNK, len(rest)))
        begun = len(self._decoder.getstate()[0])  # bytes of a letter that the last piece had only the beginning of
        try:
            more = self._decoder.decode(content, final=not content)
        except UnicodeDecodeError as error:
            line = self._line + rest.count("\n")
            raise not_utf8(error, self._path, line, self._offset - begun) from error
        self._offset += len(content)
        self._buffer, self.at, self._counted, self._ended = rest + more, 0, 0, not content
