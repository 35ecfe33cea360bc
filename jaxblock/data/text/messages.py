"""Checks the messages of conversations in the forms that data sets have, and returns all of them in one form.

The forms are OpenAI's ({"role": ..., "content": ...}, whose content is text or a list of parts) and ShareGPT's
({"from": "human", "value": ...}).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jaxblock.data.text.rows import json_type
from jaxblock.errors import UserError, shown

Message = Mapping[str, str]
"""{"role": one of `ROLES`, "content": ...}"""

ROLES = ("system", "developer", "user", "assistant", "tool")

INSTRUCTIONS = ("system", "developer")
"""The roles whose messages say how to answer; they ask nothing themselves."""

ASKING = ("user", "tool")
"""The roles whose messages an assistant answers."""

_SHAREGPT_ROLES = {"human": "user", "gpt": "assistant", "chatgpt": "assistant", "observation": "tool"}
_TEXT_PARTS = ("text", "input_text", "output_text")
_BESIDE_TEXT = {
    "tool_calls": "call",
    "function_call": "call",
    **dict.fromkeys(("reasoning_content", "reasoning", "thinking"), "reasoning"),
}
"""What a message's keys hold that some templates write beside its content."""
_NOT_TEXT = ("image", "images", "audio", "audios", "video", "videos")
_LEARNT = ("train", "training", "loss")  # how other programs say, message by message, which answers are learnt


def checked_text(value: Any, name: str, where: str) -> str:
    """Checks that a value is text and not empty, and returns it.

    Args:
        value: The value to check.
        name: What the value is, for the error message.
        where: The record that the value is from, for the error message.

    Raises:
        UserError: If the value is not a string, is blank, or cannot be written as UTF-8.
    """
    if not isinstance(value, str):
        raise UserError(f"{where}: {name} must be a string, not {json_type(value)}")
    if not value.strip():
        raise UserError(f"{where}: {name} is empty")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise UserError(
            f"{where}: {name} holds half of a surrogate pair at character {error.start}, which is not valid text"
        ) from error
    return value


def checked_messages(value: Any, name: str, short_name: str, where: str) -> list[Message]:
    """Checks that a value is a list of messages, and returns them.

    Args:
        value: The value to check: messages with "role" and "content", or with "from" and "value".
        name: What the value is, for the error message, as in "field 'messages'".
        short_name: The name that an index is put behind, as in "messages", for "messages[2]".
        where: The record that the value is from, for the error message.

    Returns:
        The messages, each {"role": one of `ROLES`, "content": its text}. Other keys of a message are left out.

    Raises:
        UserError: If it is not a list, a message has no role or text, a role is unknown, a system message is not first, or a
            message holds what would be lost: an image, a call of a tool, reasoning beside its text, or a weight.
    """
    if not isinstance(value, list) or not value:
        raise UserError(f"{where}: {name} must be a list of messages with one or more in it, not {json_type(value)}")
    messages: list[Message] = []
    for number, message in enumerate(value):
        at = f"{short_name}[{number}]"
        role, content, key = _role_and_content(message, at, where)
        if role == "system" and number:
            raise UserError(f"{where}: {at} is a system message, which must come first")
        _check_nothing_is_lost(message, role, at, where)
        text = _joined(content, f"{at}.{key}", where) if isinstance(content, list) and content else content
        messages.append({"role": role, "content": checked_text(text, f"{at}.{key}", where)})
    return messages


def _role_and_content(message: Any, at: str, where: str) -> tuple[str, Any, str]:
    """Returns a message's role, its content, and the key that the content has."""
    keys = message.keys() if isinstance(message, dict) else set()
    if {"role", "content"} <= keys:
        if message.get("value") not in (None, message["content"]):
            raise UserError(
                f"{where}: {at} has two texts, 'content' and 'value', and one would be left out: take one out"
            )
        role, known = message["role"], dict.fromkeys(ROLES)
        found, key = role, "content"
    elif {"from", "value"} <= keys:
        role, known = message["from"], dict.fromkeys([*_SHAREGPT_ROLES, *ROLES])
        found, key = _SHAREGPT_ROLES.get(role, role) if isinstance(role, str) else role, "value"
    else:
        raise UserError(f'{where}: {at} must be an object with "role" and "content" (or "from" and "value")')
    if found not in ROLES:
        raise UserError(f"{where}: {at} has the role {shown(role)}; known are {', '.join(known)}")
    return found, message[key], key


def _check_nothing_is_lost(message: Mapping[str, Any], role: str, at: str, where: str) -> None:
    """Raises UserError where a message holds calls of tools or reasoning beside its text, or says whether it is learnt."""
    for key, what in _BESIDE_TEXT.items():
        if message.get(key):
            raise UserError(
                f"{where}: {at} holds {key!r}, which would be left out: write the {what} into the message's text, as the "
                "model is to write it, or take the key out"
            )
    picture = next((key for key in _NOT_TEXT if message.get(key)), None)
    if picture is not None:
        raise UserError(f"{where}: {at} holds {picture!r}: the models read only text, so take such records out")
    for key in _LEARNT if role == "assistant" else ():
        if message.get(key) not in (None, True):
            raise UserError(
                f"{where}: {at} has {key!r}: {shown(message[key])}, and which answers are learnt is not said message by message here: "
                "take the key out; data.turns says which they are"
            )
    weight = message.get("weight")
    if weight not in (None, 1):
        raise UserError(
            f"{where}: {at} has the weight {shown(weight)}, and messages have none here: take the key out; data.turns says "
            "which of the assistant's messages are learnt"
        )


def _joined(parts: list[Any], name: str, where: str) -> str:
    """Returns the text of a message whose content is a list of parts, {"type": "text", "text": ...}, one after another.

    Raises:
        UserError: If a part is not an object with a type, or is anything but text, such as an image.
    """
    texts = []
    for number, part in enumerate(parts):
        at = f"{name}[{number}]"
        if not isinstance(part, dict) or not isinstance(part.get("type"), str):
            raise UserError(f'{where}: {at} must be an object with "type" and "text", not {json_type(part)}')
        if part["type"] not in _TEXT_PARTS:
            raise UserError(
                f"{where}: {at} is of the type {shown(part['type'])}: the models read only text, so take such records out"
            )
        if not isinstance(part.get("text"), str):
            raise UserError(f"{where}: {at}.text must be a string, not {json_type(part.get('text'))}")
        texts.append(part["text"])
    return "".join(texts)
