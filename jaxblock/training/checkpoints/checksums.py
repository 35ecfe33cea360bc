"""Checksums of a folder's files, written last: they say that the folder is whole, and later that it still is.

Neither Orbax nor TensorStore notices a flipped bit in an array's bytes. A CRC-32 of every file does (one error in four
billion passes), at some GB/s, without a library. Each process of a group reads and writes its share of the files, so
that nothing has to be said between them: the folder is whole when every share has its list.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Iterator

from etils import epath

from jaxblock.io.files import read_json, write_json
from jaxblock.io.paths import PathLike, as_path

_SEAL = re.compile(r"whole-(\d+)-of-(\d+)\.json")
_CHUNK = 1 << 22


def seal(folder: PathLike, share: int = 0, shares: int = 1) -> None:
    """Writes the sizes and checksums of this share of the folder's files. The folder must not change any more.

    Args:
        folder: what is whole now.
        share: which share, from 0.
        shares: of how many.

    Raises:
        UserError: the list cannot be written.
        OSError: a file cannot be read.
    """
    root = as_path(folder)
    names = sorted(_files(root))[share::shares]
    sums = {name: _sum(root / name) for name in names}
    write_json(root / f"whole-{share}-of-{shares}.json", sums, overwrite=True)


def sealed(folder: PathLike) -> bool:
    """Whether every share of the folder has its list: nothing was cut short."""
    found = [match for match in map(_SEAL.fullmatch, _names(as_path(folder))) if match]
    return any(sum(match[2] == shares for match in found) == int(shares) for shares in {match[2] for match in found})


def unlisted(folder: PathLike) -> bool:
    """Whether the folder has no list at all, as one from before there were lists: nothing says that it is cut short."""
    return not any(map(_SEAL.fullmatch, _names(as_path(folder))))


def unseal(folder: PathLike) -> None:
    """Takes the lists away: the folder is whole no more."""
    root = as_path(folder)
    for name in _names(root):
        if _SEAL.fullmatch(name):
            (root / name).unlink()


def damage(folder: PathLike, under: str = "", share: int = 0, shares: int = 1) -> str | None:
    """What is wrong with a folder; None where every file is as it was when it was sealed.

    Args:
        folder: the folder.
        under: look only at what lies under this folder inside.
        share: look at this share of the files only, from 0.
        shares: of how many.

    Raises:
        PermissionError: a file may not be read, which says nothing of its content.
    """
    root = as_path(folder)
    if not sealed(root):
        return f"it was never finished{_missing(root)}"
    expected: dict[str, list[int]] = {}
    for name in filter(_SEAL.fullmatch, _names(root)):
        try:
            expected |= read_json(root / name)
        except Exception as error:
            return f"{name} cannot be read ({error})"
    for name in [name for name in sorted(expected) if name.startswith(under)][share::shares]:
        problem = _difference(root / name, expected[name])
        if problem:
            return f"{name} {problem}"
    return None


def _missing(root: epath.Path) -> str:
    """Which processes' lists are not there, where others' are."""
    found = [match for match in map(_SEAL.fullmatch, _names(root)) if match]
    there, shares = {int(match[1]) for match in found}, {int(match[2]) for match in found}
    if len(shares) != 1:
        return ""
    absent = ", ".join(f"whole-{n}-of-{max(shares)}.json" for n in range(max(shares)) if n not in there)
    return f" ({absent} is missing)"


def _difference(path: epath.Path, expected: list[int]) -> str | None:
    try:
        size = path.stat().length
        if size != expected[0]:
            return f"has {size:,} bytes instead of {expected[0]:,}"
        return None if _sum(path) == expected else "holds other bytes than were saved"
    except FileNotFoundError:
        return "is missing"
    except PermissionError:
        raise
    except OSError as error:
        return f"cannot be read ({error.strerror or error})"


def _sum(path: epath.Path) -> list[int]:
    """[size, CRC-32]."""
    size, checksum = 0, 0
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            size += len(chunk)
            checksum = zlib.crc32(chunk, checksum)
    return [size, checksum]


def _names(root: epath.Path) -> list[str]:
    return [entry.name for entry in root.iterdir()] if root.exists() else []


def _files(root: epath.Path, inside: str = "") -> Iterator[str]:
    """The names of all files, with slashes; not ours, nor what is being written under a hidden name."""
    for entry in root.iterdir():
        if entry.is_dir():
            yield from _files(entry, f"{inside}{entry.name}/")
        elif not (_SEAL.fullmatch(entry.name) or entry.name.startswith(".")):
            yield inside + entry.name
