"""Draws the active blocks and the masked sets of a step.

Every draw is a pure function of uniform numbers, so that a test can show by enumeration that an estimator is unbiased. A law
draws the masked set S of a block of n supervised positions, with the weight that makes the sum of
``weight * -log p`` over S an unbiased estimate of the block's NELBO (docs/method.md derives each):

    NELBO_block = sum over l = 1..n of E[c_S / l given |S| = l],   c_S = sum over i in S of -log p(x_i | S masked).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Float, Int

from jaxblock.diffusion.canvas import Canvas, Layout, active_positions
from jaxblock.diffusion.config import MethodConfig

RATE_FLOOR = 1e-3
"""The smallest mask rate in LLaDA's and the paper's training scripts."""


class Draw(NamedTuple):
    """One active block per row, the positions that are masked in it, and the weight of each masked token's loss."""

    block: Int[Array, " B"]
    masked: Bool[Array, "B A"]
    weight: Float[Array, " B"]


class Uniforms(NamedTuple):
    """The random numbers of a step, drawn once for the whole global batch and indexed by ``row_id``.

    Attributes:
        block: decide which blocks of each sequence are active.
        count: decide the masked count or the mask rate.
        stratum: order the draws of the global batch (the permutation of ``stratified_count``).
        position: decide which positions of the block are masked.
        noise: decide the ablations' masks, by response position; R is 0 where there are none.
    """

    block: Float[Array, "B blocks"]
    count: Float[Array, "B K"]  # type: ignore[assignment]  # tuple.count is never meant
    stratum: Float[Array, "B K"]
    position: Float[Array, "B K A"]
    noise: Float[Array, "B K R"]


def draw_uniforms(key: Array, rows: int, draws: int, layout: Layout, *, noise: bool) -> Uniforms:
    """Draws the uniform numbers of one step.

    Args:
        key: ``fold_in(key(seed), step)``.
        rows: the global batch size; another one gives other draws.
        draws: K, the draws of a row.
        layout: the canvas's static part.
        noise: whether the ablations need numbers outside the block (``MethodConfig.needs_noise``).

    Returns:
        Values in [0, 1).
    """
    b, c, s, p, n = jax.random.split(key, 5)
    return Uniforms(
        block=jax.random.uniform(b, (rows, layout.n_blocks)),
        count=jax.random.uniform(c, (rows, draws)),
        stratum=jax.random.uniform(s, (rows, draws)),
        position=jax.random.uniform(p, (rows, draws, layout.block)),
        noise=jax.random.uniform(n, (rows, draws, layout.response_len if noise else 0)),
    )


def smallest(u: Float[Array, "*n A"], count: Int[Array, "*n"], valid: Bool[Array, "*n A"]) -> Bool[Array, "*n A"]:
    """Returns the ``count`` valid positions with the smallest uniforms: a uniformly random set of that size."""
    order = jnp.argsort(jnp.where(valid, u, 2.0), axis=-1, stable=True)
    return (jnp.argsort(order, axis=-1) < count[..., None]) & valid


def exact_count(count: Array, position: Array, valid: Array) -> tuple[Array, Array]:
    """Draws the count l uniformly from 1..n, then a uniform set of l positions; the weight is n / l.

    This is the Rao-Blackwell form of the 1/t estimator.

    Args:
        count: the uniforms [...] that decide the counts.
        position: the uniforms [..., A] that decide the positions.
        valid: the block's supervised positions [..., A].

    Returns:
        (masked [..., A], weight [...]).
    """
    n = valid.sum(-1)
    size = jnp.minimum(1 + jnp.floor(n * count).astype(jnp.int32), n)
    return smallest(position, size, valid), _ratio(n, size, count.dtype)


