"""A file of JSON lines that grows: one file on a local disk, numbered parts in an object store, which cannot append.

``metrics.jsonl`` in a bucket is ``metrics-000001.jsonl``, ``metrics-000002.jsonl``, ...: each part is written once. A part
named ``metrics-000003-all.jsonl`` holds all that was before it, so that a long run does not leave thousands of objects and
a crash between writing it and removing the others loses and repeats nothing.
"""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Callable

from etils import epath

from jaxblock.errors import UserError
from jaxblock.io.files import write_bytes
from jaxblock.io.paths import PathLike, as_path, explained, is_remote

PERIOD = 60.0
"""Seconds for which lines wait for others before a part is written."""
MOST_LINES = 1000
"""So many lines make a part, however quickly they came."""

_LOG = logging.getLogger(__name__)


class Lines:
    """A growing file, opened by its one writer."""

    def __init__(self, path: PathLike, keep: Callable[[bytes], bool], *, period: float = PERIOD) -> None:
        """Opens the file, or begins it. What a kill has cut off at its end is taken out.

        Args:
            path: as a single file would be named, local or ``gs://``.
            keep: whether a line that is there already stays.
            period: object store: seconds between parts.

        Raises:
            UserError: it cannot be read or written.
        """
        self.path = as_path(path)
        self._remote = is_remote(path)
        self._period, self._since = period, time.monotonic()
        self._waiting: list[bytes] = []
        self._begun = 0  # bytes of the first of them that a full disk took
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
            self._file = open(self.path, "ab", buffering=0)  # noqa: SIM115 (what waits, waits with us)

    def append(self, line: str) -> None:
        """Adds one line. On a local disk it is there when this returns; in an object store after ``flush`` or a while.

        Raises:
            UserError: it cannot be written to a local disk; it waits, and is written with the next. An object store that
                fails is asked again with the next part, and ``close`` raises.
        """
        if not self._remote:
            self._waiting.append((line + "\n").encode())
            with explained("write", self.path):
                self._write_out()
            return
        self._waiting.append((line + "\n").encode())
        if len(self._waiting) >= MOST_LINES or time.monotonic() - self._since >= self._period:
            self.flush()

    def flush(self) -> None:
        """Writes what waits, to an object store as a part; a failure is logged, and it goes with what comes next."""
        try:
            with explained("write", self.path):
                if self._remote:
                    self._write_part()
                else:
                    self._write_out()
        except UserError as error:
            _LOG.warning("%s; the lines wait for the next part", error)

    def waiting(self) -> list[str]:
        """The lines that could not be written yet."""
        return [line.decode().removesuffix("\n") for line in self._waiting]

    def close(self) -> None:
        """Writes what waits, and joins the parts of an object store.

        Raises:
            UserError: it cannot be written.
        """
        if not self._remote:
            with explained("write", self.path), self._file:
                self._write_out()
            return
        self._write_part()
        if len(_parts(self.path)) > 1:
            self._merge(read_jsonl_bytes(self.path).splitlines(keepends=True))

    def _write_out(self) -> None:
        """A full disk may take a part of a line: the rest waits."""
        while self._waiting:
            self._begun += self._file.write(self._waiting[0][self._begun :])
            if self._begun == len(self._waiting[0]):
                del self._waiting[0]
                self._begun = 0

    def _write_part(self) -> None:
        self._since = time.monotonic()
        if self._waiting:
            self._put("", self._waiting)
            self._waiting = []

    def _put(self, kind: str, lines: list[bytes]) -> None:
        name = f"{self.path.stem}-{self._number + 1:06d}{kind}{self.path.suffix}"
        write_bytes(self.path.parent / name, b"".join(lines), overwrite=True)
        self._number += 1

    def _merge(self, lines: list[bytes]) -> None:
        old = _parts(self.path, superseded=True)
        self._put("-all", lines)
        with explained("join the parts of", self.path):
            for part in old:
                part.unlink()


def read_jsonl_bytes(path: PathLike) -> bytes:
    """All lines, from the one file, from its parts (also where a bucket was copied to a local disk), or from both.

    Args:
        path: as a single file is named.

    Returns:
        The bytes; none where there is no such file.

    Raises:
        UserError: it cannot be read.
    """
    whole = as_path(path)
    with explained("read", path):
        first = [whole] if whole.exists() else []
        return b"".join(part.read_bytes() for part in [*first, *_parts(whole)])


def _number(part: epath.Path) -> int:
    return int(part.stem.removesuffix("-all").rpartition("-")[2])


def _parts(path: epath.Path, *, superseded: bool = False) -> list[epath.Path]:
    """The parts in order, from the last one that holds all before it (or with ``superseded``, all of them)."""
    if not path.parent.exists():
        return []
    form = re.compile(rf"{re.escape(path.stem)}-\d{{6,}}(-all)?{re.escape(path.suffix)}")
    found = sorted((p for p in path.parent.iterdir() if form.fullmatch(p.name)), key=_number)
    whole = [at for at, part in enumerate(found) if part.stem.endswith("-all")]
    return found[whole[-1] :] if whole and not superseded else found
