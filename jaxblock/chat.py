"""Keeps a conversation with a model: its turns, its system message and its settings, and what of it the model is shown."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from typing import Any

from jaxblock.config.yaml import with_fields
from jaxblock.data.text.examples import in_template
from jaxblock.data.text.messages import Message
from jaxblock.data.tokens.encoding import Encoder
from jaxblock.data.tokens.special import first_stop
from jaxblock.diffusion.decoding.rules import check_options
from jaxblock.errors import UserError
from jaxblock.model import Model

_INCOMPLETE = "\ufffd"  # what a tokenizer shows of a letter whose last bytes are not there yet


class Chat:
    """Answers a user's messages one after the other, each with the turns before it.

    Attributes:
        model: the model, with the settings that the next answer is decoded with.
        system: the system message; None for what the checkpoint was trained with, if anything.
        turns: the user's messages and the answers to them that the model is shown.
    """

    def __init__(self, model: Model, tell: Callable[[str], None], system: str | None = None) -> None:
        """Begins a conversation in which nothing has been said yet.

        Args:
            model: the model; its tokenizer's chat template lays out the turns. Without one, texts are joined by line breaks.
            tell: prints a note for the user.
            system: the system message.

        Raises:
            UserError: the model has no tokenizer or no mask token, or its template takes no system message.
        """
        model.arch.need_mask_id()
        self.model, self.turns = model, list[Message]()
        self.system: str | None = None
        self._tell, self._answered = tell, 0
        if model.encoder is None:
            tell(
                f"{model.origin or 'the model'} has no chat template: your messages and its answers are given to it as plain text, "
                "each on a line of its own"
            )
        self._encoder: Encoder = model.encoder or model.plain_encoder
        if system is not None:
            self.set_system(system)

    def reset(self) -> None:
        """Forgets all turns; system message and settings stay."""
        self.turns = []

    def set_system(self, text: str | None) -> None:
        """Puts a system message before the conversation, from the next answer on; None takes it away.

        Raises:
            UserError: the message cannot be shown to the model, or is too long; the one before it stays.
        """
        before, self.system = self.system, text
        try:
            ids = self._ids([_turn("user", "?")])
            if len(ids) > self._room():
                raise UserError(
                    f"the system message takes {len(ids)} tokens, more than there is room for ({self._limit()})"
                )
        except UserError:
            self.system = before
            raise

    def set_fields(self, fields: Mapping[str, Any]) -> None:
        """Changes settings, from the next answer on.

        Args:
            fields: the new values by name, such as "decode.threshold". They are checked together, as flags are.

        Raises:
            UserError: there is no such setting in `decode` or `canvas`, or it cannot have this value; nothing is changed then.
        """
        by_section: dict[str, dict[str, Any]] = {"decode": {}, "canvas": {}}
        for name, value in fields.items():
            section, _, field = name.partition(".")
            if section not in by_section or not field:
                raise UserError(
                    f"{name[:80]!r} cannot be set here: give the name of a setting of decode or canvas, as in decode.rule"
                )
            by_section[section][field] = value
        canvas = with_fields(self.model.canvas, by_section["canvas"], "/set")
        decode = with_fields(self.model.decode_defaults, by_section["decode"], "/set")
        canvas.check()
        check_options(decode)
        changed = dataclasses.replace(self.model, canvas=canvas, decode_defaults=decode)
        changed.layout(decode)
        self.model = changed

    def answer(self, text: str) -> Generator[str, None, None]:
        """Answers a message and yields the answer in pieces, one or more for every decoded block.

        The message and its answer become turns of the conversation when the iterator ends or is closed; of an answer that was
        stopped, what there is of it.

        Args:
            text: the user's message.

        Raises:
            UserError: the message is empty, holds a special token or is too long; the conversation is then as before.
        """
        user = _turn("user", in_template(text, self._encoder.config))
        ids = self._fitting(user)
        written = ""
        try:
            for piece in self._pieces(ids):
                written += piece
                yield piece
        finally:
            self._answered += 1
            self._keep(user, written)

    def _pieces(self, ids: Sequence[int]) -> Iterator[str]:
        """Decodes an answer and yields its text in pieces."""
        model, tokenizer = self.model, self._encoder.tokenizer
        layout, written, text, seen = model.layout(model.decode_defaults), "", "", 0
        for response, _ in model.stream(ids, index=self._answered):
            tokens = response.tolist()
            committed = tokens[: first_stop(tokens, (layout.mask_id, *layout.stop_ids))]
            if len(committed) > seen:
                seen, text = len(committed), tokenizer.decode(committed)
                ready = text.rstrip(_INCOMPLETE)
                if ready.startswith(written) and ready != written:
                    yield ready[len(written) :]
                    written = ready
        if text != written:
            yield text[len(os.path.commonprefix([text, written])) :]

    def _fitting(self, user: Message) -> list[int]:
        """Returns the ids of the conversation with a new message; turns for which there is no room are left out, and named.

        Raises:
            UserError: the message alone does not fit, or cannot be shown to the model.
        """
        turns, room = self.turns, self._room()
        whole = len(ids := self._ids([*turns, user]))
        while len(ids) > room and turns:
            turns = turns[2:]
            ids = self._ids([*turns, user])
        if len(ids) > room:
            raise UserError(
                f"the message takes {len(ids)} tokens, more than there is room for ({self._limit()}): it is not answered"
            )
        if len(turns) < len(self.turns):
            dropped = (len(self.turns) - len(turns)) // 2
            self._tell(
                f"the conversation takes {whole} tokens, more than there is room for ({self._limit()}): the model is no longer "
                f"shown your oldest {'message and its answer' if dropped == 1 else f'{dropped} messages and their answers'}"
            )
        self.turns = turns
        return ids

    def _keep(self, user: Message, answer: str) -> None:
        """Adds a message and its answer to the turns, if the model can be shown them again."""
        if not answer.strip():
            self._tell("the answer is empty: the model will not be shown this message and its answer again")
            return
        turns = [*self.turns, user, _turn("assistant", answer)]
        try:
            self._ids([*turns, _turn("user", "?")])
        except UserError as error:
            self._tell(
                f"the model will not be shown this message and its answer again, because that cannot be done: {error}"
            )
            return
        self.turns = turns

    def _ids(self, turns: Sequence[Message]) -> list[int]:
        """Returns the ids of turns that end with the user's, after the system message."""
        before: list[Message] = [] if self.system is None else [_turn("system", self.system)]
        return self._encoder.prompt([*before, *turns], where="the conversation")

    def _room(self) -> int:
        """Returns the most tokens that a prompt may have."""
        model = self.model
        most = model.arch.max_len - model.layout(model.decode_defaults).response_len
        return min(most, model.canvas.prompt_len) if model.recorded else most

    def _limit(self) -> str:
        """Returns what limits a prompt, for a message."""
        room, canvas = self._room(), self.model.canvas
        if self.model.recorded and room == canvas.prompt_len:
            return f"canvas.prompt_len {room}, the longest prompt that the model was trained on"
        return f"{room} of the model's {self.model.arch.max_len} positions, beside the response"


def _turn(role: str, text: str) -> Message:
    return {"role": role, "content": text}
