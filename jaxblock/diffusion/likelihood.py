"""Estimates the NELBO of responses given prompts: exactly, by enumeration, for small blocks, else by stratified Monte Carlo.

For a block of n supervised tokens, NELBO_block = sum over l of E[c_S / l given |S| = l]. It bounds from above the
negative log-likelihood of the decoder that commits one token a step in an order drawn independently of the tokens, at
temperature 1, without top-p, top-k, guidance or suppression, on the same R.

``nelbo`` computes whole responses, row by row. ``set_terms`` computes single masked sets, of any rows and blocks side by side,
and scores only the first tokens of a response: what comes after them stays masked.
"""

from __future__ import annotations

import math
from functools import partial
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Float, Int

from jaxblock.diffusion.canvas import Canvas, Layout, active_positions, narrowed, widths_by_block
from jaxblock.diffusion.laws import exact_count
from jaxblock.diffusion.objective import token_losses
from jaxblock.diffusion.sampling import Draw
from jaxblock.types import Network, Params, Sum
from jaxblock.uniforms import uniform


class Nelbo(NamedTuple):
    """Holds the estimated NELBO of each row and block, in nats.

    Attributes:
        per_block: the NELBO of each block; 0 where a row has no such block.
        variance: the variance of each estimate over the masks drawn (0 where exact, NaN where only one was drawn). The samples are
            treated as independent, which overstates it: they are stratified by count.
        by_count: the -log p of masked tokens and their number, by masked count (entry l - 1 holds blocks with l masks).
    """

    per_block: Float[Array, "B blocks"]
    variance: Float[Array, "B blocks"]
    by_count: Sum


_MOST_ENUMERATED = 19
"""The most tokens of a block whose masked sets are ever enumerated."""


class MaskedSets(NamedTuple):
    """Says which masked set of which block each row of a batch is computed for.

    Attributes:
        block: the block.
        size: n, the block's first tokens, which are scored; the positions after them stay masked.
        index: the number of the masked set, from 0.
        draws: how many sets are drawn for the block; 0 where all 2^n - 1 are enumerated (``count_sets``).
        stream: what the drawn sets depend on besides the key and the row's ``row_id``, such as the block's number in a text.
    """

    block: Int[Array, " B"]
    size: Int[Array, " B"]
    index: Int[Array, " B"]  # type: ignore[assignment]  # tuple.index is never meant
    draws: Int[Array, " B"]
    stream: Int[Array, " B"]


def is_exact(layout: Layout, samples: int) -> bool:
    """Tells whether ``nelbo`` enumerates all masked sets of a block: it does where they are no more than ``samples``."""
    return count_sets(layout.block, samples).exact


class SetCount(NamedTuple):
    """Says how many masked sets a block takes, and whether these are all that it has."""

    sets: int
    exact: bool


def count_sets(size: int, samples: int) -> SetCount:
    """Returns how many masked sets the estimate of a block of ``size`` tokens takes: all, where they are no more than ``samples``."""
    every = 2 ** min(size, _MOST_ENUMERATED) - 1
    return SetCount(every, True) if size <= _MOST_ENUMERATED and every <= samples else SetCount(samples, False)


def nelbo(net: Network, layout: Layout, samples: int, params: Params, canvas: Canvas, key: Array) -> Nelbo:
    """Estimates the NELBO of every block of every row.

    Args:
        net: the network (static).
        layout: the canvas's static part.
        samples: the masked sets drawn per block (static), stratified: sample j of N has the count
            1 + floor(n * (j + u) / N). From 2^B - 1 samples on, all masked sets are enumerated and the result is exact.
        params: the network's parameters.
        canvas: the prompts and responses, from ``canvas.from_rows``.
        key: the random key of the masks; a row's masks depend on it and on the row's ``row_id`` alone.

    Returns:
        The estimates.
    """
    chex.assert_rank(canvas.ids, 2)
    chex.assert_equal_shape_prefix(tuple(canvas), 1)
    exact = is_exact(layout, samples)
    draws = 2**layout.block - 1 if exact else samples
    keys = jax.vmap(jax.random.fold_in, in_axes=(None, 0))(key, canvas.row_id)

    def one_block(width: int, by_count: Sum, block: Array) -> tuple[Sum, tuple[Array, Array]]:
        """Estimates one block of every row, on a canvas of ``width`` positions."""
        shown = narrowed(canvas, width)
        blocks = jnp.full_like(canvas.prompt_len, block)
        _, valid = active_positions(layout, canvas, blocks)
        valid = valid & (blocks < canvas.n_blocks)[:, None]
        block_keys = jax.vmap(jax.random.fold_in, in_axes=(0, None))(keys, block)

        def one_set(carry: tuple[Array, Array, Sum], index: Array) -> tuple[tuple[Array, Array, Sum], None]:
            """Adds the masked set with number ``index`` to the sums."""
            total, squares, seen = carry
            if exact:
                masked, weight = _enumerated(layout, valid, index)
            else:
                masked, weight = _sampled(valid, block_keys, index, samples)
            nll = token_losses(net, params, layout, shown, Draw(blocks, masked, weight)).sum(-1)
            value = weight * nll
            count = masked.sum(-1)
            hit = (jnp.arange(1, layout.block + 1) == count[:, None]) & (weight > 0)[:, None]
            seen = Sum(seen.total + (hit * nll[:, None]).sum(0), seen.weight + (hit * count[:, None]).sum(0))
            # Welford's update: a difference of two sums of squares would lose digits where the samples are much alike.
            before, total = total / jnp.maximum(index, 1), total + value
            return (total, squares + (value - before) * (value - total / (index + 1)), seen), None

        zeros = jnp.zeros(canvas.prompt_len.shape)
        (total, squares, by_count), _ = jax.lax.scan(one_set, (zeros, zeros, by_count), jnp.arange(draws))
        if exact:
            return by_count, (total, jnp.zeros_like(total))
        if draws == 1:  # one draw does not show how much draws differ
            return by_count, (total, jnp.where(valid.any(-1), jnp.nan, 0.0))
        return by_count, (total / draws, jnp.maximum(squares, 0.0) / draws / (draws - 1))

    empty = Sum(jnp.zeros(layout.block), jnp.zeros(layout.block))
    widths = widths_by_block(layout, canvas.ids.shape[1] - layout.response_len)
    kinds = list(dict.fromkeys(widths))
    kind_of_block = jnp.array([kinds.index(width) for width in widths])

    def any_block(by_count: Sum, block: Array) -> tuple[Sum, tuple[Array, Array]]:
        return jax.lax.switch(kind_of_block[block], [partial(one_block, width) for width in kinds], by_count, block)

    by_count, (mean, variance) = jax.lax.scan(any_block, empty, jnp.arange(layout.n_blocks, dtype=jnp.int32))
    return Nelbo(mean.T, variance.T, by_count)


