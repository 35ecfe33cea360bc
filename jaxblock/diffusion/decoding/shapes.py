"""Chooses the shape of the batches that a row is decoded in, so that few programs serve all rows and each row pays for its own."""

from __future__ import annotations

import functools
from typing import NamedTuple

from jaxblock.diffusion.canvas import MOST_WIDTHS, Layout
from jaxblock.diffusion.decoding.config import DecodeConfig
from jaxblock.diffusion.decoding.passes import Sizes, sizes_by_block

_SMALLEST_STEP = 64  # a small canvas has fewer widths: narrower steps would save less than their programs cost
_ROUND = 16


_sizes = functools.cache(sizes_by_block)  # asked for every row at every block


class BatchShape(NamedTuple):
    """Holds the static part of a batch's program.

    Attributes:
        room: the canvas positions for prompts.
        sizes: how many positions the passes of the rows' blocks compute.
    """

    room: int
    sizes: Sizes


class BatchShapes(NamedTuple):
    """Says in which batches a row may be decoded. It depends on nothing but the row, and so do the row's tokens.

    Prompts of up to the usual length make at most ``MOST_WIDTHS`` shapes. Where the passes of all blocks are alike these are the
    canvas's quarters, rounded up (fewer for a canvas below 256 positions), else those of the blocks. Longer prompts take canvases
    of twice the width, four times, and so on.

    Attributes:
        layout: the layout of the decoder's canvas.
        options: the decoder's settings.
        prompt_len: the usual longest prompt (``canvas.prompt_len``).
        most: the most positions that the network was made for.
    """

    layout: Layout
    options: DecodeConfig
    prompt_len: int
    most: int

    def of_block(self, prompt_len: int, block: int) -> BatchShape:
        """Returns the shape for the block of a row."""
        room = self.room(prompt_len)
        return BatchShape(room, _sizes(self.layout, self.options, room)[block])

    def room(self, prompt_len: int) -> int:
        """Returns the canvas positions for a prompt, its padding included."""
        response = self.layout.response_len
        usual, needed = min(round_up(self.prompt_len, _ROUND) + response, self.most), prompt_len + response
        if needed > usual:
            while usual < needed:
                usual *= 2
            return max(needed, min(usual, self.most)) - response
        if len(set(_sizes(self.layout, self.options, usual - response))) > 1:
            return usual - response
        widths = max(1, min(MOST_WIDTHS, usual // _SMALLEST_STEP))
        step = round_up(-(-usual // widths), _ROUND)
        width = round_up(needed, step)
        if width > usual - step // 2:
            width = usual  # a little less would save less than batches of their own cost
        return width - response


def round_up(positions: int, step: int) -> int:
    """Returns the smallest multiple of a step that is at least so many positions."""
    return -(-positions // step) * step
