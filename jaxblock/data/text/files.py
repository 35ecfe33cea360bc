"""Reads records, each with its place, from files (JSON lines, JSON arrays, Parquet) and data sets of the `datasets` library."""

from __future__ import annotations

import bisect
import gzip
import hashlib
import json
import os
import re
import stat
import zlib
from collections.abc import Iterator
from typing import Any, NamedTuple

from jaxblock.errors import UserError
from jaxblock.io.files import read_bytes
from jaxblock.io.json_text import DECODER, parse_json

HUB = "hf:"
_HUB_NAME = re.compile(
    r"hf:(?P<name>[^@:#]+)(@(?P<revision>[^@:#]+))?(:(?P<config>[^@:#]+))?(#(?P<split>[^#]+))?", re.ASCII
)
_BLANK = re.compile(r"[ \t\r\n]*")
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"
_GZIP, _PARQUET = b"\x1f\x8b", b"PAR1"
_COMPRESSED = {
    b"\x28\xb5\x2f\xfd": ("Zstandard", "zstd -d"),
    b"\xfd7zXZ\x00": ("xz", "xz -d"),
    b"BZh": ("bzip2", "bzip2 -d"),
    b"PK\x03\x04": ("zip", "unzip"),
}


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


class Rows(NamedTuple):
    """Holds the records of a file or a data set.

    Attributes:
        rows: The records in their order; they are parsed one by one, and an error names the place of the first bad one.
        sha256: The hash, in hexadecimal, of the bytes that the records are parsed from; None for a data set.
    """

    rows: Iterator[Row]
    sha256: str | None


def read_rows(path: str, split: str) -> Rows:
    """Reads the records of a file, once, or of a data set.

    Args:
        path: A file, local or gs://, or a pipe: Parquet, one JSON array, or JSON lines, as its content says, compressed by
            gzip or not; or "hf:NAME[@REVISION][:CONFIG][#SPLIT]", where NAME may be a local folder that `datasets` can read.
        split: The split to read of a data set whose path does not name one.

    Returns:
        The rows, whose places are line numbers (JSON lines) or indices from 0 (all other kinds), and the bytes' hash.

    Raises:
        UserError: If the file is missing, is not UTF-8 (the message gives the byte's offset) or is not JSON (it gives the
            line), a record is not an object, or a library is not installed.
    """
    if path.startswith(HUB):
        return Rows(_dataset(path, split), None)
    stored = read_bytes(path)
    content = decompressed(path, stored)
    bare = content.removeprefix(_BYTE_ORDER_MARK).lstrip()
    if content.startswith(_PARQUET) or path.endswith(".parquet"):
        rows = _parquet(path, content)
    elif bare.startswith(b"["):
        rows = _json_array(path, content)
    else:
        rows = _json_lines(path, content)
    return Rows(rows, hashlib.sha256(stored).hexdigest())


def decompressed(path: str, content: bytes) -> bytes:
    """Returns the bytes of a gzip file without the compression, and other bytes as they are.

    Raises:
        UserError: If the file is cut off or damaged, or is compressed in another way.
    """
    for begin, (name, tool) in _COMPRESSED.items():
        if content.startswith(begin):
            raise UserError(f"{path} is compressed by {name}: decompress it first ({tool}), or give gzip")
    if not content.startswith(_GZIP):
        return content
    try:
        return gzip.decompress(content)
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{path} is a gzip file that is cut off or damaged ({error})") from error


def is_pipe(path: str) -> bool:
    """Tells whether a path names a pipe or a device, whose bytes can be read only once."""
    try:
        mode = os.stat(path).st_mode
    except (OSError, ValueError):
        return False
    return not (stat.S_ISREG(mode) or stat.S_ISDIR(mode))


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


def _json_lines(path: str, content: bytes) -> Iterator[Row]:
    name = os.path.basename(path)
    offset = len(_BYTE_ORDER_MARK) if content.startswith(_BYTE_ORDER_MARK) else 0
    for line, raw in enumerate(content[offset:].split(b"\n"), 1):
        text = _decoded(raw, path, line, offset)
        offset += len(raw) + 1
        if text.strip():
            where = f"{path}:{line}"
            yield _row(_parsed_line(text, where), where, f"{name}:{line}")


