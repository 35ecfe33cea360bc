"""Says what stands around an active block in several kinds of training, as masks over the whole response."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float

from jaxblock.diffusion.canvas import Canvas, Layout
from jaxblock.diffusion.config import MethodConfig
from jaxblock.diffusion.sampling import Draw, Uniforms


class Context(NamedTuple):
    """Describes what the network sees around the active block.

    Attributes:
        name: the name in results.
        prefix_mask_rate: the chance that a response token before the block is masked.
        suffix_mask_prob: the chance that a token of the supervised text after the block is masked.
        classical: whether the rest of the response is as classical SFT has it; the two chances are then not read.
    """

    name: str
    prefix_mask_rate: float = 0.0
    suffix_mask_prob: float = 1.0
    classical: bool = False


IDEAL = Context("ideal")
"""What the decoder sees: a clean prefix, and masks after the block."""

PREFIX_MASK_RATES = (0.0, 0.15, 0.3, 0.5)
SUFFIX_MASK_PROBS = (1.0, 0.5, 0.0)

CONTEXTS = (
    *(
        Context(f"prefix {rate:g}, suffix {prob:g}", rate, prob)
        for prob in SUFFIX_MASK_PROBS
        for rate in PREFIX_MASK_RATES
        if (rate, prob) != (0.0, 1.0)
    ),
    Context("classical", classical=True),
)
"""The contexts that are compared with ``IDEAL``: the ablations of `method.prefix_mask_rate` and `method.suffix_mask_prob`, and
classical SFT."""

NOISE = MethodConfig(law="stratified_count", blocks="pairs", prefix_mask_rate=0.5)
"""How masked sets are drawn: one for each given block, with counts stratified over the rows, and noise for tokens outside."""


def masked_response(
    layout: Layout, canvas: Canvas, draw: Draw, uniforms: Uniforms, context: Context
) -> Bool[np.ndarray, "N R"]:
    """Returns the masked response positions of each row: the drawn set in its block, and the context's elsewhere.

    In classical SFT every response position is masked at a common rate t, uniform on (0, 1), with the weight 1/t. Restricted to the
    tokens of one block of n positions, its gradient is that of Blockwise SFT with the rest of the response masked at rate t, where t
    given the count l of the block's masks is Beta(l, n - l + 1): the law of the l-th smallest of n uniforms
    (docs/study/gradients.md). The block's masks are the positions with the l smallest uniforms, so that t is the largest of these.

    Args:
        layout: the canvas of Blockwise SFT.
        canvas: the rows.
        draw: a block and a masked set for each row, drawn by a law that draws the count, from ``uniforms``.
        uniforms: the numbers that drew it, with noise (``NOISE``).
        context: what stands around the block.
    """
    at = np.arange(layout.response_len)
    start = (np.asarray(draw.block) * layout.block)[:, None]
    own_masks = np.asarray(draw.masked)
    noise = np.asarray(uniforms.noise)[np.asarray(canvas.row_id), 0]
    if context.classical:
        position = np.asarray(uniforms.position)[np.asarray(canvas.row_id), 0]
        rate = np.where(own_masks, position, 0).max(-1)[:, None]
        rest = noise < rate
    else:
        text = at < (np.asarray(canvas.n_blocks) * layout.block)[:, None]
        rest = noise < np.where(at < start, context.prefix_mask_rate, context.suffix_mask_prob)
        rest |= ~text  # after the terminator's block there is nothing to show
    inside = at - start
    here = (inside >= 0) & (inside < layout.block)
    own = np.take_along_axis(own_masks, np.clip(inside, 0, layout.block - 1), axis=1)
    return np.where(here, own, rest)


def block_weights(layout: Layout, draw: Draw) -> Float[np.ndarray, "N R"]:
    """Returns a row's weight at the response positions of its block, and 0 elsewhere: the losses that count."""
    weight = np.asarray(draw.weight)
    inside = np.arange(layout.response_len) - (np.asarray(draw.block) * layout.block)[:, None]
    return np.where((inside >= 0) & (inside < layout.block), weight[:, None], np.zeros_like(weight)[:, None])
