"""Defines ``Model``, a network with its weights: it computes logits, decodes, estimates the NELBO and saves.

It is a thin layer over pure functions; the command line uses it too.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import os
import tempfile
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import DTypeLike

from jaxblock import streaming
from jaxblock.cards.make import Export, card_text, default_name
from jaxblock.cards.use import Form
from jaxblock.config.recorded import KEY, to_block
from jaxblock.config.yaml import with_fields
from jaxblock.data.loader import pad_ids
from jaxblock.data.prompts import Ids, as_array, flush_left, split_prompts
from jaxblock.data.text.marked import MarkedText, Parts, SpannedText, parts_of
from jaxblock.data.text.messages import ASKING, Message, checked_messages
from jaxblock.data.tokens.encoding import Encoder
from jaxblock.data.tokens.spans import encode_spans, plain_encoder
from jaxblock.data.tokens.special import SpecialIds, first_stop
from jaxblock.data.tokens.tokenizer import Tokenizer
from jaxblock.diffusion import canvas as canvases
from jaxblock.diffusion import layouts, likelihood
from jaxblock.diffusion.canvas import Layout
from jaxblock.diffusion.config import CanvasConfig
from jaxblock.diffusion.decoding import decoder
from jaxblock.diffusion.decoding.config import DecodeConfig
from jaxblock.diffusion.decoding.queue import Queue, Row
from jaxblock.diffusion.decoding.rules import check_options
from jaxblock.diffusion.decoding.shapes import round_up
from jaxblock.errors import UserError, shown
from jaxblock.huggingface import peft
from jaxblock.huggingface.checks import kept_if_right, old_kept_until_right, only_exporter
from jaxblock.huggingface.companions import Trained
from jaxblock.huggingface.load import read_architecture
from jaxblock.huggingface.save import MARKER, save_checkpoint, verify_checkpoint
from jaxblock.inference import DeviceDecoder, decode_many
from jaxblock.infilling import Infilled, check_span_room, infilled
from jaxblock.io import hub_upload
from jaxblock.io.hub import local_checkpoint
from jaxblock.io.paths import PathLike, as_path
from jaxblock.io.remote import local_folder
from jaxblock.models.architecture import Architecture
from jaxblock.models.linear import lora
from jaxblock.models.transformer import Transformer
from jaxblock.parallel import processes, rules
from jaxblock.parallel.rows import mesh_of, run_on_mesh_of, spans_processes, split_filled_rows
from jaxblock.training.base_identity import weights_fingerprint
from jaxblock.training.checkpoints import run_folder
from jaxblock.training.stored_text import record_text, template_for_others
from jaxblock.types import Params


def _unchanged(params: Params) -> Params:
    """Returns the parameters; compiled, it gathers them."""
    return params


def _nelbo_per_row(
    net: Transformer, layout: Layout, samples: int, params: Params, key: Array, *rows: Array
) -> tuple[Array, Array]:
    """Returns the NELBO of each row (``canvas.from_rows``), and its standard error over the masks drawn."""
    canvas = canvases.from_rows(layout, *rows)
    return likelihood.per_row(likelihood.nelbo(net, layout, samples, params, canvas, key))


def _checked_prompt(prompt: str | Sequence[Message], where: str) -> str | list[Message]:
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
class Model:
    """Holds a network with its weights, tokenizer and default settings.

    Attributes:
        net: the network.
        params: the network's weights, with its adapters where it has any.
        canvas: the sizes of the canvas, which a call may override.
        stop_ids: the tokens that end a response.
        decode_defaults: the decoder's options, which a call may override.
        tokenizer: the tokenizer; None where the folder has none.
        encoder: the tokenizer with its chat template; None where the folder lacks one of them.
        origin: the folder that the model was loaded from; None where it was not loaded.
        base: the folder of the frozen weights that adapters belong to; None without adapters.
        step: the step of the run's checkpoint that the weights are of; None where they are from no run.
        recorded: whether canvas, decoder's options and encoder are those that the network was trained for; a saved copy then
            records them.
    """

    net: Transformer
    params: Params
    canvas: CanvasConfig
    stop_ids: tuple[int, ...]
    decode_defaults: DecodeConfig = DecodeConfig()
    tokenizer: Tokenizer | None = None
    encoder: Encoder | None = None
    origin: str | None = None
    base: str | None = None
    recorded: bool = False
    step: int | None = None

    def __repr__(self) -> str:
        """Returns three lines: the network and its weights, the canvas and how it decodes, and where it is from."""
        leaves = jax.tree.leaves(self._weights())
        count, kinds = sum(leaf.size for leaf in leaves), sorted({str(leaf.dtype) for leaf in leaves})
        arch, decode = self.arch, self.decode_defaults
        adapters = f", LoRA of rank {self.net.lora.rank}" if self.net.lora else ""
        text = "text and ids" if self.encoder else "ids only: there is no tokenizer with a chat template"
        return "\n".join([
            f"Model({arch.family}, {count:,} weights in {' and '.join(kinds)}, {arch.n_layers} layers, width {arch.d_model}, "
            f"vocabulary {arch.vocab_size:,}{adapters}",
            f"  canvas {self.canvas.prompt_len} + {self.canvas.response_len}, blocks of {self.canvas.block}, rule {decode.rule}; "
            f"takes {text}",
            f"  from {self.origin or 'memory'}{f' on {self.base}' if self.base else ''})",
        ])  # fmt: skip

    @property
    def arch(self) -> Architecture:
        """The network's sizes and special ids."""
        return self.net.arch

    def logits(self, ids: Ids, attention_mask: Ids | None = None) -> np.ndarray:
        """Computes the logits of every position, as the network gives them, before any shift.

        Args:
            ids: the tokens [B, T].
            attention_mask: 1 for real tokens, 0 for padding [B, T]; None where all are real. The logits of padding are 0.

        Returns:
            The logits, float32 [B, T, V].

        Raises:
            UserError: rows have different lengths, or an id is outside the vocabulary.
        """
        whole = as_array(ids)
        if whole.size and (whole.min() < 0 or whole.max() >= self.arch.vocab_size):
            raise UserError(f"ids hold one outside the vocabulary of {self.arch.vocab_size}")
        rows, lengths, back = flush_left(whole, attention_mask)
        positions = np.broadcast_to(np.arange(rows.shape[1], dtype=np.int32), rows.shape)
        parts = split_filled_rows(self.params, (rows, positions, lengths))
        out = np.asarray(self._run(Transformer.all_logits, (self.net,), self.params, *parts))
        result = np.zeros((*whole.shape, out.shape[-1]), out.dtype)
        for row, (source, length) in enumerate(zip(back, lengths, strict=True)):
            result[row, source] = out[row, :length]
        return result

    def layout(self, options: DecodeConfig, *, infill: bool = False) -> Layout:
        """Returns the layout of the decoder's canvas for these options; with ``infill`` that of texts whose spans are filled."""
        make = layouts.infilling_layout if infill else layouts.decoding_layout
        return make(self.canvas, options, self.arch, self.stop_ids)

    @functools.cached_property
    def plain_encoder(self) -> Encoder:
        """The encoder of texts that no chat template is applied to.

        Raises:
            UserError: there is no tokenizer, or the checkpoint has no mask token.
        """
        mask, eos = self.arch.need_mask_id(), self.arch.eos_id
        return plain_encoder(self._need_tokenizer(), SpecialIds(mask, eos, eos, eos, self.stop_ids))

    def _need_tokenizer(self) -> Tokenizer:
        """Returns the tokenizer; raises UserError where there is none."""
        if self.tokenizer is None:
            raise UserError(f"{self.origin or 'this model'} has no tokenizer, so tokens cannot become text: use decode")
        return self.tokenizer

    def options(self, **fields: Any) -> DecodeConfig:
        """Returns the decoder's options: the model's defaults, with these fields of ``DecodeConfig`` replaced.

        Raises:
            UserError: the decoder has no such field, or a field cannot take its value.
        """
        chosen = with_fields(self.decode_defaults, fields, "decode")
        check_options(chosen)
        return chosen

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
        ids = self.encoder.prompt(_checked_prompt(prompt, where), where=where)
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
            UserError: a prompt is empty, holds the mask token, or does not fit the model.
        """
        chosen = self.options(**options)
        layout = self.layout(chosen)
        rows = list(self._rows(chosen, self.prompts(prompt_ids, attention_mask, layout), first_index))
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
        self._check_candidates(candidates)
        return streaming.trace(self._blocks(prompt_ids, index, self.options(**options), candidates))

    def _check_candidates(self, candidates: int) -> None:
        """Raises UserError where so many most probable tokens cannot be returned."""
        if not 1 <= candidates <= self.arch.vocab_size:
            raise UserError(f"candidates is {candidates}: it must be from 1 to {self.arch.vocab_size}")

    def _blocks(
        self, prompt_ids: Sequence[int], index: int, options: DecodeConfig, candidates: int = 0
    ) -> streaming.Blocks:
        """Returns what decodes one checked prompt block by block."""
        layout = self.layout(options)
        (prompt,) = self.prompts([prompt_ids], None, layout)
        usual = self.canvas.prompt_len
        return streaming.Blocks(self.net, layout, options, self.params, prompt, index, usual, candidates)

    def _span_blocks(
        self, text: SpannedText, index: int, options: Mapping[str, Any], candidates: int = 0
    ) -> streaming.Blocks:
        """Returns what fills one checked text block by block."""
        chosen = self._infill_options(options)
        layout = self.layout(chosen, infill=True)
        self.check_spans(text, "the text", layout)
        prompt, rest = np.split(np.array(text.ids, np.int32), [text.first])
        usual = self.canvas.prompt_len
        return streaming.Blocks(self.net, layout, chosen, self.params, prompt, index, usual, candidates, rest)

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
            UserError: there is no tokenizer, or no chat template for a prompt; a text holds a special token; or the prompt is longer
                than those that the network was trained on.
        """
        if text.prompt is not None:
            if self.encoder is None:
                raise UserError(
                    f"{where}: {self.origin or 'this model'} has no chat template for the prompt: leave it out"
                )
            text = text._replace(prompt=_checked_prompt(text.prompt, where))
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
        self._check_candidates(candidates)
        return streaming.trace(self._span_blocks(text, index, options, candidates))

    def _infill_options(self, options: Mapping[str, Any]) -> DecodeConfig:
        """Returns the decoder's options for infilling: no stop token ends a text whose end is given."""
        return dataclasses.replace(self.options(**options), early_stop=False)

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

    def text_ids(self, response: np.ndarray, **options: Any) -> list[int]:
        """Returns the tokens of a response up to its first stop token; ``options`` as for ``decode``."""
        ids: list[int] = np.asarray(response).tolist()
        return ids[: first_stop(ids, self.layout(self.options(**options)).stop_ids)]

    def prompts(self, prompt_ids: Ids, attention_mask: Ids | None, layout: Layout) -> list[np.ndarray]:
        """Splits a batch into its prompts.

        Args:
            prompt_ids: the prompts, as ``decode`` takes them.
            attention_mask: 1 for real tokens, 0 for padding; None where all are real.
            layout: the layout of the decoder's canvas.

        Raises:
            UserError: there are no prompts, or ``check_prompt`` refuses one.
        """
        prompts = split_prompts(prompt_ids, attention_mask)
        if not prompts:
            raise UserError("no prompts: give at least one")
        for at, prompt in enumerate(prompts):
            self.check_prompt(prompt, f"prompt {at}", layout)
        return prompts

    def check_prompt(self, prompt: Sequence[int] | np.ndarray, name: str, layout: Layout) -> None:
        """Raises UserError where a prompt is empty, holds an id that no prompt may hold, or is too long.

        Args:
            prompt: the prompt's ids.
            name: the prompt's name in the message.
            layout: the layout of the decoder's canvas.
        """
        ids, arch = np.asarray(prompt), self.arch
        if not ids.size:
            raise UserError(f"{name} is empty: it needs at least one token")
        if (ids == layout.mask_id).any():
            raise UserError(f"{name} holds the mask token {layout.mask_id}: take it out")
        if ids.min() < 0 or ids.max() >= arch.vocab_size:
            raise UserError(f"{name} holds an id outside the vocabulary of {arch.vocab_size}")
        if ids.size + layout.response_len > arch.max_len:
            raise UserError(
                f"{name} has {ids.size} tokens; with {layout.response_len} for the response it is longer than the "
                f"model's {arch.max_len}"
            )

    def nelbo(
        self,
        prompt_ids: Sequence[Sequence[int]],
        response_ids: Sequence[Sequence[int]],
        *,
        response_len: int | None = None,
        block: int | None = None,
        samples: int | None = None,
        seed: int = 0,
    ) -> tuple[np.ndarray, np.ndarray]:
        """Computes upper bounds on the responses' negative log-likelihoods, in nats.

        Args:
            prompt_ids: the prompts, one list of ids per row.
            response_ids: the responses, one list of ids per row, the terminator included.
            response_len: R, the response positions of the canvas; None for the model's own.
            block: B, the positions of a block; None for the model's own.
            samples: the number of masked sets drawn per block, stratified by the number of masks; None for B. With 2^B - 1 or
                more, which is the number of all masked sets, every set is enumerated and the result is exact.
            seed: the seed of the masks.

        Returns:
            (the NELBO [B], its standard error over the drawn masks [B], which is 0 where the result is exact).

        Raises:
            UserError: a response does not fit, or a row holds the mask token.
        """
        layout = self.layout(self.options(response_len=response_len, block=block))
        if samples is not None and samples < 1:
            raise UserError(f"samples is {samples}: it must be at least 1")
        if len(prompt_ids) != len(response_ids):
            raise UserError(f"{len(prompt_ids)} prompts, but {len(response_ids)} responses: one of each per row")
        prompts = self.prompts(prompt_ids, None, layout)
        answers = [as_array(response, f"row {at}: the response's ids") for at, response in enumerate(response_ids)]
        # Few widths, so that few programs are compiled.
        rows, lengths = pad_ids(prompts, round_up(max(self.canvas.prompt_len, *map(len, prompts)), 16))
        for at, response in enumerate(answers):
            if not 1 <= len(response) <= layout.response_len:
                raise UserError(
                    f"row {at}: a response of {len(response)} tokens; response_len is {layout.response_len}"
                )
            if layout.mask_id in response:
                raise UserError(f"row {at}: the response holds the mask token {layout.mask_id}")
            if response.min() < 0 or response.max() >= self.arch.vocab_size:
                raise UserError(f"row {at}: the response holds an id outside the vocabulary of {self.arch.vocab_size}")
        responses, text = pad_ids(answers, layout.response_len)
        index = np.arange(len(rows), dtype=np.int32)
        parts = split_filled_rows(self.params, (rows, lengths, responses, text, index))
        static = (self.net, layout, samples or layout.block)
        value, error = jax.device_get(self._run(_nelbo_per_row, static, self.params, jax.random.key(seed), *parts))
        return value[: len(rows)], error[: len(rows)]

    def save(
        self,
        folder: PathLike,
        dtype: DTypeLike | None = None,
        *,
        overwrite: bool = False,
        name: str | None = None,
        scores: Sequence[PathLike] = (),
    ) -> float:
        """Writes a Hugging Face folder, reads it back and compares logits; adapters are merged into their base.

        Args:
            folder: the folder to make.
            dtype: the type of the tensors; None keeps each tensor's own.
            overwrite: whether an existing export is replaced, once the new one is whole and right.
            name: the name that the model card gives to the model, such as that of its repository on the hub; None for the folder's.
            scores: the folders of evaluations whose scores the model card has; with none, those beside the run are looked for.

        Returns:
            The largest difference between any logit before saving and after (0 where the type is kept).

        Raises:
            UserError: the base is int8, the folder exists, cannot be written or is written by another process, an evaluation
                is of other weights, or the logits differ; nothing is left then.
        """
        merged = self.merged()
        card = self._card(folder, "merged", merged.params, name, scores, dtype)
        together = spans_processes(merged.params)
        with self._place(folder, MARKER, overwrite=overwrite, together=together) as place:
            save_checkpoint(place, self.arch, merged.params, **self._companions(), card=card, dtype=dtype)
            with kept_if_right(place, MARKER, together=together):
                return verify_checkpoint(place, merged.net, merged.params, self._probe())

    def save_adapter(
        self,
        folder: PathLike,
        *,
        overwrite: bool = False,
        name: str | None = None,
        scores: Sequence[PathLike] = (),
    ) -> float:
        """Writes only the adapters, in PEFT's format, reads them back and compares logits.

        Args:
            folder: the folder to make.
            overwrite: whether an existing export of adapters is replaced, once the new one is whole and right.
            name: the name that the model card gives to the model; None for the folder's.
            scores: the folders of evaluations whose scores the model card has; with none, those beside the run are looked for.

        Returns:
            The largest difference of any logit: 0.

        Raises:
            UserError: there are no adapters, the folder exists or cannot be written, or the base's vocabulary was extended,
                which PEFT's format cannot store.
        """
        if self.net.lora is None:
            raise UserError(f"{self.origin} holds no adapters: save it whole")
        adapters, base = self.params[lora.KEY], self.base
        card = self._card(folder, "adapter", adapters, name, scores)
        if base is not None and run_folder.is_run(base):
            base = None  # PEFT cannot load a run: the user must export the base and name that export
        elif base is not None:
            peft.check_base_rows(folder, self.arch, read_architecture(local_checkpoint(base)))
        together = spans_processes(adapters)
        if together:
            adapters = jax.device_get(self._run(_unchanged, (), adapters))
        with self._place(folder, peft.CONFIG, overwrite=overwrite, together=together) as place:
            if not together or jax.process_index() == 0:
                kept = {name: value for name, value in self._companions().items() if name != "origin"}
                peft.save_adapter(place, self.arch, self.net.lora, adapters, base=base, card=card, **kept)
            if together:
                processes.wait(f"{folder} is written")
            with kept_if_right(place, peft.CONFIG, together=together):
                return self._verify_adapter(place)

    def push_to_hub(
        self,
        repository: str,
        *,
        private: bool = True,
        adapter: bool = False,
        dtype: DTypeLike | None = None,
        overwrite: bool = False,
        scores: Sequence[PathLike] = (),
    ) -> str:
        """Exports to a temporary folder, reads that back, and uploads it to the Hugging Face hub.

        Where an upload was interrupted, the same call goes on: what has arrived is not sent again.

        Args:
            repository: the name on the hub, ``org/name``; the repository is made where it does not exist.
            private: whether it is made as a private one; a public one is refused then.
            adapter: whether the adapters alone are exported, in PEFT's format, and not the whole network.
            dtype: the type of the whole network's tensors; None keeps each tensor's own.
            overwrite: whether an earlier export in the repository is replaced.
            scores: the folders of evaluations whose scores the model card has; with none, those beside the run are looked for.

        Returns:
            The address of the repository's page.

        Raises:
            UserError: as ``save`` and ``save_adapter``; or the name is no ``org/name``, there is no token or no network, or the
                repository holds other files.
        """
        if adapter and dtype is not None:
            raise UserError("adapters alone keep float32: leave out dtype")
        if spans_processes(self.params):
            raise UserError(
                "several processes hold the weights: save them to a shared folder, and push that by `jaxblock export`"
            )
        hub_upload.find_repository(repository, private=private, overwrite=overwrite)
        with tempfile.TemporaryDirectory(prefix="jaxblock-") as place:
            folder = os.path.join(place, "export")
            if adapter:
                self.save_adapter(folder, name=repository, scores=scores)
            else:
                self.save(folder, dtype, name=repository, scores=scores)
            return hub_upload.push_folder(folder, repository, private=private, overwrite=overwrite, say=warnings.warn)

    def weights_fingerprint(self) -> str | None:
        """Returns a hash by which an evaluation of these weights is known again; None where they cannot be told from others."""
        if self.origin is None or self.origin == self.base:  # the latter: adapters without a tokenizer beside them
            return None
        return weights_fingerprint(self.origin, self.step)

    def _card(
        self,
        folder: PathLike,
        form: Form,
        params: Params,
        name: str | None,
        scores: Sequence[PathLike],
        dtype: DTypeLike | None = None,
    ) -> str:
        """Returns the text of the model card of an export of these parameters."""
        leaves = jax.tree.leaves(params)
        kinds = {str(leaf.dtype) for leaf in leaves} if dtype is None else {str(jnp.dtype(dtype))}
        export = Export(
            name=name or default_name(folder),
            form=form,
            arch=self.arch,
            numbers=sum(leaf.size for leaf in leaves),
            dtype=" and ".join(sorted(kinds)),
            origin=self.origin,
            step=self.step,
            base=self.base,
            weights=self.weights_fingerprint(),
            tokenizer=None if self.tokenizer is None else self.tokenizer.main_file()[0],
        )
        return card_text(export, scores)

    @contextlib.contextmanager
    def _place(self, folder: PathLike, marker: str, *, overwrite: bool, together: bool) -> Iterator[PathLike]:
        """Locks the folder of an export and yields where to write it; refuses to replace what this model was loaded from."""
        own = {os.path.realpath(path) for path in (self.origin, self.base) if path is not None}
        if overwrite and os.path.realpath(folder) in own:
            raise UserError(f"{folder} is what the model was loaded from, so it is not replaced: choose another path")
        with (
            only_exporter(folder, together=together),
            old_kept_until_right(folder, marker, overwrite=overwrite, together=together) as place,
        ):
            yield place

    def _verify_adapter(self, folder: PathLike) -> float:
        """Reads saved adapters back and returns the largest difference of any logit; raises UserError unless it is 0."""
        mesh = mesh_of(self.params)
        place = None if mesh is None else functools.partial(rules.param_shardings, mesh)
        found, again = peft.load_adapter(local_folder(folder, ["*.json", "*.safetensors"]), self.arch, place)
        copy = dataclasses.replace(
            self, net=dataclasses.replace(self.net, lora=found), params=lora.attach(self._weights(), again)
        )
        ids = np.asarray(self._probe())
        difference = float(np.abs(copy.logits(ids) - self.logits(ids)).max())
        if not difference == 0:
            raise UserError(
                f"{folder}: logits of the saved adapters differ by {difference:.3g} (NaN: the weights hold one)"
            )
        return difference

    def merged(self) -> Model:
        """Returns the same model with its adapters merged into its weights; the model itself where there are none.

        Raises:
            UserError: the weights are int8.
        """
        if self.net.quantize == "int8":
            raise UserError(
                f"{self.origin} was loaded with int8 weights, which cannot be exported: load it with quantize none"
            )
        if self.net.lora is None:
            return self
        params = lora.merge(self.params, self.net.lora)
        return dataclasses.replace(self, net=dataclasses.replace(self.net, lora=None), params=params, base=None)

    def _run(self, function: Callable[..., Any], static: tuple[Any, ...], *arguments: Any) -> Any:
        """Runs a function, compiled, on the devices that hold the weights (``parallel.rows.run_on_mesh_of``)."""
        return run_on_mesh_of(self.params, function, static, *arguments)

    def _weights(self) -> Params:
        """Returns the weights without the adapters."""
        return {name: leaf for name, leaf in self.params.items() if name != lora.KEY}

    def _companions(self) -> dict[str, Any]:
        """Returns what is saved beside the weights: the folders of the tokenizer and of the original checkpoint, whose files
        are copied, and what the network was trained for."""
        trained = None
        if self.recorded and self.encoder is not None:
            block = to_block(record_text(self.canvas, self.decode_defaults, self.encoder))
            trained = Trained(self.stop_ids, template_for_others(self.encoder), {KEY: block})
        if self.origin is None or not run_folder.is_run(self.origin):
            return {"tokenizer": self.origin, "origin": self.base, "trained": trained}
        kept = as_path(self.origin) / run_folder.ORIGIN
        tokenizer = str(as_path(self.origin) / run_folder.TOKENIZER)
        return {"tokenizer": tokenizer, "origin": str(kept) if kept.exists() else None, "trained": trained}

    def _probe(self) -> Array:
        """Returns random tokens [2, T] to compare logits on."""
        width = min(64, self.arch.max_len)
        return jnp.asarray(np.random.default_rng(0).integers(0, self.arch.vocab_size, (2, width), dtype=np.int32))
