"""The paper's data sets by name: their fields, prompt, length rule and filter; and where their records may come from."""

from __future__ import annotations

import json
import sys
import types
from pathlib import Path
from typing import Any

import pytest

from jaxblock.config.config import Config
from jaxblock.data.config import DataConfig
from jaxblock.data.store.manifest import Manifest
from jaxblock.data.store.prepare import prepare
from jaxblock.data.store.prepared_folder import open_prepared
from jaxblock.data.text.files import read_rows
from jaxblock.data.text.recipes import with_recipe, with_test_fields
from jaxblock.data.text.sources import read_source
from jaxblock.diffusion.config import CanvasConfig
from jaxblock.errors import UserError

ASKED = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\nWhat is 2 + 3?\n\n### Response: Let's think step by step."
)
METAMATH = [
    {"query": "What is 2 + 3?", "response": "The answer is: 5", "type": "MATH_AnsAug", "original_question": "?"},
    {"query": "How many?", "response": "The answer is: 1", "type": "GSM_Rephrased", "original_question": "?"},
    {"query": "Find x." + " x" * 60, "response": "The answer is: 2", "type": "MATH_FOBAR", "original_question": "?"},
    {"query": "Find y.", "response": "The answer is: 3", "type": "MATH_SV", "original_question": "?"},
    {"query": "Find z.", "response": "The answer is: 4", "type": "MATH_SV", "original_question": "?"},
    {"query": "So many?", "response": "The answer is: 6", "type": "GSM_AnsAug", "original_question": "?"},
]


def _config(folder: Path, **data: Any) -> Config:
    out = str(folder / f"out{len(list(folder.glob('out*')))}")
    defaults = {"prepared": out, "test": None, "validation_records": 0, "template": "plain", "tokenizer_type": "char"}
    canvas = CanvasConfig(prompt_len=300, response_len=64)
    return Config(data=DataConfig(**{**defaults, "vocab_size": 330, **data}), canvas=canvas)


def _prepare(config: Config) -> Manifest:
    return prepare(config.data, config.canvas)


def _records(made: Manifest, config: Config, split: str = "train") -> list[Any]:
    assert _prepare(config) == made
    return list(open_prepared(config.data.prepared).records(split))


def test_metamathqa_leaves_out_gsm_and_what_is_long_and_counts_both(tmp_path: Path) -> None:
    path = tmp_path / "MetaMathQA.json"
    path.write_text(json.dumps(METAMATH, indent=1))
    config = _config(tmp_path, train=str(path), recipe="metamathqa")
    made = _prepare(config)
    assert made.splits["train"]["kept"] == 3
    assert made.splits["train"]["dropped"] == {"type contains 'GSM'": 2, "longer than data.max_total_len": 1}
    assert made.splits["train"]["tokens"]["total"]["max"] <= 256
    first, *others = _records(made, config)
    opened = open_prepared(config.data.prepared)
    assert opened.tokenizer.decode(first.prompt_ids) == f"Question: {ASKED}\nAnswer:"
    assert (first.prompt, first.response, first.source) == ("What is 2 + 3?", "The answer is: 5", "MetaMathQA.json[0]")
    assert [record.source for record in others] == ["MetaMathQA.json[3]", "MetaMathQA.json[4]"]
    # What is decoded is asked as what was trained on.
    assert opened.encoder.prompt("What is 2 + 3?") == first.prompt_ids.tolist()
    assert made.data["exclude_types"] == ["GSM"]

    everything = _prepare(_config(tmp_path, train=str(path), recipe="metamathqa", exclude_types=(), max_records=2))
    assert everything.splits["train"]["dropped"] == {"beyond data.max_records": 4}
    plain = _prepare(
        _config(tmp_path, train=str(path), recipe="metamathqa", prompt_template="{prompt}", max_total_len=0)
    )
    assert plain.splits["train"]["dropped"] == {"type contains 'GSM'": 2}


def test_a_rule_that_leaves_nothing_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "train.json"
    path.write_text(json.dumps(METAMATH))
    for settings, complaint in [
        ({"max_total_len": 5}, "all 4 train records have more than data.max_total_len = 5 tokens"),
        ({"exclude_types": ("GSM", "MATH")}, "data.exclude_types leaves none of the 6 records"),
        ({"type_field": "kind"}, r"train.json:1 .record 0.: no field 'kind', which data.exclude_types looks at"),
    ]:
        with pytest.raises(UserError, match=complaint):
            _prepare(_config(tmp_path, train=str(path), recipe="metamathqa", **settings))
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["train.json"]


