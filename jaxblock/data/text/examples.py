"""Converts a record into examples: conversations with a supervised answer. Every error names the file and the line."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from jaxblock.data.config import DataConfig
from jaxblock.data.text.inputs import read_rows
from jaxblock.data.text.left_out import check_conversation, check_question
from jaxblock.data.text.messages import ASKING, INSTRUCTIONS, Message, checked_messages, checked_text
from jaxblock.data.text.rows import Row
from jaxblock.errors import UserError

Prompt = str | list[Message]
"""A user's text, or a conversation that ends with the turn of the user or of a tool."""

SHAREGPT_FIELD = "conversations"
"""The field of the messages in ShareGPT's form, which is looked at in records without prompt and `data.messages_field`."""


@dataclass(frozen=True)
class Example:
    """Holds a conversation whose last turn, the assistant's, is supervised.

    Attributes:
        messages: The turns of the conversation; the last is the assistant's.
        prompt: The question as the record has it, without `data.prompt_template`; where several turns come before the
            answer, all of them, each as a line "role: text".
        response: The supervised answer as the record has it.
        where: The path and the line of the record, for error messages.
        source: The file name and the line, which the prepared record keeps, and the number of the assistant's turn where
            several are supervised ("train.jsonl:17#2").
        conversation: A name that all examples of one conversation share, so that they are put into the same split.
        fields: The record's other fields: neither prompt, response nor messages. Only graders look at them.
    """

    messages: tuple[Message, ...]
    prompt: str
    response: str
    where: str
    source: str
    conversation: str
    fields: Mapping[str, Any] = field(default_factory=dict)


def examples_of(row: Row, config: DataConfig) -> list[Example]:
    """Makes the examples of a record: one of a question and its answer, one or several of a conversation.

    Args:
        row: The record and its place in a file.
        config: Resolved settings (see `recipes.with_recipe`), which name the fields and the turns that are supervised.

    Raises:
        UserError: If a field is missing, empty or not text, or the messages are not a conversation.
    """
    field = messages_field(row, config)
    if field is not None:
        return _turns(row, _conversation(row, field, config), _others(row, field, config.system_field), config)
    prompt = question_of(row, config)
    response = _field(row, "response_field", config.response_field, _or_messages(config))
    fields = _others(row, config.prompt_field, config.input_field, config.system_field, config.response_field)
    messages = (*_asked(prompt, row, config), {"role": "assistant", "content": response})
    return [Example(messages, prompt, response, row.where, row.source, row.where, fields)]


def read_prompts(path: str, config: DataConfig) -> Iterator[tuple[str, Prompt]]:
    """Reads only the prompts of a file of records, which may lack responses.

    Args:
        path: A file, as `inputs.open_input` accepts it.
        config: Resolved settings (see `recipes.with_recipe`), which name the fields of the prompt and of the messages.

    Yields:
        (the place of a record, for error messages; the record's prompt: its text, or its messages before the last answer).

    Raises:
        UserError: If the file cannot be read, a record is not an object, its prompt is missing, empty or not text, or its
            messages are not a conversation with a turn of the user, or of a tool, at its end (before the last answer).
    """
    for row in read_rows(path, "test"):
        field = messages_field(row, config)
        if field is None:
            yield row.where, prompt_of(row, config)
            continue
        messages = messages_of(row, field, config)
        if messages[-1]["role"] == "assistant":
            del messages[-1]
        if not messages or messages[-1]["role"] not in ASKING:
            raise UserError(f"{row.where}: {field!r} holds no turn of the user that is to be answered")
        yield row.where, messages


def prompt_of(row: Row, config: DataConfig) -> Prompt:
    """Returns the prompt of a record that is no conversation: its text, or messages where it has a system message of its own.

    Raises:
        UserError: If the prompt is missing, empty or not text, or the record holds more that belongs to it.
    """
    question = question_of(row, config)
    asked = _asked(question, row, config)
    return asked if len(asked) > 1 else question


def question_of(row: Row, config: DataConfig) -> str:
    """Returns the text of a record's prompt, with that of `data.input_field` on a new line.

    Raises:
        UserError: If the prompt is missing, empty or not text, or the record holds more that belongs to it.
    """
    prompt = _field(row, "prompt_field", config.prompt_field, _or_messages(config))
    about = _optional_field(row, "input_field", config.input_field)
    check_question(row.record, config, row.where)
    return prompt if about is None else f"{prompt}\n{about}"


def _asked(question: str, row: Row, config: DataConfig) -> list[Message]:
    """Returns the messages before the response: the record's system message, if it has one, and the question in its template."""
    return [*_system(row, config), {"role": "user", "content": in_template(question, config)}]


def _others(row: Row, *used: str | None) -> dict[str, Any]:
    """Returns the fields of a record but those that are used."""
    return {name: value for name, value in row.record.items() if name not in used}


def in_template(prompt: str, config: DataConfig) -> str:
    """Puts a prompt into `data.prompt_template`, where one is set."""
    return prompt if config.prompt_template is None else config.prompt_template.replace("{prompt}", prompt)


def _system(row: Row, config: DataConfig) -> list[Message]:
    """Returns the system message that `data.system_field` holds, as a list of one; an empty list where it holds no text."""
    text = _optional_field(row, "system_field", config.system_field)
    return [] if text is None else [{"role": "system", "content": text}]


