"""Measures of confidence: how sure the network is of each position, as a number that ranks positions, smallest first."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Int


class Measure(NamedTuple):
    """Measures the confidence by which a rule ranks positions.

    Attributes:
        surprise: takes (logits [B, A, V], tokens [B, A], mask id) and returns a number per position [B, A]; the smallest ranks first.
        confidence: turns that number into the confidence that ``alg_temp`` divides.
    """

    surprise: Callable[[Array, Array, int], Array]
    confidence: Callable[[Array], Array]


def best_token(logits: Float[Array, "*rows V"]) -> Int[Array, "*rows"]:
    """Returns the first token with the largest logit, as ``argmax`` does, which XLA's CPU compiler does not vectorise."""
    top = jnp.max(logits, axis=-1, keepdims=True)
    ids = jnp.arange(logits.shape[-1], dtype=jnp.int32)
    return jnp.min(jnp.where((logits == top) | jnp.isnan(logits), ids, logits.shape[-1] - 1), axis=-1)


def surprise(logits: Float[Array, "*rows V"], token: Int[Array, "*rows"]) -> Float[Array, "*rows"]:
    """Returns -log softmax(logits)[token], as a sum that keeps its precision when the token is nearly certain.

    Args:
        logits: float32 or wider; the mask token's logit included (it stays in the normaliser).
        token: the token of each row.

    Returns:
        Nats; infinite where the token's logit is -inf.
    """
    top = jnp.max(logits, axis=-1, keepdims=True)
    behind = jnp.sum(jnp.where(logits < top, jnp.exp(logits - top), 0), axis=-1)
    ties = jnp.sum(logits == top, axis=-1) - 1  # tokens beside the best that are as probable
    return (top[..., 0] - _at(logits, token)) + jnp.log1p(behind + ties)


def margin_surprise(logits: Float[Array, "*rows V"], mask_id: int) -> Float[Array, "*rows"]:
    """Returns -log(p1 - p2), the log of the best token's lead over the second best (Dream's ``topk_margin``).

    The mask token counts as second best but never as best: where it is the most probable token, there is no lead.

    Args:
        logits: float32 or wider; -inf for what was filtered out.
        mask_id: the mask token.

    Returns:
        Nats; infinite where there is no lead.
    """
    ids = jnp.arange(logits.shape[-1])
    best = best_token(jnp.where(ids == mask_id, -jnp.inf, logits))
    runner_up = jnp.max(jnp.where(ids == best[..., None], -jnp.inf, logits), axis=-1)
    # p1 - p2 = p1 (1 - e^(l2 - l1)). Leads near 1 are equal in float32 as differences, but not as logarithms.
    behind = jnp.minimum(runner_up - _at(logits, best), 0.0)
    log_lead = jnp.where(behind > -0.7, jnp.log(-jnp.expm1(behind)), jnp.log1p(-jnp.exp(behind)))
    return surprise(logits, best) - log_lead


def entropy(logits: Float[Array, "*rows V"]) -> Float[Array, "*rows"]:
    """Returns -sum p log(p + 1e-10) of softmax(logits) in nats, which Dream's ``entropy`` ranks by, smallest first.

    Args:
        logits: float32 or wider; -inf for what was filtered out.
    """
    p = jax.nn.softmax(logits, axis=-1)
    return -jnp.sum(p * jnp.log(p + 1e-10), axis=-1)


def _probability(surprise: Array) -> Array:
    return jnp.exp(-surprise)


def _at(logits: Array, token: Array) -> Array:
    return jnp.take_along_axis(logits, token[..., None], axis=-1)[..., 0]


TOKEN = Measure(lambda logits, token, mask_id: surprise(logits, token), _probability)
"""The probability of the token."""
LEAD = Measure(lambda logits, token, mask_id: margin_surprise(logits, mask_id), _probability)
"""The lead of the best token over the second best."""
ENTROPY = Measure(lambda logits, token, mask_id: entropy(logits), jnp.negative)
"""The entropy of the position's distribution."""