def set_terms(
    net: Network, layout: Layout, params: Params, canvas: Canvas, sets: MaskedSets, key: Array
) -> Float[Array, " B"]:
    """Returns one term of each row's estimate, in nats: a set's -log p, weighted.

    The terms of all sets of a block estimate the NELBO of its first n tokens: their sum is exact where the sets are enumerated,
    their mean is unbiased where they are drawn. It bounds the negative log-likelihood of the decoder that fills these positions
    before all others of the block, in a random order.

    Args:
        net: the network (static).
        layout: the canvas's static part.
        params: the network's parameters.
        canvas: the prompts and the responses' tokens, then masks, from ``canvas.decoding_canvas``.
        sets: the block and the masked set of each row.
        key: the random key of the masks. Rows with equal ``row_id`` get the same uniforms for a block, and so nearly the same
            masks where their sizes differ.
    """
    chex.assert_equal_shape_prefix([canvas.ids, *sets], 1)
    keys = jax.vmap(jax.random.fold_in, in_axes=(None, 0))(key, canvas.row_id)
    keys = jax.vmap(jax.random.fold_in)(keys, sets.stream)
    valid = jnp.arange(layout.block) < sets.size[:, None]
    drawn, drawn_weight = _sampled(valid, keys, sets.index, jnp.maximum(sets.draws, 1))
    listed, listed_weight = _enumerated(layout, valid, sets.index)
    masked = jnp.where((sets.draws > 0)[:, None], drawn, listed)
    weight = jnp.where(sets.draws > 0, drawn_weight, listed_weight)
    return weight * token_losses(net, params, layout, canvas, Draw(sets.block, masked, weight)).sum(-1)


def _sampled(valid: Array, keys: Array, index: Array, samples: int | Array) -> tuple[Array, Array]:
    """Returns the masked set of sample ``index`` (one for all rows or one for each), and the weight n / l of its tokens."""
    step_keys = jax.vmap(jax.random.fold_in)(keys, jnp.broadcast_to(index, keys.shape))
    u = jax.vmap(lambda k: uniform(k, (valid.shape[-1] + 1,)))(step_keys)
    return exact_count((index + u[:, 0]) / samples, u[:, 1:], valid)


def _enumerated(layout: Layout, valid: Array, index: Array) -> tuple[Array, Array]:
    """Returns the masked set with number ``index`` (one for all rows or one for each), and its weight 1 / (l C(n, l)).

    Bit i of ``index`` + 1 says whether position i of the block is masked. A set with positions that a row does not have
    (i >= n) gets weight 0; so does every set of a row with more than ``_MOST_ENUMERATED`` positions.
    """
    most = min(layout.block, _MOST_ENUMERATED)
    number = jnp.broadcast_to(index + 1, valid.shape[:1])[:, None]
    bits = jnp.pad((number >> jnp.arange(most)) & 1, ((0, 0), (0, layout.block - most)))
    masked = bits.astype(bool)
    n = valid.sum(-1)
    fits = jnp.all(valid | ~masked, axis=-1) & (n <= most)
    sizes = [
        [0.0] + [1.0 / (m * math.comb(n, m)) if m <= n else 0.0 for m in range(1, most + 1)] for n in range(most + 1)
    ]
    weight = jnp.asarray(np.array(sizes), float)[jnp.minimum(n, most), masked.sum(-1)]
    return masked & valid, jnp.where(fits, weight, 0.0)


def per_row(estimate: Nelbo) -> tuple[Float[Array, " B"], Float[Array, " B"]]:
    """Returns the NELBO of each row's whole response, and its standard error over the masks drawn."""
    return estimate.per_block.sum(-1), jnp.sqrt(estimate.variance.sum(-1))
