"""Locks a folder for the time that a process writes it: a second writer is refused, with the name of the first."""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import threading
import time
from collections.abc import Callable, Iterator

from etils import epath

from jaxblock.errors import UserError
from jaxblock.io.leases import BEAT, Lease, Refused
from jaxblock.io.paths import PathLike, as_path, is_remote

_LOG = logging.getLogger(__name__)

POLL = 1.0
"""The time, in seconds, between two looks at a lock that another process holds, where its end is waited for."""


class FolderLock:
    """Holds the leases of a folder, which a thread renews."""

    def __init__(self, folder: str, say: Callable[[str], object]) -> None:
        """Describes a lock that has no lease yet.

        Args:
            folder: the folder, for messages.
            say: prints a line for the user: before a wait, or where there can be no lock.
        """
        self._folder, self._say = folder, say
        self._leases: list[Lease] = []
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._renew, name=f"lock of {folder}", daemon=True)

    def check(self) -> None:
        """Raises UserError where another process has taken the folder over because this one gave no sign of life for long."""
        for lease in self._leases:
            if lease.lost is not None:
                raise UserError(
                    f"{self._folder} was taken over by {lease.lost} after this process had given no sign of life for long: "
                    "nothing more is written here"
                )

    def held(self) -> bool:
        """Tells whether no other process has taken the folder over."""
        return all(lease.lost is None for lease in self._leases)

    def add(self, place: epath.Path, *, wait: bool = False) -> None:
        """Takes a lease. Nothing is taken on a local disk that cannot be written: either nothing will be, or it is full.

        Args:
            place: the lease's folder.
            wait: whether to wait while another process holds it.

        Raises:
            UserError: another process holds it and `wait` is off, or the object store cannot be written.
        """
        lease = Lease(place, self._folder)
        try:
            if wait:
                self._take_when_free(lease)
            else:
                lease.take(self._say)
        except Refused:
            raise
        except UserError as error:
            with contextlib.suppress(OSError):
                place.rmdir()
            cause = error.__cause__
            if is_remote(place) or not isinstance(cause, OSError) or isinstance(cause, FileExistsError):
                raise
            if cause.errno not in (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOENT):
                self._say(f"{self._folder} is not locked against other writers: {error}")
            return
        if not self._leases:
            self._thread.start()
        self._leases.append(lease)

    def _take_when_free(self, lease: Lease) -> None:
        """Takes a lease as soon as nobody holds it, and says once that it waits."""
        say = self._say
        while True:
            try:
                lease.take(say)
                return
            except Refused as error:
                say(f"{error.held}: waiting until it ends")
                say = lambda text: None  # noqa: E731
                time.sleep(POLL)

    def release(self) -> None:
        """Gives the leases back."""
        self._ended.set()
        if self._leases:
            self._thread.join()
        for lease in self._leases:
            lease.release()

    def _renew(self) -> None:
        while not self._ended.wait(BEAT):
            for lease in list(self._leases):
                try:
                    lease.renew()
                except Exception as error:  # the disk or the store may be away for a while: the next beat tries again
                    _LOG.warning("the lock of %s could not be renewed: %s", self._folder, error)


@contextlib.contextmanager
def only_writer(
    folder: PathLike, say: Callable[[str], object] = _LOG.warning, *, inside: bool = False, wait: bool = False
) -> Iterator[FolderLock]:
    """Keeps other processes from writing a folder until the block ends. Only one process of a group may call it.

    The lock of ``runs/one`` is the folder ``runs/.one.lock``. After a kill it stays, and the next start removes it.

    Args:
        folder: the folder, which may be absent.
        say: prints a line for the user: before a wait, or where there can be no lock.
        inside: whether a local folder gets a second lock, ``runs/one/.lock``, for processes that see it under another path,
            as in a container; it must exist, and may not be moved or replaced in the block.
        wait: whether to wait while another process holds the lock, instead of raising. For work that the other process does as well.

    Raises:
        UserError: another process holds the lock and `wait` is off; says which, and since when.
    """
    name = os.fspath(folder).rstrip("/")
    target = as_path(name if is_remote(folder) else os.path.realpath(name))
    lock = FolderLock(name, say)
    try:
        lock.add(target.parent / f".{target.name}.lock", wait=wait)
        if inside and not is_remote(folder):
            lock.add(target / ".lock", wait=wait)
        yield lock
    finally:
        lock.release()
