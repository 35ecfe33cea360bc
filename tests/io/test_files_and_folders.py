"""Tests that files and folders are whole or absent, and that errors name the path and the cause."""

import contextlib
import errno
import os
from pathlib import Path
from unittest.mock import Mock

import pytest

from jaxblock.errors import UserError
from jaxblock.io.files import check_absent, check_writable, read_bytes, read_json, sha256, write_text
from jaxblock.io.folders import check_vacant, new_folder
from jaxblock.io.paths import as_path


def names_in(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir())


def fill(folder: Path, text: str = "new") -> None:
    (folder / "sub").mkdir()
    (folder / "sub" / "data").write_text(text)
    (folder / "MARK").write_text("")


def test_a_file_is_replaced_only_when_asked(tmp_path):
    path = tmp_path / "a" / "file"
    write_text(path, "one")
    with pytest.raises(UserError, match="exists already"):
        write_text(path, "two")
    assert path.read_text() == "one"
    write_text(path, "two", overwrite=True)
    assert path.read_text() == "two"
    assert names_in(path.parent) == ["file"]
    assert sha256(path) == "3fc4ccfe745870e2c0d99f71f30ff0656c8dedd41cc1d7d3d376b0dbe685e2f3"


def test_a_full_disk_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "file"
    write_text(path, "old")
    monkeypatch.setattr(os, "fsync", Mock(side_effect=OSError(errno.ENOSPC, "No space left on device")))
    with pytest.raises(UserError, match=f"cannot write {path}: the disk is full"):
        write_text(path, "new", overwrite=True)
    assert path.read_text() == "old" and names_in(tmp_path) == ["file"]


@pytest.mark.parametrize("links", [True, False])
def test_a_file_that_appears_meanwhile_stays(tmp_path, monkeypatch, links):
    if not links:
        monkeypatch.setattr(os, "link", Mock(side_effect=OSError(errno.EPERM, "this disk has no hard links")))
    write_text(tmp_path / "free", "ours")
    monkeypatch.setattr(os, "fsync", lambda fd: (tmp_path / "taken").write_text("theirs"))
    with pytest.raises(UserError, match="taken exists already"):
        write_text(tmp_path / "taken", "ours")
    assert [(tmp_path / name).read_text() for name in names_in(tmp_path)] == ["ours", "theirs"]


def test_errors_name_the_cause(tmp_path):
    (tmp_path / "file").write_text("{")
    for action, cause in [
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
    assert names_in(tmp_path) == []


def test_what_may_be_replaced(tmp_path):
    whole, foreign, empty, file = (tmp_path / name for name in ("whole", "foreign", "empty", "file"))
    for folder in (whole, foreign, empty):
        folder.mkdir()
    fill(whole, "old")
    (foreign / "thesis.tex").write_text("years of work")
    file.write_text("")
    with pytest.raises(UserError, match="overwrite"):
        check_vacant(whole, marker="MARK")
    for overwrite in (False, True):
        check_vacant(empty, marker="MARK", overwrite=overwrite)
        check_vacant(tmp_path / "absent", marker="MARK", overwrite=overwrite)
        for target in (foreign, file):
            with pytest.raises(UserError, match="choose another path"):
                check_vacant(target, marker="MARK", overwrite=overwrite)
    for target in (whole, empty):
        with new_folder(target, marker="MARK", overwrite=True) as folder:
            fill(folder)
        assert (target / "sub" / "data").read_text() == "new"
    assert names_in(tmp_path) == ["empty", "file", "foreign", "whole"]


def test_a_command_replaces_nothing_that_it_reads(tmp_path):
    run, prompts, mine = tmp_path / "run", tmp_path / "prompts.jsonl", tmp_path / "answers.jsonl"
    run.mkdir()
    (tmp_path / "link").symlink_to(run)
    for file in (prompts, mine, run / "config.yaml", run / "page.html"):
        file.write_text("")
    inputs = (tmp_path / "link", os.path.relpath(prompts), None, "org/model")
    for path in (mine, run / "page.html", run / "new.jsonl", tmp_path / "new"):
        check_absent(path, overwrite=True, inputs=inputs)
    for path in (prompts, run / "config.yaml", tmp_path / "link" / "config.yaml"):
        with pytest.raises(UserError, match="is read by this command, from .*: choose another path"):
            check_absent(path, overwrite=True, inputs=inputs)


def test_what_a_killed_try_left_is_removed_once_the_folder_is_there(tmp_path):
    kept = [f".made.partial-{os.getpid()}-00", ".made.partial-notes", ".other.partial-4194305-00"]
    for name in [*kept, ".made.partial-4194305-00"]:  # Linux gives no process a higher number than 4194304
        (tmp_path / name / "sub").mkdir(parents=True)
    with new_folder(tmp_path / "made", marker="MARK") as folder:
        fill(folder)
        assert len(names_in(tmp_path)) == 5 and not (tmp_path / "made").exists()  # it appears whole
    assert names_in(tmp_path) == sorted([*kept, "made"])


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize(
    ("appears", "problem"), [("made", "a file"), ("made/thesis.tex", "holds no MARK"), ("made/MARK", "exists already")]
)
def test_what_appears_meanwhile_stays(tmp_path, appears, problem, overwrite):
    """Only another whole folder may be replaced, and that only where it is asked for."""
    replaced = overwrite and appears == "made/MARK"
    refusal = contextlib.nullcontext() if replaced else pytest.raises(UserError, match=problem)
    with refusal, new_folder(tmp_path / "made", marker="MARK", overwrite=overwrite) as folder:
        fill(folder)
        (tmp_path / appears).parent.mkdir(exist_ok=True)
        (tmp_path / appears).write_text("theirs")
    assert (tmp_path / appears).read_text() == ("" if replaced else "theirs")
    assert names_in(tmp_path) == ["made"]


def test_a_failed_swap_brings_the_old_folder_back(tmp_path, monkeypatch):
    target, rename = tmp_path / "made", os.rename
    target.mkdir()
    fill(target, "old")

    def fails_into_place(source: os.PathLike[str], to: os.PathLike[str]) -> None:
        if Path(to).name == "made" and (Path(source) / "sub" / "data").read_text() != "old":
            raise OSError(errno.EACCES, "denied")
        rename(source, to)

    monkeypatch.setattr(os, "rename", fails_into_place)
    refusal = pytest.raises(UserError, match="permission denied")
    with refusal, new_folder(target, marker="MARK", overwrite=True) as folder:
        fill(folder)
    assert (target / "sub" / "data").read_text() == "old" and names_in(tmp_path) == ["made"]
