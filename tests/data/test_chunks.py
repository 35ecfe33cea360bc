"""Inputs of any size are read and counted in chunks: the same as if they were read whole, however the chunks are cut."""

import gzip
import json
import os
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxblock.data.store import overlaps
from jaxblock.data.store.encode import prompt_hash
from jaxblock.data.store.statistics import LengthStatistics
from jaxblock.data.text import inputs, json_array
from jaxblock.data.text.inputs import distinct_names, open_input, read_rows
from jaxblock.errors import UserError

VALUES = [{"a": 'é😀\\"[]{}', "b": [1, -2.5e3, None]}, {}, {"c": {"d": ["\u2028", "x" * 30]}}, {"e": True}, {"f": 12}]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("chunks")


@settings(max_examples=40, deadline=None)
@given(
    size=st.integers(3, 90),
    array=st.booleans(),
    escaped=st.booleans(),
    mark=st.booleans(),
    packed=st.booleans(),
    end=st.booleans(),
)
def test_a_cut_anywhere_changes_nothing(folder, size, array, escaped, mark, packed, end):
    texts = [json.dumps(value, ensure_ascii=escaped) for value in VALUES]
    content = "\r\n[\n" + " ,\n\n".join(texts) + " ]\n" if array else "\n \r\n".join(texts) + "\n" * end
    stored = b"\xef\xbb\xbf" * mark + content.encode()
    path = folder / "some"
    path.write_bytes(gzip.compress(stored) if packed else stored)
    lines = [3 + 2 * i for i in range(5)] if array else [1 + 2 * i for i in range(5)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(inputs, "CHUNK", size)
        patch.setattr(json_array, "CHUNK", size)
        found = list(read_rows(str(path), "train"))
    assert [row.record for row in found] == VALUES
    ends = [f"{line} (record {i})" if array else f"{line}" for i, line in enumerate(lines)]
    assert [row.where for row in found] == [f"{path}:{end}" for end in ends]
    assert [row.source for row in found] == [f"some[{i}]" if array else f"some:{line}" for i, line in enumerate(lines)]


@pytest.mark.parametrize("size", [1, 7, 1000])
def test_an_error_has_its_place_however_the_file_is_cut(tmp_path, monkeypatch, size):
    monkeypatch.setattr(inputs, "CHUNK", size)
    monkeypatch.setattr(json_array, "CHUNK", size)
    for content, complaint in [
        ('[\n {"a": "é"},\n {"b": }]', r":3: not JSON at column 8"),
        ('[{"a": 1},\n\n   {"b": "', r":3: not JSON at column 10: Unterminated"),
        ('[{"a": 1},\n 7]', r":2 .record 1.: a JSON object is expected, not a number"),
        ('[{"a": 1},\n {"b": 1, "b": 2}]', r":2: not usable JSON: the name 'b'"),
        ('[{"a": 1}]\n\n7', r":3: more follows"),
        ('{"a": 1}\n\n{"b": tru}', r":3: not JSON at column 7"),
        (b'[{"a": 1},\n\n{"b": "\xc3\xa9\xc3("}]', r":3: not UTF-8: byte 0xc3 at offset 21"),
        (b'{"a": 1}\n{"b": "\xc3\xa9\xff"}', r":2: not UTF-8: byte 0xff at offset 18"),
    ]:
        path = tmp_path / "bad"
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        with pytest.raises(UserError, match="bad" + complaint):
            list(read_rows(str(path), "train"))


def test_a_file_that_changes_meanwhile_is_refused(tmp_path):
    path = tmp_path / "some.jsonl"
    path.write_text('{"a": 1}\n')
    opened = open_input(str(path), "train")
    assert opened.sha256 and [len(list(chunk.rows())) for chunk in opened.chunks()] == [1]
    path.write_text('{"a": 1}\n{"a": 2}\n')
    with pytest.raises(UserError, match="some.jsonl was changed while it was read"):
        list(opened.chunks())


def test_names_tell_files_apart():
    assert distinct_names(["x/train.jsonl", "y/z/other.jsonl"]) == ["train.jsonl", "other.jsonl"]
    assert distinct_names(["x/t.jsonl", "y/t.jsonl", "t.jsonl"]) == ["x/t.jsonl", "y/t.jsonl", "t.jsonl"]


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


def test_shared_prompts_are_counted_in_pieces(tmp_path, monkeypatch):
    monkeypatch.setattr(overlaps, "_AT_ONCE", 5)
    rng = np.random.default_rng(0)
    prompts = {
        split: [f"Q  {n}" for n in rng.integers(0, 60, size)] for split, size in (("a", 40), ("b", 17), ("c", 3))
    }
    hashes = overlaps.PromptHashes(tmp_path)
    for split, some in prompts.items():
        for at, prompt in enumerate(some):
            hashes.add(split, prompt_hash(prompt.lower() if at % 2 else prompt.replace("  ", "\n")))
    counts = {f"{x} and {y}": sum(p in set(prompts[x]) for p in prompts[y]) for x, y in ("ab", "ac", "bc")}
    assert hashes.count_overlaps() == counts and counts["a and b"] > 3
    assert {name: os.path.getsize(tmp_path / name) for name in os.listdir(tmp_path)}["a.hashes"] == 8 * 40
    assert Path(tmp_path).exists()
