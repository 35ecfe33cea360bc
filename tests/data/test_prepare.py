"""`prepare`: whole or not at all, counted, and never silent about what it drops."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from jaxblock.config.config import Config
from jaxblock.data.config import DataConfig
from jaxblock.data.store.manifest import Manifest, read_manifest
from jaxblock.data.store.prepare import Progress, prepare
from jaxblock.data.store.prepared_folder import open_prepared
from jaxblock.data.text.recipes import with_recipe
from jaxblock.diffusion.config import CanvasConfig
from jaxblock.errors import UserError

Jsonl = Callable[..., str]


def _config(folder: Path, canvas: dict[str, Any] | None = None, **data: Any) -> Config:
    defaults = {"prepared": str(folder / "out"), "builtin_train": 60, "builtin_test": 6, "validation_records": 4}
    return Config(
        data=DataConfig(**{**defaults, "vocab_size": 450, **data}),
        canvas=CanvasConfig(**{"prompt_len": 200, "response_len": 80, "block": 8, **(canvas or {})}),
    )


def _prepare(config: Config, progress: Progress = print) -> Manifest:
    return prepare(config.data, config.canvas, progress)


def _left(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir())


def test_the_builtin_corpus_from_text_to_records(tmp_path: Path) -> None:
    config = _config(tmp_path)
    made = _prepare(config)
    opened = open_prepared(tmp_path / "out")
    assert opened.manifest == made == read_manifest(config.data.prepared)
    assert _left(tmp_path) == ["out"]
    assert {split: entry["kept"] for split, entry in made.splits.items()} == {"train": 60, "validation": 4, "test": 6}
    assert made.overlaps == {"train and validation": 0, "train and test": 0, "validation and test": 0}
    assert made.vocab_size == opened.tokenizer.vocab_size <= 450
    assert made.data_config == dataclasses.replace(with_recipe(config.data), prepared=DataConfig().prepared)
    assert made.canvas_config == config.canvas

    records, stats = opened.records("test"), made.splits["test"]
    sizes = sorted(len(record.response_ids) for record in records)
    exact = {"min": sizes[0], "max": sizes[-1], "mean": round(sum(sizes) / 6, 2), "median": (sizes[2] + sizes[3]) / 2}
    assert exact.items() <= stats["tokens"]["response"].items()
    assert sum(int(n) * count for n, count in stats["blocks"].items()) == sum(-(-size // 8) for size in sizes)
    for number, record in enumerate(records):
        assert (record.index, record.source) == (number, f"builtin:test:{number + 1}")
        assert record.response_ids[-1] == opened.special.eot
        assert opened.tokenizer.decode(record.response_ids) == record.response
        assert opened.encoder.prompt(record.prompt) == record.prompt_ids.tolist()
    with pytest.raises(UserError, match="holds no 'dev' records"):
        opened.records("dev")


def test_other_fields_are_kept_for_graders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = {"question": "1, 2: 3", "answer": "1+2=3"}
    talk = [{"role": "user", "content": "4?"}, {"role": "assistant", "content": "2+2=4"}]
    others: list[dict[str, Any]] = [{"numbers": [1, 2], "target": 3.5}, {"é": "\ud800", "deep": {"a": [None]}}, {}]
    lines = [{**asked, **others[0]}, {"messages": talk, **others[1]}, asked]
    train = tmp_path / "train.jsonl"
    train.write_text("".join(json.dumps(line) + "\n" for line in lines))
    table = types.SimpleNamespace(load_dataset=lambda *_, **__: [{**asked, "n": 7, "picture": b"\0"}])
    monkeypatch.setitem(sys.modules, "datasets", table)
    config = _config(tmp_path, train=str(train), test="hf:some/table", validation_records=0)
    with monkeypatch.context() as earlier:
        earlier.setattr("jaxblock.data.store.prepare.MANIFEST_FORMAT", 2)
        _prepare(config)
    said: list[str] = []
    assert _prepare(config, said.append).format == 2 and "not the records' other fields" in said[-1]
    made = _prepare(dataclasses.replace(config, data=dataclasses.replace(config.data, overwrite=True)), said.append)
    opened = open_prepared(tmp_path / "out")
    assert [record.fields for record in opened.records("train")] == others
    assert [record.fields for record in opened.records("test")] == [{"n": 7}]
    sizes = sum(len(json.dumps(other, separators=(",", ":"))) for other in others[:2])
    assert made.splits["train"]["fields"] == {"records": 2, "bytes": sizes, "left_out": {}}
    assert made.splits["test"]["fields"] == {"records": 1, "bytes": 7, "left_out": {"picture": 1}}
    train.write_text(json.dumps(asked) + "\n" + json.dumps({**asked, "page": "x" * 2**20}))
    with pytest.raises(UserError, match=r"train\.jsonl:2: the fields .* 1,048,587 bytes, .* \(the largest is 'page'\)"):
        _prepare(_config(tmp_path, prepared=str(tmp_path / "large"), train=str(train), test=None, validation_records=0))


def test_a_second_call_finds_it_and_a_different_one_is_refused(tmp_path: Path, jsonl: Jsonl) -> None:
    rows = [(f"What is {n}?", f"It is {n}.") for n in range(20)]
    config = _config(tmp_path, train=jsonl("train.jsonl", rows), test=None)
    said: list[str] = []
    made = _prepare(config, said.append)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*")}
    assert not any("already prepared" in line for line in said)
    assert _prepare(config, said.append) == made
    assert "already prepared" in said[-1]

    other = dataclasses.replace(config, canvas=dataclasses.replace(config.canvas, block=16))
    with pytest.raises(UserError, match=r"canvas.block = 8 there, 16 here\). Set data.overwrite"):
        _prepare(other)
    jsonl("train.jsonl", [*rows, ("And?", "Yes.")])
    with pytest.raises(UserError, match="the content of its input, tokenizer or template files"):
        _prepare(config)
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*")} == before

    replaced = _prepare(dataclasses.replace(config, data=dataclasses.replace(config.data, overwrite=True)))
    assert replaced.splits["train"]["kept"] == made.splits["train"]["kept"] + 1
    assert _left(tmp_path) == ["out", "train.jsonl"]


def test_another_template_or_tokenizer_in_the_same_files_is_noticed(
    tmp_path: Path, jsonl: Jsonl, tokenizer_folder: Callable[..., str]
) -> None:
    template, folder = tmp_path / "mine.jinja", Path(tokenizer_folder())
    source = "{% for m in messages %}{{ m.content }}{{ eot_token }}{% endfor %}"
    template.write_text(source)
    files = {"train": jsonl("train.jsonl", [("q", "a")]), "test": None, "validation_records": 0}
    config = _config(tmp_path, **files, tokenizer=str(folder), template=str(template))
    made = _prepare(config)
    for path, text in (
        (template, source + "{# a comment #}"),
        (folder / "tokenizer.json", (folder / "tokenizer.json").read_text() + "\n"),
    ):
        before = path.read_text()
        path.write_text(text)
        with pytest.raises(UserError, match="the content of its input, tokenizer or template files"):
            _prepare(config)
        path.write_text(before)
    assert _prepare(config) == made


def test_a_foreign_folder_is_never_replaced(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("")
    with pytest.raises(UserError, match=r"holds no manifest\.json"):
        _prepare(_config(tmp_path, overwrite=True))
    assert _left(tmp_path / "out") == ["thesis.tex"]
    with pytest.raises(UserError, match="holds no prepared data"):
        open_prepared(tmp_path / "out")


def _long_config(folder: Path, jsonl: Jsonl, overlong: str, prompt_len: int = 8) -> Config:
    """Line 1 fits; 2 has a long response, 3 a long prompt, 4 both, with one token a word."""
    rows = [("a " * n, "b " * m) for n, m in ((4, 4), (4, 12), (12, 4), (12, 14))]
    # plain: "Question:" + words + "\n" + "Answer:" + end of turn, then words + end of turn
    template = folder / "short.jinja"
    template.write_text("{% for m in messages %}{{ m.content | trim }}{{ eot_token }}{% endfor %}")
    settings = {"test": None, "validation_records": 0, "tokenizer_type": "word", "template": str(template)}
    canvas = {"prompt_len": prompt_len, "response_len": 8, "block": 4}
    return _config(folder, canvas, train=jsonl("train.jsonl", rows), overlong=overlong, vocab_size=280, **settings)


def test_too_long_is_an_error_by_default(tmp_path: Path, jsonl: Jsonl) -> None:
    with pytest.raises(UserError) as caught:
        _prepare(_long_config(tmp_path, jsonl, "error"))
    for part in (
        "train.jsonl:2: the response is 13 tokens long, 5 more than canvas.response_len = 8.",
        "3 of 4 records are too long (2 prompts, 2 responses)",
        "set canvas.prompt_len = 13 and canvas.response_len = 16",
    ):
        assert part in str(caught.value)
    assert _left(tmp_path) == ["short.jinja", "train.jsonl"]
    with pytest.raises(UserError, match="no train record fits the canvas .2 . 8 tokens.; the longest prompt has 13"):
        _prepare(_long_config(tmp_path, jsonl, "drop", prompt_len=2))


DROPPED = {"prompt too long": 1, "prompt and response too long": 1}


@pytest.mark.parametrize(
    ("overlong", "kept", "dropped", "cut"),
    [("drop", 1, {**DROPPED, "response too long": 1}, {}), ("truncate", 2, DROPPED, {"response too long": 1})],
)
def test_too_long_may_be_dropped_or_cut(
    tmp_path: Path, jsonl: Jsonl, overlong: str, kept: int, dropped: dict[str, int], cut: dict[str, int]
) -> None:
    made = _prepare(_long_config(tmp_path, jsonl, overlong))
    train = made.splits["train"]
    assert (train["kept"], train["dropped"], train["cut"]) == (kept, dropped, cut)
    records = open_prepared(tmp_path / "out").records("train")
    assert [record.source for record in records] == ["train.jsonl:1", "train.jsonl:2"][:kept]
    assert [record.index for record in records] == list(range(kept))
    assert records[0].response_ids[-1] == made.special.eot
    if kept == 2:
        assert len(records[1].response_ids) == 8
        assert made.special.eot not in records[1].response_ids


@pytest.mark.parametrize(
    ("canvas", "data", "complaint"),
    [
        ({"response_len": 32, "block": 13}, {}, "does not divide .*: set block to 16 or response_len to 39"),
        ({"response_len": 30, "block": 8}, {}, "does not divide .*: set block to 6 or response_len to 32"),
        ({"block": 0}, {}, "canvas.block is 0: it must be from 1"),
        ({"prompt_len": -1}, {}, "canvas.prompt_len is -1"),
        ({}, {"builtin_test": -1}, "data.builtin_test is -1: it must be from 0"),
    ],
)
def test_settings_are_checked_first(canvas: dict[str, int], data: dict[str, int], complaint: str) -> None:
    with pytest.raises(UserError, match=complaint):
        prepare(DataConfig(**data), CanvasConfig(**canvas))


def test_training_rules_hold_for_validation_taken_from_training_alone(tmp_path: Path, jsonl: Jsonl) -> None:
    rows = [("a " * (1 + n % 4), "b") for n in range(24)]  # 2 to 5 tokens, and two ends of a turn
    config = _long_config(tmp_path, jsonl, "error")
    data = {"train": jsonl("some.jsonl", rows), "max_total_len": 6, "validation_records": 8}
    made = _prepare(dataclasses.replace(config, data=dataclasses.replace(config.data, **data)))
    for split in ("train", "validation"):
        report = made.splits[split]
        assert report["tokens"]["total"]["max"] == 6 and report["dropped"]["longer than data.max_total_len"] > 0
    long = "longer than data.max_total_len"
    assert sum(report["kept"] + report["dropped"][long] for report in made.splits.values()) == 24

    given = {"validation": jsonl("validation.jsonl", rows[:4]), "max_records": 5, "overwrite": True}
    made = _prepare(dataclasses.replace(config, data=dataclasses.replace(config.data, **data, **given)))
    assert made.splits["validation"]["dropped"] == {} and made.splits["validation"]["kept"] == 4
    assert made.splits["train"]["kept"] == 5
    assert made.splits["train"]["dropped"] == {"longer than data.max_total_len": 1, "beyond data.max_records": 18}


def test_bad_records_stop_it_before_anything_is_written(tmp_path: Path, jsonl: Jsonl) -> None:
    train = jsonl("train.jsonl", [("q", "a"), ("the <|mdm_mask|> token", "a")])
    with pytest.raises(UserError, match=r"train\.jsonl:2: the user's text contains the special token '<\|mdm_mask\|>'"):
        _prepare(_config(tmp_path, train=train, test=None, validation_records=0))
    assert _left(tmp_path) == ["train.jsonl"]


def test_a_full_disk_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(source: str, target: str) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "replace", full)  # the manifest's last step
    with pytest.raises(UserError, match="the disk is full"):
        _prepare(_config(tmp_path))
    assert _left(tmp_path) == []


def test_shared_questions_are_counted(tmp_path: Path, jsonl: Jsonl) -> None:
    train = jsonl("train.jsonl", [("one", "1"), ("two", "2"), ("three", "3")])
    test = jsonl("test.jsonl", [("Two ", "2"), ("four", "4"), ("two", "2")])
    made = _prepare(_config(tmp_path, train=train, test=test, validation_records=0))
    assert made.overlaps == {"train and test": 2}


def test_another_versions_folder_is_named(tmp_path: Path) -> None:
    _prepare(_config(tmp_path))
    path = tmp_path / "out" / "manifest.json"
    content = json.loads(path.read_text())
    for changed, complaint in [({"format": 99}, "format 99"), ({"colour": "red"}, "not a manifest of this version")]:
        path.write_text(json.dumps({**content, **changed}))
        with pytest.raises(UserError, match=complaint):
            open_prepared(tmp_path / "out")
