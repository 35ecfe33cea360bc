"""`prepare`: whole or not at all, counted, and never silent about what it drops."""

import dataclasses
import errno
import json
import os
import sys
import types
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest

from jaxblock.config.config import Config
from jaxblock.data.config import DataConfig
from jaxblock.data.mixture import Mixture, mixture_of
from jaxblock.data.store.manifest import Manifest, read_manifest
from jaxblock.data.store.prepare import Progress, prepare
from jaxblock.data.store.prepared_folder import open_prepared
from jaxblock.data.text import inputs
from jaxblock.data.text.recipes import with_recipe
from jaxblock.diffusion.config import CanvasConfig
from jaxblock.errors import UserError


def config_in(folder: Path, canvas: dict[str, Any] | None = None, **data: Any) -> Config:
    defaults = {"prepared": str(folder / "out"), "builtin_train": 60, "builtin_test": 6, "validation_records": 4}
    return Config(
        data=DataConfig(**{**defaults, "vocab_size": 450, **data}),
        canvas=CanvasConfig(**{"prompt_len": 200, "response_len": 80, "block": 8, **(canvas or {})}),
    )


def run(config: Config, progress: Progress = print, **data: Any) -> Manifest:
    """Prepares, with other settings of the data where they are given."""
    return prepare(dataclasses.replace(config.data, **data), config.canvas, progress)


def names_in(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir())


def test_the_builtin_corpus_from_text_to_records(tmp_path):
    config = config_in(tmp_path)
    made = run(config)
    opened = open_prepared(tmp_path / "out")
    assert opened.manifest == made == read_manifest(config.data.prepared) and names_in(tmp_path) == ["out"]
    assert {split: entry["kept"] for split, entry in made.splits.items()} == {"train": 60, "validation": 4, "test": 6}
    assert made.overlaps == {"train and validation": 0, "train and test": 0, "validation and test": 0}
    assert made.vocab_size == opened.tokenizer.vocab_size <= 450 and made.canvas_config == config.canvas
    assert made.data_config == dataclasses.replace(with_recipe(config.data), prepared=DataConfig().prepared)

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


def test_other_fields_are_kept_for_graders(tmp_path, monkeypatch):
    asked = {"question": "1, 2: 3", "answer": "1+2=3"}
    talk = [{"role": "user", "content": "4?"}, {"role": "assistant", "content": "2+2=4"}]
    others: list[dict[str, Any]] = [{"numbers": [1, 2], "target": 3.5}, {"é": "\ud800", "deep": {"a": [None]}}, {}]
    lines = [{**asked, **others[0]}, {"messages": talk, **others[1]}, asked]
    train = tmp_path / "train.jsonl"
    train.write_text("".join(json.dumps(line) + "\n" for line in lines))
    table = types.SimpleNamespace(load_dataset=lambda *_, **__: [{**asked, "n": 7, "picture": b"\0"}])
    monkeypatch.setitem(sys.modules, "datasets", table)
    config, said = config_in(tmp_path, train=str(train), test="hf:some/table", validation_records=0), []
    with monkeypatch.context() as earlier:
        earlier.setattr("jaxblock.data.store.prepare.MANIFEST_FORMAT", 2)
        run(config)
    assert run(config, said.append).format == 2 and "not the records' other fields" in said[-1]
    made = run(config, said.append, overwrite=True)
    opened = open_prepared(tmp_path / "out")
    assert [record.fields for record in opened.records("train")] == others
    assert [record.fields for record in opened.records("test")] == [{"n": 7}]
    sizes = sum(len(json.dumps(other, separators=(",", ":"))) for other in others[:2])
    assert made.splits["train"]["fields"] == {"records": 2, "bytes": sizes, "left_out": {}}
    assert made.splits["test"]["fields"] == {"records": 1, "bytes": 7, "left_out": {"picture": 1}}
    train.write_text(json.dumps(asked) + "\n" + json.dumps({**asked, "page": "x" * 2**20}))
    with pytest.raises(UserError, match=r"train\.jsonl:2: the fields .* 1,048,587 bytes, .* \(the largest is 'page'\)"):
        run(config_in(tmp_path, prepared=str(tmp_path / "large"), train=str(train), test=None, validation_records=0))


