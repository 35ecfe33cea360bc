"""Copies files between the local disk and an object store."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
import pathlib
import shutil
import tempfile
from collections.abc import Sequence
from fnmatch import fnmatch

import fsspec
from etils import epath

from jaxblock.errors import UserError
from jaxblock.io.paths import PathLike, as_path, explained, is_remote

_CHUNK = 8 << 20  # the number of bytes held in memory while a file is copied


def local_file(path: PathLike) -> pathlib.Path:
    """Returns a local file with the content of `path`: `path` itself, or a copy of a remote file, made once per process.

    Raises:
        UserError: the file cannot be read, or the local disk is too small.
    """
    if not is_remote(path):
        with explained("read", path):
            os.stat(path)
        return pathlib.Path(path)
    return _downloaded(os.fspath(path))


def local_folder(path: PathLike, patterns: Sequence[str]) -> pathlib.Path:
    """Returns `path` itself where it is local, or a local copy of those files of a remote folder whose names match.

    The copy is made once per process, and is removed when the process ends.

    Args:
        path: the folder, local or ``gs://``.
        patterns: globs (``*.json``) of the names of the files, directly in a remote folder, to copy.

    Raises:
        UserError: the folder cannot be read, or the local disk is too small.
    """
    if not is_remote(path):
        return pathlib.Path(path)
    return _downloaded_folder(os.fspath(path).rstrip("/"), tuple(patterns))


def remove_folder(folder: epath.Path, marker: str) -> None:
    """Removes a folder in an object store, first the file that says that it is whole."""
    (folder / marker).unlink(missing_ok=True)
    if folder.exists():
        folder.rmtree()


def upload_folder(source: pathlib.Path, target: epath.Path, marker: str) -> None:
    """Copies a local folder into an object store. If that fails, what it has uploaded is removed.

    Args:
        source: the local folder.
        target: the folder in the object store, which must hold no file of the same name.
        marker: the name of the file that says that the folder is whole; it is uploaded last.

    Raises:
        FileExistsError: a file of the same name has appeared in the store; it is left as it is.
    """
    files = sorted(file.relative_to(source) for file in source.rglob("*") if file.is_file())
    done: list[epath.Path] = []
    try:
        for file in sorted(files, key=lambda name: name == pathlib.Path(marker)):
            destination = target.joinpath(*file.parts)
            store, name = fsspec.core.url_to_fs(os.fspath(destination))
            store.put_file(os.fspath(source / file), name, mode="create")
            done.append(destination)
    except BaseException:
        for destination in reversed(done):
            with contextlib.suppress(Exception):  # the store may be out of reach, and the first error says why
                destination.unlink()
        raise


@functools.cache
def _downloads() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="jaxblock-")  # removed when the process ends


def _download_folder(remote: str) -> pathlib.Path:
    folder = pathlib.Path(_downloads().name) / hashlib.sha256(remote.encode()).hexdigest()[:16]
    folder.mkdir(exist_ok=True)
    return folder


@functools.cache
def _downloaded(path: str) -> pathlib.Path:
    parent, name = path.rsplit("/", 1)
    source, local = as_path(path), _download_folder(parent) / name
    with explained("read", path):
        size = source.stat().length
    with explained(f"copy {path} to", local):
        if size > (free := shutil.disk_usage(local.parent).free):
            raise UserError(
                f"cannot copy {path} ({size:,} bytes) to {local.parent}: {free:,} bytes free; set TMPDIR to a "
                "folder on a larger disk"
            )
        with source.open("rb") as remote, open(local, "wb") as file:
            shutil.copyfileobj(remote, file, _CHUNK)
    return local


@functools.cache
def _downloaded_folder(path: str, patterns: tuple[str, ...]) -> pathlib.Path:
    with explained("read", path):
        found = [entry for entry in as_path(path).iterdir() if any(fnmatch(entry.name, p) for p in patterns)]
        found = [entry for entry in found if not entry.is_dir()]
    for entry in found:
        _downloaded(f"{path}/{entry.name}")
    return _download_folder(path)
