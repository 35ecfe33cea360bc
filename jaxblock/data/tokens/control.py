"""Makes sure that a user's text never becomes a control token, such as the end of a turn or the header of another one.

Two checks do that. The texts are searched for the control tokens' names as they are written. Then the ids of the rendered
conversation are compared with those of the same conversation with harmless texts: both must hold the same control tokens in
the same order. The second check finds what a tokenizer's normalisation (full-width letters, capitals, invisible characters)
or a template that edits texts makes of a text that looks harmless.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from jaxblock.data.text.messages import Message
from jaxblock.data.tokens.roles import check_roles
from jaxblock.data.tokens.special import SpecialIds
from jaxblock.data.tokens.templates import Template
from jaxblock.data.tokens.tokenizer import Tokenizer, token_text
from jaxblock.errors import UserError

_HARMLESS, _OTHER = "Zq7Probe", "Kx4Other"  # two texts that no tokenizer or template has a special meaning for
_UNKNOWN = ("<unk>", "[UNK]")


def control_ids(tokenizer: Tokenizer, named: Iterable[int]) -> frozenset[int]:
    """Returns the ids that no text of a user's may become: those that the tokenizer's files mark as special, and some more.

    Args:
        tokenizer: the tokenizer. Its token for unknown letters is not among the ids, since a vocabulary may lack letters.
        named: the special ids of the network, such as the mask; those outside the vocabulary are left out.
    """
    ids = {tokenizer.id_of(text) for text in tokenizer.special_texts - _unknown_texts(tokenizer)}
    return frozenset({i for i in ids if i is not None}.union(i for i in named if i < tokenizer.vocab_size))


def unknown_ids(tokenizer: Tokenizer) -> frozenset[int]:
    """Returns the ids that stand for letters which the vocabulary lacks: one, or none."""
    texts = _unknown_texts(tokenizer) & tokenizer.special_texts
    return frozenset(i for i in map(tokenizer.id_of, texts) if i is not None)


def _unknown_texts(tokenizer: Tokenizer) -> set[str]:
    own = token_text(tokenizer.settings.get("unk_token"))
    return {*_UNKNOWN, *(() if own is None else (own,))}


class ControlTokens:
    """Knows the control tokens of a tokenizer, and which of them a template writes itself."""

    def __init__(self, tokenizer: Tokenizer, template: Template, special: SpecialIds) -> None:
        """Collects the tokens that are marked as special in the tokenizer's files and those of the special ids.

        The token for unknown letters is not one: a text may hold letters that a vocabulary lacks.
        """
        self._tokenizer, self._template = tokenizer, template
        named = [i for i in (special.mask, *special.stop_ids) if i < tokenizer.vocab_size]
        texts = tokenizer.special_texts | {tokenizer.piece(i) for i in named}
        self._texts = re.compile("|".join(map(re.escape, sorted(texts, key=len, reverse=True))))
        self._ids = control_ids(tokenizer, named)
        self._of_template: dict[tuple[tuple[str, ...], bool], list[int]] = {}

    def check_texts(self, messages: Sequence[Message], where: str) -> None:
        """Checks that no message's text names a control token.

        Args:
            messages: the turns of a conversation.
            where: the place that an error names, as in "train.jsonl:17".

        Raises:
            UserError: a text does.
        """
        for message in messages:
            found = self._texts.search(message["content"])
            if found:
                raise UserError(
                    f"{where}: the {message['role']}'s text contains the special token {found[0]!r} at character "
                    f"{found.start()}; take it out, or the model would be shown it as a control token"
                )

    def check_template(self, messages: Sequence[Message], add_generation_prompt: bool, where: str) -> None:
        """Checks, once for each order of roles, that the template has the roles and shows every message's text.

        Args:
            messages: the turns of a conversation.
            add_generation_prompt: whether the header of the assistant's next turn follows.
            where: the place that an error names.

        Raises:
            UserError: it does not.
        """
        self._written_by_template([message["role"] for message in messages], add_generation_prompt, where)

    def check_ids(
        self, ids: Sequence[int], messages: Sequence[Message], add_generation_prompt: bool, where: str
    ) -> None:
        """Checks that a conversation's ids hold the control tokens that the template writes, and no others.

        Args:
            ids: the ids of the rendered conversation.
            messages: the turns of the conversation.
            add_generation_prompt: whether it was rendered with the header of the assistant's next turn.
            where: the place that an error names.

        Raises:
            UserError: a control token is there, or absent, because of a text.
        """
        expected = self._written_by_template([message["role"] for message in messages], add_generation_prompt, where)
        if self._only_control(ids) == expected:
            return
        for at, message in enumerate(messages):
            alone = [{**other, "content": _HARMLESS} if i != at else message for i, other in enumerate(messages)]
            found = self._render(alone, add_generation_prompt, where)
            if found != expected:
                raise UserError(
                    f"{where}: the {message['role']}'s text changes the control tokens: after template "
                    f"{self._template.name!r} and the tokenizer's normalisation, {_difference(found, expected, self._tokenizer)}; "
                    "take out what looks like a control token"
                )
        raise UserError(
            f"{where}: the texts together change the control tokens that template {self._template.name!r} writes: "
            f"{_difference(self._only_control(ids), expected, self._tokenizer)}"
        )

    def _written_by_template(self, roles: Sequence[str], add_generation_prompt: bool, where: str) -> list[int]:
        """Returns the control tokens of a conversation whose texts are harmless."""
        key = (tuple(roles), add_generation_prompt)
        if key not in self._of_template:
            messages: list[Message] = [{"role": role, "content": _HARMLESS} for role in roles]
            check_roles(self._template, roles, add_generation_prompt, where)
            self._check_all_is_shown(messages, add_generation_prompt, where)
            self._of_template[key] = self._render(messages, add_generation_prompt, where)
        return self._of_template[key]

    def _check_all_is_shown(self, messages: Sequence[Message], add_generation_prompt: bool, where: str) -> None:
        """Raises UserError where the template writes the same for any text of one of the messages."""
        shown = self._template.render(messages, add_generation_prompt, where=where)
        for at, message in enumerate(messages):
            other = [*messages[:at], {**message, "content": _OTHER}, *messages[at + 1 :]]
            if shown == self._template.render(other, add_generation_prompt, where=where):
                raise UserError(
                    f"{where}: template {self._template.name!r} leaves out the {message['role']}'s text (message {at + 1} of "
                    f"{len(messages)}): it writes the same for any text. Set data.template to a template that writes every "
                    "message's content, or take such messages out"
                )

    def _render(self, messages: Sequence[Message], add_generation_prompt: bool, where: str) -> list[int]:
        return self._only_control(
            self._tokenizer.encode(self._template.render(messages, add_generation_prompt, where=where))
        )

    def _only_control(self, ids: Sequence[int]) -> list[int]:
        return [i for i in ids if i in self._ids]


def _difference(found: list[int], expected: list[int], tokenizer: Tokenizer) -> str:
    """Says at which control token two lists of them part."""
    at = next((at for at, (a, b) in enumerate(zip(found, expected, strict=False)) if a != b), len(expected))
    names = [f"{tokenizer.piece(ids[at])!r}" if at < len(ids) else "none" for ids in (found, expected)]
    at = min(at, len(found))
    return f"control token {at + 1} of the conversation is {names[0]}, where the template alone writes {names[1]}"
