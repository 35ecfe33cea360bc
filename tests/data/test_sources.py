"""What is read of files and data sets, and how it is split: every kind of bad record is refused with its file and line."""

import gzip
import hashlib
import json
import os
import sys
import types
from pathlib import Path
from typing import Any

import pytest

from jaxblock.data.config import DataConfig
from jaxblock.data.text import splits
from jaxblock.data.text.examples import Example
from jaxblock.data.text.inputs import open_input, read_rows
from jaxblock.data.text.recipes import with_recipe
from jaxblock.data.text.sources import Source, read_source
from jaxblock.data.text.splits import hash_inputs, open_inputs, read_splits
from jaxblock.errors import UserError

PAIR = '{"question": "q", "answer": "a"}'
GOOD = PAIR.encode() + b"\n"


def chat(*turns: tuple[str, object]) -> bytes:
    return json.dumps({"messages": [{"role": role, "content": content} for role, content in turns]}).encode()


def config_of(**settings: Any) -> DataConfig:
    return with_recipe(DataConfig(**settings))


def read(folder: Path, content: bytes, name: str = "some.jsonl", **settings: Any) -> list[Example]:
    (folder / name).write_bytes(content)
    return source_of(str(folder / name), "train", **settings)[0]


def source_of(path: str, split: str, **settings: Any) -> tuple[list[Example], Source]:
    """Returns the examples of one input, and their source."""
    opened = open_input(path, split)
    found = read_source([opened], config_of(train=path, **settings), split, [str(opened.sha256)])
    return list(found.examples()), found


def splits_of(**settings: Any) -> tuple[dict[str, list[Example]], dict[str, Any]]:
    """Returns the examples of every split, and the manifest's entry on each."""
    config = config_of(**settings)
    inputs = open_inputs(config)
    found = read_splits(inputs, hash_inputs(inputs, config), config)
    return {split: list(some.examples()) for split, some in found.items()}, {k: v.described() for k, v in found.items()}


TWICE = b'{"question": "q", "answer": "a", "question": "p"}'


@pytest.mark.parametrize(
    "line, complaint",
    [
        (b'{"question": "q", "answer": }', "not JSON at column 29"),
        (b'{"question": "q"', "not JSON"),
        (b'["q", "a"]', "a JSON object is expected, not a list"),
        (TWICE, "not usable JSON: the name 'question' is given twice"),
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
    ],
)
def test_bad_lines_are_named(tmp_path, line, complaint):
    with pytest.raises(UserError, match=r"some\.jsonl:2: " + complaint):
        read(tmp_path, GOOD + line + b"\n" + GOOD)


@pytest.mark.parametrize(
    "content, complaint",
    [
        *((empty, ": the file is empty") for empty in (b"", b"\n \n", b"\xef\xbb\xbf", b"[]")),
        (gzip.compress(GOOD)[:-9], " is a gzip file that is cut off or damaged"),
        (b"\x28\xb5\x2f\xfd", r" is compressed by Zstandard: decompress it first .zstd -d."),
        (b"PK\x03\x04", " is compressed by zip"),
        (f'[\n {PAIR},\n {{"question": }}\n]', r":3: not JSON at column 15"),
        (f"[\n {PAIR}\n {{}}]", r":3: not a JSON array: a comma or \] must follow record 0, but '\{'"),
        (f"[{PAIR}", r":1: not a JSON array: .* but the file ends"),
        (f"[{PAIR}]\n\n{{}}", r":3: more follows the end"),
        ('[\n\n{"question": "q"}]', r":3 .record 0.: no field 'answer'"),
        ("[1]", r":1 .record 0.: a JSON object is expected, not a number"),
        (f"[{PAIR}, " + "[" * 100_000, r":1: not usable JSON"),
        (b'\xef\xbb\xbf[\n{"question": "\xe9"}]', ":2: not UTF-8: byte 0xe9 at offset 19"),
    ],
)
def test_bad_files_are_named(tmp_path, content, complaint):
    with pytest.raises(UserError, match=r"some\.json" + complaint):
        read(tmp_path, content.encode() if isinstance(content, str) else content, "some.json")


