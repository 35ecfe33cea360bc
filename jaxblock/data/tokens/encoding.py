"""Converts conversations into the ids of a prompt and a response, and checks that the boundary between them is stable."""

from __future__ import annotations

import os
from collections.abc import Sequence

from jaxblock.data.config import DataConfig
from jaxblock.data.text.examples import Example, in_template
from jaxblock.data.text.messages import INSTRUCTIONS, Message, checked_text
from jaxblock.data.tokens.control import ControlTokens, unknown_ids
from jaxblock.data.tokens.find_special import ends_in_checkpoint, find_special
from jaxblock.data.tokens.special import SpecialIds, first_stop
from jaxblock.data.tokens.templates import Template, template_source
from jaxblock.data.tokens.tokenizer import Tokenizer
from jaxblock.errors import UserError
from jaxblock.io.files import read_bytes
from jaxblock.io.paths import PathLike, as_path


class Encoder:
    """Converts text into ids with a tokenizer, a chat template and special ids, in training and decoding alike."""

    def __init__(self, tokenizer: Tokenizer, template: Template, special: SpecialIds, config: DataConfig) -> None:
        """Keeps the parts; of the data settings only `prompt_template` and `system` are used."""
        self.tokenizer, self.template, self.special, self.config = tokenizer, template, special, config
        self._control, self._unknown_ids = ControlTokens(tokenizer, template, special), unknown_ids(tokenizer)

    def prompt(self, prompt: str | Sequence[Message], *, where: str = "the prompt") -> list[int]:
        """Returns the ids of a prompt, up to where the response begins.

        Args:
            prompt: A user's text, which is put into `data.prompt_template` as a record's prompt is; or a conversation
                that ends with the turn of a user or a tool, to which no prompt template is applied.
            where: The place that error messages name, as in "train.jsonl:17".

        Raises:
            UserError: If a text is empty or no valid text, a text holds or becomes a special token, or the template fails
                on the conversation or leaves out a message.
        """
        _, ids = self._encode(self.conversation(prompt, where=where), True, where)
        if self.special.mask in ids:
            raise UserError(
                f"{where}: the prompt's tokens contain the mask token; take it out of the text or the template"
            )
        return ids

    def conversation(self, prompt: str | Sequence[Message], *, where: str = "the prompt") -> list[Message]:
        """Returns the turns of a prompt, with `data.system` in front of them; a text is put into `data.prompt_template`.

        Raises:
            UserError: If a text is empty or no valid text.
        """
        if isinstance(prompt, str):
            prompt = [{"role": "user", "content": in_template(checked_text(prompt, "the text", where), self.config)}]
        if self.config.system is not None and prompt[0]["role"] not in INSTRUCTIONS:
            prompt = [{"role": "system", "content": self.config.system}, *prompt]
        return list(prompt)

    def rendered(self, messages: Sequence[Message], *, where: str = "the prompt") -> str:
        """Returns the text of a conversation, up to where the response begins; ``tokenizer.encode`` makes it the ids of ``prompt``.

        Args:
            messages: A conversation that ends with a user's turn.
            where: The place that error messages name.

        Raises:
            UserError: As for ``prompt``.
        """
        self.prompt(messages, where=where)
        return self.template.render(self.conversation(messages, where=where), True, where=where)

    def prompt_and_response(self, example: Example) -> tuple[list[int], list[int]]:
        """Returns the ids of an example's prompt and of its response, the terminator included.

        What a template writes after the terminator (a newline, or LLaDA's next assistant header) is dropped.

        Raises:
            UserError: If the text holds a special token, the prompt's ids are not a prefix of the conversation's ids, or the
                template loses a part of the response or does not end it.
        """
        where = example.where
        prompt_ids = self.prompt(example.messages[:-1], where=where)
        text, ids = self._encode(example.messages, False, where)
        self._check_whole(example.messages[-1]["content"], text, where)
        self._check_prefix(prompt_ids, ids, where)
        rest = ids[len(prompt_ids) :]
        end = first_stop(rest, self.special.stop_ids)
        if end is None:
            raise UserError(
                f"{where}: template {self.template.name!r} does not end the response; end an assistant's turn with "
                f"{{{{ eot_token }}}} ({self.tokenizer.piece(self.special.eot)}){self._unknown()}"
            )
        response_ids, surplus = rest[: end + 1], rest[end + 1 :]
        if self.special.mask in response_ids:
            raise UserError(
                f"{where}: the response's tokens contain the mask token; take it out of the text or the template"
            )
        repeated = surplus == prompt_ids[-len(surplus) :]
        if surplus and not repeated and self.tokenizer.decode(surplus, skip_special=True).strip():
            raise UserError(
                f"{where}: template {self.template.name!r} writes more after the response's end: "
                f"{self.tokenizer.decode(surplus, skip_special=False)!r}"
            )
        return prompt_ids, response_ids

    def holds_unknown(self, ids: Sequence[int]) -> bool:
        """Tells whether some ids stand for letters that the vocabulary lacks."""
        return not self._unknown_ids.isdisjoint(ids)

    def _check_whole(self, response: str, text: str, where: str) -> None:
        """Raises UserError where a conversation's text lacks a part of the response; white space may differ."""
        if "".join(response.split()) not in "".join(text.split()):
            raise UserError(
                f"{where}: template {self.template.name!r} does not write the whole response; it leaves out or changes a part, "
                "such as the reasoning before </think>. Set data.template to a template that writes it as it is"
            )

    def _unknown(self) -> str:
        """Returns a sentence for an error: the special tokens that the template writes but the tokenizer lacks.

        It is empty where there are none. There are some if the template was made for another tokenizer.
        """
        unknown = [text for text in self.template.control_tokens() if self.tokenizer.id_of(text) is None]
        if not unknown:
            return ""
        return f". The template writes {', '.join(unknown)}, which the tokenizer does not have as tokens"

    def _encode(self, messages: Sequence[Message], add_generation_prompt: bool, where: str) -> tuple[str, list[int]]:
        """Returns a conversation, with `data.system` in front of it, as the template's text and its ids, after checking its texts."""
        messages = self.conversation(messages, where=where)
        for message in messages:
            if message["content"] or message["role"] != "system":  # `data.system` may be empty
                checked_text(message["content"], f"the {message['role']}'s text", where)
        self._control.check_texts(messages, where)
        self._control.check_template(messages, add_generation_prompt, where)
        text = self.template.render(messages, add_generation_prompt, where=where)
        try:
            ids = self.tokenizer.encode(text)
        except UserError as error:
            raise UserError(f"{where}: {error}") from error
        self._control.check_ids(ids, messages, add_generation_prompt, where)
        return text, ids

    def _check_prefix(self, prompt_ids: list[int], ids: list[int], where: str) -> None:
        if ids[: len(prompt_ids)] == prompt_ids:
            return
        place = next(
            (i for i, (a, b) in enumerate(zip(prompt_ids, ids, strict=False)) if a != b), min(len(prompt_ids), len(ids))
        )
        alone, whole = (self._show(some, place) for some in (prompt_ids, ids))
        raise UserError(
            f"{where}: template {self.template.name!r} changes the prompt's tokens: token {place} is {alone} in the "
            f"prompt alone and {whole} once the response follows. Let the prompt end with a special token or a "
            "newline, and render it the same both times"
        )

    def _show(self, ids: list[int], place: int) -> str:
        return f"{self.tokenizer.piece(ids[place])!r} (id {ids[place]})" if place < len(ids) else "absent"


def checkpoint_encoder(folder: PathLike, tokenizer: Tokenizer, mask_id: int | None, eos_id: int) -> Encoder | None:
    """Makes the encoder of a checkpoint, which has no manifest, from the tokenizer and chat template in its folder.

    Args:
        folder: The checkpoint's folder; a template.jinja in it (written by an export) is preferred to the chat template
            in the tokenizer's files.
        tokenizer: The folder's tokenizer.
        mask_id: The mask token's id in config.json; None if it has none.
        eos_id: The id of the end of the sequence in config.json.

    Returns:
        The encoder; None where there is no template or no mask token.
    """
    if mask_id is None:
        return None
    brought, own = tokenizer.settings.get("chat_template"), as_path(folder) / "template.jinja"
    source = read_bytes(own).decode("utf-8-sig") if own.exists() else brought
    if source is None:
        return None
    config = DataConfig(tokenizer=os.fspath(folder))
    name = "tokenizer" if source == brought else "template.jinja"
    source = template_source("tokenizer", tokenizer_template=source)
    ids, ends = {"mask": mask_id, "eos": eos_id}, ends_in_checkpoint(folder)
    template, special = find_special(tokenizer, name, source, config, ids, ends)
    return Encoder(tokenizer, template, special, config)
