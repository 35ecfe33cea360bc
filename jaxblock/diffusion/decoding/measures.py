"""Measures of confidence: how sure the network is of each position, as a number that ranks positions, smallest first."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
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


def best_token(logits: Float[Array, "*rows V"], without: int | None = None) -> Int[Array, "*rows"]:
    """Returns the first token with the largest logit, as ``argmax`` does, which XLA's CPU compiler does not vectorise.

    Args:
        logits: one of each token; of a row that holds NaN any token may be returned (its ``surprise`` is NaN).
        without: a token that is left out; None leaves out none.
    """
    plain, by_pieces = partial(_best_token, without=without), partial(_best_token_by_pieces, without=without)
    if piece_size(logits.shape[-1]) is None:
        return plain(logits)
    return jax.lax.platform_dependent(logits, cpu=by_pieces, default=plain)


def surprise(logits: Float[Array, "*rows V"], token: Int[Array, "*rows"]) -> Float[Array, "*rows"]:
    """Returns -log softmax(logits)[token], as a sum that keeps its precision when the token is nearly certain.

    Args:
        logits: float32 or wider; the mask token's logit included (it stays in the normaliser); finite or -inf.
        token: the token of each row.

    Returns:
        Nats; infinite where the token's logit is -inf.
    """
    if piece_size(logits.shape[-1]) is None:
        return _surprise(logits, token)
    return jax.lax.platform_dependent(logits, token, cpu=_surprise_by_pieces, default=_surprise)


def _best_token(logits: Array, without: int | None = None) -> Array:
    ids = jnp.arange(logits.shape[-1], dtype=jnp.int32)
    if without is not None:
        logits = jnp.where(ids == without, -jnp.inf, logits)
    top = jnp.max(logits, axis=-1, keepdims=True)
    return jnp.min(jnp.where((logits == top) | jnp.isnan(logits), ids, logits.shape[-1] - 1), axis=-1)


def _surprise(logits: Array, token: Array) -> Array:
    top = jnp.max(logits, axis=-1, keepdims=True)
    behind = jnp.sum(jnp.where(logits < top, jnp.exp(logits - top), 0), axis=-1)
    ties = jnp.sum(logits == top, axis=-1) - 1  # tokens beside the best that are as probable
    return (top[..., 0] - _at(logits, token)) + jnp.log1p(behind + ties)


def piece_size(vocabulary: int) -> int | None:
    """Returns the size of the equal pieces in which a CPU looks through a row of logits; None where there are no good ones.

    Of a row, XLA's CPU compiler finds the largest logit and sums exponentials quickly, but is slow where it also has to choose among
    tokens. So the row is gone through for the maximum and the sum of each piece, and only the piece of the best token is
    looked at token by token. Half as many microseconds a row, and a tenth of a ``dual`` step (docs/benchmarks.md).
    """
    sizes = [size for size in range(16, math.isqrt(vocabulary) + 1) if vocabulary % size == 0]
    return max(sizes, default=None)


def _pieces(rows: Array) -> Array:
    """Returns rows [..., V] as pieces [..., pieces, tokens]."""
    size = piece_size(rows.shape[-1])
    assert size is not None
    return rows.reshape(*rows.shape[:-1], -1, size)


def _piece_of_best(logits: Array, tops: Array) -> tuple[Array, Array]:
    """Returns the piece with the best token [...], by the pieces' maxima, and the tokens of that piece [..., tokens]."""
    piece, size = _best_token(tops), logits.shape[-1] // tops.shape[-1]
    return piece, piece[..., None] * size + jnp.arange(size, dtype=jnp.int32)


def _best_token_by_pieces(logits: Array, without: int | None = None) -> Array:
    pieces = _pieces(logits)
    tops = jnp.max(pieces, axis=-1)
    if without is not None:
        its_piece, at = divmod(without, pieces.shape[-1])
        others = jnp.where(jnp.arange(pieces.shape[-1]) == at, -jnp.inf, pieces[..., its_piece, :])
        tops = tops.at[..., its_piece].set(jnp.max(others, axis=-1))
    piece, tokens = _piece_of_best(logits, tops)
    own = jnp.take_along_axis(logits, tokens, axis=-1)
    own = own if without is None else jnp.where(tokens == without, -jnp.inf, own)
    return piece * pieces.shape[-1] + _best_token(own)


def _surprise_by_pieces(logits: Array, token: Array) -> Array:
    tops = jnp.max(_pieces(logits), axis=-1)
    top = jnp.max(tops, axis=-1, keepdims=True)
    piece, tokens = _piece_of_best(logits, tops)
    own = jnp.take_along_axis(logits, tokens, axis=-1)
    # The best token itself is left out, since 1 + a little would be 1: its piece is summed anew.
    best = jnp.arange(own.shape[-1]) == _best_token(own)[..., None]
    of_piece = jnp.sum(jnp.where(best, 0, jnp.exp(own - top)), axis=-1)
    sums = jnp.sum(_pieces(jnp.exp(logits - top)), axis=-1)
    of_others = jnp.sum(jnp.where(jnp.arange(sums.shape[-1]) == piece[..., None], 0, sums), axis=-1)
    return (top[..., 0] - _at(logits, token)) + jnp.log1p(of_piece + of_others)


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
    best = best_token(logits, mask_id)
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