def test_a_second_call_finds_it_and_a_different_one_is_refused(tmp_path, jsonl):
    rows = [(f"What is {n}?", f"It is {n}.") for n in range(20)]
    config, said = config_in(tmp_path, train=jsonl("train.jsonl", rows), test=None), []
    made = run(config, said.append)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*")}
    assert not any("already prepared" in line for line in said)
    assert run(config, said.append) == made and "already prepared" in said[-1]

    other = dataclasses.replace(config, canvas=dataclasses.replace(config.canvas, block=16))
    with pytest.raises(UserError, match=r"canvas.block = 8 there, 16 here\). Set data.overwrite"):
        run(other)
    jsonl("train.jsonl", [*rows, ("And?", "Yes.")])
    with pytest.raises(UserError, match="the content of its input, tokenizer or template files"):
        run(config)
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*")} == before
    assert run(config, overwrite=True).splits["train"]["kept"] == made.splits["train"]["kept"] + 1
    assert names_in(tmp_path) == ["out", "train.jsonl"]


def test_another_template_or_tokenizer_in_the_same_files_is_noticed(tmp_path, jsonl, tokenizer_folder):
    template, tokenizer = tmp_path / "mine.jinja", Path(tokenizer_folder()) / "tokenizer.json"
    template.write_text("{% for m in messages %}{{ m.content }}{{ eot_token }}{% endfor %}")
    files = {"train": jsonl("train.jsonl", [("q", "a")]), "test": None, "validation_records": 0}
    config = config_in(tmp_path, **files, tokenizer=str(tokenizer.parent), template=str(template))
    made = run(config)
    for path, more in ((template, "{# a comment #}"), (tokenizer, "\n")):
        before = path.read_text()
        path.write_text(before + more)
        with pytest.raises(UserError, match="the content of its input, tokenizer or template files"):
            run(config)
        path.write_text(before)
    assert run(config) == made


