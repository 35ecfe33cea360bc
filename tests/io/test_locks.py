"""Tests that a folder has one writer at a time, on a disk and in an object store, and that a dead writer's lock is taken over."""

import dataclasses
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable

import pytest

from jaxblock.errors import UserError
from jaxblock.io import leases, locks
from jaxblock.io.files import write_bytes
from jaxblock.io.folders import list_folder
from jaxblock.io.leases import PATIENCE, Lease
from jaxblock.io.locks import only_writer
from jaxblock.io.owners import Owner, is_alive, read_owner, this_process
from jaxblock.io.paths import as_path

HOLDER = "import sys; from jaxblock.io.locks import only_writer\nwith only_writer(sys.argv[1]): print('held', flush=True); sys.stdin.read()"


@pytest.fixture(params=["disk", "bucket"])
def folder(request, tmp_path):
    """Returns a folder to be written, on a disk and in a bucket."""
    if request.param == "disk":
        return str(tmp_path / "run")
    request.getfixturevalue("store")
    return "gs://bucket/run"


def changed(**fields: object) -> Callable[[], Owner]:
    """Returns a function that makes this process with other fields."""
    return lambda: dataclasses.replace(this_process(), **fields)


def _locks(folder: str) -> list[str]:
    """Returns the files of the folder's lock."""
    parent = as_path(folder).parent
    return [file.name for entry in list_folder(parent) if entry.name.startswith(".") for file in list_folder(entry)]


