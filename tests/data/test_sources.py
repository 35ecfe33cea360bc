"""What is read of files and data sets, and how it is split: a bad record is refused with its file and line."""

import gzip
import hashlib
import json
import os
import sys
import types

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxblock.data.config import DataConfig
from jaxblock.data.text import inputs, json_array, recipes, sources, splits
from jaxblock.errors import UserError

PAIR = '{"question": "q", "answer": "a"}'
GOOD = PAIR.encode() + b"\n"


def chat(*turns):
    return json.dumps({"messages": [{"role": role, "content": content} for role, content in turns]}).encode()


def source_of(path, **settings):
    """Returns the examples of one input, and their source."""
    opened = inputs.open_input(path, "train")
    config = recipes.with_recipe(DataConfig(train=path, **settings))
    found = sources.read_source([opened], config, "train", [str(opened.sha256)])
    return list(found.examples()), found


def read(folder, content, name="some.jsonl", **settings):
    (folder / name).write_bytes(content)
    return source_of(str(folder / name), **settings)[0]


def splits_of(**settings):
    """Returns the examples of every split, and the manifest's entry on each."""
    config = recipes.with_recipe(DataConfig(**settings))
    opened = splits.open_inputs(config)
    found = splits.read_splits(opened, splits.hash_inputs(opened, config), config)
    return {split: list(some.examples()) for split, some in found.items()}, {k: v.described() for k, v in found.items()}


def cut(patch, size):
    """Lets files be read in chunks of this size."""
    patch.setattr(inputs, "CHUNK", size)
    patch.setattr(json_array, "CHUNK", size)


BAD_LINES = [
    (b'{"question": "q", "answer": }', "not JSON at column 29"),
    (b'{"question": "q"', "not JSON"),
    (b'["q", "a"]', "a JSON object is expected, not a list"),
    (b'{"question": "q", "answer": "a", "question": "p"}', "not usable JSON: the name 'question' is given twice"),
    (b"null", "a JSON object is expected, not null"),
    (b'{"question": "q"}', "no field 'answer'; set data.response_field to one of 'question'"),
    (b'{"questoin": "q", "answer": "a"}', r"no field 'question' .did you mean 'questoin'\?"),
    (b"{}", "no field 'question'; .* it is empty"),
    (b'{"question": " \\n", "answer": "a"}', "field 'question' is empty"),
    (b'{"question": "q", "answer": ""}', "field 'answer' is empty"),
    (b'{"question": "q", "answer": 18}', "field 'answer' must be a string, not a number"),
    (b'{"question": null, "answer": "a"}', "field 'question' must be a string, not null"),
    (b'{"question": "\\ud800", "answer": "a"}', "field 'question' holds half of a surrogate pair"),
    ('{"question": "é", "answer": "a"}'.encode("latin-1"), "not UTF-8: byte 0xe9 at offset 47 of the file"),
    (PAIR.encode("utf-16"), "not UTF-8: byte 0xff at offset 33"),
    (b'{"b": "\xc3\xa9\xff"}', "not UTF-8: byte 0xff at offset 42"),
    (b'{"question": "q", "answer": ' + b"9" * 5000 + b"}", "not usable JSON"),
    (b"[" * 100_000, "not usable JSON"),
    (b'{"messages": []}', "field 'messages' must be a list .* not an empty list"),
    (b'{"messages": "hello"}', "field 'messages' must be a list .* not a string"),
    (b'{"messages": [{"role": "user"}]}', r"messages\[0\] must be an object with"),
    (chat(("user", "q"), ("assistant", 1)), r"messages\[1\].content must be a string, not a number"),
    (chat(("user", ""), ("assistant", "a")), r"messages\[0\].content is empty"),
    (chat(("human", "q"), ("assistant", "a")), r"messages\[0\] has the role 'human'; known are"),
    (chat(("user", "q"), ("system", "s"), ("assistant", "a")), r"messages\[1\] is a system message"),
    (chat(("user", "q"), ("assistant", "a"), ("user", "q")), "the last message must be the assistant's"),
    (chat(("system", "s"), ("assistant", "a")), "no user message"),
]
BAD_FILES = [
    *((empty, ": the file is empty") for empty in (b"", b"\n \n", b"\xef\xbb\xbf", b"[]")),
    (gzip.compress(GOOD, mtime=0)[:-9], " is a gzip file that is cut off or damaged"),
    (b"\x28\xb5\x2f\xfd", r" is compressed by Zstandard: decompress it first .zstd -d."),
    (b"PK\x03\x04", " is compressed by zip"),
    (f'[\n {PAIR},\n {{"question": }}\n]', r":3: not JSON at column 15"),
    (f'[{PAIR},\n\n  {{"é": "', r":3: not JSON at column 9: Unterminated"),
    (f"[\n {PAIR}\n {{}}]", r":3: not a JSON array: a comma or \] must follow record 0, but '\{'"),
    (f"[{PAIR}", r":1: not a JSON array: .* but the file ends"),
    (f"[{PAIR}]\n\n{{}}", r":3: more follows the end"),
    ('[\n\n{"question": "q"}]', r":3 .record 0.: no field 'answer'"),
    (f"[{PAIR},\n 7]", r":2 .record 1.: a JSON object is expected, not a number"),
    (f'[{PAIR},\n {{"b": 1, "b": 2}}]', r":2: not usable JSON: the name 'b'"),
    (f"[{PAIR}, " + "[" * 100_000, r":1: not usable JSON"),
    (b'\xef\xbb\xbf[\n{"question": "\xe9"}]', ":2: not UTF-8: byte 0xe9 at offset 19"),
    (b"[" + GOOD + b',\n{"b": "\xc3\xa9\xc3("}]', ":3: not UTF-8: byte 0xc3 at offset 45"),
]
BAD = [*((GOOD + line + b"\n" + GOOD, f":2: {complaint}") for line, complaint in BAD_LINES), *BAD_FILES]


