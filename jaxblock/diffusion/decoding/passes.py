"""Runs the network for the decoder: full passes over the canvas, and passes over a part of it beside cached keys and values.

A full pass at a block's start fills the cache and is the block's first step. Later steps compute only the block (``dual``),
or the block and everything visible after it (``prefix``); all else keeps the keys and values of the block's start. This
is Fast-dLLM's scheme (arXiv 2505.22618). Only the first step of a block is exact, since a bidirectional network's prefix and
suffix depend on the block's tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, cast

import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Bool, Float, Int

from jaxblock.diffusion.canvas import (
    Canvas,
    Layout,
    block_start,
    groups_of_blocks,
    narrowed,
    view,
    visible_positions,
    widths_by_block,
)
from jaxblock.diffusion.decoding.config import DecodeConfig
from jaxblock.types import Cache, CachingNetwork, Network, Params, Part, View


class Sizes(NamedTuple):
    """Holds the numbers of positions that the passes of a block compute: static, so that few programs are compiled.

    Attributes:
        width: the canvas positions of a full pass.
        part: the positions of a pass beside the cache; 0 without a cache.
    """

    width: int
    part: int


def sizes_by_block(layout: Layout, options: DecodeConfig, room: int) -> tuple[Sizes, ...]:
    """Returns the sizes of each block's passes: at most ``canvas.MOST_WIDTHS`` different ones.

    They depend on the block and on the room for prompts, and so does a result's rounding: it does not depend on the rows beside it.

    Args:
        layout: the canvas's static part.
        options: the decoder's settings.
        room: P, the canvas positions before the response of the longest prompt.
    """
    starts = np.arange(layout.n_blocks) * layout.stride
    after = visible_positions(layout, np.full(layout.n_blocks, room), np.arange(layout.n_blocks)) - room - starts
    part = {"none": 0 * after, "prefix": after, "dual": 0 * after + layout.block}[options.cache]
    part = part + _before(layout, options) * (part > 0)
    parts = [max(part[group].tolist()) for group in groups_of_blocks(layout) for _ in group]
    return tuple(map(Sizes, widths_by_block(layout, room), parts))


def widest(layout: Layout, options: DecodeConfig, room: int) -> Sizes:
    """Returns sizes that serve every block."""
    return Sizes(*map(max, zip(*sizes_by_block(layout, options, room), strict=True)))


def _before(layout: Layout, options: DecodeConfig) -> int:
    """Returns how many positions before the block are computed with it: the one whose hidden state predicts its first token."""
    return 1 if layout.alignment == "shifted" and options.quirks == "none" else 0


class PassCost(NamedTuple):
    """Counts the positions of one pass, times the passes that guidance needs.

    Attributes:
        needed: the positions that each row needs.
        computed: the positions that are computed for every row, padding included.
    """

    needed: Int[Array, " B"]
    computed: int


Hidden = Float[Array, "B A D"]
"""The hidden states that predict the positions of a block."""


@dataclass(frozen=True)
class Passes:
    """Computes hidden states for the positions of a block from the block's tokens, and logits from those.

    Attributes:
        net: the network; a ``types.CachingNetwork`` where the options have a cache.
        layout: the canvas's static part.
        options: the decoder's settings.
        params: the network's parameters, as ``net.unstacked`` returns them.
        canvas: the committed tokens.
        given: the response positions that hold given text [B, R], which guidance hides as it hides the prompt; none but in infilling.
        blocks: the block of each row.
        sizes: the sizes of the passes.
    """

    net: Network
    layout: Layout
    options: DecodeConfig
    params: Params
    canvas: Canvas
    given: Bool[Array, "B R"]
    blocks: Int[Array, " B"]
    sizes: Sizes

    def full(self, tokens: Int[Array, "B A"]) -> list[Hidden]:
        """Computes the last hidden states of each view from the whole canvas."""
        return [self.net.hidden(self.params, seen) for seen in self._views(tokens)]

    def refresh(self, tokens: Int[Array, "B A"]) -> tuple[list[Hidden], list[Cache]]:
        """Computes what ``full`` does, and returns the cache of each view."""
        net = cast(CachingNetwork, self.net)
        found = [net.refresh(self.params, seen) for seen in self._views(tokens)]
        return [hidden for hidden, _ in found], [cache for _, cache in found]

    def update(self, tokens: Int[Array, "B A"], caches: list[Cache]) -> list[Hidden]:
        """Computes the last hidden states of each view from a part of the canvas and the view's cache."""
        net, pairs = cast(CachingNetwork, self.net), zip(self._views(tokens), caches, strict=True)
        return [net.update(self.params, self._part(seen), cache) for seen, cache in pairs]

    def logits(self, hidden: list[Float[Array, "B P D"]]) -> Float[Array, "B P V"]:
        """Computes the logits of positions from the hidden states of each view; guidance makes one of two."""
        return self._guided([self.net.logits(self.params, each) for each in hidden])

    @property
    def full_cost(self) -> PassCost:
        """The positions of a full pass."""
        return PassCost(self.options.passes * self._visible, self.options.passes * self.sizes.width)

    @property
    def update_cost(self) -> PassCost:
        """The positions of a pass beside the cache."""
        needed = self._visible - self._first
        if self.options.cache == "dual":
            needed = jnp.minimum(needed, self._start + self.layout.block - self._first)
        return PassCost(self.options.passes * needed, self.options.passes * self.sizes.part)

    @property
    def _start(self) -> Int[Array, " B"]:
        return block_start(self.layout, self.canvas, self.blocks)

    @property
    def _first(self) -> Int[Array, " B"]:
        """The first position of the part."""
        return jnp.maximum(self._start - _before(self.layout, self.options), 0)

    @property
    def _visible(self) -> Int[Array, " B"]:
        return jnp.minimum(self.canvas.length, visible_positions(self.layout, self.canvas.prompt_len, self.blocks))

    def _views(self, tokens: Int[Array, "B A"]) -> list[View]:
        """Returns what the network sees: the canvas, and with guidance also the canvas with the prompt and all given text hidden."""
        canvas = narrowed(self.canvas, self.sizes.width)
        seen = view(self.layout, canvas, self.blocks, tokens)
        if not self.options.cfg_scale:
            return [seen]
        in_response = jnp.arange(seen.ids.shape[1]) - canvas.prompt_len[:, None]
        given = jnp.take_along_axis(self.given, jnp.clip(in_response, 0, self.layout.response_len - 1), axis=1)
        return [seen, seen._replace(ids=jnp.where(given | (in_response < 0), self.layout.mask_id, seen.ids))]

    def _part(self, seen: View) -> Part:
        """Returns the part of a view that is computed anew."""
        first, size = self._first, self.sizes.part
        at = jnp.minimum(first[:, None] + jnp.arange(size, dtype=jnp.int32), seen.ids.shape[1] - 1)
        predicts = seen.at - first[:, None]
        return Part(jnp.take_along_axis(seen.ids, at, axis=1), first, seen.length, jnp.clip(predicts, 0, size - 1))

    def _guided(self, logits: list[Array]) -> Array:
        """Returns un + (scale + 1)(cond - un) where there are logits without the prompt, else the logits."""
        if len(logits) == 1:
            return logits[0]
        conditional, unconditional = logits
        return unconditional + (self.options.cfg_scale + 1) * (conditional - unconditional)
