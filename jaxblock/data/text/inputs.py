"""Opens files and data sets, and gives their records in chunks as often as they are wanted.

No input is held in memory whole, so that files larger than the memory can be prepared.
"""

from __future__ import annotations

import abc
import functools
import itertools
import os
import pathlib
from collections.abc import Iterator, Sequence
from io import BufferedIOBase
from typing import Any

from jaxblock.data.text.files import is_gzip, is_pipe, opened, temporary_copy
from jaxblock.data.text.hub_data import HUB, load_table
from jaxblock.data.text.json_array import element_chunks
from jaxblock.data.text.rows import CHUNK, Chunk, LineChunk, RecordChunk, Row
from jaxblock.errors import UserError, install_command
from jaxblock.io.files import sha256
from jaxblock.io.paths import explained
from jaxblock.io.remote import local_file

_BYTE_ORDER_MARK = b"\xef\xbb\xbf"
_PARQUET = b"PAR1"
_RECORDS = 1000  # of a Parquet file or a data set, in a chunk
_BYTES_OF_A_RECORD = 1000  # a guess, for data sets


class Input(abc.ABC):
    """Is a file, a data set or the built-in corpus, from which records are read.

    Attributes:
        path: The input as the settings name it.
        size: Its size in bytes, or a guess.
    """

    path: str
    size: int

    @functools.cached_property
    def sha256(self) -> str | None:
        """The hash, in hexadecimal, of the bytes that the records are parsed from; None where there is no file."""
        return None

    @abc.abstractmethod
    def chunks(self) -> Iterator[Chunk]:
        """Yields the pieces of the input in their order; can be called again.

        Raises:
            UserError: If the input cannot be read.
        """


def open_input(path: str, split: str, name: str | None = None) -> Input:
    """Opens a file or a data set.

    Args:
        path: A file, local or gs://, or a pipe: Parquet, one JSON array, or JSON lines, as its content says, compressed by
            gzip or not; or "hf:NAME[@REVISION][:CONFIG][#SPLIT]", where NAME may be a local folder that `datasets` can read.
        split: The split to read of a data set whose path does not name one.
        name: A file's name in the sources of its records; None for the last part of its path.

    Raises:
        UserError: If the input is missing or cannot be read, or a library is not installed.
    """
    return _Table(path, split) if path.startswith(HUB) else _File(path, name or os.path.basename(path))


def read_rows(path: str, split: str) -> Iterator[Row]:
    """Yields the records of a file or a data set, one after another.

    Args:
        path: A file or a data set, as `open_input` accepts it.
        split: The split to read of a data set whose path does not name one.

    Raises:
        UserError: If the input cannot be read, is not UTF-8 (the message gives the byte's offset) or is not JSON (it gives the
            line), or a record is not an object.
    """
    return itertools.chain.from_iterable(chunk.rows() for chunk in open_input(path, split).chunks())


class _File(Input):
    """Reads a file. A pipe is copied to a temporary file, since it can be read only once."""

    def __init__(self, path: str, name: str) -> None:
        self.path, self._name = path, name
        self._copies = []
        if is_pipe(path):
            with explained("read", path), open(path, "rb") as pipe:
                self._copies.append(temporary_copy(path, pipe))
            self._local = pathlib.Path(self._copies[0].name)
        else:
            self._local = local_file(path)
        self._state = self._found()
        self.size = self._state[0]

    @functools.cached_property
    def sha256(self) -> str:
        """The hash of the stored bytes."""
        found = sha256(self._local)
        self._check_unchanged()
        return found

    def chunks(self) -> Iterator[Chunk]:
        """Yields the pieces of the file, whose content says what it is."""
        self._check_unchanged()
        begin = self._begin()
        if begin.startswith(_PARQUET) or self.path.endswith(".parquet"):
            yield from self._parquet()
        else:
            with opened(self.path, self._local) as stream:
                skipped = len(_BYTE_ORDER_MARK) if begin.startswith(_BYTE_ORDER_MARK) else 0
                stream.read(skipped)
                is_array = begin[skipped:].lstrip().startswith(b"[")
                yield from (
                    element_chunks(stream, self.path, self._name, skipped) if is_array else self._lines(stream, skipped)
                )
        self._check_unchanged()

    def _begin(self) -> bytes:
        """Returns the first bytes of the file, so many that not all of them are blank."""
        with opened(self.path, self._local) as stream:
            begin = stream.read(CHUNK)
            mark = _BYTE_ORDER_MARK if begin.startswith(_BYTE_ORDER_MARK) else b""
            while not begin[len(mark) :].strip() and (more := stream.read(CHUNK)):
                begin = mark + more
        return begin

    def _lines(self, stream: BufferedIOBase, offset: int) -> Iterator[LineChunk]:
        line = 1
        while content := stream.read(CHUNK):
            content += stream.readline()
            yield LineChunk(self.path, self._name, content, line, offset)
            line, offset = line + content.count(b"\n"), offset + len(content)

    def _parquet(self) -> Iterator[RecordChunk]:
        try:
            import pyarrow.parquet
        except ImportError as error:
            raise UserError(
                f"{self.path}: Parquet needs the pyarrow library: {install_command('pyarrow')}, or give JSON lines"
            ) from error
        if is_gzip(self.path, self._local) and len(self._copies) < 2:
            with opened(self.path, self._local) as stream:
                self._copies.append(temporary_copy(self.path, stream))
        plain = self._copies[-1].name if is_gzip(self.path, self._local) else self._local
        index = 0
        try:
            with pyarrow.parquet.ParquetFile(plain) as file:
                for batch in file.iter_batches(_RECORDS):
                    yield RecordChunk((f"{self.path}[", "]"), (f"{self._name}[", "]"), batch.to_pylist(), index)
                    index += len(batch)
        except (pyarrow.ArrowException, OSError) as error:
            raise UserError(f"{self.path}: not readable as Parquet ({error})") from error

    def _found(self) -> tuple[int, int]:
        with explained("read", self.path):
            found = os.stat(self._local)
        return found.st_size, found.st_mtime_ns

    def _check_unchanged(self) -> None:
        """Raises UserError where the file has changed since it was opened: its hash would be of something else."""
        if self._found() != self._state:
            raise UserError(f"{self.path} was changed while it was read: prepare again when nothing writes to it")


class _Table(Input):
    """Reads a data set of the `datasets` library."""

    def __init__(self, path: str, split: str) -> None:
        self.path, self._table = path, load_table(path, split)
        self.size = _BYTES_OF_A_RECORD * len(self._table.rows)

    def chunks(self) -> Iterator[RecordChunk]:
        """Yields some records at a time."""
        rows, index = iter(self._table.rows), 0
        while records := [_as_dict(row) for row in itertools.islice(rows, _RECORDS)]:
            yield RecordChunk((f"{self._table.where}[", "]"), (f"{self._table.name}[", "]"), records, index)
            index += len(records)


def _as_dict(row: Any) -> Any:
    return dict(row) if hasattr(row, "keys") else row


def distinct_names(paths: Sequence[str]) -> list[str]:
    """Returns the shortest ends of paths, cut between folders, that tell the paths from each other."""
    parts = [path.split("/") for path in paths]
    for count in range(1, max(map(len, parts)) + 1):
        names = ["/".join(some[-count:]) for some in parts]
        if len(set(names)) == len(names):
            return names
    return list(paths)
