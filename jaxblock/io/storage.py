"""Files and folders that are either whole or absent, on a local disk or in an object store (``gs://``).

A local disk has an atomic rename: things are written under a temporary sibling's name and moved into place. An object
store has none: there a folder's *commit marker*, one agreed file, is written last: a folder without it is not whole.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import hashlib
import json
import os
import pathlib
import secrets
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from fnmatch import fnmatch
from typing import Any

import fsspec
from etils import epath

from jaxblock.errors import UserError

PathLike = str | os.PathLike[str]

_CHUNK = 8 << 20  # bytes in memory while a file is copied

_ADVICE = {
    errno.ENOSPC: "the disk is full: free some space or choose another folder",
    errno.EDQUOT: "the disk quota is used up: free some space or choose another folder",
    errno.EACCES: "permission denied: choose a path you may use",
    errno.EPERM: "operation not permitted: choose a path you may use",
    errno.EROFS: "the file system is read-only: choose another folder",
    errno.ENOENT: "there is no such file or folder",
    errno.ENOTDIR: "a part of this path is a file, not a folder",
    errno.EEXIST: "a file stands where a folder is needed: choose another path",
    errno.EISDIR: "this is a folder, not a file",
    errno.ENAMETOOLONG: "the name is too long",
}


def as_path(path: PathLike) -> epath.Path:
    """A path object for a local path or a URI (``gs://bucket/folder``)."""
    if is_remote(path):
        # Other processes write there too: a remembered listing would hide their files for as long as we live.
        fsspec.config.conf.setdefault("gs", {}).setdefault("use_listings_cache", False)
    try:
        return epath.Path(path)
    except KeyError as error:
        raise UserError(
            f"{os.fspath(path)}: unknown kind of address {error}; use a local path or gs://bucket/..."
        ) from error


def is_remote(path: PathLike) -> bool:
    """Whether a path names an object store, which has neither atomic rename nor append."""
    return "://" in os.fspath(path)


@contextlib.contextmanager
def explained(action: str, path: PathLike) -> Iterator[None]:
    """Turns the operating system's (or object store's) errors into a `UserError` that names the path and the cause.

    Args:
        action: What was being done, as in "cannot {action} {path}".
        path: The path to name.

    Raises:
        UserError: In place of any OSError; for a remote path in place of any error of its client.
    """
    try:
        yield
    except UserError:
        raise
    except OSError as error:
        cause = _ADVICE.get(error.errno or 0, error.strerror or str(error))
        raise UserError(f"cannot {action} {os.fspath(path)}: {cause}") from error
    except Exception as error:
        if not is_remote(path):
            raise
        raise UserError(
            f"cannot {action} {os.fspath(path)}: {error} (gs:// needs `pip install jaxblock[gcs]` and credentials)"
        ) from error


def read_bytes(path: PathLike) -> bytes:
    """A file's bytes.

    Raises:
        UserError: If it cannot be read.
    """
    with explained("read", path):
        return as_path(path).read_bytes()


def read_json(path: PathLike) -> Any:
    """A JSON file's value.

    Raises:
        UserError: If it cannot be read or is not JSON.
    """
    try:
        return json.loads(read_bytes(path))
    except ValueError as error:
        raise UserError(f"{os.fspath(path)}: not a JSON file ({error})") from error


def write_bytes(path: PathLike, content: bytes, *, overwrite: bool = False) -> None:
    """Writes a file so that it is either whole or absent, and makes its parent folders.

    Args:
        path: The file.
        content: Its bytes.
        overwrite: Replace an existing file.

    Raises:
        UserError: If it exists and `overwrite` is off, or cannot be written; an existing file is then untouched.
    """
    target = as_path(path)
    with explained("write", path):
        if not overwrite and target.exists():
            raise UserError(
                f"{os.fspath(path)} exists already and is not overwritten: choose another path or move it away"
            )
        target.parent.mkdir(parents=True, exist_ok=True)
        if is_remote(path):
            target.write_bytes(content)  # an object appears whole when its upload ends
            return
        temporary = _sibling(target)
        try:
            with open(temporary, "xb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, target)
        finally:
            with contextlib.suppress(OSError):
                os.unlink(temporary)


def write_text(path: PathLike, content: str, *, overwrite: bool = False) -> None:
    """`write_bytes` of UTF-8 text."""
    write_bytes(path, content.encode(), overwrite=overwrite)


def write_json(path: PathLike, value: Any, *, overwrite: bool = False) -> None:
    """`write_bytes` of indented JSON."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n", overwrite=overwrite)


def write_files(folder: PathLike, files: Mapping[str, bytes]) -> None:
    """Writes several files, by name, into a folder that is being made (thus not one by one in an atomic way).

    Raises:
        UserError: If one cannot be written.
    """
    with explained("write to", folder):
        target = as_path(folder)
        target.mkdir(parents=True, exist_ok=True)
        for name, content in files.items():
            (target / name).write_bytes(content)


@contextlib.contextmanager
def new_folder(path: PathLike, *, marker: str, overwrite: bool = False) -> Iterator[pathlib.Path]:
    """A local scratch folder that becomes the folder `path` if the block ends well, and vanishes if it raises.

    Args:
        path: The folder to make.
        marker: The file inside, made by the block, that says the folder is whole. Uploaded last; and no folder that has
            none is ever replaced, so that a mistyped path cannot delete what is not ours.
        overwrite: Replace an existing whole folder.

    Yields:
        The scratch folder, on the same disk as `path` where that is local.

    Raises:
        UserError: If `path` exists and may not be replaced, or cannot be written.
    """
    check_vacant(path, marker=marker, overwrite=overwrite)
    target = as_path(path)
    with contextlib.ExitStack() as cleaning, explained("write", path):
        if is_remote(path):
            scratch = pathlib.Path(cleaning.enter_context(tempfile.TemporaryDirectory(prefix="jaxblock-")))
        else:
            target = as_path(os.path.realpath(target))  # a link to a folder stays a link
            target.parent.mkdir(parents=True, exist_ok=True)
            scratch = _sibling(target)
            scratch.mkdir()
            cleaning.callback(shutil.rmtree, scratch, ignore_errors=True)
        yield scratch
        if not (scratch / marker).exists():
            raise FileNotFoundError(errno.ENOENT, f"the commit marker {marker} was not written")
        if is_remote(path):
            _upload(scratch, target, marker)
        else:
            _move(scratch, target)


def check_vacant(path: PathLike, *, marker: str, overwrite: bool = False) -> None:
    """Checks that a folder may be made at `path` (the rules of `new_folder`).

    Raises:
        UserError: If something is there that may not be replaced.
    """
    target, name = as_path(path), os.fspath(path)
    with explained("look at", path):
        if not target.exists():
            return
        if not target.is_dir():
            raise UserError(f"{name} is a file, and a folder is to be made there: choose another path")
        if not any(True for _ in target.iterdir()):
            return
        if not (target / marker).exists():
            raise UserError(
                f"{name} exists and holds no {marker}, so it is not replaced: choose another path or move it away"
            )
    if not overwrite:
        raise UserError(
            f"{name} exists already and is not overwritten: choose another path (or, for prepared data, set data.overwrite)"
        )


def check_absent(path: PathLike) -> None:
    """Checks that a file may be made at `path` (the rule of `write_bytes`), before long work.

    Raises:
        UserError: If something is there, or its folder cannot be written.
    """
    target = as_path(path)
    with explained("look at", path):
        there = target.exists()
    if there:
        raise UserError(f"{os.fspath(path)} exists already and is not overwritten: choose another path or move it away")
    check_writable(target.parent)


def check_writable(folder: PathLike, *, need_bytes: int = 0) -> None:
    """Checks, before long work, that files can be made in a folder (which is made if absent).

    Args:
        folder: The folder.
        need_bytes: Free space wanted (local disks).

    Raises:
        UserError: If nothing can be written there or too little space is free.
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


def localize(path: PathLike) -> pathlib.Path:
    """A local file with the content of `path`: itself, or for a remote file a copy fetched once per process.

    Raises:
        UserError: If it cannot be read.
    """
    if not is_remote(path):
        with explained("read", path):
            os.stat(path)
        return pathlib.Path(path)
    return _fetched(os.fspath(path))


def local_folder(path: PathLike, patterns: Sequence[str]) -> pathlib.Path:
    """A local folder with those files of `path` whose names match: itself, or for a remote one a copy.

    The copy is made once per process, and is removed when it ends.

    Args:
        path: The folder.
        patterns: Globs of names directly in it (``*.json``).

    Raises:
        UserError: If it cannot be read, or the local disk is too small.
    """
    if not is_remote(path):
        return pathlib.Path(path)
    return _fetched_folder(os.fspath(path).rstrip("/"), tuple(patterns))


def copy_files(source: PathLike, target: pathlib.Path) -> None:
    """Copies the files directly in a folder, local or remote, into a local folder, which is made if absent.

    Raises:
        UserError: If one cannot be read or written.
    """
    write_files(target, {entry.name: read_bytes(entry) for entry in listed(source) if not entry.is_dir()})


def listed(folder: PathLike) -> list[epath.Path]:
    """What is directly in a folder, by name; nothing where there is none.

    Raises:
        UserError: If it cannot be read.
    """
    with explained("read", folder):
        path = as_path(folder)
        return sorted(path.iterdir(), key=lambda entry: entry.name) if path.is_dir() else []


def size_of(folder: PathLike) -> int:
    """Bytes of all files in a folder and the folders in it."""
    entries = listed(folder)
    with explained("look at", folder):
        return sum(size_of(entry) if entry.is_dir() else entry.stat().length for entry in entries)


def move_folder(source: PathLike, target: PathLike) -> None:
    """Moves a folder to a place that does not exist yet: by rename, or in an object store by copy, then removal.

    Raises:
        UserError: If it cannot be moved.
    """
    with explained("move", source):
        if not is_remote(source):
            os.rename(source, target)
            return
        _copy_tree(as_path(source), as_path(target))
        as_path(source).rmtree()


def _copy_tree(source: epath.Path, target: epath.Path) -> None:
    target.mkdir(parents=True, exist_ok=True)
    for entry in source.iterdir():
        if entry.is_dir():
            _copy_tree(entry, target / entry.name)
        else:
            entry.copy(target / entry.name)


def sha256(path: PathLike) -> str:
    """A file's SHA-256 in hexadecimal.

    Raises:
        UserError: If it cannot be read.
    """
    digest = hashlib.sha256()
    with explained("read", path), as_path(path).open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def _sibling(target: epath.Path) -> pathlib.Path:
    """A name beside `target`, thus on the same disk, that nobody else uses and no reader takes for the real thing."""
    return pathlib.Path(target.parent) / f".{target.name}.partial-{os.getpid()}-{secrets.token_hex(4)}"


def _move(scratch: pathlib.Path, target: epath.Path) -> None:
    """Puts a finished folder in place of what is there; on failure the old one is back."""
    if not target.exists():
        os.rename(scratch, target)
        return
    old = _sibling(target)
    os.rename(target, old)
    try:
        os.rename(scratch, target)
    except OSError:
        os.rename(old, target)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _upload(scratch: pathlib.Path, target: epath.Path, marker: str) -> None:
    """Copies a folder to an object store: the old marker goes first, the new one comes last."""
    if (target / marker).exists():
        (target / marker).unlink()
    if target.exists():
        target.rmtree()
    files = sorted(file.relative_to(scratch) for file in scratch.rglob("*") if file.is_file())
    for file in sorted(files, key=lambda name: name == pathlib.Path(marker)):
        destination = target.joinpath(*file.parts)
        destination.parent.mkdir(parents=True, exist_ok=True)
        with open(scratch / file, "rb") as source, destination.open("wb") as goal:
            shutil.copyfileobj(source, goal, _CHUNK)


@functools.cache
def _scratch_for_downloads() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="jaxblock-")  # removed when the process ends


def _download_folder(path: str) -> pathlib.Path:
    folder = pathlib.Path(_scratch_for_downloads().name) / hashlib.sha256(path.encode()).hexdigest()[:16]
    folder.mkdir(exist_ok=True)
    return folder


def _download(source: epath.Path, local: pathlib.Path) -> pathlib.Path:
    with explained("read", source):
        size = source.stat().length
    with explained(f"copy {os.fspath(source)} to", local):
        if size > (free := shutil.disk_usage(local.parent).free):
            raise UserError(
                f"cannot copy {os.fspath(source)} ({size:,} bytes) to {local.parent}: {free:,} bytes free; set TMPDIR to a "
                "folder on a larger disk"
            )
        with source.open("rb") as remote, open(local, "wb") as file:
            shutil.copyfileobj(remote, file, _CHUNK)
    return local


@functools.cache
def _fetched(path: str) -> pathlib.Path:
    return _download(as_path(path), _download_folder(path) / path.rsplit("/", 1)[-1])


@functools.cache
def _fetched_folder(path: str, patterns: tuple[str, ...]) -> pathlib.Path:
    folder = _download_folder(path)
    with explained("read", path):
        found = [entry for entry in as_path(path).iterdir() if any(fnmatch(entry.name, p) for p in patterns)]
        found = [entry for entry in found if not entry.is_dir()]
    for entry in found:
        if not (folder / entry.name).exists():
            _download(entry, folder / entry.name)
    return folder