def _or_messages(config: DataConfig) -> str:
    """Returns the end of the advice where a field of a question and its answer is missing."""
    return f", or give {config.messages_field!r}"


def _optional_field(row: Row, setting: str, name: str | None) -> str | None:
    """Returns the text of a field that a record may lack; None where it holds none. A mistyped name must not drop text."""
    if name is None or (name not in row.record and not difflib.get_close_matches(name, row.record, n=1)):
        return None
    if name in row.record and row.record[name] in (None, ""):
        return None
    return _field(row, setting, name)


def _field(row: Row, setting: str, name: str | None, otherwise: str = "") -> str:
    """Returns the text of the record's field `name`, which the setting `data.{setting}` gives; `otherwise` ends the advice."""
    if name not in row.record:
        near = difflib.get_close_matches(str(name), row.record, n=1)
        hint = f" (did you mean {near[0]!r}?)" if near else ""
        raise UserError(
            f"{row.where}: no field {name!r}{hint}; set data.{setting} to one of "
            f"{', '.join(map(repr, row.record)) or 'none: it is empty'}{otherwise}"
        )
    return checked_text(row.record[name], f"field {name!r}", row.where)


def _turns(row: Row, messages: list[Message], fields: Mapping[str, Any], config: DataConfig) -> list[Example]:
    """Makes one example for each supervised turn, from the turns up to it."""
    spoken = [number for number, message in enumerate(messages) if message["role"] == "assistant"]
    first_user = next(number for number, message in enumerate(messages) if message["role"] == "user")
    # What the assistant says before the user's first turn answers nothing: it is context and not supervised.
    supervised = [number for number in spoken if number > first_user]
    every_turn = config.turns == "all"
    examples = []
    for number in supervised if every_turn else supervised[-1:]:
        turn = spoken.index(number) + 1
        asked = [message for message in messages[:number] if message["role"] not in INSTRUCTIONS]
        prompt = asked[0]["content"] if len(asked) == 1 else "\n".join(f"{m['role']}: {m['content']}" for m in asked)
        examples.append(
            Example(
                messages=tuple(messages[: number + 1]),
                prompt=prompt,
                response=messages[number]["content"],
                where=f"{row.where}, assistant turn {turn}" if every_turn else row.where,
                source=f"{row.source}#{turn}" if every_turn else row.source,
                conversation=row.where,
                fields=fields,
            )
        )
    return examples


def messages_field(row: Row, config: DataConfig) -> str | None:
    """Returns the name of the field that holds the record's messages; None where the record is a prompt and its response.

    Raises:
        UserError: If it holds two conversations, of which one would be left out.
    """
    name = config.messages_field
    if name in row.record:
        two = name != SHAREGPT_FIELD and isinstance(row.record.get(SHAREGPT_FIELD), list)
        if two and _spoken(row, name) != _spoken(row, SHAREGPT_FIELD):
            raise UserError(
                f"{row.where}: the fields {name!r} and {SHAREGPT_FIELD!r} hold two conversations, and one would be left out: take "
                "one of them out of the record"
            )
        _check_one_answer(row, name, config)
        return name
    return SHAREGPT_FIELD if SHAREGPT_FIELD in row.record and config.prompt_field not in row.record else None


def _check_one_answer(row: Row, field: str, config: DataConfig) -> None:
    """Raises UserError where a record holds messages and, in fields that the settings name, another response."""
    plain = DataConfig()
    names = (config.prompt_field, config.response_field)
    named = config.recipe is not None or names != (plain.prompt_field, plain.response_field)
    if not named or not all(name in row.record for name in names):
        return
    answer, other = _spoken(row, field)[-1]["content"], row.record[str(config.response_field)]
    if isinstance(other, str) and other.strip() != answer.strip():
        raise UserError(
            f"{row.where}: the fields {field!r} and {config.response_field!r} hold two answers, and the second, which "
            "data.response_field or the recipe names, would be left out: take one of them out of the record, or set "
            "data.messages_field to a field that no record has"
        )


def _spoken(row: Row, field: str) -> list[Message]:
    return checked_messages(row.record[field], f"field {field!r}", field, row.where)


def messages_of(row: Row, field: str, config: DataConfig) -> list[Message]:
    """Returns the messages of a record after checking them.

    Raises:
        UserError: If they are not messages, or not all that the model is to be shown of the record.
    """
    messages = _spoken(row, field)
    if messages[0]["role"] not in INSTRUCTIONS:
        messages = [*_system(row, config), *messages]
    check_conversation(row.record, messages, config, row.where)
    return messages


def _conversation(row: Row, field: str, config: DataConfig) -> list[Message]:
    """Returns the messages of a record after checking that they are a conversation.

    Raises:
        UserError: If they are not a list of messages, do not end with the assistant's turn, or have no turn of the user.
    """
    messages = messages_of(row, field, config)
    if messages[-1]["role"] != "assistant":
        raise UserError(
            f"{row.where}: the last message must be the assistant's (it is what is learnt), not the "
            f"{messages[-1]['role']}'s"
        )
    if not any(message["role"] == "user" for message in messages):
        raise UserError(f"{row.where}: no user message comes before the assistant's last one")
    return messages
