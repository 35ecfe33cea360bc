"""Defines ``Network``: a network with its weights and settings, which computes logits and the NELBO, and checks prompts."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax import Array

from jaxblock.config.yaml import with_fields
from jaxblock.data.loader import pad_ids
from jaxblock.data.prompts import Ids, as_array, flush_left, split_prompts
from jaxblock.data.tokens.encoding import Encoder
from jaxblock.data.tokens.tokenizer import Tokenizer
from jaxblock.diffusion import canvas as canvases
from jaxblock.diffusion import layouts, likelihood
from jaxblock.diffusion.canvas import Layout
from jaxblock.diffusion.config import CanvasConfig
from jaxblock.diffusion.decoding.config import DecodeConfig
from jaxblock.diffusion.decoding.rules import check_options
from jaxblock.diffusion.decoding.shapes import round_up
from jaxblock.errors import UserError
from jaxblock.model.arguments import whole_number
from jaxblock.models.architecture import Architecture
from jaxblock.models.linear import lora
from jaxblock.models.transformer import Transformer
from jaxblock.parallel.rows import even_size, run_on_mesh_of, split_rows
from jaxblock.training.base_identity import weights_fingerprint
from jaxblock.types import Params


def _nelbo_per_row(
    net: Transformer, layout: Layout, samples: int, params: Params, key: Array, *rows: Array
) -> tuple[Array, Array]:
    """Returns the NELBO of each row (``canvas.from_rows``), and its standard error over the masks drawn."""
    canvas = canvases.from_rows(layout, *rows)
    return likelihood.per_row(likelihood.nelbo(net, layout, samples, params, canvas, key))


@dataclasses.dataclass(frozen=True, repr=False)
class Network:
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
        """Computes the logits of every position, as the network gives them, before any shift; ``decode.batch_size`` rows at a time.

        Args:
            ids: the tokens [B, T].
            attention_mask: 1 for real tokens, 0 for padding [B, T]; None where all are real. The logits of padding are 0.

        Returns:
            The logits, float32 [B, T, V].

        Raises:
            UserError: rows have different lengths or are too long for the model, or an id is outside the vocabulary.
        """
        whole = as_array(ids)
        if whole.size and (whole.min() < 0 or whole.max() >= self.arch.vocab_size):
            raise UserError(f"ids hold one outside the vocabulary of {self.arch.vocab_size}")
        rows, lengths, back = flush_left(whole, attention_mask)
        longest = int(lengths.argmax())
        if lengths[longest] > self.arch.max_len:
            raise UserError(
                f"row {longest} has {lengths[longest]} tokens: it is longer than the model's {self.arch.max_len}"
            )
        positions = np.broadcast_to(np.arange(rows.shape[1], dtype=np.int32), rows.shape)
        out = self._run_rows(Transformer.all_logits, (self.net,), (), (rows, positions, lengths))
        result = np.zeros((*whole.shape, out.shape[-1]), out.dtype)
        for row, (source, length) in enumerate(zip(back, lengths, strict=True)):
            result[row, source] = out[row, :length]
        return result

    def layout(self, options: DecodeConfig, *, infill: bool = False) -> Layout:
        """Returns the layout of the decoder's canvas for these options; with ``infill`` that of texts whose spans are filled."""
        make = layouts.infilling_layout if infill else layouts.decoding_layout
        return make(self.canvas, options, self.arch, self.stop_ids)

    def options(self, **fields: Any) -> DecodeConfig:
        """Returns the decoder's options: the model's defaults, with these fields of ``DecodeConfig`` replaced.

        Raises:
            UserError: the decoder has no such field, or a field cannot take its value.
        """
        chosen = with_fields(self.decode_defaults, fields, "decode")
        check_options(chosen)
        return chosen

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
        """Computes upper bounds on the responses' negative log-likelihoods, in nats; ``decode.batch_size`` rows at a time.

        Args:
            prompt_ids: the prompts, one list of ids per row.
            response_ids: the responses, one list of ids per row, the terminator included.
            response_len: R, the response positions of the canvas; None for the model's own.
            block: B, the positions of a block; None for the model's own.
            samples: the number of masked sets drawn per block, stratified by the number of masks; None for B. With 2^B - 1 or
                more, which is the number of all masked sets, every set is enumerated and the result is exact.
            seed: the seed of the masks, 0 or more.

        Returns:
            (the NELBO [B], its standard error over the drawn masks [B], which is 0 where the result is exact and NaN where only one
            mask was drawn).

        Raises:
            UserError: a response does not fit, a row holds the mask token, or ``samples`` or ``seed`` is out of range.
        """
        layout = self.layout(self.options(response_len=response_len, block=block))
        samples = layout.block if samples is None else whole_number(samples, "samples", 1)
        key = jax.random.key(whole_number(seed, "seed", 0))
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
        static = (self.net, layout, samples)
        value, error = self._run_rows(_nelbo_per_row, static, (key,), (rows, lengths, responses, text, index))
        return value, error

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

    def weights_fingerprint(self) -> str | None:
        """Returns a hash by which an evaluation of these weights is known again; None where they cannot be told from others."""
        if self.origin is None or self.origin == self.base:  # the latter: adapters without a tokenizer beside them
            return None
        return weights_fingerprint(self.origin, self.step, self.base if self.step is None else None)

    def _run(self, function: Callable[..., Any], static: tuple[Any, ...], *arguments: Any) -> Any:
        """Runs a function, compiled, on the devices that hold the weights (``parallel.rows.run_on_mesh_of``)."""
        return run_on_mesh_of(self.params, function, static, *arguments)

    def _run_rows(
        self, function: Callable[..., Any], static: tuple[Any, ...], same: tuple[Any, ...], rows: Sequence[np.ndarray]
    ) -> Any:
        """Runs a function of rows on ``decode.batch_size`` of them at a time, and returns its results for all, on the host.

        Args:
            function: the function; it is called with the static arguments, the weights, the arguments that are the same for every
                batch, and the rows. Its result for a row does not depend on the others.
            static: the static arguments.
            same: the arguments that are the same for every batch.
            rows: the arrays, whose first axis is split into batches.
        """
        count = len(rows[0])
        size = even_size(self.params, min(self.decode_defaults.batch_size, count))
        found = []
        for first in range(0, count, size):
            batch = np.minimum(np.arange(first, first + size), count - 1)  # the last row fills the last batch up
            parts = split_rows(self.params, [array[batch] for array in rows])
            found.append(jax.device_get(self._run(function, static, self.params, *same, *parts)))
        return jax.tree.map(lambda *batches: np.concatenate(batches)[:count], *found)

    def _weights(self) -> Params:
        """Returns the weights without the adapters."""
        return {name: leaf for name, leaf in self.params.items() if name != lora.KEY}
