"""Decodes one prompt, or fills one text, block by block from the host, so that its steps can be shown as they come, or kept as a trace."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from jaxblock.diffusion import canvas as canvases
from jaxblock.diffusion.canvas import Canvas, Layout
from jaxblock.diffusion.decoding import decoder
from jaxblock.diffusion.decoding.beliefs import Beliefs
from jaxblock.diffusion.decoding.config import DecodeConfig
from jaxblock.diffusion.decoding.decoder import Carry
from jaxblock.diffusion.decoding.passes import Sizes
from jaxblock.diffusion.decoding.shapes import BatchShapes
from jaxblock.models.transformer import Transformer
from jaxblock.parallel.rows import even_size, run_on_mesh_of
from jaxblock.types import Params


class Blocks(NamedTuple):
    """Holds what decodes one prompt, or fills one text, block by block.

    Attributes:
        net: the network.
        layout: the layout of the decoder's canvas.
        options: the decoder's settings.
        params: the network's weights.
        prompt: the ids of the prompt, or of a text up to its first span, checked.
        row_id: the prompt's index, from which its random key comes.
        prompt_len: the usual longest prompt (``canvas.prompt_len``); a longer one takes a further program.
        candidates: how many of the most probable tokens of each position are kept; 0 for no beliefs.
        rest: the ids of a text from its first span on (the layout then says ``infill``); None for R masks.
    """

    net: Transformer
    layout: Layout
    options: DecodeConfig
    params: Params
    prompt: np.ndarray
    row_id: int
    prompt_len: int
    candidates: int = 0
    rest: np.ndarray | None = None

    @property
    def size(self) -> int:
        """The positions of the response."""
        return self.layout.response_len if self.rest is None else len(self.rest)

    def decoded(self) -> Iterator[tuple[Canvas, Carry]]:
        """Yields the canvas and the decoder's state after every block, until the response has ended."""
        layout, settings = self.layout, self.options.static(self.layout.block)
        shapes = BatchShapes(layout, settings, self.prompt_len, self.net.arch.max_len)
        room = shapes.room(len(self.prompt))  # the canvas that ``decode_many`` uses
        rest = np.full(self.size, layout.mask_id, np.int32) if self.rest is None else self.rest
        row = np.full(room + layout.response_len, layout.mask_id, np.int32)
        first, end = len(self.prompt), len(self.prompt) + self.size
        row[:end] = np.concatenate([self.prompt, rest])
        # Every process needs the canvas whole, to rebuild the steps; the devices share out copies of its row.
        copies = even_size(self.params, 1)
        parts = [np.repeat(np.array([part], np.int32), copies, axis=0) for part in (row, first, self.row_id, end)]
        canvas = run_on_mesh_of(self.params, canvases.decoding_canvas, (layout,), *parts)
        carry = decoder.start_decoding(layout, canvas, self.options.seed, self.candidates)
        masks = np.flatnonzero(rest == layout.mask_id)
        while masks.size and not bool(carry.done.all()):
            block = int(masks[0]) // layout.stride
            blocks = jnp.full_like(canvas.prompt_len, block)
            static = (self.net, layout, settings, shapes.of_block(len(self.prompt), block).sizes)
            carry = run_on_mesh_of(self.params, _decode_block, static, self.params, canvas, carry, blocks)
            yield canvas, carry
            masks = np.flatnonzero(np.asarray(carry.ids)[0, first:end] == layout.mask_id)

    def responses(self, canvas: Canvas, carry: Carry) -> decoder.Responses:
        """Returns the response so far; positions that are not decoded yet hold the fill token."""
        return run_on_mesh_of(self.params, decoder.finish, (self.layout,), canvas, carry)


def _decode_block(
    net: Transformer,
    layout: Layout,
    options: DecodeConfig,
    sizes: Sizes,
    params: Params,
    canvas: Canvas,
    carry: Carry,
    blocks: Array,
) -> Carry:
    """Decodes one block by passes of these sizes, which are static like the arguments before them."""
    return decoder.decode_block(net, layout, options, params, canvas, carry, blocks, sizes)


class Trace(NamedTuple):
    """Holds one decoded response, and what happened in which step.

    Attributes:
        response: the response's tokens [R], or those of a text from its first span on; positions that were never decoded (early
            stop) hold the fill token.
        commit_step: the step, counted from 0 over the whole response, that committed each position [R]; -1 where none did,
            ``decoder.GIVEN`` for a given token.
        nfe: the forward passes spent.
        positions: the canvas positions that those passes needed to compute, summed (token-forwards).
        steps: the decode steps taken; each took ``nfe / steps`` forward passes.
        beliefs: what the network believed of each position in the step that committed it, without the row axis: probability of the
            committed token [R], most probable tokens [R, K] and their probabilities [R, K].
    """

    response: np.ndarray
    commit_step: np.ndarray
    nfe: int
    positions: int
    steps: int
    beliefs: Beliefs


def stream(blocks: Blocks) -> Iterator[tuple[np.ndarray, int]]:
    """Yields the response after every step, with the mask id where nothing is committed, and the forward passes so far."""
    shown, passes = 0, blocks.options.passes
    for canvas, carry in blocks.decoded():
        steps = int(carry.nfe[0]) // passes
        states = decoder.responses_by_step(blocks.layout, blocks.responses(canvas, carry), steps)
        for step in range(shown + 1, steps + 1):
            yield states[step, 0, : blocks.size], step * passes
        shown = steps


def trace(blocks: Blocks) -> Trace:
    """Decodes the whole response and returns its trace; ``blocks.candidates`` is at least 1."""
    for canvas, carry in blocks.decoded():
        last = blocks.responses(canvas, carry), carry.beliefs
    found, beliefs = jax.device_get(last)  # a canvas has at least one block
    nfe = int(found.nfe[0])
    size = blocks.size
    rows = jax.tree.map(lambda leaf: np.asarray(leaf)[0, :size], beliefs)
    response, commit_step = found.response[0, :size], found.commit_step[0, :size]
    return Trace(response, commit_step, nfe, int(found.positions[0]), nfe // blocks.options.passes, rows)
