"""The paper's data sets by name: their fields, prompt, length rule and filter."""

import pytest

from jaxblock.data.config import DataConfig
from jaxblock.data.text.recipes import with_recipe
from jaxblock.errors import UserError

CHARS = {"tokenizer_type": "char", "vocab_size": 330, "template": "plain"}
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


def test_metamathqa_leaves_out_gsm_and_what_is_long_and_counts_both(jsonl, prepared):
    # Records of tests have fields of their own, and are never filtered.
    test = jsonl("test.jsonl", [("What is 2 + 3?" + " please" * 12, "5\n#### 5")])
    options = {"train": jsonl("MetaMathQA.json", METAMATH), "recipe": "metamathqa", "test": test, **CHARS}
    opened = prepared(test_recipe="gsm8k", **options)
    train = opened.manifest.splits["train"]
    assert train["kept"] == 3 and train["tokens"]["total"]["max"] <= 256
    assert train["dropped"] == {"type contains 'GSM'": 2, "longer than data.max_total_len": 1}
    first, *others = opened.records("train")
    asked = (
        "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
        "### Instruction:\nWhat is 2 + 3?\n\n### Response: Let's think step by step."
    )
    assert opened.tokenizer.decode(first.prompt_ids) == f"Question: {asked}\nAnswer:"
    assert (first.prompt, first.response, first.source) == ("What is 2 + 3?", "The answer is: 5", "MetaMathQA.json:1")
    assert [record.source for record in others] == ["MetaMathQA.json:4", "MetaMathQA.json:5"]
    # What is decoded is asked as what was trained on.
    assert opened.encoder.prompt("What is 2 + 3?") == first.prompt_ids.tolist()
    (record,), made = opened.records("test"), opened.manifest.splits["test"]
    assert (made["kept"], made["dropped"], record.response) == (1, {}, "5\n#### 5")
    assert made["tokens"]["total"]["min"] > 256
    assert opened.tokenizer.decode(record.prompt_ids).startswith("Question: Below is an instruction")
    for changed, dropped in [
        ({"exclude_types": (), "max_records": 2}, {"beyond data.max_records": 4}),
        ({"prompt_template": "{prompt}", "max_total_len": 0}, {"type contains 'GSM'": 2}),
    ]:
        again = prepared(**options, **changed, test_recipe="gsm8k", overwrite=True)
        assert again.manifest.splits["train"]["dropped"] == dropped


def test_a_rule_that_leaves_nothing_is_an_error(tmp_path, jsonl, prepared):
    train = jsonl("meta.jsonl", METAMATH)
    for options, complaint in [
        ({"max_total_len": 5}, "all 4 train records have more than data.max_total_len = 5 tokens"),
        ({"exclude_types": ("GSM", "MATH")}, "data.exclude_types leaves none of the 6 records"),
        ({"type_field": "kind"}, "meta.jsonl:1: no field 'kind', which data.exclude_types looks at"),
    ]:
        with pytest.raises(UserError, match=complaint):
            prepared(train=train, recipe="metamathqa", **CHARS, **options)
    assert [entry.name for entry in tmp_path.iterdir()] == ["meta.jsonl"]


def test_what_a_recipe_decides_and_what_it_leaves():
    meta = with_recipe(DataConfig(recipe="metamathqa", test_recipe="gsm8k"))
    math = with_recipe(DataConfig(recipe="math", train="math.jsonl", prompt_field="q", max_records=5))
    assert [with_recipe(config) for config in (meta, math)] == [meta, math]
    assert (meta.train, meta.test, meta.prompt_field) == ("hf:meta-math/MetaMathQA", "hf:openai/gsm8k:main", "query")
    assert (meta.exclude_types, meta.max_total_len, meta.max_records) == (("GSM",), 256, 20_000)
    assert (math.train, math.test, math.prompt_field, math.response_field) == ("math.jsonl", "builtin", "q", "solution")
    assert (math.exclude_types, math.max_records) == ((), 5)
    assert with_recipe(DataConfig(recipe="metamathqa")).test is None
