"""Keeps what the network believed of each position in the step that committed it, for a trace of a decode."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Float, Int

from jaxblock.diffusion.decoding.measures import surprise


class Beliefs(NamedTuple):
    """Holds probabilities under the softmax of the raw logits: after guidance, before temperature, filters and suppression.

    The mask token counts among the tokens, although it is never committed.

    Attributes:
        probability: the probability of the token that was committed; 0 where none was.
        ids: the most probable tokens, best first; ties go to the lowest id.
        probabilities: their probabilities.
    """

    probability: Float[Array, "B P"]
    ids: Int[Array, "B P K"]
    probabilities: Float[Array, "B P K"]


def no_beliefs(rows: int, positions: int, count: int) -> Beliefs:
    """Returns the beliefs about positions of which none is committed; ``count`` is K, the tokens kept for each."""
    ids = jnp.zeros((rows, positions, count), jnp.int32)
    return Beliefs(jnp.zeros((rows, positions)), ids, jnp.zeros(ids.shape))


def believed(logits: Float[Array, "B P V"], token: Int[Array, "B P"], count: int) -> Beliefs:
    """Returns what the network believes of positions.

    Args:
        logits: what the step's tokens are chosen by.
        token: the token that each position would get.
        count: K, the most probable tokens that are kept.
    """
    best, ids = jax.lax.top_k(logits, count)
    share = jnp.exp(best - jax.nn.logsumexp(logits, axis=-1, keepdims=True))
    return Beliefs(jnp.exp(-surprise(logits, token)), ids, share)


def with_committed(beliefs: Beliefs, found: Beliefs, chosen: Bool[Array, "B P"]) -> Beliefs:
    """Returns the beliefs after a step.

    Args:
        beliefs: those of the steps before.
        found: what the network believes in this step.
        chosen: the positions that the step commits.
    """
    return jax.tree.map(lambda old, new: pick(chosen, new.astype(old.dtype), old), beliefs, found)


def pick(positions: Bool[Array, "B P"], new: Array, old: Array) -> Array:
    """Returns ``new`` at these positions and ``old`` at the others, both [B, P, ...]."""
    return jnp.where(positions.reshape(*positions.shape, *[1] * (old.ndim - 2)), new, old)


def moved(values: Array, to: Int[Array, "B R"]) -> Array:
    """Returns, for each of R positions, the values [B, R, ...] of the position of ``values`` [B, P, ...] that ``to`` names."""
    return jnp.take_along_axis(values, to.reshape(*to.shape, *[1] * (values.ndim - 2)), axis=1)
