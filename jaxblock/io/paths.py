"""Handles local paths and object store addresses (``gs://bucket/folder``) alike, with errors that name the path."""

from __future__ import annotations

import contextlib
import errno
import os
import pathlib
import secrets
from collections.abc import Iterator

import fsspec
from etils import epath

from jaxblock.errors import UserError, install_command

PathLike = str | os.PathLike[str]

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
    """Makes a path object from a local path or an address (``gs://bucket/folder``).

    Raises:
        UserError: the kind of address is unknown.
    """
    if is_remote(path):
        # Other processes write there too, and a cached listing would hide their files until this process ends.
        fsspec.config.conf.setdefault("gs", {}).setdefault("use_listings_cache", False)
    try:
        return epath.Path(path)
    except KeyError as error:
        raise UserError(
            f"{os.fspath(path)}: unknown kind of address {error}; use a local path or gs://bucket/..."
        ) from error


def is_remote(path: PathLike) -> bool:
    """Returns whether a path names an object store, which has neither atomic rename nor append."""
    return "://" in os.fspath(path)


def absolute_path(path: PathLike) -> epath.Path:
    """Makes a path object whose parents are the folders above it; an address stays as it is."""
    return as_path(path if is_remote(path) else os.path.abspath(path))


def in_same_bucket(place: epath.Path, other: epath.Path) -> bool:
    """Returns whether a path above or beside another one is in the same bucket: other buckets are not the user's. True on disks."""
    bucket = place.parts[:3] if is_remote(place) else ()  # ("/", "gs", its name)
    return other.parts[: len(bucket)] == bucket


def put_object(path: PathLike, content: bytes, *, overwrite: bool) -> None:
    """Uploads an object to an object store, in one request that the store accepts or refuses as a whole.

    Raises:
        FileExistsError: `overwrite` is off, and the store holds an object of this name already.
    """
    as_path(path)  # sets how the store is reached
    store, name = fsspec.core.url_to_fs(os.fspath(path))
    store.pipe_file(name, content, mode="overwrite" if overwrite else "create")


@contextlib.contextmanager
def explained(action: str, path: PathLike) -> Iterator[None]:
    """Turns errors of the operating system or the object store into a `UserError` that names the path and the cause.

    Args:
        action: what the block does, for the message "cannot {action} {path}".
        path: the path that the message names.

    Raises:
        UserError: the block raised OSError or, for a remote path, any error.
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
            f"cannot {action} {os.fspath(path)}: {error} (gs:// needs gcsfs, {install_command('jaxblock[gcs]')}, and credentials)"
        ) from error


def temporary_sibling(target: epath.Path) -> pathlib.Path:
    """Returns an unused hidden path beside `target`, on the same disk, so that it can later be renamed to `target`."""
    return pathlib.Path(target.parent) / f".{target.name}.partial-{os.getpid()}-{secrets.token_hex(4)}"