def test_what_is_hashed_is_what_was_read_once(tmp_path):
    """A pipe can be read once only. Files are recognised by what is in them, whatever their names are."""
    array = f"[{PAIR}]".encode()
    for content in (GOOD, array, gzip.compress(GOOD), gzip.compress(array)):
        (tmp_path / "other").write_bytes(content)
        ends = os.pipe()
        os.write(ends[1], content)
        os.close(ends[1])
        for path in (str(tmp_path / "other"), f"/dev/fd/{ends[0]}"):
            found, source = source_of(path, "train")
            assert [example.response for example in found] == ["a"]
            assert source.sha256 == (hashlib.sha256(content).hexdigest(),)
        os.close(ends[0])
    assert [example.source for example in read(tmp_path, GOOD, "lines.json")] == ["lines.json:1"]


def test_what_is_accepted(tmp_path):
    turns = chat(("system", "s"), ("user", "one"), ("assistant", "two"), ("user", "three"), ("assistant", "four"))
    content = b"\xef\xbb\xbf" + '{"q": "Où?", "a": "là\\n"}\r\n\n'.encode() + turns
    first, second = read(tmp_path, content, prompt_field="q", response_field="a")
    assert (first.prompt, first.response, first.source) == ("Où?", "là\n", "some.jsonl:1")
    assert [m["role"] for m in first.messages] == ["user", "assistant"]
    assert (second.prompt, second.response) == ("user: one\nassistant: two\nuser: three", "four")
    assert second.where == f"{tmp_path}/some.jsonl:3" and len(second.messages) == 5


def test_every_turn_is_a_row_that_ends_there(tmp_path):
    greeted = chat(("system", "s"), ("assistant", "hello"), *[(r, t) for t in "ab" for r in ("user", "assistant")])
    content = greeted + b"\n" + GOOD
    last, _ = read(tmp_path, content)
    *turns, pair = read(tmp_path, content, turns="all")
    assert [(row.response, row.source, len(row.messages)) for row in turns] == [
        ("a", "some.jsonl:1#2", 4),  # the greeting, #1, answers nothing
        ("b", "some.jsonl:1#3", 6),
    ]
    assert [row.prompt for row in turns] == ["assistant: hello\nuser: a", last.prompt]
    assert (last.source, last.messages, last.response) == ("some.jsonl:1", turns[1].messages, "b")
    assert {row.conversation for row in turns} == {last.where} != {pair.conversation}
    assert turns[1].where.endswith("some.jsonl:1, assistant turn 3") and pair.source == "some.jsonl:2"


def test_a_conversation_is_never_split(tmp_path):
    def talk(n: int) -> bytes:
        return chat(*[(role, f"{n} {k} {role}") for k in range(1 + n % 3) for role in ("user", "assistant")]) + b"\n"

    path = tmp_path / "chats.jsonl"
    path.write_bytes(b"".join(talk(n) for n in range(30)))
    for seed in range(3):
        settings = {"train": str(path), "test": None, "validation_records": 7, "seed": seed}
        (every, entries), (last, _) = (splits_of(**settings, turns=turns) for turns in ("all", "last"))
        sides = [{e.conversation for e in every[split]} for split in ("train", "validation")]
        assert len(sides[1]) == 7 and len(sides[0]) == 23 and not sides[0] & sides[1]
        assert sum(map(len, every.values())) == 60
        for split, side in zip(("train", "validation"), sides, strict=True):
            assert (entries[split]["conversations"], entries[split]["records"]) == (len(side), len(every[split]))
            assert {e.conversation for e in last[split]} == side


def pairs_file(path: Path, n: int) -> str:
    path.write_text("".join(f'{{"question": "q{i}", "answer": "a{i}"}}\n' for i in range(n)))
    return str(path)


def test_validation_is_set_apart_by_the_seed_alone(tmp_path):
    train = pairs_file(tmp_path / "train.jsonl", 50)

    def split(seed: int) -> dict[str, list[str]]:
        loaded, entries = splits_of(train=train, test=None, validation_records=8, seed=seed)
        assert {name: entry["records"] for name, entry in entries.items()} == {"train": 42, "validation": 8}
        return {name: [example.prompt for example in some] for name, some in loaded.items()}

    first = split(0)
    assert sorted(first["train"] + first["validation"]) == sorted(f"q{i}" for i in range(50))
    assert split(0) == first and split(1)["validation"] != first["validation"]