def test_a_test_split_of_another_recipe_is_never_filtered(tmp_path: Path) -> None:
    train, test = tmp_path / "train.json", tmp_path / "test.jsonl"
    train.write_text(json.dumps(METAMATH))
    test.write_text(json.dumps({"question": "What is 2 + 3?" + " please" * 12, "answer": "5\n#### 5"}) + "\n")
    config = _config(tmp_path, train=str(train), test=str(test), recipe="metamathqa", test_recipe="gsm8k")
    made = _prepare(config)
    assert (made.splits["test"]["kept"], made.splits["test"]["dropped"]) == (1, {})
    assert made.splits["test"]["tokens"]["total"]["min"] > 256
    (record,) = _records(made, config, "test")
    text = open_prepared(config.data.prepared).tokenizer.decode(record.prompt_ids)
    assert text.startswith("Question: Below is an instruction") and record.response == "5\n#### 5"


def test_what_a_recipe_decides_and_what_it_leaves() -> None:
    plain = with_recipe(DataConfig())
    files = {"train": "builtin", "test": "builtin", "prompt_field": "question", "response_field": "answer"}
    rules = {"prompt_template": "{prompt}", "exclude_types": (), "max_total_len": 0, "max_records": 0}
    assert (files | rules).items() <= vars(plain).items()
    meta = with_recipe(DataConfig(recipe="metamathqa", test_recipe="gsm8k"))
    assert (meta.train, meta.test) == ("hf:meta-math/MetaMathQA", "hf:openai/gsm8k:main")
    assert (meta.prompt_field, with_test_fields(meta).prompt_field) == ("query", "question")
    assert (meta.exclude_types, meta.max_total_len, meta.max_records) == (("GSM",), 256, 20_000)
    math = with_recipe(DataConfig(recipe="math", train="math.jsonl", prompt_field="q", max_records=5))
    assert (math.train, math.test, math.prompt_field, math.response_field) == ("math.jsonl", "builtin", "q", "solution")
    assert (math.exclude_types, math.max_records) == ((), 5)
    assert with_recipe(DataConfig(recipe="metamathqa")).test is None
    for config in (plain, meta, math):
        assert with_recipe(config) == config
    with pytest.raises(UserError, match="data.test is `builtin` but data.train is 'math.jsonl'"):
        _prepare(Config(data=math))


def test_gsm8k_by_recipe(tmp_path: Path, shared: Path) -> None:
    head = tmp_path / "train.jsonl"
    head.write_bytes(b"".join((shared / "data/gsm8k/train.jsonl").read_bytes().splitlines(keepends=True)[:300]))
    settings = {"recipe": "gsm8k", "tokenizer_type": "bpe", "vocab_size": 2000, "validation_records": 20}
    made = _prepare(_config(tmp_path, train=str(head), overlong="drop", **settings))
    total = sum(made.splits["train"]["dropped"].values()) + made.splits["train"]["kept"]
    assert total == 280 and made.splits["train"]["dropped"]["longer than data.max_total_len"] > 0
    for split in ("train", "validation"):
        assert made.splits[split]["tokens"]["total"]["max"] <= 256


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        ('[\n {"question": "q", "answer": "a"},\n {"question": }\n]', r":3: not JSON at column 15"),
        (
            '[\n {"question": "q", "answer": "a"}\n {}]',
            r":3: not a JSON array: a comma or \] must follow record 0, but '\{'",
        ),
        ('[{"question": "q", "answer": "a"}', r":1: not a JSON array: .* but the file ends"),
        ('[{"question": "q", "answer": "a"}]\n\n{}', r":3: more follows the end"),
        ('[\n\n{"question": "q"}]', r":3 .record 0.: no field 'answer'"),
        ("[]", ": the file is empty"),
        ("[1]", r":1 .record 0.: a JSON object is expected, not a number"),
        ('[{"question": "q", "answer": "a"}, ' + "[" * 100_000, r":1: not usable JSON"),
    ],
)
def test_bad_arrays_are_named(tmp_path: Path, content: str, complaint: str) -> None:
    path = tmp_path / "some.json"
    path.write_text(content)
    with pytest.raises(UserError, match=r"some\.json" + complaint):
        read_source(str(path), with_recipe(DataConfig()), "train")


