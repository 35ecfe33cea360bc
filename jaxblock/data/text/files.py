"""Opens files of text: compressed or not, local or in an object store, or pipes, which can be read only once."""

from __future__ import annotations

import contextlib
import gzip
import os
import shutil
import stat
import tempfile
import zlib
from collections.abc import Iterator
from io import BufferedIOBase
from typing import IO

from jaxblock.errors import UserError
from jaxblock.io.paths import PathLike, explained

_GZIP = b"\x1f\x8b"
_COMPRESSED = {
    b"\x28\xb5\x2f\xfd": ("Zstandard", "zstd -d"),
    b"\xfd7zXZ\x00": ("xz", "xz -d"),
    b"BZh": ("bzip2", "bzip2 -d"),
    b"PK\x03\x04": ("zip", "unzip"),
}


def decompressed(path: str, content: bytes) -> bytes:
    """Returns the bytes of a gzip file without the compression, and other bytes as they are.

    Raises:
        UserError: If the file is cut off or damaged, or is compressed in another way.
    """
    if not _is_gzip(path, content):
        return content
    with _explained_gzip(path):
        return gzip.decompress(content)


@contextlib.contextmanager
def opened(path: str, local: PathLike) -> Iterator[BufferedIOBase]:
    """Opens a file for reading; where it is compressed by gzip, what is read is not.

    Args:
        path: The file's path, for error messages.
        local: The local file with its content.

    Raises:
        UserError: If the file cannot be read, is cut off or damaged, or is compressed in another way.
    """
    with explained("read", path), open(local, "rb") as stored:
        if not _is_gzip(path, stored.peek(8)):
            yield stored
            return
        with _explained_gzip(path), gzip.open(stored) as stream:
            yield stream


def is_gzip(path: str, local: PathLike) -> bool:
    """Tells whether a file is compressed by gzip."""
    with explained("read", path), open(local, "rb") as stored:
        return _is_gzip(path, stored.read(8))


def temporary_copy(path: str, stream: BufferedIOBase) -> IO[bytes]:
    """Copies what a stream holds to a temporary file, which is removed when it is closed.

    Args:
        path: The path of the file that is read, for error messages.
        stream: The stream to copy.

    Raises:
        UserError: If the disk is full.
    """
    with explained("make a temporary copy (TMPDIR names its folder) of", path):
        copy = tempfile.NamedTemporaryFile(prefix="jaxblock-")  # noqa: SIM115 (it lives as long as the input)
        shutil.copyfileobj(stream, copy, 1 << 20)
        copy.flush()
    return copy


def is_pipe(path: str) -> bool:
    """Tells whether a path names a pipe or a device, whose bytes can be read only once."""
    try:
        mode = os.stat(path).st_mode
    except (OSError, ValueError):
        return False
    return not (stat.S_ISREG(mode) or stat.S_ISDIR(mode))


def _is_gzip(path: str, begin: bytes) -> bool:
    """Tells whether a file that begins with these bytes is compressed by gzip; raises UserError for another compression."""
    for magic, (name, tool) in _COMPRESSED.items():
        if begin.startswith(magic):
            raise UserError(f"{path} is compressed by {name}: decompress it first ({tool}), or give gzip")
    return begin.startswith(_GZIP)


@contextlib.contextmanager
def _explained_gzip(path: str) -> Iterator[None]:
    try:
        yield
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{path} is a gzip file that is cut off or damaged ({error})") from error
