"""Makes one process at a time the writer of a folder: on local disks, network file systems and in object stores alike.

A lease is a folder of numbered files, of which the highest names the owner. Every `BEAT` seconds the owner writes the next
number and removes the one before, which shows other machines that it lives. A number is only ever created, never
replaced, so that of two processes that want it exactly one gets it; file locks of the kernel would do none of this
in an object store, and not reliably between machines. A lease whose owner is seen to be dead is taken over at once, and so is
one that was copied together with its folder; one whose owner cannot be seen (another machine, another container) when no new
number appears for `PATIENCE` seconds.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable

from etils import epath

from jaxblock.errors import UserError
from jaxblock.io.files import read_bytes, write_bytes
from jaxblock.io.folders import list_folder
from jaxblock.io.owners import Owner, holds, read_owner, this_process
from jaxblock.io.paths import PathLike, as_path, explained, is_remote

BEAT = 20.0
"""The time, in seconds, between two signs of life."""
PATIENCE = 120.0
"""The time, in seconds, without a sign of life after which an owner that cannot be seen counts as dead."""

Wait = Callable[[float], object]


class Refused(UserError):
    """Reports that another process holds a lease.

    Attributes:
        held: what is written by whom, such as "runs/one is being written by process 12 on host".
    """

    def __init__(self, held: str) -> None:
        """Makes the error of something that is held."""
        super().__init__(f"{held}: wait until it ends, or choose another folder")
        self.held = held


class Lease:
    """Holds the right to write something, from ``take`` to ``release``.

    Attributes:
        path: the lease's folder.
        lost: who has taken the lease over; None while it is ours.
    """

    def __init__(self, path: PathLike, what: str) -> None:
        """Describes a lease; nothing is looked at or written yet.

        Args:
            path: the lease's folder, local or in an object store.
            what: what the lease is for, for messages: "the folder runs/one".
        """
        self.path = as_path(path)
        self.lost: str | None = None
        self._what = what
        self._place = "" if is_remote(path) else os.path.realpath(path)
        self._content = b""
        self._number = 0

    def take(self, say: Callable[[str], object], wait: Wait = time.sleep) -> None:
        """Takes the lease, after waiting for signs of life where it cannot be seen whether the owner lives.

        Args:
            say: prints a line for the user before a wait.
            wait: waits for a number of seconds.

        Raises:
            Refused: its owner lives.
            UserError: the lease cannot be read or written.
        """
        with explained("lock", self._what):
            self._content = this_process(self._place).as_json()
            while not self._claim(self._wait_for_owner(say, wait) + 1):
                pass  # another process was faster

    def _wait_for_owner(self, say: Callable[[str], object], wait: Wait) -> int:
        """Returns the highest number once its owner is dead or counts as dead, 0 where there is none; else raises Refused."""
        watched, waited = None, 0.0
        while True:
            number, owner = self._newest()
            alive = False if number == 0 else None if owner is None else holds(owner, self._place)
            if alive or (alive is None and watched not in (None, number)):
                raise Refused(f"{self._what} is being written by {owner or 'another process'}")
            if alive is False or waited >= PATIENCE:
                return number
            if watched is None:
                who = owner or "the process"
                say(f"waiting up to {PATIENCE:g} s for a sign of life of {who} that wrote {self._what}")
            watched = number
            wait(BEAT / 10)
            waited += BEAT / 10

    def is_held(self) -> bool:
        """Tells, without waiting, whether a process holds the lease: one that cannot be seen from here counts as living.

        Raises:
            UserError: the lease cannot be read.
        """
        number, owner = self._newest()
        return number > 0 and (owner is None or holds(owner, self._place) is not False)

    def renew(self) -> None:
        """Shows that the owner lives; sets ``lost`` where another process has taken the lease over.

        Raises:
            UserError: the lease cannot be read or written now.
        """
        if self.lost is None and not self._claim(self._number + 1):
            self.lost = str(self._newest()[1] or "another process")

    def release(self) -> None:
        """Gives the lease back. It stays, and counts as a dead process's, where it cannot be removed."""
        if self.lost is None:
            with contextlib.suppress(Exception):  # clients of object stores raise many kinds
                self._remove(self._number)
                if not is_remote(self.path):
                    self.path.rmdir()

    def _newest(self) -> tuple[int, Owner | None]:
        """Returns the highest number and its owner; (0, None) where nobody holds the lease."""
        while numbers := self._numbers():
            try:
                return numbers[-1], read_owner(read_bytes(self._file(numbers[-1])))
            except UserError:
                if self._file(numbers[-1]).exists():
                    raise  # else its owner has just given it back, or written the next number
        return 0, None

    def _claim(self, number: int) -> bool:
        """Creates a number and removes the ones before it; returns whether it is ours now.

        A process that slept may create a number that was passed long ago, so the highest one is looked at again.
        """
        try:
            try:
                write_bytes(self._file(number), self._content)
            except UserError as error:
                if not isinstance(error.__cause__, FileNotFoundError):
                    raise
                write_bytes(self._file(number), self._content)  # another process has just removed the empty folder
        except UserError:
            if not self._file(number).exists():
                raise
            # Where the answer to a first try was lost on the way, a client's second try finds our own file.
            if read_bytes(self._file(number)) != self._content:
                return False
        numbers = self._numbers()
        if numbers[-1:] != [number]:
            self._remove(number)
            return False
        self._number = number
        for older in numbers[:-1]:
            self._remove(older)
        return True

    def _numbers(self) -> list[int]:
        return sorted(int(entry.name) for entry in list_folder(self.path) if entry.name.isdecimal())

    def _file(self, number: int) -> epath.Path:
        return self.path / f"{number:06d}"

    def _remove(self, number: int) -> None:
        with contextlib.suppress(FileNotFoundError):
            self._file(number).unlink()