@pytest.mark.parametrize("content, complaint", BAD)
def test_bad_lines_and_files_are_named_however_they_are_cut(tmp_path, monkeypatch, content, complaint):
    for size in (3, 7, inputs.CHUNK):
        cut(monkeypatch, size)
        with pytest.raises(UserError, match=r"some\.json" + complaint):
            read(tmp_path, content.encode() if isinstance(content, str) else content, "some.json")


VALUES = [{"a": 'é😀\\"[]{}', "b": [1, -2.5e3, None]}, {}, {"c": {"d": ["\u2028", "x" * 30]}}, {"e": True}, {"f": 1}]


@settings(max_examples=40, deadline=None)
@given(size=st.integers(3, 90), flags=st.tuples(*[st.booleans()] * 5))
def test_a_cut_anywhere_changes_nothing(tmp_path_factory, size, flags):
    array, escaped, mark, packed, end = flags
    texts = [json.dumps(value, ensure_ascii=escaped) for value in VALUES]
    content = "\r\n[\n" + " ,\n\n".join(texts) + " ]\n" if array else "\n \r\n".join(texts) + "\n" * end
    stored = b"\xef\xbb\xbf" * mark + content.encode()
    path = tmp_path_factory.getbasetemp() / "some"
    path.write_bytes(gzip.compress(stored) if packed else stored)
    with pytest.MonkeyPatch.context() as patch:
        cut(patch, size)
        found = list(inputs.read_rows(str(path), "train"))
    assert [row.record for row in found] == VALUES
    lines = [(3 if array else 1) + 2 * i for i in range(5)]
    assert [row.where for row in found] == [f"{path}:{n}" + f" (record {i})" * array for i, n in enumerate(lines)]
    assert [row.source for row in found] == [f"some[{i}]" if array else f"some:{n}" for i, n in enumerate(lines)]


def test_what_is_hashed_is_what_was_read_once(tmp_path):
    """A pipe can be read once only. Files are recognised by what is in them, whatever their names are."""
    array = f"[{PAIR}]".encode()
    for content in (GOOD, array, gzip.compress(GOOD), gzip.compress(array)):
        (tmp_path / "other").write_bytes(content)
        ends = os.pipe()
        os.write(ends[1], content)
        os.close(ends[1])
        for path in (str(tmp_path / "other"), f"/dev/fd/{ends[0]}"):
            found, source = source_of(path)
            assert [example.response for example in found] == ["a"]
            assert source.sha256 == (hashlib.sha256(content).hexdigest(),)
        os.close(ends[0])
    opened = inputs.open_input(str(tmp_path / "other"), "train")
    assert opened.sha256 and [len(list(chunk.rows())) for chunk in opened.chunks()] == [1]
    (tmp_path / "other").write_bytes(GOOD + GOOD)
    with pytest.raises(UserError, match="other was changed while it was read"):
        list(opened.chunks())
    for names in (["train.jsonl", "other.jsonl"], ["x/t.jsonl", "y/t.jsonl"]):
        assert inputs.distinct_names([f"{folder}/{name}" for folder, name in zip("xy", names, strict=True)]) == names


def test_every_turn_is_a_row_that_ends_there(tmp_path):
    greeted = chat(("system", "s"), ("assistant", "hello"), *[(r, t) for t in "ab" for r in ("user", "assistant")])
    content = b"\xef\xbb\xbf" + '{"q": "Où?", "a": "là\\n"}\r\n\n'.encode() + greeted
    fields = {"prompt_field": "q", "response_field": "a"}
    first, last = read(tmp_path, content, **fields)
    assert (first.prompt, first.response, first.source) == ("Où?", "là\n", "some.jsonl:1")
    assert [m["role"] for m in first.messages] == ["user", "assistant"]
    assert last.where == last.conversation == f"{tmp_path}/some.jsonl:3" and len(last.messages) == 6
    pair, *turns = read(tmp_path, content, turns="all", **fields)
    assert [(row.response, row.source, len(row.messages)) for row in turns] == [
        ("a", "some.jsonl:3#2", 4),  # the greeting, #1, answers nothing
        ("b", "some.jsonl:3#3", 6),
    ]
    assert [row.prompt for row in turns] == ["assistant: hello\nuser: a", last.prompt]
    assert (last.source, last.messages, last.response) == ("some.jsonl:3", turns[1].messages, "b")
    assert last.prompt == "assistant: hello\nuser: a\nassistant: a\nuser: b"
    assert {row.conversation for row in turns} == {last.where} != {pair.conversation} and pair == first
    assert turns[1].where.endswith("some.jsonl:3, assistant turn 3")


