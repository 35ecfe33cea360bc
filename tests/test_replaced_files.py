"""Tests that the files of prepared data and of runs are those that were written there, in every verb that opens them."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

import jaxblock
from jaxblock.cli import main
from jaxblock.data.store.prepared_folder import open_prepared
from jaxblock.data.store.records import Records, write_records
from jaxblock.errors import UserError
from jaxblock.io import inventory


def _reverse(file: Path) -> None:
    """Writes the same records in the other order, which gives a file of the same size here."""
    records = list(Records(file.parent, file.stem.split(".")[0]))[::-1]
    size = file.stat().st_size
    write_records(file.parent, "train", records)
    assert file.stat().st_size == size


def _shorten(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-1])


def _flip(file: Path) -> None:
    file.write_bytes(bytes([file.read_bytes()[0] ^ 1]) + file.read_bytes()[1:])


def _empty(file: Path) -> None:
    file.write_text("")


CASES: dict[str, tuple[str, Callable[[Path], object]]] = {
    "template": ("tokenizer/template.jinja", _flip),
    "tokenizer": ("tokenizer/*token*", _flip),
    "no-tokenizer": ("tokenizer/*token*", Path.unlink),
    "manifest": ("manifest.json", lambda f: f.write_text(json.dumps({**json.loads(f.read_text()), "vocab_size": 9}))),
    "config": ("config.yaml", _empty),
    "size": ("train.array_record", _shorten),
    "order": ("train.array_record", _reverse),
    "list": ("files.json", lambda f: f.write_text('{"manifest.json": {"bytes": "1", "sha256": "2"}}')),
}
RUNS = ["template", "tokenizer", "no-tokenizer", "manifest", "config", "list"]


@pytest.mark.parametrize(
    ("kind", "case"), [*(("run", c) for c in RUNS), *(("data", c) for c in CASES if c != "config")]
)
def test_a_replaced_file_is_refused(
    tiny_config: Path, tiny_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str, case: str
) -> None:
    """The file is named, and nothing is read as something else."""
    folder = tmp_path / "copy"
    ignored = shutil.ignore_patterns("metrics.jsonl", "plots")
    shutil.copytree(tiny_run if kind == "run" else tiny_config.parent / "prepared", folder, ignore=ignored)
    name, change = CASES[case]
    (file,) = folder.glob(name)
    change(file)
    capsys.readouterr()
    if kind == "run":
        with pytest.raises(UserError, match=re.escape(str(file))):
            jaxblock.load(folder)
        command = ["train", "--config", str(tiny_config), "--train.out", str(folder)]
    else:
        command = [
            "train",
            "--config",
            str(tiny_config),
            "--data.prepared",
            str(folder),
            "--train.out",
            f"{folder}/run",
        ]
        if case != "order":
            assert main(["prepare", "--config", str(tiny_config), "--data.prepared", str(folder)]) == 2
    assert main(command) == 2
    said = capsys.readouterr().err
    assert str(file) in said and ("put the file back" in said or "put it back" in said) and "Traceback" not in said


def test_large_files_are_compared_on_request(
    tiny_config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(tiny_config.parent / "prepared", tmp_path / "prepared")
    _reverse(tmp_path / "prepared" / "train.array_record")
    monkeypatch.setattr(inventory, "HASHED_BYTES", 100)
    assert len(open_prepared(tmp_path / "prepared").records("train")) > 0
    command = ["inspect", "--config", str(tiny_config), "--data.prepared", str(tmp_path / "prepared")]
    assert main(command) == 0
    capsys.readouterr()
    assert main([*command, "--verify"]) == 2
    assert "train.array_record holds other bytes than were written" in capsys.readouterr().err


def test_folders_of_earlier_versions_have_no_list(tiny_config: Path, tmp_path: Path) -> None:
    """Their manifests know the tokenizer and the template."""
    shutil.copytree(tiny_config.parent / "prepared", tmp_path / "prepared")
    (tmp_path / "prepared" / "files.json").unlink()
    assert len(open_prepared(tmp_path / "prepared", verify=True).records("train")) > 0
    for name in ("tokenizer.model", "template.jinja"):
        file = tmp_path / "prepared" / "tokenizer" / name
        _flip(file)
        with pytest.raises(UserError, match=rf"{file} is not the file that manifest\.json describes"):
            open_prepared(tmp_path / "prepared")
        _flip(file)
