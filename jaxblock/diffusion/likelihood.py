"""Estimates the NELBO of responses given prompts: exactly, by enumeration, for small blocks, else by stratified Monte Carlo.

For a block of n supervised tokens, NELBO_block = sum over l of E[c_S / l given |S| = l]. It bounds from above the
negative log-likelihood of the decoder that commits one token a step in an order drawn independently of the tokens, at
temperature 1, without top-p, top-k, guidance or suppression, on the same R.
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
from jaxtyping import Float

from jaxblock.diffusion.canvas import Canvas, Layout, active_positions, narrowed, widths_by_block
from jaxblock.diffusion.laws import exact_count
from jaxblock.diffusion.objective import token_losses
from jaxblock.diffusion.sampling import Draw
from jaxblock.types import Network, Params, Sum


class Nelbo(NamedTuple):
    """Holds the estimated NELBO of each row and block, in nats.

    Attributes:
        per_block: the NELBO of each block; 0 where a row has no such block.
        variance: the variance of each estimate over the masks drawn (0 where exact). The samples are treated as
            independent, which overstates it: they are stratified by count.
        by_count: the -log p of masked tokens and their number, by masked count (entry l - 1 holds blocks with l masks).
    """

    per_block: Float[Array, "B blocks"]
    variance: Float[Array, "B blocks"]
    by_count: Sum


def is_exact(layout: Layout, samples: int) -> bool:
    """Tells whether ``nelbo`` enumerates all masked sets of a block: it does where they are no more than ``samples``."""
    return layout.block < 20 and 2**layout.block - 1 <= samples


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
        return by_count, (total / draws, jnp.maximum(squares, 0.0) / draws / max(draws - 1, 1))

    empty = Sum(jnp.zeros(layout.block), jnp.zeros(layout.block))
    widths = widths_by_block(layout, canvas.ids.shape[1] - layout.response_len)
    kinds = list(dict.fromkeys(widths))
    kind_of_block = jnp.array([kinds.index(width) for width in widths])

    def any_block(by_count: Sum, block: Array) -> tuple[Sum, tuple[Array, Array]]:
        return jax.lax.switch(kind_of_block[block], [partial(one_block, width) for width in kinds], by_count, block)

    by_count, (mean, variance) = jax.lax.scan(any_block, empty, jnp.arange(layout.n_blocks, dtype=jnp.int32))
    return Nelbo(mean.T, variance.T, by_count)


def _sampled(valid: Array, keys: Array, index: Array, samples: int) -> tuple[Array, Array]:
    """Returns the masked set of sample ``index``, and the weight n / l of its tokens."""
    step_keys = jax.vmap(jax.random.fold_in, in_axes=(0, None))(keys, index)
    u = jax.vmap(lambda k: jax.random.uniform(k, (valid.shape[-1] + 1,)))(step_keys)
    return exact_count((index + u[:, 0]) / samples, u[:, 1:], valid)


def _enumerated(layout: Layout, valid: Array, index: Array) -> tuple[Array, Array]:
    """Returns the masked set with number ``index``, and its weight 1 / (l C(n, l)).

    Bit i of ``index`` + 1 says whether position i of the block is masked. A set with positions that a row does not have
    (i >= n) gets weight 0.
    """
    bits = ((index + 1) >> jnp.arange(layout.block)) & 1
    masked = jnp.broadcast_to(bits.astype(bool), valid.shape)
    fits = jnp.all(valid | ~masked, axis=-1)
    sizes = [
        [0.0] + [1.0 / (m * math.comb(n, m)) if m <= n else 0.0 for m in range(1, layout.block + 1)]
        for n in range(layout.block + 1)
    ]
    weight = jnp.asarray(np.array(sizes), float)[valid.sum(-1), masked.sum(-1)]
    return masked & valid, jnp.where(fits, weight, 0.0)


def per_row(estimate: Nelbo) -> tuple[Float[Array, " B"], Float[Array, " B"]]:
    """Returns the NELBO of each row's whole response, and its standard error over the masks drawn."""
    return estimate.per_block.sum(-1), jnp.sqrt(estimate.variance.sum(-1))
