"""Reads what `decode` is given: prompts, or texts whose spans are to be filled."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator, Sequence

from jaxblock.commands import say
from jaxblock.data.config import DataConfig
from jaxblock.data.text.examples import Prompt
from jaxblock.data.text.files import decompressed
from jaxblock.data.text.marked import MarkedText, parts_of
from jaxblock.errors import UserError
from jaxblock.io.files import read_bytes
from jaxblock.io.json_text import parse_json

RECORDS = (".jsonl", ".ndjson", ".json", ".parquet")
"""The suffixes of files that hold records, whether in capitals or not; any other file has one prompt or text per line."""

_BYTE_ORDER_MARK = b"\xef\xbb\xbf"


def read_prompts(given: Sequence[str], file: str | None, data: DataConfig) -> Iterator[tuple[str, Prompt]]:
    """Yields (origin, prompt) of every prompt, from the command line, a file or standard input."""
    if not given and file is not None and _has_records(file):
        from jaxblock.data.text.examples import read_prompts as of_records
        from jaxblock.data.text.recipes import with_recipe

        yield from of_records(file, with_recipe(data))
    else:
        yield from _texts(given, file, "prompt")


def read_texts(given: Sequence[str], file: str | None, data: DataConfig) -> Iterator[tuple[str, MarkedText]]:
    """Yields (origin, text) of every text with spans, from the command line, a file or standard input."""
    if not given and file is not None and _has_records(file):
        from jaxblock.data.text.marked import read_marked
        from jaxblock.data.text.recipes import with_recipe

        yield from read_marked(file, with_recipe(data))
    else:
        for where, text in _texts(given, file, "text"):
            yield where, MarkedText(parts_of(text, where), None)


def _has_records(file: str) -> bool:
    return _plain_name(file).endswith(RECORDS)


def _plain_name(file: str) -> str:
    return file.lower().removesuffix(".gz")


def _texts(given: Sequence[str], file: str | None, kind: str) -> Iterator[tuple[str, str]]:
    """Yields (origin, text) of the arguments, or of the lines of a file or of standard input."""
    if given:
        yield from ((f"{kind} {at}", text) for at, text in enumerate(given, 1))
    elif file is None:
        if sys.stdin is None:  # the caller closed it (`<&-`)
            raise UserError(
                f"standard input is closed, so there are no {kind}s: leave it open, or give some on the command line or by --file"
            )
        if sys.stdin.isatty():
            say(f"reading {kind}s from standard input, one a line; end with Ctrl-D")
        yield from _lines("standard input", sys.stdin.buffer.read())
    else:
        content = decompressed(file, read_bytes(file))
        if not _plain_name(file).endswith(".txt") and _looks_like_records(content):
            raise UserError(
                f"{file} looks like records, and its name does not say so: end it in one of {', '.join(RECORDS)} for the {kind}s in "
                f"their fields, or in .txt for each line to be a {kind}"
            )
        yield from _lines(file, content)


def _looks_like_records(content: bytes) -> bool:
    """Says whether content begins as Parquet, an array of JSON objects, or a line with a JSON object does."""
    begin = content.removeprefix(_BYTE_ORDER_MARK).lstrip()
    if begin.startswith(b"PAR1") or re.match(rb"\[\s*\{", begin):
        return True
    try:
        return isinstance(parse_json(begin.partition(b"\n")[0]), dict)
    except ValueError:
        return False


def _lines(name: str, content: bytes) -> Iterator[tuple[str, str]]:
    """Yields (file:line, text) of every line that is not blank."""
    # splitlines would also split at other separators (U+2028, form feed), which a prompt may contain.
    for number, raw in enumerate(content.removeprefix(_BYTE_ORDER_MARK).split(b"\n"), 1):
        where = f"{name}:{number}"
        try:
            line = raw.decode().removesuffix("\r")
        except UnicodeDecodeError as error:
            raise UserError(f"{where}: not UTF-8 text ({error}); convert the file to UTF-8") from error
        if line.strip():
            yield where, line
