"""Fills marked spans inside texts, with what is given visible on both sides."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, cast

import numpy as np

from jaxblock import streaming
from jaxblock.data.text.marked import MarkedText, Parts, SpannedText, parts_of
from jaxblock.data.text.messages import Message
from jaxblock.data.tokens.encoding import Encoder
from jaxblock.data.tokens.spans import encode_spans, plain_encoder
from jaxblock.data.tokens.special import SpecialIds
from jaxblock.diffusion.canvas import Layout
from jaxblock.diffusion.decoding.config import DecodeConfig
from jaxblock.diffusion.decoding.queue import Queue
from jaxblock.errors import UserError, shown
from jaxblock.inference import DeviceDecoder
from jaxblock.model.answering import Answering, checked_prompt
from jaxblock.model.infilled import Infilled, check_span_room, infilled


@dataclasses.dataclass(frozen=True, repr=False)
class Filling(Answering):
    """Adds the filling of spans to a network that answers: ``infill`` and what it is made of."""

    @functools.cached_property
    def plain_encoder(self) -> Encoder:
        """The encoder of texts that no chat template is applied to.

        Raises:
            UserError: there is no tokenizer, or the checkpoint has no mask token.
        """
        mask, eos = self.arch.need_mask_id(), self.arch.eos_id
        return plain_encoder(self._need_tokenizer(), SpecialIds(mask, eos, eos, eos, self.stop_ids))

    def infill(
        self,
        text: str | Parts | Sequence[str | Parts],
        prompt: str | Sequence[Message] | Sequence[str | Sequence[Message] | None] | None = None,
        *,
        return_steps: bool = False,
        **options: Any,
    ) -> Infilled | list[Infilled]:
        """Fills the marked spans of a text, or of each of a list of texts; the network sees what is given on both sides.

        Args:
            text: a text with markers, as in "one [[8]] three", where [[8]] is a span of 8 tokens; or its pieces,
                ["one ", 8, " three"]; or a list of texts.
            prompt: the user's text, or the conversation, that the text is the answer to, in the chat template; for a list of texts a
                list of them. None for a text that stands alone, which is taken as it is.
            return_steps: whether to return the text after every step (``Infilled.canvases``).
            **options: fields of ``DecodeConfig``, by name. ``early_stop`` has no effect, since the end is given.

        Raises:
            UserError: a text has no span or does not fit the canvas, or ``text_prompt`` refuses a prompt.
        """
        one = not isinstance(text, list | tuple) or any(isinstance(part, int) for part in text)
        texts = cast("list[str | Parts]", [text] if one else list(text))
        prompts: list[Any] = [prompt] if one or prompt is None else list(prompt)
        prompts = prompts * len(texts) if prompt is None else prompts
        if len(prompts) != len(texts) or isinstance(prompt, str) and not one:
            raise UserError(f"{len(texts)} texts need as many prompts, or None")
        spanned = []
        for at, (each, asked) in enumerate(zip(texts, prompts, strict=True)):
            where = "the text" if one else f"text {at}"
            spanned.append(self.spanned_text(MarkedText(parts_of(each, where), asked), where))
        found = list(self.fillings(spanned, return_steps=return_steps, **options))
        return found[0] if one else found

    def spanned_text(self, text: MarkedText, where: str) -> SpannedText:
        """Returns the ids of a text with spans.

        Args:
            text: the text's pieces, and what it answers.
            where: the text's name in messages.

        Raises:
            UserError: there is no tokenizer, or no chat template for a prompt; a text holds a special token; its spans are longer
                than what the model takes; or the prompt is longer than those that the network was trained on.
        """
        total = sum(part for part in text.parts if isinstance(part, int))
        if total > self.arch.max_len:  # told before so many masks are made
            raise UserError(
                f"{where} has spans of {shown(total)} tokens, more than the model's {self.arch.max_len}: shorten them"
            )
        if text.prompt is not None:
            if self.encoder is None:
                raise UserError(
                    f"{where}: {self.origin or 'this model'} has no chat template for the prompt: leave it out"
                )
            text = text._replace(prompt=checked_prompt(text.prompt, where))
        found = encode_spans(self.encoder or self.plain_encoder, self.plain_encoder, text, where)
        self._check_prompt_len(found.prompt_len, f"{where}: the prompt")
        return found

    def fillings(
        self, texts: Sequence[SpannedText], *, return_steps: bool = False, **options: Any
    ) -> Iterator[Infilled]:
        """Fills texts, ``decode.batch_size`` at a time, and yields the results in their order; arguments as for ``infill``."""
        tokenizer, chosen = self._need_tokenizer(), self._infill_options(options)
        layout = self.layout(chosen, infill=True)
        for at, text in enumerate(texts):
            self.check_spans(text, f"text {at}", layout)
        usual = self.canvas.prompt_len
        device = DeviceDecoder(self.net, layout, chosen, self.params, prompt_len=usual, rows=len(texts))
        rows = (device.row(text.ids[: text.first], at, text.ids[text.first :]) for at, text in enumerate(texts))
        for text, row in zip(texts, Queue(rows, device), strict=True):
            yield infilled(tokenizer, layout, text, row, return_steps=return_steps)

    def stream_infill(self, text: SpannedText, *, index: int = 0, **options: Any) -> Iterator[tuple[np.ndarray, int]]:
        """Fills one text block by block and yields it after every step, from its first span on.

        Args:
            text: the text.
            index: the text's index, from which its random key comes.
            **options: fields of ``DecodeConfig``, by name.

        Returns:
            An iterator of (the ids so far from the first span on, with the mask id where nothing is filled in; the forward passes
            so far).
        """
        return streaming.stream(self._span_blocks(text, index, options))

    def trace_infill(
        self, text: SpannedText, *, index: int = 0, candidates: int = 5, **options: Any
    ) -> streaming.Trace:
        """Fills one text and returns the steps with what the network believed in each, as ``trace`` does; arguments as there."""
        candidates = self._checked_candidates(candidates)
        return streaming.trace(self._span_blocks(text, index, options, candidates))

    def check_spans(self, text: SpannedText, name: str, layout: Layout) -> None:
        """Raises UserError where a text with spans does not fit the canvas, or ``check_prompt`` refuses what is before them.

        Args:
            text: the text.
            name: the text's name in the message.
            layout: the layout of the decoder's canvas.
        """
        check_span_room(text, name, layout)
        trained = self.canvas.prompt_len + layout.response_len
        if self.recorded and len(text.ids) > trained:
            raise UserError(
                f"{name} has {len(text.ids)} tokens, its prompt included; the network was trained on canvas.prompt_len "
                f"{self.canvas.prompt_len} and decodes {layout.response_len} more. Shorten it, or set canvas.prompt_len if you mean it"
            )
        if text.first:
            self.check_prompt(text.ids[: text.first], f"{name}, up to its first span,", layout)

    def _infill_options(self, options: Mapping[str, Any]) -> DecodeConfig:
        """Returns the decoder's options for infilling: no stop token ends a text whose end is given."""
        return dataclasses.replace(self.options(**options), early_stop=False)

    def _span_blocks(
        self, text: SpannedText, index: int, options: Mapping[str, Any], candidates: int = 0
    ) -> streaming.Blocks:
        """Returns what fills one checked text block by block."""
        index = self._checked_index(index, 1)
        chosen = self._infill_options(options)
        layout = self.layout(chosen, infill=True)
        self.check_spans(text, "the text", layout)
        prompt, rest = np.split(np.array(text.ids, np.int32), [text.first])
        usual = self.canvas.prompt_len
        return streaming.Blocks(self.net, layout, chosen, self.params, prompt, index, usual, candidates, rest)