def test_validation_is_set_apart_by_the_seed_alone_and_a_conversation_is_never_split(tmp_path):
    turns = [[(role, f"{n} {k} {role}") for k in range(1 + n % 3) for role in ("user", "assistant")] for n in range(30)]
    path = tmp_path / "chats.jsonl"
    path.write_bytes(b"\n".join(chat(*talk) for talk in turns))
    taken = []
    for seed in (0, 1):
        options = {"train": str(path), "test": None, "validation_records": 7, "seed": seed}
        (every, entries), (last, _) = (splits_of(**options, turns=turns) for turns in ("all", "last"))
        sides = {split: {e.conversation for e in every[split]} for split in ("train", "validation")}
        assert {split: len(side) for split, side in sides.items()} == {"train": 23, "validation": 7}
        assert not sides["train"] & sides["validation"] and sum(map(len, every.values())) == 60
        for split, side in sides.items():
            assert (entries[split]["conversations"], entries[split]["records"]) == (len(side), len(every[split]))
            assert {e.conversation for e in last[split]} == side
        taken.append(sides["validation"])
    assert taken[0] != taken[1]


def test_data_sets_are_loaded_by_name(tmp_path, monkeypatch):
    asked = []

    def load_dataset(name, config=None, *, split, revision=None):
        asked.append((name, config, split, revision))
        if name == "away":
            raise ConnectionError("Couldn't reach the hub\nsecond line")
        return [{"question": f"{split} {n}?", "answer": f"{n}\n#### {n}"} for n in range(4)]

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    gsm8k, validation = "openai/gsm8k", "hf:openai/gsm8k@abc:main#train"
    loaded, entries = splits_of(recipe="gsm8k", test="builtin", validation=validation)
    expected = {(gsm8k, "main", "test", None), (gsm8k, "main", "train", "abc"), (gsm8k, "main", "train", None)}
    assert set(asked) == expected and len(asked) == 3
    named = {split: entry["path"] for split, entry in entries.items()}
    assert named == {"train": f"hf:{gsm8k}:main", "validation": validation, "test": f"hf:{gsm8k}:main"}
    assert [example.source for example in loaded["test"]] == [f"gsm8k/test[{n}]" for n in range(4)]

    (tmp_path / "x.parquet").touch()
    away = "cannot load hf:away .split 'train'. .*ConnectionError: Couldn't reach the hub. Without a network"
    for path, complaint in [
        ("hf:", "names no data set: write hf:NAME"),
        ("hf:a#b#c", "names no data set"),
        ("hf:away", away),
        ("hf:openai/gsm8k", "needs the datasets library: .*pip install .*datasets, or"),
        (f"{tmp_path}/x.parquet", "needs the pyarrow library: .*pip install .*pyarrow, or"),
    ]:
        if "pip" in complaint:
            for name in ("datasets", "pyarrow", "pyarrow.parquet"):
                monkeypatch.setitem(sys.modules, name, None)
        with pytest.raises(UserError, match=complaint):
            splits_of(train=path, test=None)


def test_the_real_datasets_library_reads_a_local_folder(jsonl, tmp_path):
    pytest.importorskip("datasets")
    rows = [{"problem": f"{n}?", "solution": f"\\boxed{{{n}}}", "type": "Algebra"} for n in range(3)]
    jsonl("math/train.jsonl", rows)
    found, _ = source_of(f"hf:{tmp_path}/math", recipe="math")
    assert [example.response for example in found] == ["\\boxed{0}", "\\boxed{1}", "\\boxed{2}"]
    assert found[1].source == "math/train[1]"
    with pytest.raises(UserError, match="cannot load .* .split 'validation'."):
        inputs.open_input(f"hf:{tmp_path}/math", "validation")


def test_parquet(tmp_path):
    pyarrow, parquet = (pytest.importorskip(name) for name in ("pyarrow", "pyarrow.parquet"))
    path = tmp_path / "train.parquet"
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    parquet.write_table(pyarrow.Table.from_pylist([{"messages": turns}, {"messages": None}]), path)
    rows = [(row.record["messages"], row.source) for row in inputs.read_rows(str(path), "train")]
    assert rows == [(turns, "train.parquet[0]"), (None, "train.parquet[1]")]
    with pytest.raises(UserError, match=r"train.parquet\[1\]: field 'messages' must be a list .* not null"):
        source_of(str(path))
    path.write_bytes(b"PAR1 no more")
    with pytest.raises(UserError, match="not readable as Parquet"):
        list(inputs.read_rows(str(path), "train"))
    with pytest.raises(UserError, match="cannot read none.parquet"):
        inputs.read_rows("none.parquet", "train")
