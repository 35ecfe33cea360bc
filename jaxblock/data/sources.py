"""Text records: JSON lines, or the built-in corpus. Every complaint names the file and the line."""

from __future__ import annotations

import dataclasses
import difflib
import hashlib
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

from jaxblock import storage
from jaxblock.config import DataConfig
from jaxblock.data import corpus
from jaxblock.data.templates import Message
from jaxblock.errors import UserError

BUILTIN = "builtin"
ROLES = ("system", "user", "assistant")


@dataclass(frozen=True)
class Example:
    """A conversation whose last turn, the assistant's, is supervised.

    Attributes:
        messages: The turns; the last is the assistant's.
        prompt: The question as the record has it (of several turns: all of them, one "role: text" a line).
        response: The supervised answer as the record has it.
        where: For error messages: path and line.
        source: For the prepared record: file name and line.
    """

    messages: tuple[Message, ...]
    prompt: str
    response: str
    where: str
    source: str


def builtin(split: Literal["train", "test"], n: int, config: DataConfig) -> list[Example]:
    """`n` problems of the built-in corpus at the config's level and seed, named "builtin:test:12" and so on.

    Raises:
        UserError: If the level is unknown or has not so many problems.
    """
    try:
        records = corpus.generate(split, n, level=config.level, seed=config.seed)
    except ValueError as error:
        raise UserError(f"the built-in corpus (data.level, data.builtin_train, data.builtin_test): {error}") from error
    names = [f"{BUILTIN}:{split}:{line}" for line in range(1, n + 1)]
    return [
        _pair(record["question"], record["answer"], name, name) for name, record in zip(names, records, strict=True)
    ]


def read_jsonl(path: str, config: DataConfig) -> list[Example]:
    """Reads a file of JSON objects, one a line; blank lines are skipped.

    Args:
        path: Local or gs://.
        config: Names of the fields.

    Raises:
        UserError: For a file that is missing, empty or not UTF-8 (with the byte's offset), and for a line that is not
            JSON, no object, or whose fields are missing, empty or not text (with the line's number).
    """
    name = os.path.basename(path)
    examples = []
    for line, text in _lines(path):
        where = f"{path}:{line}"
        example = _example(_parse(text, where), config, where)
        examples.append(dataclasses.replace(example, source=f"{name}:{line}"))
    if not examples:
        raise UserError(f"{path}: the file is empty; one JSON object a line is expected")
    return examples


def digest(examples: list[Example]) -> str:
    """SHA-256 of the texts of examples (the built-in corpus has no file to hash)."""
    content = json.dumps([[example.prompt, example.response] for example in examples], ensure_ascii=False)
    return hashlib.sha256(content.encode()).hexdigest()


def _lines(path: str) -> Iterator[tuple[int, str]]:
    content = storage.read_bytes(path)
    offset = 3 if content.startswith(b"\xef\xbb\xbf") else 0  # a byte-order mark
    for line, raw in enumerate(content[offset:].split(b"\n"), 1):
        try:
            text = raw.decode()
        except UnicodeDecodeError as error:
            place = offset + error.start
            raise UserError(
                f"{path}:{line}: not UTF-8: byte 0x{content[place]:02x} at offset {place} of the file; convert it "
                "(iconv -t UTF-8)"
            ) from error
        if text.strip():
            yield line, text
        offset += len(raw) + 1


def _parse(text: str, where: str) -> dict[str, Any]:
    try:
        record = json.loads(text)
    except json.JSONDecodeError as error:
        raise UserError(
            f"{where}: not JSON at column {error.colno}: {error.msg}; one JSON object a line is expected"
        ) from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: not usable JSON: {error}") from error
    if not isinstance(record, dict):
        hint = "; a file that is one JSON array must be split into lines" if isinstance(record, list) else ""
        raise UserError(f"{where}: a JSON object is expected, not {_kind(record)}{hint}")
    return record


def _example(record: dict[str, Any], config: DataConfig, where: str) -> Example:
    if config.messages_field in record:
        return _conversation(record[config.messages_field], config.messages_field, where)
    for setting in ("prompt_field", "response_field"):
        key = getattr(config, setting)
        if key not in record:
            near = difflib.get_close_matches(key, record, n=1)
            hint = f" (did you mean {near[0]!r}?)" if near else ""
            raise UserError(
                f"{where}: no field {key!r}{hint}; set data.{setting} to one of "
                f"{', '.join(map(repr, record)) or 'none: it is empty'}"
                f", or give {config.messages_field!r}"
            )
    texts = [_text(record[key], f"field {key!r}", where) for key in (config.prompt_field, config.response_field)]
    return _pair(texts[0], texts[1], where, where)


def _conversation(value: Any, key: str, where: str) -> Example:
    if not isinstance(value, list) or not value:
        raise UserError(f"{where}: field {key!r} must be a list of messages with one or more in it, not {_kind(value)}")
    messages = []
    for number, message in enumerate(value):
        name = f"{key}[{number}]"
        if not isinstance(message, dict) or not {"role", "content"} <= message.keys():
            raise UserError(f'{where}: {name} must be an object with "role" and "content"')
        role = message["role"]
        if role not in ROLES:
            raise UserError(f"{where}: {name} has the role {role!r}; known are {', '.join(ROLES)}")
        if role == "system" and number:
            raise UserError(f"{where}: {name} is a system message, which must come first")
        messages.append({"role": role, "content": _text(message["content"], f"{name}.content", where)})
    if messages[-1]["role"] != "assistant":
        raise UserError(
            f"{where}: the last message must be the assistant's (it is what is learnt), not the "
            f"{messages[-1]['role']}'s"
        )
    before = messages[:-1]
    if not any(message["role"] == "user" for message in before):
        raise UserError(f"{where}: no user message comes before the assistant's last one")
    asked = [message for message in before if message["role"] != "system"]
    prompt = asked[0]["content"] if len(asked) == 1 else "\n".join(f"{m['role']}: {m['content']}" for m in asked)
    return Example(tuple(messages), prompt, messages[-1]["content"], where, where)


def _pair(prompt: str, response: str, where: str, source: str) -> Example:
    messages = ({"role": "user", "content": prompt}, {"role": "assistant", "content": response})
    return Example(messages, prompt, response, where, source)


def _text(value: Any, name: str, where: str) -> str:
    if not isinstance(value, str):
        raise UserError(f"{where}: {name} must be a string, not {_kind(value)}")
    if not value.strip():
        raise UserError(f"{where}: {name} is empty")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise UserError(
            f"{where}: {name} holds half of a surrogate pair at character {error.start}, which is no text"
        ) from error
    return value


def _kind(value: Any) -> str:
    kinds = {bool: "a boolean", int: "a number", float: "a number", str: "a string", list: "a list", dict: "an object"}
    return "null" if value is None else ("an empty list" if value == [] else kinds[type(value)])
