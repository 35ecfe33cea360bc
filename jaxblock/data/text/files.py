"""Rows of record files: JSON lines, a JSON array, Parquet, or a data set of the `datasets` library, each with its place."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from typing import Any, NamedTuple

from jaxblock.errors import UserError
from jaxblock.io.files import read_bytes, sha256
from jaxblock.io.remote import local_file

HUB = "hf:"
_HUB_NAME = re.compile(
    r"hf:(?P<name>[^@:#]+)(@(?P<revision>[^@:#]+))?(:(?P<config>[^@:#]+))?(#(?P<split>[^#]+))?", re.ASCII
)
_BLANK = re.compile(r"[ \t\r\n]*")


class Row(NamedTuple):
    """One record as it stands.

    Attributes:
        value: Its fields; anything but a dict is for the reader to refuse.
        where: Path and place, for error messages.
        source: File name and place, for the prepared record.
    """

    value: Any
    where: str
    source: str


def rows(path: str, split: str) -> Iterator[Row]:
    """Reads records.

    Args:
        path: A file, local or gs://: Parquet (.parquet), JSON (.json: one array, or lines) or JSON lines (anything else);
            or "hf:NAME[@REVISION][:CONFIG][#SPLIT]", where NAME may be a local folder that `datasets` can read.
        split: The data set's split where the path names none.

    Yields:
        Rows, named by line (JSON lines) or by index from 0 (the rest).

    Raises:
        UserError: For what is missing, is not UTF-8 (with the byte's offset) or is not JSON (with the line), and for a
            library that is not installed.
    """
    if path.startswith(HUB):
        return _dataset(path, split)
    if path.endswith(".parquet"):
        return _parquet(path)
    content = read_bytes(path)
    bare = content.removeprefix(b"\xef\xbb\xbf").lstrip()
    if path.endswith(".json") and bare.startswith(b"["):
        return _array(path, content)
    return _json_lines(path, content)


def digest(path: str) -> str | None:
    """SHA-256 of a file's bytes; None for a data set, which has no file of its own."""
    return None if path.startswith(HUB) else sha256(path)


def _json_lines(path: str, content: bytes) -> Iterator[Row]:
    name = os.path.basename(path)
    offset = 3 if content.startswith(b"\xef\xbb\xbf") else 0  # a byte-order mark
    for line, raw in enumerate(content[offset:].split(b"\n"), 1):
        text = _decoded(raw, path, line, offset)
        offset += len(raw) + 1
        if text.strip():
            yield Row(_parsed(text, f"{path}:{line}"), f"{path}:{line}", f"{name}:{line}")


def _decoded(raw: bytes, path: str, line: int, offset: int) -> str:
    try:
        return raw.decode()
    except UnicodeDecodeError as error:
        line += raw.count(b"\n", 0, error.start)
        raise UserError(
            f"{path}:{line}: not UTF-8: byte 0x{raw[error.start]:02x} at offset {offset + error.start} of the file; "
            "convert it (iconv -t UTF-8)"
        ) from error


def _parsed(text: str, where: str) -> Any:
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise UserError(
            f"{where}: not JSON at column {error.colno}: {error.msg}; one JSON object a line is expected"
        ) from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: not usable JSON: {error}") from error
    if isinstance(value, list):
        raise UserError(
            f"{where}: a JSON object is expected, not a list; a file that is one JSON array must end in .json, or be split into lines"
        )
    return value


def _array(path: str, content: bytes) -> Iterator[Row]:
    """The elements one after another, so that an error names the line of its element."""
    bom = 3 if content.startswith(b"\xef\xbb\xbf") else 0
    text = _decoded(content[bom:], path, 1, bom)
    name, read, line, seen, index = os.path.basename(path), json.JSONDecoder().raw_decode, 1, 0, 0
    at = text.index("[") + 1
    while True:
        at = _after_blanks(text, at)
        if text[at : at + 1] == "]":
            break
        line, seen = line + text.count("\n", seen, at), at
        where = f"{path}:{line}"
        try:
            value, at = read(text, at)
        except json.JSONDecodeError as error:
            raise UserError(f"{path}:{error.lineno}: not JSON at column {error.colno}: {error.msg}") from error
        except (ValueError, RecursionError) as error:
            raise UserError(f"{where}: not usable JSON: {error}") from error
        yield Row(value, f"{where} (record {index})", f"{name}[{index}]")
        index += 1
        at = _after_blanks(text, at)
        if text[at : at + 1] not in (",", "]"):
            line += text.count("\n", seen, at)
            found = repr(text[at]) if at < len(text) else "the file ends"
            raise UserError(
                f"{path}:{line}: not a JSON array: a comma or ] must follow record {index - 1}, but {found}"
            )
        at += text[at] == ","
    rest = _after_blanks(text, at + 1)
    if rest < len(text):
        raise UserError(f"{path}:{1 + text.count(chr(10), 0, rest)}: more follows the end of the JSON array")


def _after_blanks(text: str, at: int) -> int:
    found = _BLANK.match(text, at)
    return found.end() if found else at


def _parquet(path: str) -> Iterator[Row]:
    try:
        import pyarrow.parquet
    except ImportError as error:
        raise UserError(
            f"{path}: Parquet needs the pyarrow library: pip install pyarrow, or give JSON lines"
        ) from error
    name, index = os.path.basename(path), 0
    local = local_file(path)
    if not local.exists():
        raise UserError(f"cannot read {path}: there is no such file")
    try:
        with pyarrow.parquet.ParquetFile(local) as file:
            for batch in file.iter_batches():
                for value in batch.to_pylist():
                    yield Row(value, f"{path}[{index}]", f"{name}[{index}]")
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
    except Exception as error:  # the library raises many kinds, its own and those of the network
        first = next(iter(str(error).splitlines()), "")
        raise UserError(
            f"cannot load {path} (split {split!r}) through the datasets library: {type(error).__name__}: {first}. Without "
            "a network, download the files elsewhere and give their path"
        ) from error
    for index, value in enumerate(table):
        yield Row(
            dict(value), f"{path} (split {split}) [{index}]", f"{name.rstrip('/').split('/')[-1]}/{split}[{index}]"
        )
