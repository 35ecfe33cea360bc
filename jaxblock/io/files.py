"""Reads and writes single files, each of which is at any moment either whole or absent."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import pathlib
import secrets
import shutil
from collections.abc import Iterable
from typing import Any

from etils import epath

from jaxblock.errors import UserError
from jaxblock.io.json_text import parse_json
from jaxblock.io.paths import PathLike, as_path, explained, is_remote, put_object, temporary_sibling


def read_bytes(path: PathLike) -> bytes:
    """Reads a file's bytes.

    Raises:
        UserError: the file cannot be read.
    """
    with explained("read", path):
        return as_path(path).read_bytes()


def read_json(path: PathLike) -> Any:
    """Reads the value of a JSON file.

    Raises:
        UserError: the file cannot be read or is not JSON.
    """
    try:
        return parse_json(read_bytes(path))
    except ValueError as error:
        raise UserError(f"{os.fspath(path)}: not a JSON file ({error})") from error


def sha256(path: PathLike) -> str:
    """Computes a file's SHA-256 in hexadecimal, without holding the file in memory.

    Raises:
        UserError: the file cannot be read.
    """
    with explained("read", path), as_path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_bytes(path: PathLike, content: bytes, *, overwrite: bool = False) -> None:
    """Writes a file so that it is either whole or absent, and makes its parent folders.

    Args:
        path: the file; of a link, the file that it points to.
        content: the bytes to write.
        overwrite: whether an existing file is replaced.

    Raises:
        UserError: the file exists and `overwrite` is off, it is a device or a pipe, or it cannot be written; what exists is then
            untouched.
    """
    target = _behind_links(path)
    with explained("write", path):
        _check_regular(path)
        if not overwrite and target.exists():
            raise _already_there(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            if is_remote(path):
                put_object(path, content, overwrite=overwrite)  # an object appears whole when its upload ends
                return
            temporary = temporary_sibling(target)
            try:
                with open(temporary, "xb") as file:
                    file.write(content)
                    file.flush()
                    os.fsync(file.fileno())
                if not overwrite:
                    _claim_name(temporary, target)
                os.replace(temporary, target)
            finally:
                with contextlib.suppress(OSError):
                    os.unlink(temporary)
        except FileExistsError as error:
            if overwrite:
                raise
            raise _already_there(path) from error


def _claim_name(temporary: pathlib.Path, target: PathLike) -> None:
    """Gives a file a second name that must be new; where the disk has no such links, an empty file takes the name.

    Raises:
        FileExistsError: something has appeared under the name since it was looked at; it is left as it is.
    """
    try:
        os.link(temporary, target)
    except FileExistsError:
        raise
    except OSError:
        open(target, "xb").close()


def write_text(path: PathLike, content: str, *, overwrite: bool = False) -> None:
    """Writes text in UTF-8 as `write_bytes` does."""
    write_bytes(path, content.encode(), overwrite=overwrite)


def write_json(path: PathLike, value: Any, *, overwrite: bool = False) -> None:
    """Writes a value as indented JSON as `write_bytes` does."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n", overwrite=overwrite)


def check_absent(path: PathLike, *, overwrite: bool = False, inputs: Iterable[PathLike | None] = ()) -> None:
    """Checks, before long work, that `write_bytes` could make a file at `path`.

    Args:
        path: the file.
        overwrite: whether an existing file may be replaced.
        inputs: files and folders that the same command reads, and that it never replaces. In these folders it may replace its own
            pages (*.html).

    Raises:
        UserError: a file exists at `path` and `overwrite` is off or it is an input, a folder, a device or a pipe does, or files
            cannot be made in its parent folder.
    """
    target = as_path(path)
    with explained("look at", path):
        there, is_folder = target.exists(), target.is_dir()
    if is_folder:
        raise UserError(f"{os.fspath(path)} is a folder, and a file is to be made there: choose another path")
    _check_regular(path)
    if there and not overwrite:
        raise _already_there(path)
    for given in inputs if there else ():
        if given is None:
            continue
        source, place = real_path(given), real_path(path)
        if source == place or (source in place.parents and place.suffix != ".html"):
            raise UserError(
                f"{os.fspath(path)} is read by this command, from {given}, and would be lost: choose another path"
            )
    check_writable(_behind_links(path).parent)


def _check_regular(path: PathLike) -> None:
    """Raises UserError where there is a device or a pipe, which a finished file would take the place of."""
    if not is_remote(path) and os.path.exists(path) and not (os.path.isfile(path) or os.path.isdir(path)):
        raise UserError(f"{os.fspath(path)} is a device or a pipe, not a file: choose the path of a file")


def _behind_links(path: PathLike) -> epath.Path:
    """Returns the file that a path means; an address in an object store as it is."""
    return as_path(path if is_remote(path) else os.path.realpath(path))


def real_path(path: PathLike) -> pathlib.PurePath:
    """Returns the place that a path means, behind its links; an address in an object store has none."""
    return pathlib.PurePath(os.fspath(path) if is_remote(path) else os.path.realpath(path))


def check_writable(folder: PathLike, *, need_bytes: int = 0) -> None:
    """Checks, before long work, that files can be made in a folder, and makes the folder if it is absent.

    Args:
        folder: the folder.
        need_bytes: the free space wanted on a local disk, in bytes.

    Raises:
        UserError: nothing can be written there or too little space is free.
    """
    with explained("write to", folder):
        target = as_path(folder)
        target.mkdir(parents=True, exist_ok=True)
        if not is_remote(folder):
            free = shutil.disk_usage(target).free
            if free < need_bytes:
                raise UserError(f"cannot write to {os.fspath(folder)}: {need_bytes:,} bytes needed, {free:,} free")
        probe = target / f".probe-{secrets.token_hex(4)}"
        probe.write_bytes(b"jaxblock")
        probe.unlink()


def _already_there(path: PathLike) -> UserError:
    return UserError(
        f"{os.fspath(path)} exists already and is not overwritten: choose another path, or give --overwrite"
    )