def bernoulli(count: Array, position: Array, valid: Array) -> tuple[Array, Array]:
    """Masks positions independently at the rate t = count, given that at least one is masked.

    The first masked position j is found from its conditional rates t / (1 - (1 - t)^(positions left)); those after it
    are masked at rate t. That is the law of redrawing S at the same t until it is not empty, without the loop. The
    weight (1 - (1 - t)^n) / t undoes the condition.

    Args:
        count: the mask rates [...], uniform on [0, 1).
        position: the uniforms [..., A] that decide the positions.
        valid: the block's supervised positions [..., A], the first n.

    Returns:
        (masked [..., A], weight [...]).
    """
    n = valid.sum(-1)
    t = jnp.maximum(count, jnp.finfo(count.dtype).tiny)
    left = (n[..., None] - jnp.arange(valid.shape[-1])).astype(t.dtype)
    some = -jnp.expm1(left * jnp.log1p(-t)[..., None])
    conditional = jnp.where(left > 1, t[..., None] / jnp.where(left >= 1, some, 1.0), 1.0)
    hit = (position < conditional) & valid
    first = jnp.argmax(hit, axis=-1)[..., None]
    index = jnp.arange(valid.shape[-1])
    masked = ((index == first) | ((index > first) & (position < t[..., None]))) & valid
    weight = -jnp.expm1(n.astype(t.dtype) * jnp.log1p(-t)) / t
    return masked, jnp.where(n > 0, weight, 0.0)


def floored_bernoulli(count: Array, position: Array, valid: Array) -> tuple[Array, Array]:
    """Masks positions independently at the rate p = floor + (1 - floor) * count, with the weight 1 / p.

    LLaDA's and the paper's scripts draw so. It is biased: a set of one is drawn too rarely by the factor that docs/method.md
    gives, and the set may be empty. It is here to reproduce their results, and for LLaDA's classical SFT.
    """
    p = RATE_FLOOR + (1 - RATE_FLOOR) * count
    return (position < p[..., None]) & valid, 1.0 / p


def complement(masked: Array, position: Array, valid: Array) -> tuple[Array, Array]:
    """Returns the antithetic partner of a set S: its complement and one random element of S, so that it is never empty.

    Args:
        masked: S [..., A].
        position: the uniforms that drew S: the element of S with the largest one is random given S.
        valid: the block's supervised positions [..., A].

    Returns:
        (masked [..., A], weight n / l [...]), l = n + 1 - |S|.
    """
    n = valid.sum(-1)
    again = jnp.argmax(jnp.where(masked, position, -1.0), axis=-1)
    kept = jnp.arange(valid.shape[-1]) == again[..., None]
    partner = (~masked | kept) & valid
    return partner, _ratio(n, partner.sum(-1), position.dtype)


def _ratio(n: Array, size: Array, dtype: jnp.dtype) -> Array:
    return n.astype(dtype) / jnp.maximum(size, 1).astype(dtype)


def _stratify(u: Uniforms) -> Float[Array, "B K"]:
    """Returns (pi(draw) + u) / N, where pi permutes the N = B * K draws of the global batch."""
    flat = u.stratum.reshape(-1)
    rank = jnp.argsort(jnp.argsort(flat, stable=True)).reshape(u.stratum.shape)
    return (rank + u.count) / flat.shape[0]


_LAWS: dict[str, Callable[[Array, Array, Array], tuple[Array, Array]]] = {
    "exact_count": exact_count,
    "stratified_count": exact_count,
    "antithetic": exact_count,
    "bernoulli": bernoulli,
    "floored_bernoulli": floored_bernoulli,
}


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
        block: the active block of each row, which the data give where ``method.pairs``; else None.

    Returns:
        A Draw whose arrays have a leading K axis: block [K, B], masked [K, B, A], weight [K, B]. A row's loss is the
        sum over its draws of weight * -log p over the masked set.
    """
    chex.assert_shape([uniforms.count, uniforms.stratum], (None, method.draws))
    chex.assert_shape(uniforms.position, (None, method.draws, layout.block))
    each = method.masks_per_block
    count = _stratify(uniforms) if method.law == "stratified_count" else uniforms.count
    count, position = count[canvas.row_id], uniforms.position[canvas.row_id]
    if method.pairs:
        if block is None:
            raise ValueError("blocks='pairs' takes the active block from the data: pass block")
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
        masked, weight = _LAWS[method.law](count, position, valid)
    if method.weighting == "masked_mean":
        weight = 1.0 / jnp.maximum(masked.sum(-1), 1).astype(share.dtype)
    elif method.weighting == "uniform":
        weight = jnp.ones_like(share)
    return Draw(chosen.T, jnp.moveaxis(masked, 1, 0), (weight * share).T)


def _supervised(layout: Layout, canvas: Canvas, chosen: Int[Array, "B K"]) -> Bool[Array, "B K A"]:
    return jax.vmap(lambda b: active_positions(layout, canvas, b)[1], in_axes=1, out_axes=1)(chosen)
