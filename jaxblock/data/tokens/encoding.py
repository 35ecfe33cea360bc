"""Conversations -> ids of prompt and response, with the boundary between the two checked in tokens."""

from __future__ import annotations

import re
from collections.abc import Sequence

from jaxblock.data.config import DataConfig
from jaxblock.data.text.sources import Example, wrapped
from jaxblock.data.tokens.special import SpecialIds, first_stop
from jaxblock.data.tokens.templates import Message, Template
from jaxblock.data.tokens.tokenizers import Tokenizer
from jaxblock.errors import UserError


class Encoder:
    """Tokenizer, template and special ids put together: the one way from text to ids, in training and decoding."""

    def __init__(self, tokenizer: Tokenizer, template: Template, special: SpecialIds, config: DataConfig) -> None:
        self.tokenizer, self.template, self.special = tokenizer, template, special
        self._config = config
        # A named unused token need not be marked as special in the tokenizer's files.
        named = {tokenizer.piece(i) for i in (special.mask, special.eos, special.eot) if i < tokenizer.vocab_size}
        forbidden = tokenizer.special_texts | named
        self._forbidden = re.compile("|".join(map(re.escape, sorted(forbidden, key=len, reverse=True))))

    def prompt(self, prompt: str | Sequence[Message], *, where: str = "the prompt") -> list[int]:
        """Ids of a prompt up to where the response begins.

        Args:
            prompt: A user's text, which is put into `data.prompt_template` as that of a record is; or a conversation that
                ends with a user's turn, which is taken as it stands.
            where: What to name in an error.

        Raises:
            UserError: If the text holds a special token, or the template fails on it.
        """
        if isinstance(prompt, str):
            prompt = [{"role": "user", "content": wrapped(prompt, self._config)}]
        text = self.template.render(self._checked(prompt, where), True, where=where)
        ids = self.tokenizer.encode(text)
        if self.special.mask in ids:
            raise UserError(
                f"{where}: the prompt's tokens contain the mask token; take it out of the text or the template"
            )
        return ids

    def text(self, example: Example) -> str:
        """The whole conversation as text (what a tokenizer is trained on)."""
        return self.template.render(self._checked(example.messages, example.where), False, where=example.where)

    def pair(self, example: Example) -> tuple[list[int], list[int]]:
        """Ids of an example's prompt and of its response, the terminator included.

        What a template writes after the terminator (a newline, or LLaDA's next assistant header) is dropped.

        Raises:
            UserError: If the text holds a special token, the prompt's ids are not a prefix of the whole's, or the
                template loses the response or does not end it.
        """
        where = example.where
        prompt_ids = self.prompt(example.messages[:-1], where=where)
        ids = self.tokenizer.encode(self.text(example))
        self._check_prefix(prompt_ids, ids, where)
        rest = ids[len(prompt_ids) :]
        end = first_stop(rest, self.special.stop_ids)
        if end is None:
            raise UserError(
                f"{where}: template {self.template.name!r} does not end the response; end an assistant's turn with "
                f"{{{{ eot_token }}}} "
                f"({self.tokenizer.piece(self.special.eot)}){self._unknown()}"
            )
        response_ids, surplus = rest[: end + 1], rest[end + 1 :]
        if end == 0:
            raise UserError(f"{where}: template {self.template.name!r} leaves nothing of the response")
        if self.special.mask in response_ids:
            raise UserError(
                f"{where}: the response's tokens contain the mask token; take it out of the text or the template"
            )
        if (
            surplus
            and surplus != prompt_ids[-len(surplus) :]
            and self.tokenizer.decode(surplus, skip_special=True).strip()
        ):
            raise UserError(
                f"{where}: template {self.template.name!r} writes more after the response's end: "
                f"{self.tokenizer.decode(surplus, skip_special=False)!r}"
            )
        return prompt_ids, response_ids

    def _unknown(self) -> str:
        """What a template written for another tokenizer (an Instruct model's, used with the Base model's) fails by."""
        unknown = [text for text in self.template.control_tokens() if self.tokenizer.id_of(text) is None]
        return (
            f". The template writes {', '.join(unknown)}, which the tokenizer does not have as tokens"
            if unknown
            else ""
        )

    def _checked(self, messages: Sequence[Message], where: str) -> list[Message]:
        for message in messages:
            found = self._forbidden.search(message["content"])
            if found:
                raise UserError(
                    f"{where}: the {message['role']}'s text contains the special token {found[0]!r} at character "
                    f"{found.start()}; "
                    "take it out, or the model would be shown it as a control token"
                )
        if self._config.system is not None and messages[0]["role"] != "system":
            messages = [{"role": "system", "content": self._config.system}, *messages]
        return list(messages)

    def _check_prefix(self, prompt_ids: list[int], ids: list[int], where: str) -> None:
        if ids[: len(prompt_ids)] == prompt_ids:
            return
        place = next(
            (i for i, (a, b) in enumerate(zip(prompt_ids, ids, strict=False)) if a != b), min(len(prompt_ids), len(ids))
        )
        alone, whole = (self._show(some, place) for some in (prompt_ids, ids))
        raise UserError(
            f"{where}: template {self.template.name!r} changes the prompt's tokens: token {place} is {alone} in the "
            f"prompt alone and {whole} "
            "once the response follows. Let the prompt end with a special token or a newline, and render it the "
            "same both times"
        )

    def _show(self, ids: list[int], place: int) -> str:
        return f"{self.tokenizer.piece(ids[place])!r} (id {ids[place]})" if place < len(ids) else "absent"
