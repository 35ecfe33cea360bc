"""Tests that a folder has one writer at a time, on a disk and in an object store, and that a dead writer's lock is taken over."""

import dataclasses
import os
import shutil
import subprocess
import sys
from unittest.mock import Mock

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
ELSEWHERE = {"machine": "another", "host": "far"}


@pytest.fixture(params=["disk", "bucket"])
def folder(request, tmp_path):
    """Returns a folder to be written, on a disk and in a bucket."""
    if request.param == "disk":
        return str(tmp_path / "run")
    request.getfixturevalue("store")
    return "gs://bucket/run"


def by(**fields: object) -> bytes:
    """Returns what this process, with other fields, writes into a lock."""
    return dataclasses.replace(this_process(), **fields).as_json()


def _lease(folder: str, content: bytes = b"") -> Lease:
    lease = Lease(as_path(folder).parent / ".run.lock", "run")
    lease._content = content
    return lease


def _locks(folder: str) -> list[str]:
    """Returns the files of the folder's lock."""
    return [file.name for file in list_folder(as_path(folder).parent / ".run.lock")]


def refused(folder: object, message: str = "is being written by", **how: bool) -> None:
    with pytest.raises(UserError, match=message), only_writer(folder, **how):
        pass


def test_one_writer_at_a_time_and_a_killed_one_is_succeeded(folder, monkeypatch):
    """A real process holds the lock; it is named to the second, and is waited for; once it is killed the next goes on."""
    monkeypatch.setattr(locks, "POLL", 0.01)
    holder = subprocess.Popen([sys.executable, "-c", HOLDER, folder], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert holder.stdout.readline() == b"held\n"
    refused(folder, rf"run is being written by process {holder.pid} on \S+, since 20")
    assert _lease(folder).is_held()
    said = []

    def kill(text: str) -> None:
        said.append(text)
        holder.kill()
        holder.communicate()
        assert _locks(folder) and not _lease(folder).is_held()

    with only_writer(folder, kill, wait=True):
        refused(folder, f"process {os.getpid()} ")
    assert _locks(folder) == []
    [line] = said
    assert f"run is being written by process {holder.pid} " in line and line.endswith(": waiting until it ends")


@pytest.mark.parametrize("beats", [False, True])
def test_an_owner_on_another_machine_is_watched(folder, beats):
    """It is refused when the owner gives a sign of life while we wait, and is taken over when it gives none."""
    theirs, ours = _lease(folder, by(**ELSEWHERE)), _lease(folder)
    assert not theirs.is_held() and theirs._claim(7) and theirs.is_held()
    said: list[str] = []
    waited: list[float] = []

    def wait(seconds: float) -> None:
        waited.append(seconds)
        if beats and len(waited) == 3:
            theirs.renew()

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
    slept, new = _lease(folder, by()), _lease(folder, by())
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
                write_bytes(lease._file(numbers[-1] + 1), by(**ELSEWHERE))
            except UserError:
                continue
        with pytest.raises(UserError, match="was taken over by process .* on far"):
            lock.check()


def test_a_folder_is_locked_inside_too_and_a_copy_of_it_is_not(tmp_path):
    """Other containers may see it under other paths; a link or a move leaves it the same folder, a copy is another one."""
    run, link, copy, moved = (tmp_path / name for name in ("run", "link", "copy", "moved"))
    run.mkdir()
    link.symlink_to("run")
    with only_writer(link, inside=True):
        assert sorted(os.listdir(tmp_path)) == [".run.lock", "link", "run"]
        (tmp_path / ".run.lock").rename(tmp_path / "unseen")
        refused(run, inside=True)
        (tmp_path / "unseen").rename(tmp_path / ".run.lock")
        shutil.copytree(run, copy)
        assert Lease(run / ".lock", "run").is_held() and not Lease(copy / ".lock", "copy").is_held()
        with only_writer(copy, inside=True):
            assert os.listdir(copy / ".lock") == ["000002"]
        run.rename(moved)
        refused(moved, inside=True)
        moved.rename(run)
    assert os.listdir(run) == os.listdir(copy) == [] and sorted(os.listdir(tmp_path)) == ["copy", "link", "run"]


def test_a_folder_that_cannot_be_written_needs_no_lock(tmp_path, monkeypatch):
    for cause, told in ((PermissionError(13, "no"), 0), (OSError(30, "read-only"), 0), (OSError(28, "full"), 1)):
        error, said = UserError("cannot write"), Mock()
        error.__cause__ = cause
        monkeypatch.setattr(leases, "write_bytes", Mock(side_effect=error))
        with only_writer(tmp_path / "run", said):
            pass
        assert said.call_count == told
    assert "is not locked against other writers: cannot write" in said.call_args.args[0]


def test_who_is_alive_and_what_is_no_owner():
    for fields, alive in [
        ({}, True),
        ({"begun": 1}, False),  # the process id was given to another process
        ({"pid": 2**22 + 5}, False),
        ({"pid": 2**70, "begun": 0}, False),
        ({"namespace": "pid:[1]"}, None),
        ({"machine": "x"}, None),
    ]:
        owner = read_owner(by(**fields))
        assert isinstance(owner, Owner) and is_alive(owner) is alive
    for content in (b"", b"{", b"[]", b'{"host": 1}', b"[" * 100_000, b"\xff"):
        assert read_owner(content) is None
