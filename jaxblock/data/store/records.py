"""Reads and writes prepared records (one tokenised prompt and response each) in ArrayRecord files with random access."""

from __future__ import annotations

import contextlib
import json
import pathlib
import struct
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, SupportsIndex, overload

import numpy as np
from array_record.python.array_record_data_source import ArrayRecordDataSource
from array_record.python.array_record_module import ArrayRecordWriter

from jaxblock.errors import UserError
from jaxblock.io.inventory import check_file
from jaxblock.io.paths import PathLike, as_path
from jaxblock.io.remote import local_file

_HEADER = struct.Struct("<6I")  # index, numbers of prompt and response ids, numbers of bytes of the three texts
_INDEX = struct.Struct("<I")  # the first of them
# Files up to this many bytes are kept in memory: a random read takes 0.1 ms, longer than all other work on a row.
_KEEP_IN_MEMORY = 64 << 20


@dataclass(frozen=True)
class Record:
    """Holds one supervised response and the prompt that it answers.

    Attributes:
        prompt_ids: The prompt's ids, int32 [prompt tokens], with all that the template puts before the response.
        response_ids: The response's ids, int32 [response tokens]: the text and its terminator (a response that was cut has
            none), without fill.
        prompt: The question as the record has it, without the template.
        response: The answer as the record has it, without the template.
        source: The place the record came from, as in "train.jsonl:17".
        index: The record's place in its split, from 0.
        fields_json: The record's other fields as JSON; empty where it has none.
    """

    prompt_ids: np.ndarray
    response_ids: np.ndarray
    prompt: str
    response: str
    source: str
    index: int
    fields_json: str = ""

    @property
    def fields(self) -> dict[str, Any]:
        """The record's other fields, as its line in the user's file has them; empty where it has none."""
        return json.loads(self.fields_json) if self.fields_json else {}


def encode_record(record: Record) -> bytes:
    """Returns a record as bytes, from which `decode_record` reads it."""
    prompt_ids = np.ascontiguousarray(record.prompt_ids, "<i4")
    response_ids = np.ascontiguousarray(record.response_ids, "<i4")
    texts = [text.encode() for text in (record.prompt, record.response, record.source)]
    header = _HEADER.pack(record.index, len(prompt_ids), len(response_ids), *map(len, texts))
    # An object of JSON shows where it ends, so that a record without other fields has the same bytes as ever.
    return b"".join([header, prompt_ids.tobytes(), response_ids.tobytes(), *texts, record.fields_json.encode()])


def decode_record(content: bytes) -> Record:
    """Reads a record from the bytes that `encode_record` wrote.

    Raises:
        ValueError: If the bytes are not exactly one record.
    """
    index, n_prompt, n_response, *sizes = _HEADER.unpack_from(content)
    end = _HEADER.size + 4 * (n_prompt + n_response)
    fields = content[end + sum(sizes) :]
    if end + sum(sizes) > len(content) or fields and not (fields.startswith(b"{") and fields.endswith(b"}")):
        raise ValueError(f"{len(content)} bytes hold no record of {end + sum(sizes)} bytes")
    ids = np.frombuffer(content, "<i4", n_prompt + n_response, _HEADER.size).astype(np.int32)
    texts = []
    for size in sizes:
        texts.append(content[end : end + size].decode())
        end += size
    return Record(ids[:n_prompt], ids[n_prompt:], texts[0], texts[1], texts[2], index, fields.decode())


def records_file(folder: PathLike, split: str) -> str:
    """Returns the path of a split's file in a prepared folder."""
    return str(as_path(folder) / f"{split}.array_record")


def with_index(content: bytes, index: int) -> bytes:
    """Returns the bytes of a record with another place in its split."""
    return _INDEX.pack(index) + content[_INDEX.size :]


@contextlib.contextmanager
def record_writer(folder: pathlib.Path, split: str) -> Iterator[Callable[[bytes], None]]:
    """Yields a function that appends the bytes of a record to a split's file, which is made in a local folder.

    Raises:
        UserError: If the file cannot be written; it may then hold a part of the records.
    """
    path = records_file(folder, split)
    try:
        writer = ArrayRecordWriter(path, "group_size:1")  # so that a random read decompresses one record only
        yield writer.write
        writer.close()
    except RuntimeError as error:
        raise UserError(f"cannot write {path}: {error}") from error


class Records(Sequence[Record]):
    """Gives random access to a split's records. Threads may share it, and worker processes may unpickle it."""

    def __init__(self, folder: PathLike, split: str) -> None:
        """Opens a split ("train", "validation" or "test") of a prepared folder.

        Raises:
            UserError: If the split's file is absent, damaged, or not the one that was prepared.
        """
        self.path = records_file(folder, split)
        if not as_path(self.path).exists():
            raise UserError(
                f"{self.path} does not exist: the prepared data have no split {split!r}; run `jaxblock prepare` first"
            )
        self._local = local_file(self.path)
        check_file(folder, as_path(self.path).name, self._local)
        self._open()

    def _open(self) -> None:
        local = self._local
        try:
            self._source = ArrayRecordDataSource(str(local))
            small = local.stat().st_size <= _KEEP_IN_MEMORY
            self._memory = self._source.__getitems__(range(len(self._source))) if small and len(self._source) else None
        except (RuntimeError, ValueError) as error:
            raise UserError(f"{self.path} is damaged: run `jaxblock prepare` again ({error})") from error

    def __len__(self) -> int:
        return len(self._source)

    @overload
    def __getitem__(self, index: SupportsIndex) -> Record: ...

    @overload
    def __getitem__(self, index: slice) -> list[Record]: ...

    def __getitem__(self, index: SupportsIndex | slice) -> Record | list[Record]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        return decode_record(self._bytes(index))

    def lengths(self, every: int = 1) -> np.ndarray:
        """Returns the number of tokens of each prompt and each response, int32 [records, 2].

        Args:
            every: Reads each record (1), each second one (2), ...
        """
        places = range(0, len(self), every)
        return np.array([_HEADER.unpack_from(self._bytes(i))[1:3] for i in places], np.int32).reshape(-1, 2)

    def _bytes(self, index: SupportsIndex) -> bytes:
        i = index.__index__()
        if not -len(self) <= i < len(self):
            raise IndexError(f"record {i} of {len(self)} in {self.path}")
        return self._source[i % len(self)] if self._memory is None else self._memory[i]

    def __getstate__(self) -> dict[str, Any]:
        return {"path": self.path, "local": self._local}  # so that a worker process does not download the file again

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.path, self._local = state["path"], state["local"]
        self._open()
