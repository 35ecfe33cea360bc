"""Makes, moves and copies folders that are at any moment either whole or absent.

A local disk has an atomic rename: a folder is written under a temporary name beside its final one and then renamed. An
object store (``gs://``) has none: there one chosen file, the folder's *commit marker*, is written last, and a folder
without it is not whole.
"""

from __future__ import annotations

import contextlib
import errno
import glob
import os
import pathlib
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from fnmatch import fnmatch

from etils import epath

from jaxblock.errors import UserError, shown
from jaxblock.io.files import read_bytes, real_path
from jaxblock.io.owners import runs_here
from jaxblock.io.paths import PathLike, as_path, explained, is_remote, temporary_sibling
from jaxblock.io.remote import remove_folder, upload_folder
from jaxblock.io.signed_text import is_unedited

EXPORT_FILES = ("*.safetensors", "*.json", "*.jinja", "*.model", "*.py", "merges.txt", "vocab.txt", "README.md")
"""Globs of the files of an export. A README.md is one only as long as it is as we wrote it."""
_HOLDS = {
    "manifest.json": ("manifest.json", "files.json", "tokenizer", "*.array_record"),
    "summary.json": ("summary.json", "problems.jsonl"),
    "results.json": ("results.json", "samples_*.jsonl"),
    "config.json": EXPORT_FILES,
    "adapter_config.json": EXPORT_FILES,
}
"""What a folder holds that may be replaced, by its commit marker: a run has a manifest too, and people put files anywhere."""


@contextlib.contextmanager
def new_folder(path: PathLike, *, marker: str, overwrite: bool = False) -> Iterator[pathlib.Path]:
    """Yields a local scratch folder that becomes the folder `path` when the block ends, and is removed if it raises.

    Args:
        path: the folder to make.
        marker: the name of the commit marker, a file that the block must write; it is uploaded last. A folder without it is
            never replaced, and neither is one with other files in it than such a folder has.
        overwrite: whether an existing whole folder is replaced.

    Yields:
        The scratch folder, on the same disk as `path` where that is local.

    Raises:
        UserError: `path` exists and may not be replaced, or it cannot be written.
    """
    check_vacant(path, marker=marker, overwrite=overwrite)
    target = as_path(path)
    with contextlib.ExitStack() as cleaning, explained("write", path):
        if is_remote(path):
            scratch = pathlib.Path(cleaning.enter_context(tempfile.TemporaryDirectory(prefix="jaxblock-")))
        else:
            target = as_path(os.path.realpath(target))  # so that the folder is replaced and a link to it is kept
            target.parent.mkdir(parents=True, exist_ok=True)
            scratch = temporary_sibling(target)
            scratch.mkdir()
            cleaning.callback(shutil.rmtree, scratch, ignore_errors=True)
        yield scratch
        if not (scratch / marker).exists():
            raise FileNotFoundError(errno.ENOENT, f"the commit marker {marker} was not written")
        if is_remote(path):
            if overwrite:
                remove_folder(target, marker)
            try:
                upload_folder(scratch, target, marker)
            except FileExistsError:
                check_vacant(path, marker=marker)  # says what has appeared
                raise
        else:
            move_into_place(scratch, target, marker=marker, overwrite=overwrite)
            _remove_partial(target)


