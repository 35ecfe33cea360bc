"""Appends to files of JSON lines: one file on a local disk, numbered parts in an object store, which cannot append.

``metrics.jsonl`` in a bucket is ``metrics-000001.jsonl``, ``metrics-000002.jsonl``, ...: each part is written once. A part
named ``metrics-000003-all.jsonl`` holds the lines of all parts before it, so that a long run does not leave thousands of
objects, and a crash between writing it and removing the others neither loses nor repeats a line.
"""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Callable
from typing import Literal

from etils import epath

from jaxblock.errors import UserError
from jaxblock.io.files import write_bytes
from jaxblock.io.paths import PathLike, as_path, explained, is_remote

PERIOD = 60.0
"""The time, in seconds, after which `append` writes the waiting lines as a part."""
MOST_LINES = 1000
"""The number of waiting lines at which a part is written, even before `PERIOD` has passed."""

_LOG = logging.getLogger(__name__)


class JsonlWriter:
    """Appends lines to a file that no other process writes to."""

    def __init__(self, path: PathLike, keep: Callable[[bytes], bool], *, period: float = PERIOD) -> None:
        """Opens the file or makes it; an incomplete last line, left by a process that was killed, is removed.

        Args:
            path: the file's name, local or ``gs://``; in an object store the parts' names are made from it.
            keep: tells whether a line that is in the file already is kept.
            period: the time in seconds between two parts in an object store.

        Raises:
            UserError: the file cannot be read or written.
        """
        self.path = as_path(path)
        self._remote = is_remote(path)
        self._period, self._since = period, time.monotonic()
        self._waiting: list[bytes] = []
        self._begun = 0  # bytes of the first waiting line that were written before the disk was full
        self._number = 0
        with explained("write", self.path):
            there = read_jsonl_bytes(self.path).splitlines(keepends=True)
            kept = [line for line in there if line.endswith(b"\n") and keep(line)]
            if self._remote:
                parts = _parts(self.path)
                self._number = _number(parts[-1]) if parts else 0
                if kept != there:
                    self._merge(kept)
                return
            if kept != there:
                write_bytes(self.path, b"".join(kept), overwrite=True)
            self._write_out()  # makes the file

    def append(self, line: str) -> None:
        """Adds one line. It is written at once to a local disk, and with the next part to an object store.

        Raises:
            UserError: the line cannot be written to a local disk; it waits, and is written with the next line. A failing
                object store raises nothing here: it is tried again with the next part, and only ``close`` raises.
        """
        self._waiting.append((line + "\n").encode())
        if not self._remote:
            with explained("write", self.path):
                self._write_out()
        elif len(self._waiting) >= MOST_LINES or time.monotonic() - self._since >= self._period:
            self.flush()

    def flush(self) -> None:
        """Writes the waiting lines, to an object store as a part. A failure is logged, and the lines go on waiting."""
        try:
            with explained("write", self.path):
                if self._remote:
                    self._write_part()
                else:
                    self._write_out()
        except UserError as error:
            _LOG.warning("%s; the lines wait for the next part", error)

    def waiting(self) -> list[str]:
        """Returns the lines that are not written yet."""
        return [line.decode().removesuffix("\n") for line in self._waiting]

    def close(self) -> None:
        """Writes the waiting lines, and joins the parts in an object store; no file is open between two calls.

        Raises:
            UserError: the lines cannot be written.
        """
        if not self._remote:
            with explained("write", self.path):
                self._write_out()
            return
        self._write_part()
        if len(_parts(self.path)) > 1:
            self._merge(read_jsonl_bytes(self.path).splitlines(keepends=True))

    def _write_out(self) -> None:
        """Writes the waiting lines to a local disk; where a full disk accepts only part of a line, the rest of it waits."""
        with open(self.path, "ab", buffering=0) as file:
            while self._waiting:
                self._begun += file.write(self._waiting[0][self._begun :])
                if self._begun == len(self._waiting[0]):
                    del self._waiting[0]
                    self._begun = 0

    def _write_part(self) -> None:
        self._since = time.monotonic()
        if self._waiting:
            self._put("", self._waiting)
            self._waiting = []

    def _put(self, kind: Literal["", "-all"], lines: list[bytes]) -> None:
        """Writes lines as the next part."""
        name = f"{self.path.stem}-{self._number + 1:06d}{kind}{self.path.suffix}"
        write_bytes(self.path.parent / name, b"".join(lines), overwrite=True)
        self._number += 1

    def _merge(self, lines: list[bytes]) -> None:
        """Writes a part that holds all lines, then removes the parts before it."""
        old = _parts(self.path, superseded=True)
        self._put("-all", lines)
        with explained("join the parts of", self.path):
            for part in old:
                part.unlink()


def read_jsonl_bytes(path: PathLike) -> bytes:
    """Reads all lines from the file, its parts or both. Parts are read on a local disk too, if a bucket was copied there.

    Args:
        path: the file's name, from which its parts' names are made.

    Returns:
        The bytes of all lines; empty where there is no such file.

    Raises:
        UserError: the file cannot be read.
    """
    whole = as_path(path)
    with explained("read", path):
        first = [whole] if whole.exists() else []
        return b"".join(part.read_bytes() for part in [*first, *_parts(whole)])


def _number(part: epath.Path) -> int:
    return int(part.stem.removesuffix("-all").rpartition("-")[2])


def _parts(path: epath.Path, *, superseded: bool = False) -> list[epath.Path]:
    """Lists the parts in order.

    Args:
        path: the file's name, from which the parts' names are made.
        superseded: whether to list also the parts before the last ``-all`` part, which holds all of their lines.
    """
    if not path.parent.exists():
        return []
    form = re.compile(rf"{re.escape(path.stem)}-\d{{6,}}(-all)?{re.escape(path.suffix)}")
    found = sorted((p for p in path.parent.iterdir() if form.fullmatch(p.name)), key=_number)
    whole = [at for at, part in enumerate(found) if part.stem.endswith("-all")]
    return found[whole[-1] :] if whole and not superseded else found
