"""Draws the active blocks and the masked sets of a step.

Every draw is a pure function of uniform numbers, so that a test can show by enumeration that an estimator is unbiased.
"""

from __future__ import annotations

from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Float, Int

from jaxblock.diffusion.canvas import Canvas, Layout, active_positions
from jaxblock.diffusion.config import MethodConfig
from jaxblock.diffusion.laws import LAWS, complement, exact_count
from jaxblock.uniforms import uniform_arrays


class Draw(NamedTuple):
    """Holds one active block per row, the positions that are masked in it, and the weight of each masked token's loss."""

    block: Int[Array, " B"]
    masked: Bool[Array, "B A"]
    weight: Float[Array, " B"]


class Uniforms(NamedTuple):
    """Holds the random numbers of a step, drawn once for the whole global batch and indexed by ``row_id``.

    Attributes:
        block: numbers that decide which blocks of each sequence are active.
        count: numbers that decide the masked count or the mask rate.
        stratum: numbers that order the draws of the global batch (the permutation of ``stratified_count``).
        position: numbers that decide which positions of the block are masked.
        noise: numbers that decide the ablations' masks: by response position, and where prompt tokens may be masked by prompt
            position after that; none without ablations.
    """

    block: Float[Array, "B blocks"]
    count: Float[Array, "B K"]  # type: ignore[assignment]  # tuple.count is never meant
    stratum: Float[Array, "B K"]
    position: Float[Array, "B K A"]
    noise: Float[Array, "B K N"]


def draw_uniforms(method: MethodConfig, layout: Layout, key: Array, rows: int, prompt_room: int = 0) -> Uniforms:
    """Draws the uniform numbers of one step.

    Args:
        method: says how many draws K there are, and whether ablations need random numbers outside the block.
        layout: the canvas's static part.
        key: the random key of the step, ``fold_in(key(seed), step)``.
        rows: the global batch size; the draws depend on it.
        prompt_room: P, the tokens of the longest prompt; read where ``method.prompt_mask_rate`` is above 0.

    Returns:
        Values in [0, 1).
    """
    if method.prompt_mask_rate > 0 and prompt_room < 1:
        raise ValueError("method.prompt_mask_rate needs numbers for the prompt: pass prompt_room")
    draws = method.draws
    b, c, s, p, n = jax.random.split(key, 5)
    noise = jax.random.uniform(n, (rows, draws, layout.response_len if method.needs_noise else 0))
    if method.prompt_mask_rate > 0:
        # From a key of their own, so that the numbers of the response are those of a method that masks no prompt token.
        of_prompt = jax.random.uniform(jax.random.fold_in(n, 1), (rows, draws, prompt_room))
        noise = jnp.concatenate([noise, of_prompt], axis=2)
    shapes = [(rows, layout.n_blocks), (rows, draws), (rows, draws), (rows, draws, layout.block)]
    block, count, stratum, position = uniform_arrays(jnp.stack([b, c, s, p]), shapes)
    return Uniforms(block, count, stratum, position, noise)


def _stratify(u: Uniforms) -> Float[Array, "B K"]:
    """Returns (pi(draw) + u) / N, where pi permutes the N = B * K draws of the global batch."""
    flat = u.stratum.reshape(-1)
    rank = jnp.argsort(jnp.argsort(flat, stable=True)).reshape(u.stratum.shape)
    return (rank + u.count) / flat.shape[0]


def choose_blocks(
    uniforms: Float[Array, "B blocks"], n_blocks: Int[Array, " B"], draws: int
) -> tuple[Int[Array, "B K"], Float[Array, "B K"]]:
    """Chooses m = min(K, K_i) distinct blocks of each sequence, each with the weight K_i / m; unused draws have weight 0.

    Args:
        uniforms: a uniform number for each block.
        n_blocks: K_i, the blocks of each sequence.
        draws: K.

    Returns:
        (blocks, weights), both [B, K].
    """
    possible = uniforms.shape[1]
    exists = jnp.arange(possible) < n_blocks[:, None]
    order = jnp.argsort(jnp.where(exists, uniforms, 2.0), axis=1, stable=True)
    order = jnp.pad(order, ((0, 0), (0, max(draws - possible, 0))))[:, :draws]
    used = jnp.minimum(draws, n_blocks)[:, None]
    weight = jnp.where(jnp.arange(draws) < used, n_blocks[:, None] / jnp.maximum(used, 1), 0.0)
    return order.astype(jnp.int32), weight.astype(uniforms.dtype)


def draw(
    method: MethodConfig,
    layout: Layout,
    canvas: Canvas,
    uniforms: Uniforms,
    block: Int[Array, " B"] | None = None,
) -> Draw:
    """Draws K active blocks and masked sets for every row.

    Args:
        method: law, choice of blocks, K and weighting (static).
        layout: the canvas's static part.
        canvas: the rows; ``row_id`` picks each row's uniforms.
        uniforms: the random numbers of the whole global batch.
        block: the active block of each row, which the loader chooses under ``method.pairs``; else None.

    Returns:
        A Draw whose arrays have a leading K axis: block [K, B], masked [K, B, A], weight [K, B]. A row's loss is the
        sum over its draws of weight * -log p over the masked set.
    """
    chex.assert_shape([uniforms.count, uniforms.stratum], (None, method.draws))
    chex.assert_shape(uniforms.position, (None, method.draws, layout.block))
    each = method.masks_per_block
    count = _stratify(uniforms) if method.law == "stratified_count" else uniforms.count
    if method.rate_floor > 0:
        count = method.rate_floor + (1 - method.rate_floor) * count
    count, position = count[canvas.row_id], uniforms.position[canvas.row_id]
    if method.pairs:
        if block is None:
            raise ValueError("method.blocks pairs takes the active block from the data: pass block")
        chosen, share = block[:, None], jnp.ones((block.shape[0], 1), count.dtype)
    else:
        chosen, share = choose_blocks(uniforms.block[canvas.row_id], canvas.n_blocks, method.draws // each)
    chosen = jnp.repeat(chosen, each, axis=1)
    share = jnp.repeat(share, each, axis=1) / each
    valid = _supervised(layout, canvas, chosen)

    if method.law == "antithetic":
        first, second = position[:, 0::2], valid[:, 0::2]
        masked, weight = exact_count(count[:, 0::2], first, second)
        partner, partner_weight = complement(masked, first, second)
        masked = jnp.stack([masked, partner], axis=2).reshape(valid.shape)
        weight = jnp.stack([weight, partner_weight], axis=2).reshape(share.shape)
    else:
        masked, weight = LAWS[method.law](count, position, valid)
    if method.weighting == "masked_mean":
        weight = 1.0 / jnp.maximum(masked.sum(-1), 1).astype(share.dtype)
    elif method.weighting == "uniform":
        weight = jnp.ones_like(share)
    return Draw(chosen.T, jnp.moveaxis(masked, 1, 0), (weight * share).T)


def _supervised(layout: Layout, canvas: Canvas, chosen: Int[Array, "B K"]) -> Bool[Array, "B K A"]:
    return jax.vmap(lambda b: active_positions(layout, canvas, b)[1], in_axes=1, out_axes=1)(chosen)