def test_settings_that_fit_no_split(tmp_path, monkeypatch):
    train, pipe = pairs_file(tmp_path / "train.jsonl", 8), str(tmp_path / "pipe")
    os.mkfifo(pipe)
    generate = splits.corpus.generate
    for settings, complaint in [
        ({"train": train}, "data.test is `builtin`"),
        ({"train": train, "test": None, "validation": "builtin"}, "data.validation is `builtin`"),
        ({"train": train, "test": None, "validation_records": 8}, "leaves nothing of the 8 records"),
        ({"train": "none.jsonl", "test": None}, "cannot read none.jsonl: there is no such file"),
        ({"train": pipe, "test": pipe}, "pipe is given for two splits, and a pipe can be read only once"),
        ({"builtin_train": 0}, "leaves nothing to train on"),
        ({"level": "impossible"}, "unknown level 'impossible'"),
        ({"builtin_train": 20, "builtin_test": 5, "validation_records": 2}, "repeat those of another split"),
    ]:
        if "repeat" in complaint:  # a corpus that leaks
            monkeypatch.setattr(splits.corpus, "generate", lambda split, n, **options: generate("test", n, **options))
        with pytest.raises(UserError, match=complaint):
            splits_of(**settings)


def test_the_builtin_corpus_holds_validation_beyond_test():
    loaded, _ = splits_of(builtin_train=200, builtin_test=10, validation_records=4)
    assert {name: len(some) for name, some in loaded.items()} == {"train": 200, "validation": 4, "test": 10}
    assert loaded["test"][9].source == "builtin:test:10"
    assert loaded["validation"][0].source == "builtin:test:11"
    prompts = [example.prompt for some in loaded.values() for example in some]
    assert len(set(prompts)) == len(prompts)


@pytest.fixture
def datasets(monkeypatch):
    """A stand-in for the `datasets` library; the list holds what was asked of it."""
    asked: list[tuple[Any, ...]] = []

    def load_dataset(name: str, config: str | None = None, *, split: str, revision: str | None = None) -> Any:
        asked.append((name, config, split, revision))
        if name == "away":
            raise ConnectionError("Couldn't reach the hub\nsecond line")
        return [{"question": f"{split} {n}?", "answer": f"{n}\n#### {n}"} for n in range(4)]

    module = types.ModuleType("datasets")
    module.load_dataset = load_dataset
    monkeypatch.setitem(sys.modules, "datasets", module)
    return asked


def test_data_sets_are_loaded_by_name(datasets):
    options = {"recipe": "gsm8k", "test": "builtin", "validation": "hf:openai/gsm8k@abc:main#train"}
    loaded, entries = splits_of(**options)
    assert sorted(datasets, key=str) == [
        ("openai/gsm8k", "main", "test", None),
        ("openai/gsm8k", "main", "train", "abc"),
        ("openai/gsm8k", "main", "train", None),
    ]
    named = {split: entry["path"] for split, entry in entries.items()}
    assert named == {
        "train": "hf:openai/gsm8k:main",
        "validation": options["validation"],
        "test": "hf:openai/gsm8k:main",
    }
    assert [example.source for example in loaded["test"]] == [f"gsm8k/test[{n}]" for n in range(4)]


def test_data_sets_that_cannot_be_loaded(tmp_path, datasets, monkeypatch):
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


def test_the_real_datasets_library_reads_a_local_folder(tmp_path):
    pytest.importorskip("datasets")
    folder = tmp_path / "math"
    folder.mkdir()
    rows = [{"problem": f"{n}?", "solution": f"\\boxed{{{n}}}", "type": "Algebra"} for n in range(3)]
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = config_of(recipe="math", train=f"hf:{folder}")
    found, _ = source_of(config.train, "train", recipe="math")
    assert [example.response for example in found] == ["\\boxed{0}", "\\boxed{1}", "\\boxed{2}"]
    assert found[1].source == "math/train[1]"
    with pytest.raises(UserError, match="cannot load .* .split 'validation'."):
        open_input(config.train, "validation")


def test_parquet(tmp_path):
    pyarrow, parquet = (pytest.importorskip(name) for name in ("pyarrow", "pyarrow.parquet"))
    path = tmp_path / "train.parquet"
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    parquet.write_table(pyarrow.Table.from_pylist([{"messages": turns}, {"messages": None}]), path)
    rows = [(row.record["messages"], row.source) for row in read_rows(str(path), "train")]
    assert rows == [(turns, "train.parquet[0]"), (None, "train.parquet[1]")]
    with pytest.raises(UserError, match=r"train.parquet\[1\]: field 'messages' must be a list .* not null"):
        source_of(str(path), "train")
    path.write_bytes(b"PAR1 no more")
    with pytest.raises(UserError, match="not readable as Parquet"):
        list(read_rows(str(path), "train"))
    with pytest.raises(UserError, match="cannot read none.parquet"):
        read_rows("none.parquet", "train")
