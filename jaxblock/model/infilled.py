"""Fills the spans of texts: checks that a text fits the canvas, and describes what a decoded row has become."""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from jaxblock.data.text.marked import SpannedText
from jaxblock.data.tokens.spans import filled_text, fills_of
from jaxblock.data.tokens.tokenizer import Tokenizer
from jaxblock.diffusion.canvas import Layout
from jaxblock.diffusion.decoding import decoder
from jaxblock.diffusion.decoding.queue import Row
from jaxblock.errors import UserError
from jaxblock.streaming import Trace


class Infilled(NamedTuple):
    """Holds a text whose spans are filled.

    Attributes:
        text: the whole text, what was given and what was filled in.
        fills: the text of each span. Special tokens that a span holds, such as the end of a sequence, are no part of it.
        ids: the ids of the prompt, where there is one, and of the text.
        spans: the [first, end) of each span in the ids.
        nfe: the forward passes that it took.
        positions: the canvas positions that those passes needed to compute, summed (token-forwards).
        canvases: the ids after 0, 1, ... steps [S, T], with the mask id where nothing is filled in; None without ``return_steps``.
    """

    text: str
    fills: list[str]
    ids: list[int]
    spans: list[tuple[int, int]]
    nfe: int
    positions: int
    canvases: np.ndarray | None


def check_span_room(text: SpannedText, where: str, layout: Layout) -> None:
    """Checks that a text leaves the decoder something to go by, and fits the response positions of the canvas.

    Args:
        text: the text.
        where: the text's name in the message.
        layout: the layout of the decoder's canvas.

    Raises:
        UserError: nothing is given, nothing stands before a span whose first token would be predicted from there, or the text
            from its first span on is longer than the response positions.
    """
    rest, masks = len(text.ids) - text.first, sum(end - first for first, end in text.spans)
    if masks == len(text.ids):
        raise UserError(f"{where} gives nothing but spans: write some text before or after them")
    if text.first == 0 and layout.alignment == "shifted":
        raise UserError(
            f"{where} begins with a span, and this network predicts a token from the one before it: write something before it"
        )
    if rest > layout.response_len:
        needed = -(-rest // layout.block) * layout.block
        raise UserError(
            f"{where} has {rest} tokens from its first span to its end, more than the canvas's {layout.response_len} response "
            f"positions: set decode.response_len to {needed} or more, or give less after the span"
        )


def infilled(
    tokenizer: Tokenizer, layout: Layout, text: SpannedText, row: Row | Trace, *, return_steps: bool = False
) -> Infilled:
    """Describes a text that is decoded.

    Args:
        tokenizer: the tokenizer.
        layout: the layout of the decoder's canvas.
        text: the text.
        row: its row, or the trace of it.
        return_steps: whether to rebuild the canvas after every step.
    """
    ids = [*text.ids[: text.first], *row.response.tolist()]
    fills = fills_of(tokenizer, ids, text.spans)
    canvases = None
    if return_steps:
        zero = jnp.zeros(1, jnp.int32)
        found = decoder.Responses(jnp.asarray(row.response)[None], jnp.asarray(row.commit_step)[None], zero, zero, zero)
        states = decoder.responses_by_step(layout, found, int(row.commit_step.max()) + 1)[:, 0]
        before = np.broadcast_to(np.array(text.ids[: text.first], np.int32), (len(states), text.first))
        canvases = np.concatenate([before, states], axis=1)
    return Infilled(filled_text(text.parts, fills), fills, ids, text.spans, row.nfe, row.positions, canvases)
