"""Tests that files and folders are whole or absent, and that errors name the path and the cause."""

import contextlib
import errno
import os
from functools import partial
from pathlib import Path
from unittest.mock import DEFAULT, Mock

import pytest

from jaxblock.errors import UserError
from jaxblock.io.files import check_absent, check_writable, read_bytes, read_json, sha256, write_text
from jaxblock.io.folders import check_vacant, new_folder
from jaxblock.io.paths import as_path


def fill(folder: Path, text: str = "new") -> None:
    (folder / "sub").mkdir(parents=True)
    (folder / "sub" / "data").write_text(text)
    (folder / "MARK").write_text("")


def test_a_file_is_replaced_only_when_asked_and_stays_when_the_disk_is_full(tmp_path, monkeypatch):
    path = tmp_path / "a" / "file"
    write_text(path, "one")
    with pytest.raises(UserError, match="exists already"):
        write_text(path, "two")
    assert path.read_text() == "one"
    write_text(path, "two", overwrite=True)
    assert sha256(path) == "3fc4ccfe745870e2c0d99f71f30ff0656c8dedd41cc1d7d3d376b0dbe685e2f3"
    monkeypatch.setattr(os, "fsync", Mock(side_effect=OSError(errno.ENOSPC, "No space left on device")))
    with pytest.raises(UserError, match=f"cannot write {path}: the disk is full"):
        write_text(path, "new", overwrite=True)
    assert path.read_text() == "two" and os.listdir(path.parent) == ["file"]


@pytest.mark.parametrize("links", [True, False])
def test_a_file_that_appears_meanwhile_stays(tmp_path, monkeypatch, links):
    if not links:
        monkeypatch.setattr(os, "link", Mock(side_effect=OSError(errno.EPERM, "this disk has no hard links")))
    write_text(tmp_path / "free", "ours")
    monkeypatch.setattr(os, "fsync", lambda fd: (tmp_path / "taken").write_text("theirs"))
    with pytest.raises(UserError, match="taken exists already"):
        write_text(tmp_path / "taken", "ours")
    assert [(tmp_path / name).read_text() for name in sorted(os.listdir(tmp_path))] == ["ours", "theirs"]


def test_errors_name_the_cause(tmp_path):
    (tmp_path / "file").write_text("{")
    (tmp_path / "link").symlink_to(tmp_path / "whole")
    (tmp_path / "whole" / "in").mkdir(parents=True)
    (tmp_path / "whole" / "MARK").write_text("")
    for name in ("whole", "link"):
        check_vacant(
            tmp_path / name, marker="MARK", overwrite=True, inputs=[None, tmp_path / "file", tmp_path / "wholesome"]
        )
    replace = partial(check_vacant, marker="MARK", overwrite=True)
    for action, cause in [
        (
            lambda root: replace(root / "link", inputs=[root / "whole" / "in" / "x"]),
            "link is not replaced, .* reads .*x from",
        ),
        (lambda root: replace(root / "whole", inputs=[root / "link"]), "whole is not replaced"),
        (lambda root: read_bytes(root / "none"), "no such file"),
        (lambda root: read_bytes(root), "folder, not a file"),
        (lambda root: write_text(root / "file" / "x", ""), "a file stands where a folder"),
        (lambda root: check_writable(root / "file" / "x"), "a file, not a folder"),
        (lambda root: check_writable(root / "sub", need_bytes=1 << 60), "bytes needed"),
        (lambda root: read_json(root / "file"), "not a JSON file"),
        (lambda root: as_path("ftp://x"), "unknown kind of address"),
        (lambda root: check_writable("/proc/jaxblock"), "cannot write to /proc/jaxblock"),
    ]:
        with pytest.raises(UserError, match=cause):
            action(tmp_path)


@pytest.mark.parametrize("error", [ValueError("broken"), KeyboardInterrupt(), OSError(errno.ENOSPC, "full"), None])
def test_a_failed_folder_leaves_nothing(tmp_path, error):
    expected = UserError if error is None or isinstance(error, OSError) else type(error)
    with pytest.raises(expected), new_folder(tmp_path / "made", marker="MARK") as folder:
        (folder / "data").write_text("half")  # and without an error: no marker
        if error is not None:
            raise error
    assert os.listdir(tmp_path) == []


