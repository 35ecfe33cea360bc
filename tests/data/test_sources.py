"""Every kind of bad record is refused with its file and line."""

from __future__ import annotations

import gzip
import hashlib
import json
import os
from pathlib import Path
from typing import Any

import pytest

from jaxblock.data.config import DataConfig
from jaxblock.data.text import splits
from jaxblock.data.text.examples import Example
from jaxblock.data.text.recipes import with_recipe
from jaxblock.data.text.sources import read_source
from jaxblock.data.text.splits import read_splits
from jaxblock.errors import UserError

GOOD = b'{"question": "q", "answer": "a"}\n'


def _chat(*turns: tuple[str, object]) -> bytes:
    return json.dumps({"messages": [{"role": role, "content": content} for role, content in turns]}).encode()


def _config(**settings: Any) -> DataConfig:
    return with_recipe(DataConfig(**settings))


def _read(folder: Path, content: bytes, **settings: Any) -> list[Example]:
    path = folder / "some.jsonl"
    path.write_bytes(content)
    return read_source(str(path), _config(**settings), "train").examples


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        (b'{"question": "q", "answer": }', r":2: not JSON at column 29"),
        (b'{"question": "q"', r":2: not JSON"),
        (b'["q", "a"]', r":2: a JSON object is expected, not a list"),
        (
            b'{"question": "q", "answer": "a", "question": "p"}',
            r":2: not usable JSON: the name 'question' is given twice",
        ),
        (b"null", r":2: a JSON object is expected, not null"),
        (b'{"question": "q"}', r":2: no field 'answer'; set data.response_field to one of 'question'"),
        (b'{"questoin": "q", "answer": "a"}', r":2: no field 'question' .did you mean 'questoin'\?"),
        (b"{}", r":2: no field 'question'; .* it is empty"),
        (b'{"question": " \\n", "answer": "a"}', r":2: field 'question' is empty"),
        (b'{"question": "q", "answer": ""}', r":2: field 'answer' is empty"),
        (b'{"question": "q", "answer": 18}', r":2: field 'answer' must be a string, not a number"),
        (b'{"question": null, "answer": "a"}', r":2: field 'question' must be a string, not null"),
        (b'{"question": "\\ud800", "answer": "a"}', r":2: field 'question' holds half of a surrogate pair"),
        ('{"question": "é", "answer": "a"}'.encode("latin-1"), r":2: not UTF-8: byte 0xe9 at offset 47 of the file"),
        (b'{"question": "q", "answer": "a"}'.decode().encode("utf-16"), r":2: not UTF-8: byte 0xff at offset 33"),
        (b'{"question": "q", "answer": ' + b"9" * 5000 + b"}", r":2: not usable JSON"),
        (b"[" * 100_000, r":2: not usable JSON"),
        (b'{"messages": []}', r":2: field 'messages' must be a list .* not an empty list"),
        (b'{"messages": "hello"}', r":2: field 'messages' must be a list .* not a string"),
        (b'{"messages": [{"role": "user"}]}', r":2: messages\[0\] must be an object with"),
        (_chat(("user", "q"), ("assistant", ["a"])), r":2: messages\[1\].content must be a string, not a list"),
        (_chat(("user", ""), ("assistant", "a")), r":2: messages\[0\].content is empty"),
        (_chat(("human", "q"), ("assistant", "a")), r":2: messages\[0\] has the role 'human'; known are"),
        (_chat(("user", "q"), ("system", "s"), ("assistant", "a")), r":2: messages\[1\] is a system message"),
        (_chat(("user", "q"), ("assistant", "a"), ("user", "q")), r":2: the last message must be the assistant's"),
        (_chat(("system", "s"), ("assistant", "a")), r":2: no user message"),
    ],
)
def test_bad_lines_are_named(tmp_path: Path, line: bytes, complaint: str) -> None:
    with pytest.raises(UserError, match=r"some\.jsonl" + complaint):
        _read(tmp_path, GOOD + line + b"\n" + GOOD)


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        *((empty, "some.jsonl: the file is empty") for empty in (b"", b"\n \n", b"\xef\xbb\xbf")),
        (gzip.compress(GOOD)[:-9], "some.jsonl is a gzip file that is cut off or damaged"),
        (b"\x28\xb5\x2f\xfd", r"some.jsonl is compressed by Zstandard: decompress it first .zstd -d."),
        (b"PK\x03\x04", "some.jsonl is compressed by zip"),
    ],
)
def test_files_without_lines_are_named(tmp_path: Path, content: bytes, complaint: str) -> None:
    with pytest.raises(UserError, match=complaint):
        _read(tmp_path, content)
    with pytest.raises(UserError, match="cannot read none.jsonl: there is no such file"):
        read_source("none.jsonl", _config(), "train")


def test_what_is_hashed_is_what_was_read_once(tmp_path: Path) -> None:
    """A pipe can be read once only. Files are recognised by what is in them, whatever their names are."""
    line, plain = GOOD.strip(), tmp_path / "some.jsonl"
    plain.write_bytes(GOOD)
    for content in (GOOD, b"[" + line + b"]", gzip.compress(GOOD), gzip.compress(b"[" + line + b"]")):
        (tmp_path / "other").write_bytes(content)
        ends = os.pipe()
        os.write(ends[1], content)
        os.close(ends[1])
        for path in (str(tmp_path / "other"), f"/dev/fd/{ends[0]}"):
            read = read_source(path, _config(), "train")
            assert [example.response for example in read.examples] == ["a"]
            assert read.sha256 == hashlib.sha256(content).hexdigest()
        os.close(ends[0])


