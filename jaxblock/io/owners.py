"""Says who a process is, in a form that other processes and other machines can read, and whether such a process lives."""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import json
import os
import secrets
import socket
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Owner:
    """Identifies a process.

    Attributes:
        host: the name of its machine or container.
        machine: the identity of the machine's kernel since its start, which its containers share; else the host's name.
        namespace: the process-id namespace, since the same number is another process in another container.
        pid: its process id.
        begun: when the process began, in the kernel's ticks, since a process id is used again; 0 where not known.
        since: when the owner took what it holds, such as "2026-11-28 20:15:00 UTC".
        token: a random text, which tells two locks of one process apart.
        place: the lock's folder, as the owner sees it: in a copy of that folder this text is the same, and nobody holds it.
            Empty in object stores, and in locks of earlier versions.
    """

    host: str
    machine: str
    namespace: str
    pid: int
    begun: int
    since: str
    token: str
    place: str = ""

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}, since {self.since}"

    def as_json(self) -> bytes:
        """Returns the owner as a line of JSON."""
        return json.dumps(dataclasses.asdict(self)).encode()


def this_process(place: str = "") -> Owner:
    """Returns the identity of this process.

    Args:
        place: the folder of the lock that it takes.
    """
    now = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
    pid = os.getpid()
    return Owner(
        socket.gethostname(), _machine(), _namespace(), pid, _begun(pid) or 0, now, secrets.token_hex(8), place
    )


def read_owner(content: bytes) -> Owner | None:
    """Reads an owner from its JSON; None where the text is none, such as one that is still being written."""
    try:
        owner = Owner(**json.loads(content))
    except (ValueError, TypeError, RecursionError):
        return None
    kinds = {"str": str, "int": int}
    fits = all(isinstance(getattr(owner, f.name), kinds[str(f.type)]) for f in dataclasses.fields(owner))
    return owner if fits else None


def is_alive(owner: Owner) -> bool | None:
    """Tells whether a process still runs; None where that cannot be seen from here, as of another machine's process."""
    if (owner.machine, owner.namespace) != (_machine(), _namespace()):
        return None
    begun = _begun(owner.pid)
    if begun is not None and owner.begun:
        return begun == owner.begun
    return runs_here(owner.pid)


def holds(owner: Owner, place: str) -> bool | None:
    """Tells whether the owner named in a lock holds it; None where that cannot be seen from here.

    A lock that came with a copy of its folder names an owner that may well live, and that holds another lock.

    Args:
        owner: who is named in the lock.
        place: the lock's folder; empty in object stores.
    """
    if (alive := is_alive(owner)) and place and owner.place:
        with contextlib.suppress(OSError):  # the owner's folder was moved: this may be it
            return os.path.samefile(owner.place, place)
    return alive


def runs_here(pid: int) -> bool:
    """Tells whether this machine has a process of this number."""
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        pass  # a process of another user
    return True


def _machine() -> str:
    with contextlib.suppress(OSError):
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return socket.gethostname()


def _namespace() -> str:
    with contextlib.suppress(OSError):
        return os.readlink("/proc/self/ns/pid")
    return ""


def _begun(pid: int) -> int | None:
    """Returns when a process began; None where there is no such process, or the system does not say. A zombie has ended."""
    try:
        state, *fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return -1 if state in "ZX" else int(fields[18])