def test_a_command_replaces_nothing_that_it_reads(tmp_path):
    run, prompts, mine = tmp_path / "run", tmp_path / "prompts.jsonl", tmp_path / "answers.jsonl"
    (tmp_path / "link").symlink_to(run)
    for file in (prompts, mine, run / "config.yaml", run / "page.html"):
        write_text(file, "")
    inputs = (tmp_path / "link", os.path.relpath(prompts), None, "org/model")
    for path in (mine, run / "page.html", run / "new.jsonl", tmp_path / "new"):
        check_absent(path, overwrite=True, inputs=inputs)
    for path in (prompts, run / "config.yaml", tmp_path / "link" / "config.yaml"):
        with pytest.raises(UserError, match="is read by this command, from .*: choose another path"):
            check_absent(path, overwrite=True, inputs=inputs)


def test_a_device_a_pipe_and_a_link_stay_what_they_are(tmp_path):
    pipe, link, target = (tmp_path / name for name in ("pipe", "link", "target"))
    os.mkfifo(pipe)
    link.symlink_to(target)
    for path in (pipe, Path("/dev/null")):
        for refuse in (
            lambda path: check_absent(path, overwrite=True),
            lambda path: write_text(path, "", overwrite=True),
        ):
            with pytest.raises(UserError, match=f"{path} is a device or a pipe, not a file"):
                refuse(path)
    for content in ("new", "newer"):
        check_absent(link, overwrite=True)
        write_text(link, content, overwrite=True)
        assert link.is_symlink() and target.read_text() == content
    assert pipe.is_fifo() and Path("/dev/null").is_char_device()


def test_what_a_killed_try_left_is_removed_once_the_folder_is_there(tmp_path):
    kept = [f".made.partial-{os.getpid()}-00", ".made.partial-notes", ".other.partial-4194305-00"]
    for name in [*kept, ".made.partial-4194305-00"]:  # Linux gives no process a higher number than 4194304
        (tmp_path / name / "sub").mkdir(parents=True)
    with new_folder(tmp_path / "made", marker="MARK") as folder:
        fill(folder)
        assert len(os.listdir(tmp_path)) == 5 and not (tmp_path / "made").exists()  # it appears whole
    assert sorted(os.listdir(tmp_path)) == sorted([*kept, "made"])


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("when", ["before", "meanwhile"])
@pytest.mark.parametrize(
    ("there", "problem"),
    [("made", "a file"), ("made/thesis.tex", "holds no MARK"), ("made/MARK", "exists already"), ("made/", None)],
)
def test_an_empty_folder_is_replaced_and_a_whole_one_where_that_is_asked_for(tmp_path, overwrite, when, there, problem):
    """Whatever else is there stays, also what appears while the folder is made."""
    replaced = problem is None or (overwrite and there == "made/MARK")

    def put(at: str) -> None:
        if at == when:
            (tmp_path / "made").mkdir() if there == "made/" else write_text(tmp_path / there, "theirs")

    put("before")
    refusal = contextlib.nullcontext() if replaced else pytest.raises(UserError, match=problem)
    with refusal, new_folder(tmp_path / "made", marker="MARK", overwrite=overwrite) as folder:
        fill(folder)
        put("meanwhile")
    assert os.listdir(tmp_path) == ["made"] and (tmp_path / "made" / "sub").exists() == replaced
    assert there == "made/" or (tmp_path / there).read_text() == ("" if replaced else "theirs")


def test_a_failed_swap_brings_the_old_folder_back(tmp_path, monkeypatch):
    target = tmp_path / "made"
    fill(target, "old")
    out_in_and_back = [DEFAULT, OSError(errno.EACCES, "denied"), DEFAULT]
    monkeypatch.setattr(os, "rename", Mock(wraps=os.rename, side_effect=out_in_and_back))
    refusal = pytest.raises(UserError, match="permission denied")
    with refusal, new_folder(target, marker="MARK", overwrite=True) as folder:
        fill(folder)
    assert (target / "sub" / "data").read_text() == "old" and os.listdir(tmp_path) == ["made"]
