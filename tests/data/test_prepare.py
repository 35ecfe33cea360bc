"""`prepare`: whole or not at all, counted, and never silent about what it drops."""

import errno
import json
import os
import sys
import types
from collections import Counter
from unittest.mock import Mock

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxblock.data.config import DataConfig
from jaxblock.data.mixture import Mixture, mixture_of
from jaxblock.data.store import overlaps
from jaxblock.data.store.statistics import LengthStatistics
from jaxblock.data.text import inputs, splits
from jaxblock.data.text.recipes import with_recipe
from jaxblock.diffusion.config import CanvasConfig
from jaxblock.errors import UserError

BUILTIN = {"train": "builtin", "builtin_train": 60, "builtin_test": 6, "vocab_size": 450}
CHARS = {"tokenizer_type": "char", "vocab_size": 330, "template": "plain"}


def names_in(folder):
    return sorted(entry.name for entry in folder.iterdir())


@pytest.mark.parametrize("level", ["easy", "sudoku"])
def test_the_builtin_corpus_from_text_to_records(tmp_path, prepared, level):
    settings = {**BUILTIN, "test": "builtin", "validation_records": 4, "level": level}
    opened = prepared(canvas=(200, 80, 8), **settings)
    made, records = opened.manifest, opened.records("test")
    assert names_in(tmp_path) == ["out"]
    assert {split: entry["kept"] for split, entry in made.splits.items()} == {"train": 60, "validation": 4, "test": 6}
    assert made.overlaps == {"train and validation": 0, "train and test": 0, "validation and test": 0}
    assert made.vocab_size == opened.tokenizer.vocab_size <= 450
    assert made.canvas_config == CanvasConfig(prompt_len=200, response_len=80, block=8)
    assert made.data_config == with_recipe(DataConfig(**settings))

    counted = LengthStatistics(8)
    for number, record in enumerate(records):
        counted.add(len(record.prompt_ids), len(record.response_ids))
        assert (record.index, record.source) == (number, f"builtin:test:{number + 1}")
        assert record.response_ids[-1] == opened.special.eot
        assert opened.tokenizer.decode(record.response_ids) == record.response
        assert opened.encoder.prompt(record.prompt) == record.prompt_ids.tolist()
    assert counted.report().items() <= made.splits["test"].items()
    assert ("####" in record.response) == (level == "easy")
    assert opened.records("validation")[0].source == "builtin:test:7", "held-out problems after those of the test"
    with pytest.raises(UserError, match="holds no 'dev' records"):
        opened.records("dev")


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 50), st.integers(1, 70)), min_size=1, max_size=40), st.integers(1, 9))
def test_statistics_are_numpys(lengths, block):
    counted = LengthStatistics(block)
    for prompt, response in lengths:
        counted.add(prompt, response)
    found = counted.report()
    prompt, response = np.array(lengths).T
    for name, some in (("prompt", prompt), ("response", response), ("total", prompt + response)):
        mean, p95 = round(float(some.mean()), 2), round(float(np.percentile(some, 95)), 2)
        exact = {"min": some.min(), "mean": mean, "median": np.median(some), "max": some.max()}
        assert {key: found["tokens"][name][key] for key in exact} == exact
        assert found["tokens"][name]["p95"] == pytest.approx(p95, abs=0.011)  # a tie of rounding may go either way
    assert found["blocks"] == {str(n): c for n, c in sorted(Counter((-(-response // block)).tolist()).items())}


def test_other_fields_are_kept_for_graders(tmp_path, jsonl, prepared, monkeypatch):
    asked = {"question": "1, 2: 3", "answer": "1+2=3"}
    talk = [{"role": "user", "content": "4?"}, {"role": "assistant", "content": "2+2=4"}]
    others = [{"numbers": [1, 2], "target": 3.5}, {"é": "\ud800", "deep": {"a": [None]}}, {}]
    rows, said = [{**asked, **others[0]}, {"messages": talk, **others[1]}, asked], []
    table = types.SimpleNamespace(load_dataset=lambda *_, **__: [{**asked, "n": 7, "picture": b"\0"}])
    monkeypatch.setitem(sys.modules, "datasets", table)
    settings = {**CHARS, "test": "hf:some/table"}
    with monkeypatch.context() as earlier:
        earlier.setattr("jaxblock.data.store.prepare.MANIFEST_FORMAT", 2)
        prepared(rows=rows, **settings)
    assert prepared(rows=rows, progress=said.append, **settings).manifest.format == 2
    assert "not the records' other fields" in said[-1]
    opened = prepared(rows=rows, overwrite=True, **settings)
    assert [record.fields for record in opened.records("train")] == others
    assert [record.fields for record in opened.records("test")] == [{"n": 7}]
    sizes = sum(len(json.dumps(other, separators=(",", ":"))) for other in others[:2])
    assert opened.manifest.splits["train"]["fields"] == {"records": 2, "bytes": sizes, "left_out": {}}
    assert opened.manifest.splits["test"]["fields"] == {"records": 1, "bytes": 7, "left_out": {"picture": 1}}
    with pytest.raises(UserError, match=r"train\.jsonl:2: the fields .* 1,048,587 bytes, .* \(the largest is 'page'\)"):
        prepared(rows=[asked, {**asked, "page": "x" * 2**20}], prepared=str(tmp_path / "large"))


def test_a_second_call_finds_it_and_any_change_is_noticed(tmp_path, jsonl, prepared, tokenizer_folder):
    template, tokenizer = tmp_path / "mine.jinja", tokenizer_folder() / "tokenizer.json"
    template.write_text("{% for m in messages %}{{ m.content }}{{ eot_token }}{% endfor %}")
    train, said = tmp_path / "train.jsonl", []
    jsonl("train.jsonl", [("q", "a")])
    settings = {"tokenizer": tokenizer.parent, "template": str(template), "train": str(train), "progress": said.append}
    made = prepared(**settings).manifest
    assert not any("already prepared" in line for line in said)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*")}
    for path, more in ((template, "{# a comment #}"), (tokenizer, "\n"), (train, "\n")):
        content = path.read_text()
        path.write_text(content + more)
        with pytest.raises(UserError, match="the content of its input, tokenizer or template files"):
            prepared(**settings)
        path.write_text(content)
    with pytest.raises(UserError, match=r"canvas.block = 8 there, 16 here\). Set data.overwrite"):
        prepared(canvas=(300, 96, 16), **settings)
    assert prepared(**settings).manifest == made and "already prepared" in said[-1]
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*")} == before
    jsonl("train.jsonl", [("q", "a"), ("And?", "Yes.")])
    assert prepared(**settings, overwrite=True).manifest.splits["train"]["kept"] == 2

    # The folder of another version is named, and one with something else in it is never replaced.
    path = tmp_path / "out" / "manifest.json"
    content = json.loads(path.read_text())
    for changed, complaint in [({"format": 99}, "format 99"), ({"colour": "red"}, "not a manifest of this version")]:
        path.write_text(json.dumps({**content, **changed}))
        with pytest.raises(UserError, match=complaint):
            prepared(**settings)
    path.unlink()
    names = names_in(tmp_path / "out")
    with pytest.raises(UserError, match=r"holds no manifest\.json"):
        prepared(**settings, overwrite=True)
    assert names_in(tmp_path / "out") == names


@pytest.fixture
def long(tmp_path, prepared):
    """Prepares with one token a word and a canvas of 8 + 8 tokens: a prompt is its words and an end, and so is a response."""
    template = tmp_path / "short.jinja"
    template.write_text("{% for m in messages %}{{ m.content | trim }}{{ eot_token }}{% endfor %}")
    # Line 1 fits; 2 has a long response, 3 a long prompt, 4 both.
    lengths = ((4, 4), (4, 12), (12, 4), (12, 14))
    words = {"tokenizer_type": "word", "template": str(template), "vocab_size": 280}

    def make(rows=tuple(("a " * n, "b " * m) for n, m in lengths), prompt_len=8, **data):
        return prepared(rows=rows, canvas=(prompt_len, 8, 4), **words, **data)

    return make


def test_too_long_is_an_error_or_dropped_or_cut(tmp_path, long):
    with pytest.raises(UserError) as caught:
        long()
    for part in (
        "train.jsonl:2: the response is 13 tokens long, 5 more than canvas.response_len = 8.",
        "3 of 4 records are too long (2 prompts, 2 responses)",
        "set canvas.prompt_len = 13 and canvas.response_len = 16",
    ):
        assert part in str(caught.value)
    with pytest.raises(UserError, match="no train record fits the canvas .2 . 8 tokens.; the longest prompt has 1"):
        long(prompt_len=2, overlong="drop")
    assert names_in(tmp_path) == ["short.jinja", "train.jsonl"]
    prompts, response = {"prompt too long": 1, "prompt and response too long": 1}, {"response too long": 1}
    for overlong, dropped, cut in (("drop", prompts | response, {}), ("truncate", prompts, response)):
        opened = long(overlong=overlong, overwrite=True)
        train, eot = opened.manifest.splits["train"], opened.special.eot
        assert (train["dropped"], train["cut"]) == (dropped, cut)
        first, *more = opened.records("train")
        assert (first.source, first.index, first.response_ids[-1]) == ("train.jsonl:1", 0, eot)
        assert [(r.source, r.index) for r in more] == [("train.jsonl:2", 1)] * len(cut) and train["kept"] == 1 + len(
            cut
        )
        assert all(len(r.response_ids) == 8 and eot not in r.response_ids for r in more)


def test_training_rules_hold_for_validation_taken_from_training_alone(jsonl, long):
    rows = [("a " * (1 + n % 4), "b") for n in range(24)]  # 2 to 5 tokens, and two ends of a turn
    made = long(rows, max_total_len=6, validation_records=8).manifest.splits
    reason = "longer than data.max_total_len"
    assert all(made[split]["tokens"]["total"]["max"] == 6 and made[split]["dropped"][reason] > 0 for split in made)
    assert sum(split["kept"] + split["dropped"][reason] for split in made.values()) == 24
    given = {"validation": jsonl("validation.jsonl", rows[:4]), "max_records": 5, "overwrite": True}
    made = long(rows, max_total_len=6, **given).manifest.splits
    assert {split: (made[split]["kept"], made[split]["dropped"]) for split in made} == {
        "train": (5, {reason: 1, "beyond data.max_records": 18}),
        "validation": (4, {}),
    }


def test_shared_prompts_are_counted_whatever_their_case_and_blanks(jsonl, prepared, monkeypatch):
    monkeypatch.setattr(overlaps, "_AT_ONCE", 5)
    rng = np.random.default_rng(0)
    numbers = {split: rng.integers(0, 60, n).tolist() for split, n in (("train", 40), ("validation", 17), ("test", 3))}
    files = {
        split: jsonl(f"{split}.jsonl", [(f"q  {n}" if at % 2 else f"Q\n{n} ", "a") for at, n in enumerate(some)])
        for split, some in numbers.items()
    }
    pairs = [("train", "validation"), ("train", "test"), ("validation", "test")]
    counts = {f"{one} and {other}": sum(n in numbers[one] for n in numbers[other]) for one, other in pairs}
    assert prepared(**files, **CHARS).manifest.overlaps == counts and counts["train and validation"] > 3


def test_several_files_are_prepared_alike_by_one_process_and_by_two(
    tmp_path, jsonl, prepared, tokenizer_folder, monkeypatch
):
    """The bytes are the same, and so is the error that stops it; each record keeps the name of its file."""
    monkeypatch.setattr(inputs, "CHUNK", 4000)
    paths = []
    for name, n, more in (("a", 150, []), ("b", 90, []), ("bad", 90, [("<|eot_id|>", "a"), ("q", "<|mdm_mask|>")])):
        rows = [(f"What is {i} plus {name}?", f"It is {i}.") for i in range(n)]
        paths.append(jsonl(f"{name}/train.jsonl", [*rows, *more]))
    data = {"tokenizer": tokenizer_folder(), "validation_records": 9, "template": "tokenizer"}
    options = {"train": tuple(paths[:2]), "max_records": 100}
    made, errors = {}, {}
    for workers in (0, 2):
        data |= {"prepared": str(tmp_path / f"out{workers}"), "prepare_workers": workers}
        made[workers] = prepared(**data, **options, weights=(0.7, 0.3)).manifest
        complaint = r"bad/train.jsonl:91: the user's text contains the special token '<\|eot_id"
        with pytest.raises(UserError, match=complaint) as caught:
            prepared(**{**data, "prepared": str(tmp_path / "none"), "train": (paths[0], paths[2])})
        errors[workers] = str(caught.value)
    assert made[0] == made[2] and errors[0] == errors[2] and not (tmp_path / "none").exists()
    for file in (path for path in (tmp_path / "out0").rglob("*") if path.is_file()):
        assert file.read_bytes() == (tmp_path / "out2" / file.relative_to(tmp_path / "out0")).read_bytes(), file
    opened = prepared(**data, **options)  # weights are no part of what is prepared
    assert opened.manifest == made[2]

    train, entry = made[2].splits["train"], made[2].inputs["train"]
    kept = [each["kept"] for each in train["files"]]
    assert kept[0] == 100 and kept[1] == entry["files"][1]["records"]
    assert entry["records"] == 231 == sum(kept) + train["dropped"]["beyond data.max_records"]
    sources = [record.source.split(":")[0] for record in opened.records("train")]
    assert sources == ["a/train.jsonl"] * kept[0] + ["b/train.jsonl"] * kept[1]
    weighted = DataConfig(train=options["train"], weights=(0.7, 0.3))
    assert mixture_of(train, "x", weighted) == Mixture(options["train"], tuple(kept), weighted.weights)


def test_what_stops_it_leaves_nothing(tmp_path, jsonl, prepared, monkeypatch):
    one, other, same, empty, long, marked = (
        jsonl(f"{name}.jsonl", rows)
        for name, rows in {
            "one": [(f"q{i}", "a") for i in range(9)],
            "other": [(f"p{i}", "a") for i in range(9)],
            "same": [(f"q{i}", "a") for i in range(9)],
            "empty": [],
            "long": [("q " * 300, "a")] * 3,
            "marked": [("q", "a"), ("the <|mdm_mask|> token", "a")],
        }.items()
    )
    link, none, pipe = (str(tmp_path / f"{name}.jsonl") for name in ("link", "none", "pipe"))
    os.symlink(one, link)
    os.mkfifo(pipe)
    halves, full = {"weights": (0.5, 0.5), "overlong": "drop"}, OSError(errno.ENOSPC, "No space left on device")
    generate = splits.corpus.generate
    for train, options, complaint in [
        ((one, one), {}, "data.train gives .*one.jsonl twice"),
        ((one, link), {}, r"link.jsonl twice .*one.jsonl"),
        ((one, same), {}, "one.jsonl and .*same.jsonl hold the same bytes"),
        ((one, empty, other), {}, "empty.jsonl: the file is empty"),
        ((one, none), {}, "cannot read .*none.jsonl: there is no such file"),
        ((one, other), {"test": "builtin"}, "data.test is `builtin` but data.train is '.*one.jsonl', '.*other.jsonl'"),
        (one, {"test": "builtin"}, "data.test is `builtin` but data.train is '.*one.jsonl'"),
        (one, {"validation": "builtin"}, "data.validation is `builtin`"),
        (one, {"validation_records": 9}, "leaves nothing of the 9 records"),
        (pipe, {"test": pipe}, "pipe.jsonl is given for two splits, and a pipe can be read only once"),
        ((one, long), halves, "a share to .*long.jsonl, of which no record is left"),
        (one, {"weights": (1.0,)}, "data.weights has no effect on one training file"),
        (one, {"canvas": (200, 30, 8)}, "does not divide .*: set block to 6 or response_len to 32"),
        (one, {"builtin_test": -1}, "data.builtin_test is -1: it must be from 0"),
        (marked, {}, r"marked\.jsonl:2: the user's text contains the special token '<\|mdm_mask\|>'"),
        ("builtin", {"builtin_train": 0}, "leaves nothing to train on"),
        ("builtin", {"level": "impossible"}, "unknown level 'impossible'"),
        ("builtin", BUILTIN, "the disk is full"),
        ("builtin", {"builtin_train": 20, "test": "builtin", "builtin_test": 5}, "repeat those of another split"),
    ]:
        with monkeypatch.context() as patch, pytest.raises(UserError, match=complaint):
            if "full" in complaint:
                patch.setattr(os, "replace", Mock(side_effect=full))  # the manifest's last step
            if "repeat" in complaint:  # a corpus that leaks
                patch.setattr(splits.corpus, "generate", lambda split, n, **more: generate("test", n, **more))
            prepared(**{"train": train, **options})
    assert not [entry for entry in tmp_path.iterdir() if entry.suffix != ".jsonl"]
