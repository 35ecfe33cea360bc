"""Implements the laws by which the masked set of a block is drawn, as pure functions of uniform numbers.

A law draws the masked set S of a block of n supervised positions, with the weight that makes the sum of
``weight * -log p`` over S an unbiased estimate of the block's NELBO (docs/method.md derives each):

    NELBO_block = sum over l = 1..n of E[c_S / l given |S| = l],   c_S = sum over i in S of -log p(x_i | S masked).
"""

from __future__ import annotations

from collections.abc import Callable

import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Float, Int

from jaxblock.diffusion.config import Law

RATE_FLOOR = 1e-3
"""The smallest mask rate in LLaDA's and the paper's training scripts."""


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

    This is the law of LLaDA's and the paper's scripts, kept to reproduce their results and for LLaDA's classical SFT. It is
    biased: sets of one position are drawn too rarely (docs/method.md gives the factor), and the set may be empty.
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


LAWS: dict[Law, Callable[[Array, Array, Array], tuple[Array, Array]]] = {
    "exact_count": exact_count,
    "stratified_count": exact_count,
    "antithetic": exact_count,
    "bernoulli": bernoulli,
    "floored_bernoulli": floored_bernoulli,
}
