"""Turns the texts of tasks into tokens: bare texts, conversations in the chat template, and prompts with what follows them."""

from __future__ import annotations

from collections.abc import Sequence

from jaxblock.data.text.examples import Message, checked_messages
from jaxblock.data.tokens.control import control_ids
from jaxblock.data.tokens.tokenizer import token_text
from jaxblock.errors import UserError
from jaxblock.model import Model


class Texts:
    """Turns the texts of tasks into tokens, and refuses what the network would take for a control token."""

    def __init__(self, model: Model, add_bos_token: bool | None = None) -> None:
        """Takes the tokenizer and the chat template of a model.

        Args:
            model: the model.
            add_bos_token: whether a bare text begins with the beginning-of-sequence token; None for what the tokenizer's settings
                say. A chat template writes the token itself.

        Raises:
            UserError: there is no tokenizer, or no such token although it is asked for.
        """
        if model.tokenizer is None:
            raise UserError(
                f"{model.origin or 'this model'} has no tokenizer, and tasks are texts: add its tokenizer files"
            )
        self._model, self._tokenizer, self._encoder = model, model.tokenizer, model.encoder
        self._control = control_ids(model.tokenizer, (model.arch.need_mask_id(), *model.stop_ids))
        written = model.encoder.template.tokens.get("bos_token") if model.encoder else None
        names = (written, token_text(model.tokenizer.settings.get("bos_token")))
        bos = next((i for name in names if name and (i := model.tokenizer.id_of(name)) is not None), None)
        if add_bos_token and bos is None:
            raise UserError(
                f"{model.origin}: the tokenizer names no beginning-of-sequence token: leave out --add_bos_token"
            )
        adds = add_bos_token or (add_bos_token is None and model.tokenizer.settings.get("add_bos_token") is True)
        self._before_text = [bos] if adds and bos is not None else []
        self.prefix = model.arch.eos_id if bos is None else bos
        """The token that stands before a text without a prompt: the beginning of a sequence, or else the end of another one."""
        self._rendered: set[str] = set()

    def render(self, messages: Sequence[Message], add_generation_prompt: bool) -> str:
        """Returns a conversation as the chat template writes it, up to where the answer begins.

        Args:
            messages: the turns of the conversation.
            add_generation_prompt: whether the answer is a new turn; else the last message is the beginning of the answer.

        Raises:
            UserError: there is no chat template, it rejects the conversation, or a text holds a special token.
        """
        if self._encoder is None:
            raise UserError(
                f"{self._model.origin or 'this model'} has no chat template: leave out --apply_chat_template, and the tasks' texts "
                "are shown as they are"
            )
        where = f"the tasks' conversation that ends with {messages[-1]['content'][-60:]!r}"
        begun = "" if add_generation_prompt else messages[-1]["content"]
        turns = list(messages if add_generation_prompt else messages[:-1])
        if all(turn["content"].strip() for turn in turns):
            checked = checked_messages(turns, "the conversation", "message", where)
            text = self._encoder.rendered(checked, where=where)
        else:  # perplexity tasks, and choices without a question, ask nothing; lm-eval renders a turn for them all the same
            for turn in turns:
                self._check(self._tokenizer.encode(turn["content"]), turn["content"], where)
            text = self._encoder.template.render(self._encoder.conversation(turns, where=where), True, where=where)
        self._check(self._tokenizer.encode(begun), begun, "the beginning of an answer")
        self._rendered.add(text + begun)
        return text + begun

    def prompt(self, text: str, where: str) -> list[int]:
        """Returns the tokens of a prompt; an empty one is the token that stands before a text.

        Raises:
            UserError: the text holds a special token (other than those that the chat template wrote), or is too long.
        """
        return self._fitting(self._whole(text, text, where), where)

    def prompt_and_choices(self, context: str, choices: Sequence[str], where: str) -> tuple[list[int], list[list[int]]]:
        """Returns the tokens of a prompt, and of the texts that may follow it.

        The tokenizer sees prompt and choice together. A token that has letters of both belongs to the choices: then the prompt
        ends before it, for all choices of the prompt alike.

        Raises:
            UserError: a choice has no token or more than R, a text holds a special token, or the prompt is too long.
        """
        whole = [self._whole(context + choice, context, where) for choice in choices]
        ids = self._whole(context, context, where)
        shared = min(_common(ids, one) for one in whole)
        most = self._model.layout(self._model.options()).response_len
        for one, choice in zip(whole, choices, strict=True):
            if len(one) == shared:
                raise UserError(
                    f"{where}: an answer to be scored has no token: {choice[:60]!r}. Correct the task's file or data"
                )
            if len(one) - shared > most:
                raise UserError(
                    f"{where}: an answer to be scored has {len(one) - shared} tokens, and the canvas has {most} response "
                    "positions: the network cannot give it. Set --decode.response_len (a multiple of the block) if you mean it"
                )
        return self._fitting(whole[0][:shared] or [self.prefix], where), [one[shared:] for one in whole]

    def text(self, text: str, where: str) -> list[int]:
        """Returns the tokens of a text without a prompt; raises UserError where it holds a special token."""
        ids = self._tokenizer.encode(text)
        self._check(ids, text, where)
        return ids

    def _whole(self, text: str, context: str, where: str) -> list[int]:
        """Returns the tokens of a text that begins with ``context``."""
        ids = self._tokenizer.encode(text)
        if context and context in self._rendered:
            self._check(ids[_common(ids, self._tokenizer.encode(context)) :], text[len(context) :], where)
            return ids
        self._check(ids, text, where)
        return [*(self._before_text if context else [self.prefix]), *ids]

    def _check(self, ids: Sequence[int], text: str, where: str) -> None:
        """Raises UserError where the tokens of a text hold a control token."""
        found = next((i for i in ids if i in self._control), None)
        if found is not None:
            raise UserError(
                f"{where}: the text holds the special token {self._tokenizer.piece(found)!r}, which the network would be shown as "
                f"a control token: {text[:60]!r}. Take it out of the task's file or data; --apply_chat_template writes such tokens"
            )

    def _fitting(self, ids: list[int], where: str) -> list[int]:
        """Returns the tokens of a prompt; raises UserError where it is longer than the network takes."""
        model = self._model
        if model.recorded and len(ids) > model.canvas.prompt_len:
            raise UserError(
                f"{where}: the prompt has {len(ids)} tokens, more than canvas.prompt_len {model.canvas.prompt_len}: the network was "
                "trained on no longer prompts. Give fewer examples (--num_fewshot), or --canvas.prompt_len if you mean it"
            )
        model.check_prompt(ids, f"{where}: the prompt", model.layout(model.options()))
        return ids


def _common(one: Sequence[int], other: Sequence[int]) -> int:
    """Returns how many tokens two lists share at their beginning."""
    return next((at for at, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))
