"""Text records as conversations with a supervised turn. Every complaint names the file and the line."""

from __future__ import annotations

import difflib
import hashlib
import json
from collections import Counter
from dataclasses import dataclass
from typing import Any, Literal

from jaxblock.data.config import DataConfig
from jaxblock.data.text import corpus, files
from jaxblock.data.text.recipes import BUILTIN
from jaxblock.data.tokens.templates import Message
from jaxblock.errors import UserError

ROLES = ("system", "user", "assistant")


@dataclass(frozen=True)
class Example:
    """A conversation whose last turn, the assistant's, is supervised.

    Attributes:
        messages: The turns; the last is the assistant's.
        prompt: The question as the record has it, without `data.prompt_template` (of several turns: all of them, one
            "role: text" a line).
        response: The supervised answer as the record has it.
        where: For error messages: path and line.
        source: For the prepared record: file name and line, and which of several assistant turns ("train.jsonl:17#2").
        conversation: The same for the turns of one conversation, which no split may separate.
    """

    messages: tuple[Message, ...]
    prompt: str
    response: str
    where: str
    source: str
    conversation: str


@dataclass(frozen=True)
class Source:
    """What a file holds.

    Attributes:
        examples: Its examples, in its order.
        dropped: Records left out, by reason.
        sha256: Of the file, or (a data set has none) of the examples' texts.
    """

    examples: list[Example]
    dropped: dict[str, int]
    sha256: str


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
        _pair(record["question"], record["answer"], config, name, name)
        for name, record in zip(names, records, strict=True)
    ]


def read(path: str, config: DataConfig, split: str) -> Source:
    """Reads the records of a file or a data set.

    Args:
        path: As `files.rows` takes it.
        config: Resolved settings (see `recipes.resolve`): names of the fields, which turns are supervised, and, for the
            split "train" only, which types are left out.
        split: "train", "validation" or "test".

    Raises:
        UserError: For what cannot be read, holds no record, is no object, or whose fields are missing, empty or not text;
            file and line are named.
    """
    examples: list[Example] = []
    dropped: Counter[str] = Counter()
    count = 0
    for row in files.rows(path, split):
        count += 1
        record = _object(row)
        kind = _excluded(record, config, row.where) if split == "train" else None
        if kind is not None:
            dropped[f"{config.type_field} contains {kind!r}"] += 1
        else:
            examples += _examples(record, config, row)
    if not count:
        raise UserError(f"{path}: the file is empty; one JSON object a line is expected")
    if not examples:
        raise UserError(f"{path}: data.exclude_types leaves none of the {count} records")
    return Source(examples, dict(dropped), files.digest(path) or digest(examples))


def digest(examples: list[Example]) -> str:
    """SHA-256 of the texts of examples (what is built in or from a hub has no file to hash)."""
    texts = [[[message["role"], message["content"]] for message in example.messages] for example in examples]
    content = json.dumps(texts, ensure_ascii=False)
    return hashlib.sha256(content.encode()).hexdigest()


def wrapped(prompt: str, config: DataConfig) -> str:
    """A prompt inside `data.prompt_template`, where one is set."""
    return prompt if config.prompt_template is None else config.prompt_template.replace("{prompt}", prompt)


def _object(row: files.Row) -> dict[str, Any]:
    if not isinstance(row.value, dict):
        raise UserError(f"{row.where}: a JSON object is expected, not {_kind(row.value)}")
    return row.value


def _excluded(record: dict[str, Any], config: DataConfig, where: str) -> str | None:
    """The text of `data.exclude_types` that a record's type contains."""
    if not config.exclude_types:
        return None
    if config.type_field not in record:
        raise UserError(
            f"{where}: no field {config.type_field!r}, which data.exclude_types looks at; set data.type_field to one of "
            f"{', '.join(map(repr, record))}, or data.exclude_types to an empty list"
        )
    kind = _text(record[config.type_field], f"field {config.type_field!r}", where)
    return next((text for text in config.exclude_types if text in kind), None)


def _examples(record: dict[str, Any], config: DataConfig, row: files.Row) -> list[Example]:
    where = row.where
    if config.messages_field in record:
        messages = _conversation(record[config.messages_field], config.messages_field, where)
        return _turns(messages, config, row)
    texts = []
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
        texts.append(_text(record[key], f"field {key!r}", where))
    return [_pair(texts[0], texts[1], config, where, row.source)]


def _turns(messages: list[Message], config: DataConfig, row: files.Row) -> list[Example]:
    """One example for each supervised turn; the turns after it are not in it."""
    spoken = [number for number, message in enumerate(messages) if message["role"] == "assistant"]
    first_user = next(number for number, message in enumerate(messages) if message["role"] == "user")
    wanted = [number for number in spoken if number > first_user]  # a greeting answers nothing
    everything = config.turns == "all"
    examples = []
    for number in wanted if everything else wanted[-1:]:
        place = f"#{spoken.index(number) + 1}" if everything else ""
        asked = [message for message in messages[:number] if message["role"] != "system"]
        prompt = asked[0]["content"] if len(asked) == 1 else "\n".join(f"{m['role']}: {m['content']}" for m in asked)
        examples.append(
            Example(
                messages=tuple(messages[: number + 1]),
                prompt=prompt,
                response=messages[number]["content"],
                where=row.where + (f", assistant turn {place[1:]}" if place else ""),
                source=row.source + place,
                conversation=row.where,
            )
        )
    return examples


def _conversation(value: Any, key: str, where: str) -> list[Message]:
    if not isinstance(value, list) or not value:
        raise UserError(f"{where}: field {key!r} must be a list of messages with one or more in it, not {_kind(value)}")
    messages: list[Message] = []
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
    if not any(message["role"] == "user" for message in messages):
        raise UserError(f"{where}: no user message comes before the assistant's last one")
    return messages


def _pair(prompt: str, response: str, config: DataConfig, where: str, source: str) -> Example:
    messages = ({"role": "user", "content": wrapped(prompt, config)}, {"role": "assistant", "content": response})
    return Example(messages, prompt, response, where, source, where)


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
    if value is None or value == []:
        return "null" if value is None else "an empty list"
    return kinds.get(type(value), f"a {type(value).__name__}")
