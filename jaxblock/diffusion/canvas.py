"""What the model sees. One function, ``view``, builds it for the trainer and for the decoder alike.

Training passes "mask where the draw says, else the true token" as the block's tokens; decoding passes "what is
committed so far". Everything else about the picture (the prompt, what lies after the block, how much is visible) is
decided here, once, so the two cannot drift apart.
"""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Int

from jaxblock.diffusion.config import Context
from jaxblock.settings import Alignment
from jaxblock.types import View


class Layout(NamedTuple):
    """What is static about a canvas. Hashable: a jitted function may close over it or take it as a static argument.

    Attributes:
        response_len: R, the response positions of a row; a multiple of ``block`` under ``aligned``.
        block: B, response positions of one block (A, in array shapes).
        alignment: ``same_position``: the hidden state at i predicts token i. ``shifted``: the one at i - 1 does.
        context: ``aligned`` (the decoder's own view) or ``paper`` (the published training script's view).
        suffix_window: how many positions after the active block are visible; None means all of them.
        mask_id: the mask token.
        fill_id: fills the rest of the terminator's block (the end-of-sequence token).
        stop_ids: the tokens that end a response.
        total_len: under ``paper``: canvas positions T, prompt and response together; None for room for the longest of
            each.
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

    @property
    def n_blocks(self) -> int:
        """How many blocks the response canvas holds (the last may be short under ``paper``)."""
        return -(-self.response_len // self.block)


class Canvas(NamedTuple):
    """Prompts and responses of a batch, flush left: the prompt at 0, the response at ``prompt_len``.

    Attributes:
        ids: tokens; after ``length`` they are never seen.
        prompt_len: tokens of the prompt.
        length: visible positions, the prompt included.
        text_len: response tokens that are text, the terminator counted, the fill not.
        n_blocks: K_i, the blocks of this row that may be active.
        row_id: the row's index in the global batch (indexes the step's uniforms).
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
    """Lays prompts and responses flush left.

    Under ``aligned`` the response is filled with ``fill_id`` to the end of its last block, the positions after it
    are masks, and R response positions are visible. Under ``paper`` everything after the response is visible fill to
    the end of the canvas, as in the published script.

    Args:
        layout: the canvas's static part.
        prompt_ids: prompts; entries at or after ``prompt_len`` are ignored.
        prompt_len: tokens of each prompt.
        response_ids: responses, the terminator included; R at most ``layout.response_len``.
        text_len: tokens of each response, at least 1.
        row_id: index of each row in the global batch.

    Returns:
        A canvas of T = P + layout.response_len positions (or ``layout.total_len``, into which every row must fit).
    """
    room = prompt_ids.shape[1] + layout.response_len
    width = room if layout.total_len is None else layout.total_len
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
    """A canvas whose response is all masks: R of them are visible, in either context.

    Args:
        layout: the canvas's static part.
        prompt_ids: prompts, flush left; entries at or after ``prompt_len`` are ignored.
        prompt_len: tokens of each prompt.
        row_id: index of each prompt.

    Returns:
        A canvas of T = P + R positions.
    """
    at = jnp.arange(prompt_ids.shape[1] + layout.response_len, dtype=jnp.int32)[None, :]
    prompt = jnp.pad(prompt_ids, ((0, 0), (0, layout.response_len)))
    ids = jnp.where(at < prompt_len[:, None], prompt, layout.mask_id).astype(jnp.int32)
    all_of = jnp.full_like(prompt_len, layout.response_len)
    return Canvas(ids, prompt_len, prompt_len + layout.response_len, all_of, -(-all_of // layout.block), row_id)


def supervised_end(layout: Layout, canvas: Canvas) -> Int[Array, " B"]:
    """The canvas position after each row's last supervised token: the fill counts under ``aligned``, not under ``paper``."""
    if layout.context == "aligned":
        return canvas.prompt_len + canvas.n_blocks * layout.block
    return canvas.prompt_len + canvas.text_len


def block_start(layout: Layout, canvas: Canvas, block: Int[Array, " B"]) -> Int[Array, " B"]:
    """The canvas position of each row's block."""
    return canvas.prompt_len + block * layout.block


def active_positions(
    layout: Layout, canvas: Canvas, block: Int[Array, " B"]
) -> tuple[Int[Array, "B A"], Bool[Array, "B A"]]:
    """Canvas positions of a block (clipped to the canvas), and which of them exist and may be supervised."""
    active = block_start(layout, canvas, block)[:, None] + jnp.arange(layout.block, dtype=jnp.int32)
    valid = (block >= 0)[:, None] & (active < supervised_end(layout, canvas)[:, None])
    return jnp.clip(active, 0, canvas.ids.shape[1] - 1), valid


def block_tokens(canvas: Canvas, active: Int[Array, "B A"]) -> Int[Array, "B A"]:
    """The canvas's own tokens at the active positions."""
    return jnp.take_along_axis(canvas.ids, active, axis=1)


def view(layout: Layout, canvas: Canvas, block: Int[Array, " B"], block_ids: Int[Array, "B A"]) -> View:
    """What the model sees when ``block`` is active and holds ``block_ids``.

    Before the block: the canvas as it is. After it: masks to the end of the R positions (``aligned``), or to the
    end of the text with the visible fill after it (``paper``).

    Args:
        layout: the canvas's static part.
        canvas: true tokens in training, committed tokens in decoding.
        block: the active block of each row; -1 for none (the published script's exhausted rows): the canvas as it is.
        block_ids: the block's tokens; those outside the supervised text are ignored.

    Returns:
        The view. ``at`` carries the logit alignment.
    """
    start = block_start(layout, canvas, block)
    active, valid = active_positions(layout, canvas, block)
    at = jnp.arange(canvas.ids.shape[1], dtype=jnp.int32)[None, :]
    masks_end = canvas.length if layout.context == "aligned" else canvas.prompt_len + canvas.text_len
    suffix = (block >= 0)[:, None] & (at >= (start + layout.block)[:, None]) & (at < masks_end[:, None])
    ids = jnp.where(suffix, layout.mask_id, canvas.ids)

    inside = at - start[:, None]
    here = jnp.clip(inside, 0, layout.block - 1)
    in_block = (inside == here) & jnp.take_along_axis(valid, here, axis=1)
    ids = jnp.where(in_block, jnp.take_along_axis(block_ids, here, axis=1), ids)

    length = canvas.length
    if layout.suffix_window is not None:
        length = jnp.minimum(length, start + layout.block + layout.suffix_window)
    predicts_next = 1 if layout.alignment == "shifted" else 0
    return View(
        ids=ids.astype(jnp.int32),
        positions=jnp.broadcast_to(at, canvas.ids.shape),
        length=length,
        active=active,
        at=jnp.maximum(active - predicts_next, 0),
        valid=valid,
    )
