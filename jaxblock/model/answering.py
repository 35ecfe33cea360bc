"""Answers prompts: as text, as ids, block by block, and with what the network believed in each step."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, cast

import jax.numpy as jnp
import numpy as np

from jaxblock import streaming
from jaxblock.data.prompts import Ids, as_array
from jaxblock.data.text.messages import ASKING, Message, checked_messages
from jaxblock.data.tokens.special import first_stop
from jaxblock.data.tokens.tokenizer import Tokenizer
from jaxblock.diffusion.decoding import decoder
from jaxblock.diffusion.decoding.config import DecodeConfig
from jaxblock.diffusion.decoding.queue import Row
from jaxblock.errors import UserError, shown
from jaxblock.inference import decode_many
from jaxblock.model.arguments import LARGEST, whole_number
from jaxblock.model.network import Network


def checked_prompt(prompt: str | Sequence[Message], where: str) -> str | list[Message]:
    """Returns a text as it is, or the checked turns of a conversation.

    Raises:
        UserError: a conversation's messages are none, or it does not end with the user's turn.
    """
    if isinstance(prompt, str):
        return prompt
    conversation = list(prompt) if isinstance(prompt, tuple) else prompt
    messages = checked_messages(conversation, "the conversation", "message", where)
    if messages[-1]["role"] not in ASKING:
        raise UserError(f"{where}: the last message must be the user's, not the {messages[-1]['role']}'s")
    return messages


class Decoded(NamedTuple):
    """Holds the responses and all intermediate steps: the result of ``Model.decode`` with ``return_steps``.

    Attributes:
        ids: the responses [B, R].
        canvases: the responses after 0, 1, ... steps [S, B, R]; positions without a committed token hold the mask id.
        nfe: the forward passes spent on each row [B].
        positions: the canvas positions that those passes needed to compute, summed (token-forwards) [B].
    """

    ids: np.ndarray
    canvases: np.ndarray
    nfe: np.ndarray
    positions: np.ndarray


class Answer(NamedTuple):
    """Holds the response to one prompt.

    Attributes:
        text: the response's text.
        ids: its tokens, without the one that ended it.
        nfe: the forward passes that it took.
    """

    text: str
    ids: list[int]
    nfe: int


@dataclasses.dataclass(frozen=True, repr=False)
class Answering(Network):
    """Adds answers to a network: ``generate``, ``decode`` and what they are made of."""

    def _need_tokenizer(self) -> Tokenizer:
        """Returns the tokenizer; raises UserError where there is none."""
        if self.tokenizer is None:
            raise UserError(f"{self.origin or 'this model'} has no tokenizer, so tokens cannot become text: use decode")
        return self.tokenizer

    def generate(
        self, prompt: str | Sequence[Message] | Sequence[str | Sequence[Message]], **options: Any
    ) -> str | list[str]:
        """Answers a text, a conversation, or a list of texts and conversations.

        Args:
            prompt: a user's text, or a conversation ([{"role": "user", "content": "..."}]) that ends with the user's turn; or
                a list of them.
            **options: fields of ``DecodeConfig``, by name.

        Returns:
            The response's text; a list of them for a list.

        Raises:
            UserError: there is no tokenizer with a chat template, or ``text_prompt`` refuses a prompt.
        """
        if not isinstance(prompt, str | list | tuple | np.ndarray):
            raise UserError(f"generate takes a text, a conversation, or a list of them, not {shown(prompt)}")
        if isinstance(prompt, str) or (len(prompt) and isinstance(prompt[0], Mapping)):
            ids = [self.text_prompt(cast("str | Sequence[Message]", prompt), "the prompt")]
            return next(self.answers(ids, **options)).text
        several = cast("Sequence[str | Sequence[Message]]", prompt)
        ids = [self.text_prompt(one, f"prompt {at}") for at, one in enumerate(several)]
        return [answer.text for answer in self.answers(ids, **options)]

    def text_prompt(self, prompt: str | Sequence[Message], where: str) -> list[int]:
        """Returns the ids of a text or conversation, as ``prepare`` makes them.

        Args:
            prompt: a user's text, or a conversation that ends with the turn of the user or of a tool.
            where: the prompt's name in messages.

        Raises:
            UserError: there is no tokenizer with a chat template; the prompt is empty, holds a special token or is longer than
                the prompts that the network was trained on; or the conversation does not end so.
        """
        if self.encoder is None:
            raise UserError(
                f"{self.origin or 'this model'} has no tokenizer with a chat template, so text cannot become tokens; give ids "
                "to jaxblock.load(folder).decode(ids) in Python"
            )
        ids = self.encoder.prompt(checked_prompt(prompt, where), where=where)
        self._check_prompt_len(len(ids), where)
        return ids

    def _check_prompt_len(self, length: int, where: str) -> None:
        """Raises UserError where a prompt is longer than those that the network was trained on, as far as that is recorded."""
        if self.recorded and length > self.canvas.prompt_len:
            raise UserError(
                f"{where} has {length} tokens, more than canvas.prompt_len {self.canvas.prompt_len}: the network was trained "
                "on no longer prompts. Shorten it, or set canvas.prompt_len if you mean it"
            )

    def answers(self, prompt_ids: Iterable[Sequence[int] | np.ndarray], **options: Any) -> Iterator[Answer]:
        """Decodes prompts, ``decode.batch_size`` at a time, and yields the answers in their order.

        A prompt whose answer has ended gives its place in the batch to the next one.

        Args:
            prompt_ids: the prompts' ids; those of an iterator are read while others are decoded, a bounded number ahead.
            **options: fields of ``DecodeConfig``, by name.

        Raises:
            UserError: there is no tokenizer, or a prompt does not fit the model (where they are a sequence, before any is decoded).
        """
        tokenizer = self._need_tokenizer()
        chosen = self.options(**options)
        layout = self.layout(chosen)

        def checked() -> Iterator[np.ndarray]:
            for at, prompt in enumerate(prompt_ids):
                ids = as_array(prompt, f"prompt {at}")
                self.check_prompt(ids, f"prompt {at}", layout)
                yield ids

        for row in self._rows(chosen, list(checked()) if isinstance(prompt_ids, Sequence) else checked()):
            ids = self.text_ids(row.response, **options)
            yield Answer(tokenizer.decode(ids), ids, row.nfe)

    def decode(
        self,
        prompt_ids: Ids,
        attention_mask: Ids | None = None,
        *,
        return_steps: bool = False,
        first_index: int = 0,
        **options: Any,
    ) -> np.ndarray | Decoded:
        """Decodes responses block by block, those of ``decode.batch_size`` prompts at a time.

        Args:
            prompt_ids: the prompts, as a list of lists of ids or an array [B, P], which may be padded on either side.
            attention_mask: 1 for real tokens, 0 for padding [B, P]; None where all are real.
            return_steps: whether to return ``Decoded``, with the canvas after every step and the forward passes.
            first_index: the index of the first prompt; a prompt's random key comes from its index.
            **options: fields of ``DecodeConfig``, by name.

        Returns:
            The response ids [B, R], with the fill token after an early stop; or ``Decoded``.

        Raises:
            UserError: a prompt is empty, holds the mask token, or does not fit the model; or an index is out of range.
        """
        chosen = self.options(**options)
        layout = self.layout(chosen)
        prompts = self.prompts(prompt_ids, attention_mask, layout)
        first_index = self._checked_index(first_index, len(prompts))
        rows = list(self._rows(chosen, prompts, first_index))
        stacked = {name: np.stack([getattr(row, name) for row in rows]) for name in decoder.Responses._fields}
        if not return_steps:
            return stacked["response"]
        found = decoder.Responses(**{name: jnp.asarray(values) for name, values in stacked.items()})
        states = decoder.responses_by_step(layout, found, int(stacked["commit_step"].max()) + 1)
        return Decoded(stacked["response"], states, stacked["nfe"], stacked["positions"])

    def _rows(self, options: DecodeConfig, prompts: Iterable[np.ndarray], first_index: int = 0) -> Iterator[Row]:
        """Decodes checked prompts and yields their rows in order."""
        layout, usual = self.layout(options), self.canvas.prompt_len
        return decode_many(self.net, layout, options, self.params, prompts, prompt_len=usual, first_index=first_index)

    def stream(self, prompt_ids: Sequence[int], *, index: int = 0, **options: Any) -> Iterator[tuple[np.ndarray, int]]:
        """Decodes one prompt block by block and yields the response after every step; ``decode`` returns the last one.

        Args:
            prompt_ids: the prompt's ids.
            index: the prompt's index, from which its random key comes.
            **options: fields of ``DecodeConfig``, by name.

        Returns:
            An iterator of (the response so far [R], with the mask id where nothing is committed; the forward passes so far).
        """
        yield from streaming.stream(self._blocks(prompt_ids, index, self.options(**options)))

    def trace(
        self, prompt_ids: Sequence[int], *, index: int = 0, candidates: int = 5, **options: Any
    ) -> streaming.Trace:
        """Decodes one prompt as ``decode`` does, and returns the steps with what the network believed in each.

        Args:
            prompt_ids: the prompt's ids.
            index: the prompt's index, from which its random key comes.
            candidates: how many of the most probable tokens of each position are returned, at least 1.
            **options: fields of ``DecodeConfig``, by name.

        Raises:
            UserError: the prompt does not fit the model, or ``candidates`` is not from 1 to the size of the vocabulary.
        """
        candidates = self._checked_candidates(candidates)
        return streaming.trace(self._blocks(prompt_ids, index, self.options(**options), candidates))

    @staticmethod
    def _checked_index(first: int, count: int) -> int:
        """Returns the first of the indices of so many prompts; raises UserError unless all are from 0 and have 31 bits."""
        return whole_number(first, f"the index of the first of {count} prompts", 0, LARGEST + 1 - count)

    def _checked_candidates(self, candidates: int) -> int:
        """Returns how many most probable tokens are kept; raises UserError where there are not so many."""
        return whole_number(candidates, "candidates", 1, self.arch.vocab_size)

    def _blocks(
        self, prompt_ids: Sequence[int], index: int, options: DecodeConfig, candidates: int = 0
    ) -> streaming.Blocks:
        """Returns what decodes one checked prompt block by block."""
        index = self._checked_index(index, 1)
        layout = self.layout(options)
        (prompt,) = self.prompts([prompt_ids], None, layout)
        usual = self.canvas.prompt_len
        return streaming.Blocks(self.net, layout, options, self.params, prompt, index, usual, candidates)

    def text_ids(self, response: np.ndarray, **options: Any) -> list[int]:
        """Returns the tokens of a response up to its first stop token; ``options`` as for ``decode``."""
        ids: list[int] = np.asarray(response).tolist()
        return ids[: first_stop(ids, self.layout(self.options(**options)).stop_ids)]
