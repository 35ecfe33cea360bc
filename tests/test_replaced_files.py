"""Tests that the files of prepared data and of runs are those that were written there, in every verb that opens them."""

import json
import re
import shutil
from pathlib import Path

import pytest

import jaxblock
from jaxblock.data.store.prepared_folder import open_prepared
from jaxblock.data.store.records import Records, encode_record, record_writer
from jaxblock.errors import UserError
from jaxblock.io import inventory
from tests.runs import flip_a_bit


def _reverse(file: Path) -> None:
    """Writes the same records in the other order, which gives a file of the same size here."""
    size, records = file.stat().st_size, list(Records(file.parent, file.stem))
    with record_writer(file.parent, file.stem) as write:
        for record in reversed(records):
            write(encode_record(record))
    assert file.stat().st_size == size


CASES = {
    "template": ("tokenizer/template.jinja", flip_a_bit),
    "tokenizer": ("tokenizer/*token*", flip_a_bit),
    "no-tokenizer": ("tokenizer/*token*", Path.unlink),
    "manifest": ("manifest.json", lambda f: f.write_text(json.dumps({**json.loads(f.read_text()), "vocab_size": 9}))),
    "list": ("files.json", lambda f: f.write_text('{"manifest.json": {"bytes": "1", "sha256": "2"}}')),
    "config": ("config.yaml", lambda f: f.write_text("")),
    "size": ("train.array_record", lambda f: f.write_bytes(f.read_bytes()[:-1])),
    "order": ("train.array_record", _reverse),
}
OF_RUNS = [("run", case) for case in CASES if case not in ("size", "order")]
OF_DATA = [("data", case) for case in CASES if case != "config"]


@pytest.fixture
def data(tiny_config, tmp_path):
    return shutil.copytree(tiny_config.parent / "prepared", tmp_path / "prepared")


@pytest.mark.parametrize(("kind", "case"), OF_RUNS + OF_DATA)
def test_a_replaced_file_is_named_and_nothing_is_read_as_something_else(tiny_config, run_copy, data, ran, kind, case):
    name, change = CASES[case]
    (file,) = (run_copy if kind == "run" else data).glob(name)
    change(file)
    flags = f"--config {tiny_config} --train.out {run_copy}"
    if kind == "run":
        with pytest.raises(UserError, match=re.escape(str(file))):
            jaxblock.load(run_copy)
    else:
        flags = f"--config {tiny_config} --data.prepared {data}"
        ran(f"prepare {flags}", 0 if case == "order" else 2)
    said = ran(f"train {flags}", 2).err
    assert str(file) in said and re.search("put (the file|it) back", said)


def test_large_files_are_compared_on_request(tiny_config, data, monkeypatch, ran):
    _reverse(data / "train.array_record")
    monkeypatch.setattr(inventory, "HASHED_BYTES", 100)
    command = f"inspect --config {tiny_config} --data.prepared {data}"
    ran(command)
    assert "train.array_record holds other bytes than were written" in ran(f"{command} --verify", 2).err


def test_folders_of_earlier_versions_have_no_list(data):
    """Their manifests know the tokenizer and the template."""
    (data / "files.json").unlink()
    assert len(open_prepared(data, verify=True).records("train")) > 0
    for name in ("tokenizer.model", "template.jinja"):
        file = data / "tokenizer" / name
        flip_a_bit(file)
        with pytest.raises(UserError, match=rf"{file} is not the file that manifest\.json describes"):
            open_prepared(data)
        flip_a_bit(file)
