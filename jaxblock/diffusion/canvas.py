"""Builds the canvas of a batch, and the view of it that the model sees.

One function, ``view``, builds what the model sees for the trainer and for the decoder alike. Training passes "a mask where
the draw says so, else the true token" as the block's tokens; decoding passes "what is committed so far". Everything else (the
prompt, what comes after the block, how much is visible) is decided here, so training and decoding cannot differ in it.
"""

from __future__ import annotations

from typing import NamedTuple, TypeVar

import chex
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Bool, Int

from jaxblock.diffusion.config import Context
from jaxblock.settings import Alignment
from jaxblock.types import View

Numbers = TypeVar("Numbers", np.ndarray, Array)
"""A row's numbers on the host, or on the devices."""


class Layout(NamedTuple):
    """Holds the static part of a canvas: sizes and special tokens. Hashable, so a jitted function may take it as a static argument.

    Attributes:
        response_len: R, the response positions of a row; a multiple of ``block`` under ``aligned``.
        block: B, the response positions of one block (A in array shapes).
        alignment: whether the hidden state at i (``same_position``) or the one at i - 1 (``shifted``) predicts token i.
        context: ``aligned`` shows what the decoder would see, ``paper`` what the published training script shows.
        suffix_window: the positions after the active block that are visible; None for all of them.
        mask_id: the mask token.
        fill_id: the token that fills the rest of the terminator's block (the end-of-sequence token).
        stop_ids: the tokens that end a response.
        total_len: ``paper`` only: T, the canvas positions of prompt and response together; None for the sum of both.
        infill: whether the response is a text with masked spans in it, whose other tokens are given (decoding only, and
            without a ``suffix_window``): a block may then begin at any response position, and all that is given is visible.
    """

    response_len: int
    block: int
    alignment: Alignment
    context: Context
    suffix_window: int | None
    mask_id: int
    fill_id: int
    stop_ids: tuple[int, ...]
    total_len: int | None = None
    infill: bool = False

    @property
    def stride(self) -> int:
        """The response positions from the beginning of a block to the beginning of the next: 1 where it may begin anywhere."""
        return 1 if self.infill else self.block

    @property
    def n_blocks(self) -> int:
        """The number of blocks that R response positions may have (the last may be short under ``paper``)."""
        return -(-self.response_len // self.stride)


class Canvas(NamedTuple):
    """Holds the prompts and responses of a batch, aligned to the left: the prompt at 0, the response at ``prompt_len``.

    Attributes:
        ids: the tokens; those at or after ``length`` are never seen.
        prompt_len: the tokens of each prompt.
        length: the visible positions of each row, the prompt included.
        text_len: the response tokens that are text; the terminator counts, the fill does not.
        n_blocks: K_i, the blocks of each row that may be active.
        row_id: what a row's random numbers depend on: its index in the global batch, or the index of its prompt.
    """

    ids: Int[Array, "B T"]
    prompt_len: Int[Array, " B"]
    length: Int[Array, " B"]
    text_len: Int[Array, " B"]
    n_blocks: Int[Array, " B"]
    row_id: Int[Array, " B"]


def from_rows(
    layout: Layout,
    prompt_ids: Int[Array, "B P"],
    prompt_len: Int[Array, " B"],
    response_ids: Int[Array, "B R"],
    text_len: Int[Array, " B"],
    row_id: Int[Array, " B"],
) -> Canvas:
    """Makes the canvas of prompts with their responses, as training and the NELBO need it.

    Under ``aligned`` the response is filled with ``fill_id`` to the end of its last block, the positions after it
    are masks, and R response positions are visible. Under ``paper`` everything after the response is visible fill to
    the end of the canvas, as in the published script.

    Args:
        layout: the canvas's static part.
        prompt_ids: the prompts; entries at or after ``prompt_len`` are ignored.
        prompt_len: the tokens of each prompt.
        response_ids: the responses with their terminators; at most ``layout.response_len`` positions.
        text_len: the tokens of each response, at least 1.
        row_id: the index of each row in the global batch.

    Returns:
        A canvas of T = P + layout.response_len positions (or ``layout.total_len``, into which every row must fit).
    """
    chex.assert_rank([prompt_ids, response_ids], 2)
    chex.assert_shape([prompt_len, text_len, row_id], prompt_ids.shape[:1])
    chex.assert_equal_shape_prefix([prompt_ids, response_ids], 1)
    width = canvas_width(layout, prompt_ids.shape[1])
    at = jnp.arange(width, dtype=jnp.int32)[None, :]
    offset = at - prompt_len[:, None]
    n_blocks = -(-text_len // layout.block)
    prompt = jnp.pad(prompt_ids, ((0, 0), (0, max(width - prompt_ids.shape[1], 0))))[:, :width]
    response = jnp.take_along_axis(response_ids, jnp.clip(offset, 0, response_ids.shape[1] - 1), axis=1)
    if layout.context == "aligned":
        in_last_block = offset < (n_blocks * layout.block)[:, None]
        rest = jnp.where(in_last_block, layout.fill_id, layout.mask_id)
        length = prompt_len + layout.response_len
    else:
        rest = jnp.full_like(offset, layout.fill_id)
        length = jnp.full_like(prompt_len, width)
    ids = jnp.where(offset < 0, prompt, jnp.where(offset < text_len[:, None], response, rest))
    return Canvas(ids.astype(jnp.int32), prompt_len, length, text_len, n_blocks, row_id)


def for_decoding(
    layout: Layout, prompt_ids: Int[Array, "B P"], prompt_len: Int[Array, " B"], row_id: Int[Array, " B"]
) -> Canvas:
    """Makes the canvas of prompts whose responses are all masks; R of them are visible, in either context.

    Args:
        layout: the canvas's static part.
        prompt_ids: the prompts, flush left; entries at or after ``prompt_len`` are ignored.
        prompt_len: the tokens of each prompt.
        row_id: the index of each prompt.

    Returns:
        A canvas of T = P + R positions.
    """
    chex.assert_rank(prompt_ids, 2)
    chex.assert_shape([prompt_len, row_id], prompt_ids.shape[:1])
    at = jnp.arange(prompt_ids.shape[1] + layout.response_len, dtype=jnp.int32)[None, :]
    prompt = jnp.pad(prompt_ids, ((0, 0), (0, layout.response_len)))
    ids = jnp.where(at < prompt_len[:, None], prompt, layout.mask_id).astype(jnp.int32)
    return decoding_canvas(layout, ids, prompt_len, row_id)


def decoding_canvas(
    layout: Layout,
    ids: Int[Array, "B T"],
    prompt_len: Int[Array, " B"],
    row_id: Int[Array, " B"],
    length: Int[Array, " B"] | None = None,
) -> Canvas:
    """Returns the canvas of tokens of which some are decoded or given already; T may be less than P + R, where no more is visible.

    Args:
        layout: the canvas's static part.
        ids: the prompts and what is there of the responses, with masks for the rest.
        prompt_len: the tokens of each prompt.
        row_id: the index of each prompt.
        length: the visible positions of each row; None for prompt and R response positions. (A text with spans ends earlier.)
    """
    all_of = jnp.full_like(prompt_len, layout.response_len)
    length = prompt_len + layout.response_len if length is None else length
    return Canvas(ids, prompt_len, length, all_of, -(-all_of // layout.block), row_id)


def supervised_end(layout: Layout, canvas: Canvas) -> Int[Array, " B"]:
    """Returns the canvas position after each row's last supervised token; the fill is supervised only under ``aligned``."""
    if layout.infill:
        return canvas.length
    if layout.context == "aligned":
        return canvas.prompt_len + canvas.n_blocks * layout.block
    return canvas.prompt_len + canvas.text_len


def canvas_width(layout: Layout, longest_prompt: int) -> int:
    """Returns T, the canvas positions of rows whose prompts have room for ``longest_prompt`` tokens."""
    return longest_prompt + layout.response_len if layout.total_len is None else layout.total_len


def needed_positions(layout: Layout, width: int, prompt_len: Numbers, block: Numbers | None = None) -> Numbers:
    """Returns the number of positions that training shows of each row; positions after them need not be computed.

    Args:
        layout: the canvas's static part.
        width: the canvas positions T.
        prompt_len: the tokens of each prompt.
        block: the active block of each row, where it is known before the draw; None where it is not.
    """
    if layout.context == "paper":
        return prompt_len * 0 + width  # the fill after the response is visible
    return prompt_len + layout.response_len if block is None else visible_positions(layout, prompt_len, block)


def visible_positions(layout: Layout, prompt_len: Numbers, block: Numbers) -> Numbers:
    """Returns the number of positions that an ``aligned`` canvas shows while a block is active: to the end of its window.

    Args:
        layout: the canvas's static part.
        prompt_len: the tokens of each prompt.
        block: the active block of each row.
    """
    whole = prompt_len + layout.response_len
    if layout.suffix_window is None:
        return whole
    return whole.clip(max=prompt_len + (block + 1) * layout.block + layout.suffix_window)


def block_start(layout: Layout, canvas: Canvas, block: Int[Array, " B"]) -> Int[Array, " B"]:
    """Returns the canvas position at which each row's block begins."""
    return canvas.prompt_len + block * layout.stride


def active_positions(
    layout: Layout, canvas: Canvas, block: Int[Array, " B"]
) -> tuple[Int[Array, "B A"], Bool[Array, "B A"]]:
    """Returns the canvas positions of each row's block (clipped to the canvas), and which of them may be supervised.

    A block of a masked span ends with the span: what is given after it is neither supervised nor decoded, nor is the next span.
    """
    active = block_start(layout, canvas, block)[:, None] + jnp.arange(layout.block, dtype=jnp.int32)
    valid = (block >= 0)[:, None] & (active < supervised_end(layout, canvas)[:, None])
    active = jnp.clip(active, 0, canvas.ids.shape[1] - 1)
    if layout.infill:
        masked = valid & (block_tokens(canvas, active) == layout.mask_id)
        valid = jnp.cumprod(masked, axis=1).astype(bool)  # up to the first given token
    return active, valid


def block_tokens(canvas: Canvas, active: Int[Array, "B A"]) -> Int[Array, "B A"]:
    """Returns the canvas's own tokens at the active positions."""
    return jnp.take_along_axis(canvas.ids, active, axis=1)


def view(layout: Layout, canvas: Canvas, block: Int[Array, " B"], block_ids: Int[Array, "B A"]) -> View:
    """Builds what the model sees when ``block`` is active and holds ``block_ids``.

    Before the block: the canvas as it is. After it: masks to the end of the R positions (``aligned``), or to the
    end of the text with the visible fill after it (``paper``). In infilling the canvas as it is: what is given, and the masks of
    later spans.

    Args:
        layout: the canvas's static part.
        canvas: the true tokens in training, the committed tokens in decoding.
        block: the active block of each row; -1 for a row without one, whose canvas is shown unchanged (the published script
            keeps such rows in the batch when all blocks of their sequence have been used).
        block_ids: the block's tokens; those outside the supervised text are ignored.

    Returns:
        The view; its ``at`` follows from ``layout.alignment``.
    """
    chex.assert_shape(block, canvas.ids.shape[:1])
    chex.assert_shape(block_ids, (canvas.ids.shape[0], layout.block))
    start = block_start(layout, canvas, block)
    active, valid = active_positions(layout, canvas, block)
    at = jnp.arange(canvas.ids.shape[1], dtype=jnp.int32)[None, :]
    ids = canvas.ids
    if not layout.infill:
        masks_end = canvas.length if layout.context == "aligned" else canvas.prompt_len + canvas.text_len
        suffix = (block >= 0)[:, None] & (at >= (start + layout.block)[:, None]) & (at < masks_end[:, None])
        ids = jnp.where(suffix, layout.mask_id, ids)

    inside = at - start[:, None]
    here = jnp.clip(inside, 0, layout.block - 1)
    in_block = (inside == here) & jnp.take_along_axis(valid, here, axis=1)
    ids = jnp.where(in_block, jnp.take_along_axis(block_ids, here, axis=1), ids)

    length = canvas.length
    if layout.suffix_window is not None:
        length = jnp.minimum(length, visible_positions(layout, canvas.prompt_len, block))
    predicts_next = 1 if layout.alignment == "shifted" else 0
    return View(
        ids=ids.astype(jnp.int32),
        positions=jnp.broadcast_to(at, canvas.ids.shape),
        length=length,
        active=active,
        at=jnp.maximum(active - predicts_next, 0),
        valid=valid,
    )


MOST_WIDTHS = 4
"""The most widths of a canvas that one program is compiled for."""


def groups_of_blocks(layout: Layout) -> list[range]:
    """Splits the blocks into at most ``MOST_WIDTHS`` runs, whose passes compute equally many positions."""
    n = layout.n_blocks
    bounds = sorted({-(-n * i // MOST_WIDTHS) for i in range(MOST_WIDTHS + 1)})
    return [range(first, end) for first, end in zip(bounds, bounds[1:], strict=False)]


def widths_by_block(layout: Layout, room: int) -> tuple[int, ...]:
    """Returns the canvas positions to compute while each block is active: all that are visible, in a few widths only.

    Args:
        layout: the canvas's static part.
        room: P, the canvas positions before the response of the longest prompt.
    """
    if layout.context == "paper":  # its fill is visible to the end of the canvas
        return (room + layout.response_len,) * layout.n_blocks
    visible = visible_positions(layout, np.full(layout.n_blocks, room), np.arange(layout.n_blocks)).tolist()
    return tuple(max(visible[k] for k in group) for group in groups_of_blocks(layout) for _ in group)


def narrowed(canvas: Canvas, width: int) -> Canvas:
    """Returns the canvas with its first ``width`` positions; the caller makes sure that no later one is visible."""
    return canvas._replace(ids=canvas.ids[:, :width])
