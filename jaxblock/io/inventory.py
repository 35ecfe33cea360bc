"""Lists the files of a folder, and compares the folder with its list: files that were replaced later are refused.

The list, ``files.json``, is written with the folder. Folders of earlier versions have none, and are not compared.
"""

from __future__ import annotations

import os
import pathlib
from collections.abc import Collection
from fnmatch import fnmatch
from typing import NamedTuple

from jaxblock.errors import UserError
from jaxblock.io.files import read_json, sha256, write_json
from jaxblock.io.paths import PathLike, as_path, explained

INVENTORY = "files.json"
"""The list's name in the folder."""
HASHED_BYTES = 64 << 20
"""The size, in bytes, up to which a file is compared byte by byte when it is opened; of larger ones the size is."""


class Entry(NamedTuple):
    """Describes a file when its folder was made.

    Attributes:
        bytes: its size.
        sha256: its SHA-256 in hexadecimal.
    """

    bytes: int
    sha256: str


def write_inventory(folder: pathlib.Path, leave_out: Collection[str] = ()) -> None:
    """Lists all files of a local folder that is being made, and of the folders in it.

    Args:
        folder: the folder, with all of its files.
        leave_out: names of files that are not listed.
    """
    files = sorted(file for file in folder.rglob("*") if file.is_file() and file.name not in leave_out)
    entries = {f.relative_to(folder).as_posix(): Entry(f.stat().st_size, sha256(f))._asdict() for f in files}
    write_json(folder / INVENTORY, entries)


def has_inventory(folder: PathLike) -> bool:
    """Tells whether a folder has a list of its files."""
    return bool((as_path(folder) / INVENTORY).exists())


def check_inventory(folder: PathLike, *, sizes_of: str, verify: bool = False) -> None:
    """Compares a folder's files with its list; does nothing where it has none.

    Args:
        folder: the folder.
        sizes_of: a glob of the names of the files of which only the size is compared.
        verify: whether all of them, and files of any size, are compared byte by byte.

    Raises:
        UserError: a file is missing or was replaced, or the list is damaged.
    """
    for name, entry in _read(folder).items():
        small = entry.bytes <= HASHED_BYTES and not fnmatch(name, sizes_of)
        _check(folder, name, entry, as_path(folder) / name, bytewise=small or verify)


def check_file(folder: PathLike, name: str, copy: PathLike) -> None:
    """Compares one file with the folder's list; does nothing where it is not listed.

    Args:
        folder: the folder.
        name: the file's name in it.
        copy: where its content is: the file itself, or the local copy of a remote one.

    Raises:
        UserError: the file was replaced, or the list is damaged.
    """
    entry = _read(folder).get(name)
    if entry is not None:
        _check(folder, name, entry, copy, bytewise=entry.bytes <= HASHED_BYTES)


def _read(folder: PathLike) -> dict[str, Entry]:
    """Reads a folder's list; empty where it has none."""
    path = as_path(folder) / INVENTORY
    if not path.exists():
        return {}
    content = read_json(path)
    try:
        entries = {str(name): Entry(**entry) for name, entry in content.items()}
    except (AttributeError, TypeError) as error:
        raise UserError(f"{path} is no list of files ({error}): put it back as it was") from error
    if not all(isinstance(e.bytes, int) and isinstance(e.sha256, str) for e in entries.values()):
        raise UserError(f"{path} is no list of files: put it back as it was")
    return entries


def _check(folder: PathLike, name: str, entry: Entry, copy: PathLike, *, bytewise: bool) -> None:
    try:
        with explained("read", copy):
            size = as_path(copy).stat().length
    except UserError as error:
        if not isinstance(error.__cause__, FileNotFoundError):
            raise
        problem: str | None = "is missing"
    else:
        problem = None if size == entry.bytes else f"has {size:,} bytes instead of {entry.bytes:,}"
        if problem is None and bytewise and sha256(copy) != entry.sha256:
            problem = "holds other bytes than were written"
    if problem is not None:
        raise UserError(
            f"{os.fspath(folder)}/{name} {problem} ({INVENTORY} lists the files as they were): put the file back, or make the "
            "folder again"
        )