def test_one_writer_at_a_time_and_a_killed_one_is_succeeded(folder):
    """A real process holds the lock; it is named to the second, and once it is killed the next goes on."""
    holder = subprocess.Popen([sys.executable, "-c", HOLDER, folder], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert holder.stdout is not None and holder.stdout.readline() == b"held\n"
    refusal = pytest.raises(UserError, match=rf"run is being written by process {holder.pid} on \S+, since 20")
    with refusal, only_writer(folder):
        pass
    lease = Lease(as_path(folder).parent / ".run.lock", "run")
    assert lease.is_held()
    holder.send_signal(signal.SIGKILL)
    holder.communicate()
    assert _locks(folder) and not lease.is_held()
    with only_writer(folder), pytest.raises(UserError, match=f"process {os.getpid()} "), only_writer(folder):
        pass
    assert _locks(folder) == []


def test_a_lock_that_is_waited_for_is_taken_when_its_holder_ends(tmp_path, monkeypatch):
    """The waiting process says once for whom it waits; the holder, a real process, is told to end when it has said so."""
    monkeypatch.setattr(locks, "POLL", 0.01)
    folder = str(tmp_path / "data")
    holder = subprocess.Popen([sys.executable, "-c", HOLDER, folder], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert holder.stdout is not None and holder.stdout.readline() == b"held\n" and holder.stdin is not None
    said: list[str] = []

    def say(text: str) -> None:
        said.append(text)
        holder.stdin.close()

    with only_writer(folder, say, wait=True):
        assert holder.wait() == 0
    [line] = said
    assert f"data is being written by process {holder.pid} " in line and line.endswith(": waiting until it ends")


@pytest.mark.parametrize("beats", [False, True])
def test_an_owner_on_another_machine_is_watched(folder, beats):
    """It is refused when the owner gives a sign of life while we wait, and is taken over when it gives none."""
    path = as_path(folder).parent / ".run.lock"
    theirs = Lease(path, "run")
    theirs._content = changed(machine="another", host="far")().as_json()
    assert not theirs.is_held() and theirs._claim(7) and theirs.is_held()
    said: list[str] = []
    waited: list[float] = []

    def wait(seconds: float) -> None:
        waited.append(seconds)
        if beats and len(waited) == 3:
            theirs.renew()

    ours = Lease(path, "run")
    if beats:
        with pytest.raises(UserError, match=f"run is being written by process {os.getpid()} on far, since 20"):
            ours.take(said.append, wait)
        assert len(waited) == 3 and theirs.lost is None
    else:
        ours.take(said.append, wait)
        assert sum(waited) == PATIENCE and _locks(folder) == ["000008"]
        theirs.renew()  # it wakes up
        assert theirs.lost is not None and str(os.getpid()) in theirs.lost
        theirs.release()
        assert _locks(folder) == ["000008"]
    assert len(said) == 1 and "sign of life" in said[0]


def test_a_writer_that_slept_does_not_take_a_number_that_was_passed(folder):
    path = as_path(folder).parent / ".run.lock"
    slept, new = Lease(path, "run"), Lease(path, "run")
    for lease in (slept, new):
        lease._content = this_process().as_json()
    assert slept._claim(1) and new._claim(2) and new._claim(3)  # 2, which the sleeper wants next, is free again
    slept.renew()
    assert slept.lost is not None and _locks(folder) == ["000003"]


def test_a_lost_lock_is_told(tmp_path, monkeypatch):
    """The thread notices that another process has written the next number."""
    monkeypatch.setattr(locks, "BEAT", 0.01)
    with only_writer(tmp_path / "run") as lock:
        lock.check()
        while (lease := lock._leases[0]).lost is None:  # the thread renews at the same time, and may win a few times
            numbers = lease._numbers() or [0]
            try:
                write_bytes(lease._file(numbers[-1] + 1), changed(machine="another", host="far")().as_json())
            except UserError:
                continue
        with pytest.raises(UserError, match="was taken over by process .* on far"):
            lock.check()


def test_a_folder_is_locked_inside_too(tmp_path):
    """Two containers may see the folder under other paths; a link to it is the folder itself."""
    (tmp_path / "run").mkdir()
    (tmp_path / "link").symlink_to("run")
    with only_writer(tmp_path / "link", inside=True):
        assert sorted(os.listdir(tmp_path)) == [".run.lock", "link", "run"]
        (tmp_path / ".run.lock").rename(tmp_path / "unseen")
        with pytest.raises(UserError, match="is being written by"), only_writer(tmp_path / "run", inside=True):
            pass
        (tmp_path / "unseen").rename(tmp_path / ".run.lock")
    assert os.listdir(tmp_path / "run") == [] and sorted(os.listdir(tmp_path)) == ["link", "run"]


def test_the_lock_in_a_copy_of_a_folder_is_nobodys(tmp_path):
    """A run is copied while it is trained: the copy can be written at once, the run and a run that was moved cannot."""
    (tmp_path / "run").mkdir()
    with only_writer(tmp_path / "run", inside=True):
        shutil.copytree(tmp_path / "run", tmp_path / "copy")
        assert (
            Lease(tmp_path / "run" / ".lock", "run").is_held()
            and not Lease(tmp_path / "copy" / ".lock", "copy").is_held()
        )
        with only_writer(tmp_path / "copy", inside=True):
            assert os.listdir(tmp_path / "copy" / ".lock") == ["000002"]
        (tmp_path / "run").rename(tmp_path / "moved")
        with pytest.raises(UserError, match="is being written by"), only_writer(tmp_path / "moved", inside=True):
            pass
        (tmp_path / "moved").rename(tmp_path / "run")
    assert os.listdir(tmp_path / "copy") == os.listdir(tmp_path / "run") == []


def test_a_folder_that_cannot_be_written_needs_no_lock(tmp_path, monkeypatch):
    said: list[str] = []
    for error, told in ((PermissionError(13, "no"), 0), (OSError(30, "read-only"), 0), (OSError(28, "full"), 1)):

        def fails(*arguments: object, error: OSError = error) -> None:
            raise UserError("cannot write") from error

        monkeypatch.setattr(leases, "write_bytes", fails)
        with only_writer(tmp_path / "run", said.append):
            pass
        assert len(said) == told
    assert "is not locked against other writers: cannot write" in said[0]


def test_who_is_alive_and_what_is_no_owner():
    for owner, alive in [
        (this_process, True),
        (changed(begun=1), False),  # the process id was given to another process
        (changed(pid=2**22 + 5), False),
        (changed(pid=2**70, begun=0), False),
        (changed(namespace="pid:[1]"), None),
        (changed(machine="x"), None),
    ]:
        assert is_alive(owner()) is alive and isinstance(read_owner(owner().as_json()), Owner)
    for content in (b"", b"{", b"[]", b'{"host": 1}', b"[" * 100_000, b"\xff"):
        assert read_owner(content) is None
