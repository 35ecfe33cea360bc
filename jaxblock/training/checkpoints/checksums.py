"""Writes the size and CRC-32 of every file of a folder to lists; they are written last, so they also mark it as complete.

Neither Orbax nor TensorStore notices a flipped bit in an array's bytes. A CRC-32 of each file does (it misses one error
in four billion), at some GB/s and without another library. Each process of a group lists its own share of the files,
without waiting for the others; the folder is whole when every share has its list.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Iterator

from etils import epath

from jaxblock.io.files import read_bytes, read_json, write_json
from jaxblock.io.paths import PathLike, as_path

_LIST = re.compile(r"whole-(\d+)-of-(\d+)\.json")
_CHUNK = 1 << 22


def seal(folder: PathLike, share: int = 0, shares: int = 1) -> None:
    """Writes the list of one share of the folder's files. The folder must not change any more.

    Args:
        folder: the folder, all of whose files are written.
        share: which share of the files, from 0.
        shares: the number of shares.

    Raises:
        UserError: the list cannot be written.
        OSError: a file cannot be read.
    """
    root = as_path(folder)
    names = sorted(_files(root))[share::shares]
    entries = {name: _size_and_checksum(root / name) for name in names}
    write_json(root / f"whole-{share}-of-{shares}.json", entries, overwrite=True)


def is_sealed(folder: PathLike) -> bool:
    """Tells whether every share of the folder has its list, which means that the folder is complete."""
    found = _lists(folder)
    return any(sum(match[2] == shares for match in found) == int(shares) for shares in {match[2] for match in found})


def has_lists(folder: PathLike) -> bool:
    """Tells whether the folder has any list; checkpoints from before lists were introduced have none."""
    return bool(_lists(folder))


def read_lists(folder: PathLike) -> bytes:
    """Returns the content of all lists, which differs between two folders with different files; empty where there is none.

    Raises:
        UserError: a list cannot be read.
    """
    return b"".join(read_bytes(as_path(folder) / match[0]) for match in _lists(folder))


def unseal(folder: PathLike) -> None:
    """Removes the lists, so that the folder no longer counts as whole."""
    for match in _lists(folder):
        (as_path(folder) / match[0]).unlink()


def find_difference(folder: PathLike, under: str = "", share: int = 0, shares: int = 1) -> str | None:
    """Compares the folder's files with the lists.

    Args:
        folder: the folder.
        under: compare only the files whose names inside the folder begin with this.
        share: compare only this share of the files, from 0.
        shares: the number of shares.

    Returns:
        What is wrong with the first file that differs, or with the lists; None where every file is as it was sealed.

    Raises:
        PermissionError: a file may not be read, which says nothing about its content.
    """
    root = as_path(folder)
    if not is_sealed(root):
        return f"it was never finished{_missing_list(root)}"
    expected: dict[str, list[int]] = {}
    for match in _lists(root):
        try:
            expected |= read_json(root / match[0])
        except Exception as error:
            return f"{match[0]} cannot be read ({error})"
    for name in [name for name in sorted(expected) if name.startswith(under)][share::shares]:
        problem = _difference(root / name, expected[name])
        if problem:
            return f"{name} {problem}"
    return None


def _missing_list(root: epath.Path) -> str:
    """Names the lists that are missing, where other processes' lists exist."""
    found = _lists(root)
    present, shares = {int(match[1]) for match in found}, {int(match[2]) for match in found}
    if len(shares) != 1:
        return ""
    absent = ", ".join(f"whole-{n}-of-{max(shares)}.json" for n in range(max(shares)) if n not in present)
    return f" ({absent} is missing)"


def _difference(path: epath.Path, expected: list[int]) -> str | None:
    try:
        size = path.stat().length
        if size != expected[0]:
            return f"has {size:,} bytes instead of {expected[0]:,}"
        return None if _size_and_checksum(path) == expected else "holds other bytes than were saved"
    except FileNotFoundError:
        return "is missing"
    except PermissionError:
        raise
    except OSError as error:
        return f"cannot be read ({error.strerror or error})"


def _size_and_checksum(path: epath.Path) -> list[int]:
    size, checksum = 0, 0
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            size += len(chunk)
            checksum = zlib.crc32(chunk, checksum)
    return [size, checksum]


def _lists(folder: PathLike) -> list[re.Match[str]]:
    """Matches the names of the folder's lists; group 1 is the share, group 2 the number of shares."""
    root = as_path(folder)
    names = sorted(entry.name for entry in root.iterdir()) if root.exists() else []
    return [match for match in map(_LIST.fullmatch, names) if match]


def _files(root: epath.Path, inside: str = "") -> Iterator[str]:
    """Yields the names of all files, with slashes, except the lists and hidden files that are still being written."""
    for entry in root.iterdir():
        if entry.is_dir():
            yield from _files(entry, f"{inside}{entry.name}/")
        elif not (_LIST.fullmatch(entry.name) or entry.name.startswith(".")):
            yield inside + entry.name
