"""The paper's data sets by name: their fields, prompt, length rule and filter."""

import json
from pathlib import Path
from typing import Any

import pytest

from jaxblock.data.config import DataConfig
from jaxblock.data.store.manifest import Manifest
from jaxblock.data.store.prepare import prepare
from jaxblock.data.store.prepared_folder import Prepared, open_prepared
from jaxblock.data.text.recipes import with_recipe, with_test_fields
from jaxblock.diffusion.config import CanvasConfig
from jaxblock.errors import UserError

ASKED = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\nWhat is 2 + 3?\n\n### Response: Let's think step by step."
)
METAMATH = [
    {"query": query, "response": f"The answer is: {number}", "type": kind, "original_question": "?"}
    for query, number, kind in [
        ("What is 2 + 3?", 5, "MATH_AnsAug"),
        ("How many?", 1, "GSM_Rephrased"),
        ("Find x." + " x" * 60, 2, "MATH_FOBAR"),
        ("Find y.", 3, "MATH_SV"),
        ("Find z.", 4, "MATH_SV"),
        ("So many?", 6, "GSM_AnsAug"),
    ]
]


def prepared(folder: Path, **data: Any) -> tuple[Manifest, Prepared]:
    out = str(folder / f"out{len(list(folder.glob('out*')))}")
    defaults = {"prepared": out, "test": None, "validation_records": 0, "template": "plain", "tokenizer_type": "char"}
    config = DataConfig(**{**defaults, "vocab_size": 330, **data})
    return prepare(config, CanvasConfig(prompt_len=300, response_len=64)), open_prepared(out)


@pytest.fixture
def metamath(tmp_path):
    path = tmp_path / "MetaMathQA.json"
    path.write_text(json.dumps(METAMATH, indent=1))
    return {"train": str(path), "recipe": "metamathqa"}


def test_metamathqa_leaves_out_gsm_and_what_is_long_and_counts_both(tmp_path, metamath):
    made, opened = prepared(tmp_path, **metamath)
    train = made.splits["train"]
    assert train["kept"] == 3 and train["tokens"]["total"]["max"] <= 256
    assert train["dropped"] == {"type contains 'GSM'": 2, "longer than data.max_total_len": 1}
    first, *others = opened.records("train")
    assert opened.tokenizer.decode(first.prompt_ids) == f"Question: {ASKED}\nAnswer:"
    assert (first.prompt, first.response, first.source) == ("What is 2 + 3?", "The answer is: 5", "MetaMathQA.json[0]")
    assert [record.source for record in others] == ["MetaMathQA.json[3]", "MetaMathQA.json[4]"]
    # What is decoded is asked as what was trained on.
    assert opened.encoder.prompt("What is 2 + 3?") == first.prompt_ids.tolist()
    assert made.data["exclude_types"] == ["GSM"]
    for options, dropped in [
        ({"exclude_types": (), "max_records": 2}, {"beyond data.max_records": 4}),
        ({"prompt_template": "{prompt}", "max_total_len": 0}, {"type contains 'GSM'": 2}),
    ]:
        assert prepared(tmp_path, **metamath, **options)[0].splits["train"]["dropped"] == dropped


def test_a_rule_that_leaves_nothing_is_an_error(tmp_path, metamath):
    for options, complaint in [
        ({"max_total_len": 5}, "all 4 train records have more than data.max_total_len = 5 tokens"),
        ({"exclude_types": ("GSM", "MATH")}, "data.exclude_types leaves none of the 6 records"),
        ({"type_field": "kind"}, r"MetaMathQA.json:2 .record 0.: no field 'kind', which data.exclude_types looks at"),
        ({"recipe": "math", "test": "builtin"}, "data.test is `builtin` but data.train is '.*MetaMathQA.json'"),
    ]:
        with pytest.raises(UserError, match=complaint):
            prepared(tmp_path, **{**metamath, **options})
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["MetaMathQA.json"]


def test_a_test_split_of_another_recipe_is_never_filtered(tmp_path, metamath):
    test = tmp_path / "test.jsonl"
    test.write_text(json.dumps({"question": "What is 2 + 3?" + " please" * 12, "answer": "5\n#### 5"}) + "\n")
    made, opened = prepared(tmp_path, **metamath, test=str(test), test_recipe="gsm8k")
    assert (made.splits["test"]["kept"], made.splits["test"]["dropped"]) == (1, {})
    assert made.splits["test"]["tokens"]["total"]["min"] > 256
    (record,) = opened.records("test")
    text = opened.tokenizer.decode(record.prompt_ids)
    assert text.startswith("Question: Below is an instruction") and record.response == "5\n#### 5"


def test_what_a_recipe_decides_and_what_it_leaves():
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
    assert [with_recipe(config) for config in (plain, meta, math)] == [plain, meta, math]