def test_a_foreign_folder_is_never_replaced(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("")
    with pytest.raises(UserError, match=r"holds no manifest\.json"):
        run(config_in(tmp_path, overwrite=True))
    assert names_in(tmp_path / "out") == ["thesis.tex"]
    with pytest.raises(UserError, match="holds no prepared data"):
        open_prepared(tmp_path / "out")


def long_config(folder: Path, jsonl: Any, overlong: str, prompt_len: int = 8) -> Config:
    """Line 1 fits; 2 has a long response, 3 a long prompt, 4 both, with one token a word."""
    rows = [("a " * n, "b " * m) for n, m in ((4, 4), (4, 12), (12, 4), (12, 14))]
    template = folder / "short.jinja"  # a prompt is its words and an end, and so is a response
    template.write_text("{% for m in messages %}{{ m.content | trim }}{{ eot_token }}{% endfor %}")
    settings = {"test": None, "validation_records": 0, "tokenizer_type": "word", "template": str(template)}
    canvas = {"prompt_len": prompt_len, "response_len": 8, "block": 4}
    return config_in(folder, canvas, train=jsonl("train.jsonl", rows), overlong=overlong, vocab_size=280, **settings)


def test_too_long_is_an_error_by_default(tmp_path, jsonl):
    with pytest.raises(UserError) as caught:
        run(long_config(tmp_path, jsonl, "error"))
    for part in (
        "train.jsonl:2: the response is 13 tokens long, 5 more than canvas.response_len = 8.",
        "3 of 4 records are too long (2 prompts, 2 responses)",
        "set canvas.prompt_len = 13 and canvas.response_len = 16",
    ):
        assert part in str(caught.value)
    assert names_in(tmp_path) == ["short.jinja", "train.jsonl"]
    with pytest.raises(UserError, match="no train record fits the canvas .2 . 8 tokens.; the longest prompt has 13"):
        run(long_config(tmp_path, jsonl, "drop", prompt_len=2))


@pytest.mark.parametrize("overlong, kept", [("drop", 1), ("truncate", 2)])
def test_too_long_may_be_dropped_or_cut(tmp_path, jsonl, overlong, kept):
    made = run(long_config(tmp_path, jsonl, overlong))
    train, response = made.splits["train"], {"response too long": 1}
    prompts = {"prompt too long": 1, "prompt and response too long": 1}
    expected = (prompts | response, {}) if overlong == "drop" else (prompts, response)
    assert train["kept"] == kept and (train["dropped"], train["cut"]) == expected
    records = list(open_prepared(tmp_path / "out").records("train"))
    assert [(r.source, r.index) for r in records] == [("train.jsonl:1", 0), ("train.jsonl:2", 1)][:kept]
    assert records[0].response_ids[-1] == made.special.eot
    assert all(len(r.response_ids) == 8 and made.special.eot not in r.response_ids for r in records[1:])


def test_settings_are_checked_first():
    for canvas, data, complaint in [
        ({"response_len": 30, "block": 8}, {}, "does not divide .*: set block to 6 or response_len to 32"),
        ({}, {"builtin_test": -1}, "data.builtin_test is -1: it must be from 0"),
    ]:
        with pytest.raises(UserError, match=complaint):
            prepare(DataConfig(**data), CanvasConfig(**canvas))


def test_training_rules_hold_for_validation_taken_from_training_alone(tmp_path, jsonl):
    rows = [("a " * (1 + n % 4), "b") for n in range(24)]  # 2 to 5 tokens, and two ends of a turn
    config, long = long_config(tmp_path, jsonl, "error"), "longer than data.max_total_len"
    data = {"train": jsonl("some.jsonl", rows), "max_total_len": 6, "validation_records": 8}
    made = run(config, **data).splits
    assert all(made[split]["tokens"]["total"]["max"] == 6 and made[split]["dropped"][long] > 0 for split in made)
    assert sum(split["kept"] + split["dropped"][long] for split in made.values()) == 24

    given = {"validation": jsonl("validation.jsonl", rows[:4]), "max_records": 5, "overwrite": True}
    made = run(config, **data, **given).splits
    assert {split: (made[split]["kept"], made[split]["dropped"]) for split in made} == {
        "train": (5, {long: 1, "beyond data.max_records": 18}),
        "validation": (4, {}),
    }


def test_what_stops_it_leaves_nothing(tmp_path, jsonl, monkeypatch):
    train = jsonl("train.jsonl", [("q", "a"), ("the <|mdm_mask|> token", "a")])
    with pytest.raises(UserError, match=r"train\.jsonl:2: the user's text contains the special token '<\|mdm_mask\|>'"):
        run(config_in(tmp_path, train=train, test=None, validation_records=0))
    full = OSError(errno.ENOSPC, "No space left on device")
    monkeypatch.setattr(os, "replace", Mock(side_effect=full))  # the manifest's last step
    with pytest.raises(UserError, match="the disk is full"):
        run(config_in(tmp_path))
    assert names_in(tmp_path) == ["train.jsonl"]


def test_shared_questions_are_counted_and_another_versions_folder_is_named(tmp_path, jsonl):
    train = jsonl("train.jsonl", [("one", "1"), ("two", "2"), ("three", "3")])
    test = jsonl("test.jsonl", [("Two ", "2"), ("four", "4"), ("two", "2")])
    made = run(config_in(tmp_path, train=train, test=test, validation_records=0))
    assert made.overlaps == {"train and test": 2}
    # The folder of another version is named.
    path = tmp_path / "out" / "manifest.json"
    content = json.loads(path.read_text())
    for changed, complaint in [({"format": 99}, "format 99"), ({"colour": "red"}, "not a manifest of this version")]:
        path.write_text(json.dumps({**content, **changed}))
        with pytest.raises(UserError, match=complaint):
            open_prepared(tmp_path / "out")


def test_several_files_are_prepared_alike_by_one_process_and_by_two(tmp_path, jsonl, tokenizer_folder, monkeypatch):
    """The bytes are the same, and so is the error that stops it; each record keeps the name of its file."""
    monkeypatch.setattr(inputs, "CHUNK", 4000)
    paths = []
    for name, n, more in (("a", 150, []), ("b", 90, []), ("bad", 90, [("<|eot_id|>", "a"), ("q", "<|mdm_mask|>")])):
        (tmp_path / name).mkdir()
        rows = [(f"What is {i} plus {name}?", f"It is {i}.") for i in range(n)]
        paths.append(jsonl(f"{name}/train.jsonl", [*rows, *more]))
    settings = {"test": None, "tokenizer": tokenizer_folder(), "validation_records": 9, "template": "tokenizer"}
    made, errors = {}, {}
    for workers in (0, 2):
        options = {**settings, "prepared": str(tmp_path / f"out{workers}"), "prepare_workers": workers}
        config = config_in(tmp_path, train=tuple(paths[:2]), max_records=100, weights=(0.7, 0.3), **options)
        made[workers] = run(config)
        with pytest.raises(
            UserError, match=r"bad/train.jsonl:91: the user's text contains the special token"
        ) as caught:
            run(config, prepared=str(tmp_path / "none"), train=(paths[0], paths[2]), max_records=0)
        errors[workers] = str(caught.value)
    assert made[0] == made[2] and errors[0] == errors[2] and not (tmp_path / "none").exists()
    for file in (path for path in (tmp_path / "out0").rglob("*") if path.is_file()):
        assert file.read_bytes() == (tmp_path / "out2" / file.relative_to(tmp_path / "out0")).read_bytes(), file
    assert run(dataclasses.replace(config, data=dataclasses.replace(config.data, weights=None))) == made[2]

    train, entry = made[2].splits["train"], made[2].inputs["train"]
    kept = [each["kept"] for each in train["files"]]
    assert kept[0] == 100 and kept[1] == entry["files"][1]["records"]
    assert entry["records"] == 231 == sum(kept) + train["dropped"]["beyond data.max_records"]
    sources = [record.source.split(":")[0] for record in open_prepared(tmp_path / "out2").records("train")]
    assert sources == ["a/train.jsonl"] * kept[0] + ["b/train.jsonl"] * kept[1]
    assert mixture_of(train, "x", config.data) == Mixture(tuple(paths[:2]), tuple(kept), (0.7, 0.3))


def test_training_files_that_do_not_go_together(tmp_path, jsonl):
    one, other = (jsonl(name, [(f"q{name}{i}", "a") for i in range(9)]) for name in ("one.jsonl", "other.jsonl"))
    empty, same = jsonl("empty.jsonl", []), str(tmp_path / "same.jsonl")
    Path(same).write_bytes(Path(one).read_bytes())
    os.symlink(one, tmp_path / "link.jsonl")
    long = jsonl("long.jsonl", [("q " * 300, "a")] * 3)
    for train, options, complaint in [
        ((one, one), {}, "data.train gives .*one.jsonl twice"),
        ((one, str(tmp_path / "link.jsonl")), {}, r"link.jsonl twice .*one.jsonl"),
        ((one, same), {}, "one.jsonl and .*same.jsonl hold the same bytes"),
        ((one, empty, other), {}, "empty.jsonl: the file is empty"),
        ((one, str(tmp_path / "none.jsonl")), {}, "cannot read .*none.jsonl"),
        ((one, other), {"test": "builtin"}, "data.test is `builtin` but data.train is '.*one.jsonl', '.*other.jsonl'"),
        (
            (one, long),
            {"weights": (0.5, 0.5), "overlong": "drop"},
            "a share to .*long.jsonl, of which no record is left",
        ),
        (one, {"weights": (1.0,)}, "data.weights has no effect on one training file"),
    ]:
        with pytest.raises(UserError, match=complaint):
            run(config_in(tmp_path, **{"train": train, "test": None, "validation_records": 2, **options}))
    assert "out" not in names_in(tmp_path)
