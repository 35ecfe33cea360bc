"""Looks only at the positions of a block that may still be masks: those that are committed need no logits.

How many that can be before each step follows from the rule and the step (``Rule.most_masks``), so the number of positions
does not depend on the rows of a batch, and neither does a row's result. A network's pass still computes the whole block, whose
committed tokens the masks attend to; what is saved is the product with the vocabulary, and the search of it for tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Float, Int

from jaxblock.diffusion.decoding.beliefs import moved
from jaxblock.diffusion.decoding.config import DecodeConfig
from jaxblock.diffusion.decoding.rules import RULES

MOST_COUNTS = 4
"""The most different numbers of positions, each of which is compiled."""
_ROUND = 8  # a matrix product of fewer rows is no faster

T = TypeVar("T")


def counts_by_step(options: DecodeConfig, block: int) -> tuple[int, ...]:
    """Returns how many positions of a block each step looks at: at most ``MOST_COUNTS`` different numbers.

    Args:
        options: the decoder's settings. With a temperature every step looks at the whole block: the noise of a token is drawn for
            all positions at once, so it would change with their number.
        block: positions of a block.
    """
    most = RULES[options.rule].most_masks
    if most is None or options.temperature > 0:
        return (block,) * (block if RULES[options.rule].pace == "rule" else options.steps(block))
    size = -(-block // MOST_COUNTS // _ROUND) * _ROUND
    return tuple(min(-(-int(masks) // size) * size, block) for masks in most(options, block))


def look(
    hidden: Sequence[Float[Array, "B A D"]],
    masked: Bool[Array, "B A"],
    counts: Sequence[int],
    step: Int[Array, ""],
    find: Callable[[list[Array]], T],
) -> T:
    """Applies a function to the hidden states of the masked positions.

    Args:
        hidden: hidden states for the positions of a block, one array for each view of the canvas.
        masked: the positions to look at.
        counts: how many positions each step looks at, at least those that are masked (static).
        step: the step.
        find: takes the hidden states [B, P, D] of P positions, and returns arrays [B, P, ...].

    Returns:
        Arrays [B, A, ...]; what they hold at positions that are not masked means nothing.
    """
    kinds = sorted(set(counts))
    place = jnp.cumsum(masked, axis=1) - 1  # of each masked position among all of its row
    first = jnp.argsort(~masked, axis=1, stable=True)

    def of(count: int, hidden: list[Array]) -> T:
        if count == masked.shape[1]:
            return find(hidden)
        found = find([moved(each, first[:, :count]) for each in hidden])
        return jax.tree.map(lambda leaf: moved(leaf, jnp.clip(place, 0, count - 1)), found)

    if len(kinds) == 1:
        return of(kinds[0], list(hidden))
    kind = jnp.asarray([kinds.index(count) for count in counts])[step]
    return jax.lax.switch(kind, [lambda hidden, count=count: of(count, hidden) for count in kinds], list(hidden))
