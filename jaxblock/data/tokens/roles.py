"""Checks that a chat template has the roles `developer` and `tool`, which many templates lack.

A template that lacks a role refuses the conversation, leaves the message out, or writes it as if somebody else had said it; the
last two would train on another conversation than the user's.
"""

from __future__ import annotations

from collections.abc import Sequence

from jaxblock.data.text.messages import Message
from jaxblock.data.tokens.templates import Template
from jaxblock.errors import UserError, first_line

# What a template may not take each role for. A developer's message may be written as the system's: it is its newer name.
_OTHERS = {"developer": ("user", "assistant"), "tool": ("system", "user", "assistant")}

_ONE, _TWO = "Zq7Probe", "Kx4Other"  # two texts that no template has a special meaning for


def check_roles(template: Template, roles: Sequence[str], add_generation_prompt: bool, where: str) -> None:
    """Checks that a template writes the messages of every role of a conversation, and as those of nobody else.

    Args:
        template: The template.
        roles: The roles of the conversation's messages, in their order.
        add_generation_prompt: Whether the header of an assistant's turn follows.
        where: The place that an error names, as in "train.jsonl:17".

    Raises:
        UserError: If the template lacks a role; the message names both.
    """
    messages: list[Message] = [{"role": role, "content": _ONE} for role in roles]
    checked = [role for role in _OTHERS if role in roles]
    advice = "take such messages out, or set data.template to a template that has the role"
    try:
        text = template.render(messages, add_generation_prompt) if checked else ""
    except UserError as error:
        names = " or ".join(map(repr, checked))
        raise UserError(
            f"{where}: template {template.name!r} has no role {names}, or not in this place ({first_line(error)}): {advice}"
        ) from error
    for role in checked:
        lacks = f"{where}: template {template.name!r} has no role {role!r}"
        at = len(roles) - 1 - list(reversed(roles)).index(role)
        before, after = messages[:at], messages[at + 1 :]
        if text == template.render([*before, {"role": role, "content": _TWO}, *after], add_generation_prompt):
            raise UserError(f"{lacks}: it leaves its messages out; {advice}")
        for other in _OTHERS[role]:
            try:
                written = template.render([*before, {"role": other, "content": _ONE}, *after], add_generation_prompt)
            except UserError:
                continue  # it refuses the other role in this place, so that it tells them apart
            if text == written:
                raise UserError(f"{lacks}: it writes its messages as the {other}'s; {advice}")
