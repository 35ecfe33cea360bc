"""Refuses records with fields that belong to what the model is shown, and that would be left out of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from jaxblock.data.config import DataConfig
from jaxblock.data.text.messages import INSTRUCTIONS, Message
from jaxblock.errors import UserError

_PICTURES = ("image", "images")  # the fields that hold what `<image>` in a message stands for
_SYSTEM = ("system", "system_prompt")
_TOOLS = ("tools", "functions")  # the fields that describe the tools which an assistant may call
_NOTHING: tuple[Any, ...] = (None, "", "[]", [], {})


def check_conversation(record: Mapping[str, Any], messages: Sequence[Message], config: DataConfig, where: str) -> None:
    """Checks that a record's messages are all that the model is to be shown of it.

    Args:
        record: The record.
        messages: Its messages, checked.
        config: Resolved settings, whose `data.system` stands before messages without a system message.
        where: The record's place, for the error message.

    Raises:
        UserError: If the messages stand for pictures that the record holds, or a system message or tools stand beside them.
    """
    pictures = next((name for name in _PICTURES if record.get(name)), None)
    if pictures is not None and any("<image>" in message["content"] for message in messages):
        raise UserError(
            f"{where}: the messages show an image (<image>, field {pictures!r}): the models read only text, so take such "
            "records out"
        )
    first = messages[0]["content"] if messages[0]["role"] in INSTRUCTIONS else config.system
    _check_system(record, first, (), config, where)
    tools = next((name for name in _TOOLS if record.get(name) not in _NOTHING), None)
    if tools is not None and first is None:  # a system message may describe them
        raise UserError(
            f"{where}: the field {tools!r} describes tools, which no template here writes: describe them in a system message, "
            "or take the field out"
        )


def check_question(record: Mapping[str, Any], config: DataConfig, where: str) -> None:
    """Checks that a record's prompt is all that the model is to be shown before the response.

    Args:
        record: The record.
        config: Resolved settings (see `recipes.with_recipe`), which name the field of the prompt.
        where: The record's place, for the error message.

    Raises:
        UserError: If a system message, earlier turns (`history`) or an instruction's `input` stand beside the prompt.
    """
    used = (config.prompt_field, config.input_field, config.system_field, config.response_field)
    _check_system(record, config.system, used, config, where)
    beside = ["history", "input"] if config.prompt_field == "instruction" else []
    name = next((name for name in beside if name not in used and record.get(name) not in _NOTHING), None)
    if name is not None:
        raise UserError(
            f"{where}: the field {name!r} belongs to the instruction, and would be left out: name it in data.input_field (its "
            "text follows the prompt), write both into one field, or the record as messages"
            if name == "input"
            else f"{where}: the field {name!r} holds earlier turns, and would be left out: write the record as messages"
        )


def _check_system(
    record: Mapping[str, Any], shown: str | None, used: Sequence[str | None], config: DataConfig, where: str
) -> None:
    """Raises UserError where a field holds a system message other than the one that the model is shown."""
    own = () if config.system_field is None else (config.system_field,)
    for name in (*_SYSTEM, *own):
        text = record.get(name)
        if name in used or not isinstance(text, str) or not text.strip() or text.strip() == (shown or "").strip():
            continue
        raise UserError(
            f"{where}: the field {name!r} is a system message beside the prompt, and would be left out: name it in "
            "data.system_field (for records whose messages have none), or take it out; data.system sets one for all records"
        )