def test_an_array_with_bytes_that_are_not_utf8_names_the_line(tmp_path: Path) -> None:
    path = tmp_path / "some.json"
    path.write_bytes(b'\xef\xbb\xbf[\n{"question": "\xe9"}]')
    with pytest.raises(UserError, match=r"some.json:2: not UTF-8: byte 0xe9 at offset 19"):
        list(read_rows(str(path), "train").rows)
    path.write_text('{"question": "q", "answer": "a"}\n')  # lines in a .json file are lines
    assert [row.source for row in read_rows(str(path), "train").rows] == ["some.json:1"]


@pytest.fixture
def datasets(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """A stand-in for the `datasets` library; the list holds what was asked of it."""
    asked: list[tuple[Any, ...]] = []

    def load_dataset(name: str, config: str | None = None, *, split: str, revision: str | None = None) -> Any:
        asked.append((name, config, split, revision))
        if name == "away":
            raise ConnectionError("Couldn't reach the hub\nsecond line")
        return [{"question": f"{split} {n}?", "answer": f"{n}\n#### {n}"} for n in range(4)]

    module = types.ModuleType("datasets")
    module.load_dataset = load_dataset  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "datasets", module)
    return asked


def test_data_sets_are_loaded_by_name(tmp_path: Path, datasets: list[tuple[Any, ...]]) -> None:
    config = _config(tmp_path, recipe="gsm8k", test="builtin", validation="hf:openai/gsm8k@abc:main#train")
    made = _prepare(config)
    assert sorted(datasets, key=str) == [
        ("openai/gsm8k", "main", "test", None),
        ("openai/gsm8k", "main", "train", "abc"),
        ("openai/gsm8k", "main", "train", None),
    ]
    assert {split: entry["path"] for split, entry in made.inputs.items()} == {
        "train": "hf:openai/gsm8k:main",
        "validation": "hf:openai/gsm8k@abc:main#train",
        "test": "hf:openai/gsm8k:main",
    }
    assert [record.source for record in _records(made, config, "test")] == [f"gsm8k/test[{n}]" for n in range(4)]


def test_data_sets_that_cannot_be_loaded(tmp_path: Path, datasets: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "x.parquet").touch()
    for path, complaint in [
        ("hf:", "names no data set: write hf:NAME"),
        ("hf:a#b#c", "names no data set"),
        ("hf:away", "cannot load hf:away .split 'train'. .*ConnectionError: Couldn't reach the hub. Without a network"),
        ("hf:openai/gsm8k", "needs the datasets library: pip install datasets"),
        (f"{tmp_path}/x.parquet", "needs the pyarrow library: pip install pyarrow"),
    ]:
        if "pip" in complaint:
            for name in ("datasets", "pyarrow", "pyarrow.parquet"):
                monkeypatch.setitem(sys.modules, name, None)
        with pytest.raises(UserError, match=complaint):
            _prepare(_config(tmp_path, train=path))


def test_the_real_datasets_library_reads_a_local_folder(tmp_path: Path) -> None:
    pytest.importorskip("datasets")
    folder = tmp_path / "math"
    folder.mkdir()
    rows = [{"problem": f"{n}?", "solution": f"\\boxed{{{n}}}", "type": "Algebra"} for n in range(3)]
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = with_recipe(DataConfig(recipe="math", train=f"hf:{folder}"))
    read = read_source(config.train, config, "train")
    assert [example.response for example in read.examples] == ["\\boxed{0}", "\\boxed{1}", "\\boxed{2}"]
    assert read.examples[1].source == "math/train[1]"
    with pytest.raises(UserError, match="cannot load .* .split 'validation'."):
        read_source(config.train, config, "validation")


def test_parquet(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    path = tmp_path / "train.parquet"
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    parquet.write_table(pyarrow.Table.from_pylist([{"messages": turns}, {"messages": None}]), path)
    rows = list(read_rows(str(path), "train").rows)
    assert [(row.record["messages"], row.source) for row in rows] == [
        (turns, "train.parquet[0]"),
        (None, "train.parquet[1]"),
    ]
    with pytest.raises(UserError, match=r"train.parquet\[1\]: field 'messages' must be a list .* not null"):
        read_source(str(path), with_recipe(DataConfig()), "train")
    path.write_bytes(b"PAR1 no more")
    with pytest.raises(UserError, match="not readable as Parquet"):
        list(read_rows(str(path), "train").rows)
    with pytest.raises(UserError, match="cannot read none.parquet"):
        read_rows("none.parquet", "train")