def _decoded(raw: bytes, path: str, line: int, offset: int) -> str:
    """Decodes UTF-8; the bytes begin at line `line` and byte `offset` of the file, which an error names."""
    try:
        return raw.decode()
    except UnicodeDecodeError as error:
        line += raw.count(b"\n", 0, error.start)
        raise UserError(
            f"{path}:{line}: not UTF-8: byte 0x{raw[error.start]:02x} at offset {offset + error.start} of the file; "
            "convert it (iconv -t UTF-8)"
        ) from error


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


def _json_array(path: str, content: bytes) -> Iterator[Row]:
    """Yields the elements of a JSON array; they are parsed one by one, so that an error can name the element's line."""
    start = len(_BYTE_ORDER_MARK) if content.startswith(_BYTE_ORDER_MARK) else 0
    text = _decoded(content[start:], path, 1, start)
    line_ends = [found.start() for found in re.finditer("\n", text)]

    def place(at: int) -> str:
        return f"{path}:{1 + bisect.bisect_left(line_ends, at)}"

    name, parse, index = os.path.basename(path), DECODER.raw_decode, 0
    at = _after_blanks(text, text.index("[") + 1)
    while text[at : at + 1] != "]":
        where = place(at)
        try:
            value, at = parse(text, at)
        except json.JSONDecodeError as error:
            raise UserError(f"{path}:{error.lineno}: not JSON at column {error.colno}: {error.msg}") from error
        except (ValueError, RecursionError) as error:
            raise UserError(f"{where}: not usable JSON: {error}") from error
        yield _row(value, f"{where} (record {index})", f"{name}[{index}]")
        at = _after_blanks(text, at)
        if text[at : at + 1] not in (",", "]"):
            found = repr(text[at]) if at < len(text) else "the file ends"
            raise UserError(f"{place(at)}: not a JSON array: a comma or ] must follow record {index}, but {found}")
        at = _after_blanks(text, at + (text[at] == ","))
        index += 1
    rest = _after_blanks(text, at + 1)
    if rest < len(text):
        raise UserError(f"{place(rest)}: more follows the end of the JSON array")


def _after_blanks(text: str, at: int) -> int:
    found = _BLANK.match(text, at)
    return found.end() if found else at


def _parquet(path: str, content: bytes) -> Iterator[Row]:
    try:
        import pyarrow.parquet
    except ImportError as error:
        raise UserError(
            f"{path}: Parquet needs the pyarrow library: pip install pyarrow, or give JSON lines"
        ) from error
    name, index = os.path.basename(path), 0
    try:
        with pyarrow.parquet.ParquetFile(pyarrow.BufferReader(content)) as file:
            for batch in file.iter_batches():
                for value in batch.to_pylist():
                    yield _row(value, f"{path}[{index}]", f"{name}[{index}]")
                    index += 1
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(f"{path}: not readable as Parquet ({error})") from error


def _dataset(path: str, split: str) -> Iterator[Row]:
    found = _HUB_NAME.fullmatch(path)
    if found is None:
        raise UserError(
            f"{path!r} names no data set: write hf:NAME[@REVISION][:CONFIG][#SPLIT], as in hf:openai/gsm8k:main#train"
        )
    name, split = found["name"], found["split"] or split
    try:
        import datasets
    except ImportError as error:
        raise UserError(
            f"{path} needs the datasets library: pip install datasets, or download the files and give their path"
        ) from error
    try:
        table = datasets.load_dataset(name, found["config"], split=split, revision=found["revision"])
    except Exception as error:  # the library raises its own exceptions and those of several network libraries
        first = next(iter(str(error).splitlines()), "")
        raise UserError(
            f"cannot load {path} (split {split!r}) through the datasets library: {type(error).__name__}: {first}. Without "
            "a network, download the files elsewhere and give their path"
        ) from error
    folder = name.rstrip("/").split("/")[-1]
    for index, record in enumerate(table):
        yield Row(dict(record), f"{path} (split {split}) [{index}]", f"{folder}/{split}[{index}]")