def check_vacant(
    path: PathLike, *, marker: str, overwrite: bool = False, inputs: Iterable[PathLike | None] = ()
) -> None:
    """Checks that a folder may be made at `path`, by the rules of `new_folder`.

    Args:
        path: the folder.
        marker: the name of its commit marker.
        overwrite: whether an existing whole folder may be replaced.
        inputs: files and folders that the same command reads, and that it never replaces.

    Raises:
        UserError: a file or folder is there that may not be replaced.
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
            f"{name} exists already and is not overwritten: choose another path, or give --overwrite (prepare: --data.overwrite)"
        )
    for given in inputs:
        if given is not None and real_path(path) in (source := real_path(given), *source.parents):
            raise UserError(
                f"{name} is not replaced, since this command reads {os.fspath(given)} from there: choose another path"
            )
    holds = _HOLDS.get(marker, ("*",))
    entries = list_folder(target)
    other = [entry.name for entry in entries if not any(fnmatch(entry.name, one) for one in holds)]
    other += [entry.name for entry in entries if entry.name == "README.md" and not is_unedited(read_bytes(entry))]
    if other:
        raise UserError(
            f"{name} is not replaced, since that would delete what is no part of it: {shown(other[0])}. Move that away, or choose "
            "another path"
        )


def write_files(folder: PathLike, files: Mapping[str, bytes]) -> None:
    """Writes files into a folder that is being made. Unlike `write_bytes`, a failure may leave part of a file.

    Args:
        folder: the folder, which is made if absent.
        files: the content of each file, by its name.

    Raises:
        UserError: a file cannot be written.
    """
    with explained("write to", folder):
        target = as_path(folder)
        target.mkdir(parents=True, exist_ok=True)
        for name, content in files.items():
            (target / name).write_bytes(content)


def copy_files(source: PathLike, target: pathlib.Path, patterns: Sequence[str] = ("*",)) -> None:
    """Copies files that are directly in a folder, local or remote, into a local folder, which is made if absent.

    Args:
        source: the folder to copy from.
        target: the local folder to copy into.
        patterns: globs of the names of the files to copy.

    Raises:
        UserError: one of the files cannot be read or written.
    """
    files = [file for file in list_folder(source) if any(fnmatch(file.name, p) for p in patterns) and not file.is_dir()]
    write_files(target, {file.name: read_bytes(file) for file in files})


def list_folder(folder: PathLike) -> list[epath.Path]:
    """Lists the files and folders directly in a folder, sorted by name; empty where there is no such folder.

    Raises:
        UserError: the folder cannot be read.
    """
    with explained("read", folder):
        path = as_path(folder)
        return sorted(path.iterdir(), key=lambda entry: entry.name) if path.is_dir() else []


def folder_bytes(folder: PathLike) -> int:
    """Adds up the sizes of all files in a folder and the folders in it, in bytes."""
    entries = list_folder(folder)
    with explained("look at", folder):
        return sum(folder_bytes(entry) if entry.is_dir() else entry.stat().length for entry in entries)


def move_folder(source: PathLike, target: PathLike) -> None:
    """Moves a folder to a path that does not exist yet: by rename, or in an object store by copying and removing it.

    Raises:
        UserError: the folder cannot be moved.
    """
    with explained("move", source):
        if not is_remote(source):
            os.rename(source, target)
            return
        _copy_tree(as_path(source), as_path(target))
        as_path(source).rmtree()


def discard_folder(path: PathLike, marker: str) -> None:
    """Removes a folder so that it does not look whole at any moment.

    Args:
        path: the folder.
        marker: the name of its commit marker, which is removed first in an object store.

    Raises:
        UserError: the folder cannot be removed.
    """
    with explained("remove", path):
        if is_remote(path):
            remove_folder(as_path(path), marker)
            return
        leaving = temporary_sibling(as_path(os.path.realpath(path)))
        os.rename(os.path.realpath(path), leaving)
        shutil.rmtree(leaving)


def _copy_tree(source: epath.Path, target: epath.Path) -> None:
    target.mkdir(parents=True, exist_ok=True)
    for entry in source.iterdir():
        if entry.is_dir():
            _copy_tree(entry, target / entry.name)
        else:
            entry.copy(target / entry.name)


def _remove_partial(target: epath.Path) -> None:
    """Removes what killed processes have left of earlier tries to make a folder, now that the folder is there."""
    for entry in pathlib.Path(target.parent).glob(f"{glob.escape(f'.{target.name}.partial-')}*-*"):
        pid = entry.name.rpartition(".partial-")[2].partition("-")[0]
        if pid.isdecimal() and not runs_here(int(pid)):
            shutil.rmtree(entry, ignore_errors=True)


def move_into_place(scratch: pathlib.Path, target: epath.Path, *, marker: str, overwrite: bool) -> None:
    """Gives a finished folder its name. What may not be replaced stays or is put back, also if it has appeared only now.

    Args:
        scratch: the finished folder, on the same local disk.
        target: its place, not a link.
        marker: the name of its commit marker.
        overwrite: whether an existing whole folder is replaced.

    Raises:
        UserError: something is there that may not be replaced.
        OSError: the folder cannot be moved.
    """
    if not overwrite or not target.exists():
        try:
            os.rename(scratch, target)  # it replaces an empty folder and nothing else
        except OSError as error:
            if error.errno in (errno.EEXIST, errno.ENOTEMPTY, errno.ENOTDIR):
                check_vacant(target, marker=marker)  # says what is there
            raise
        return
    old = temporary_sibling(target)
    os.rename(target, old)
    try:
        check_vacant(old, marker=marker, overwrite=True)
        os.rename(scratch, target)
    except (OSError, UserError):
        os.rename(old, target)
        raise
    shutil.rmtree(old, ignore_errors=True)