def test_what_is_accepted(tmp_path: Path) -> None:
    content = (
        b"\xef\xbb\xbf"
        + '{"q": "Où?", "a": "là\\n"}\r\n\n'.encode()
        + _chat(("system", "s"), ("user", "one"), ("assistant", "two"), ("user", "three"), ("assistant", "four"))
    )
    first, second = _read(tmp_path, content, prompt_field="q", response_field="a")
    assert (first.prompt, first.response, first.source) == ("Où?", "là\n", "some.jsonl:1")
    assert [m["role"] for m in first.messages] == ["user", "assistant"]
    assert (second.prompt, second.response) == ("user: one\nassistant: two\nuser: three", "four")
    assert second.where == f"{tmp_path}/some.jsonl:3"
    assert len(second.messages) == 5


TALK = [("system", "s"), ("assistant", "hello"), ("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d")]


def test_every_turn_is_a_row_that_ends_there(tmp_path: Path) -> None:
    content = _chat(*TALK) + b"\n" + GOOD
    last, _ = _read(tmp_path, content)
    *turns, pair = _read(tmp_path, content, turns="all")
    assert [(row.response, row.source, len(row.messages)) for row in turns] == [
        ("b", "some.jsonl:1#2", 4),  # the greeting, #1, answers nothing
        ("d", "some.jsonl:1#3", 6),
    ]
    assert [row.prompt for row in turns] == ["assistant: hello\nuser: a", last.prompt]
    assert (last.source, last.messages, last.response) == ("some.jsonl:1", turns[1].messages, "d")
    assert {row.conversation for row in turns} == {last.where} != {pair.conversation}
    assert turns[1].where.endswith("some.jsonl:1, assistant turn 3")
    assert pair.source == "some.jsonl:2"


def test_a_conversation_is_never_split(tmp_path: Path) -> None:
    def chat(n: int) -> bytes:
        turns = [(role, f"{n} {k} {role}") for k in range(1 + n % 3) for role in ("user", "assistant")]
        return _chat(*turns) + b"\n"

    path = tmp_path / "chats.jsonl"
    path.write_bytes(b"".join(chat(n) for n in range(30)))
    for seed in range(3):
        settings = {"train": str(path), "test": None, "validation_records": 7, "turns": "all", "seed": seed}
        loaded = read_splits(_config(**settings))
        sides = [{example.conversation for example in loaded[split].examples} for split in ("train", "validation")]
        assert len(sides[1]) == 7 and len(sides[0]) == 23 and not sides[0] & sides[1]
        assert sum(len(some.examples) for some in loaded.values()) == 60
        for split, side in zip(("train", "validation"), sides, strict=True):
            entry = loaded[split].described()
            assert (entry["conversations"], entry["records"]) == (len(side), len(loaded[split].examples))
        last = read_splits(_config(**{**settings, "turns": "last"}))
        assert [{e.conversation for e in last[split].examples} for split in ("train", "validation")] == sides


def _write(path: Path, n: int) -> str:
    path.write_text("".join(f'{{"question": "q{i}", "answer": "a{i}"}}\n' for i in range(n)))
    return str(path)


def test_validation_is_set_apart_by_the_seed_alone(tmp_path: Path) -> None:
    train = _write(tmp_path / "train.jsonl", 50)

    def split(seed: int) -> dict[str, list[str]]:
        loaded = read_splits(_config(train=train, test=None, validation_records=8, seed=seed))
        assert {name: some.described()["records"] for name, some in loaded.items()} == {"train": 42, "validation": 8}
        return {name: [example.prompt for example in some.examples] for name, some in loaded.items()}

    first = split(0)
    assert sorted(first["train"] + first["validation"]) == sorted(f"q{i}" for i in range(50))
    assert split(0) == first
    assert split(1)["validation"] != first["validation"]


def test_settings_that_fit_no_split(tmp_path: Path) -> None:
    train = _write(tmp_path / "train.jsonl", 8)
    for settings, complaint in [
        ({"train": train}, "data.test is `builtin`"),
        ({"train": train, "test": None, "validation": "builtin"}, "data.validation is `builtin`"),
        ({"train": train, "test": None, "validation_records": 8}, "leaves nothing of the 8 records"),
        ({"builtin_train": 0}, "leaves nothing to train on"),
        ({"level": "impossible"}, "unknown level 'impossible'"),
    ]:
        with pytest.raises(UserError, match=complaint):
            read_splits(_config(**settings))


def test_the_builtin_corpus_holds_validation_beyond_test() -> None:
    loaded = read_splits(_config(builtin_train=200, builtin_test=10, validation_records=4))
    assert {name: len(some.examples) for name, some in loaded.items()} == {"train": 200, "validation": 4, "test": 10}
    assert loaded["test"].examples[9].source == "builtin:test:10"
    assert loaded["validation"].examples[0].source == "builtin:test:11"
    prompts = [example.prompt for some in loaded.values() for example in some.examples]
    assert len(set(prompts)) == len(prompts)


def test_a_corpus_that_leaks_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    generate = splits.corpus.generate
    monkeypatch.setattr(splits.corpus, "generate", lambda split, n, **settings: generate("test", n, **settings))
    with pytest.raises(UserError, match="repeat those of another split"):
        read_splits(_config(builtin_train=20, builtin_test=5, validation_records=2))
