"""Computes attention as matrix products and a softmax that XLA compiles, for every platform, type and mask."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Int

from jaxblock.models.attention.mask import Mask
from jaxblock.models.numerics import at_least_float32, matmul_precision
from jaxblock.types import KeysValues

_HIDDEN = -0.7 * float(jnp.finfo(jnp.float32).max)  # finite, so that no gradient is NaN


def attend(
    q: Float[Array, "B T N H"], k: Float[Array, "B S G H"], v: Float[Array, "B S G H"], mask: Mask
) -> Float[Array, "B T N H"]:
    """Computes scaled dot-product attention (see ``backends.attend``); the softmax is in float32 for every type.

    Heads come before positions in all products, forward and backward, and the queries of heads that share keys are one
    matrix. The gradient of ``jax.nn.dot_product_attention``, whose products have the heads within, takes twice as long on a CPU.
    """
    (rows, queries, heads, size), (keys, groups) = q.shape, k.shape[1:3]
    k, v = k.swapaxes(1, 2), v.swapaxes(1, 2)
    precision, wide = matmul_precision(q), at_least_float32(q.dtype)
    scores = jnp.matmul(_by_group(q, groups), k.swapaxes(2, 3), precision=precision, preferred_element_type=wide)
    scores = (scores * size**-0.5).reshape(rows, groups, heads // groups, queries, keys)
    weights = jax.nn.softmax(jnp.where(_visible(mask, queries, keys), scores, _HIDDEN), axis=-1)
    weights = weights.reshape(rows, groups, -1, keys).astype(v.dtype)
    return _by_position(jnp.matmul(weights, v, precision=precision), queries)


def keep(k: Float[Array, "B S G H"], v: Float[Array, "B S G H"]) -> KeysValues:
    """Returns keys [B, G, H, S] and values [B, G, S, H] in the order in which ``attend_beside`` multiplies them.

    Each step of a decoder reads them, so that they should not be reordered there.
    """
    return KeysValues(k.transpose(0, 2, 3, 1), v.swapaxes(1, 2))


def attend_beside(
    q: Float[Array, "B T N H"], new: KeysValues, kept: KeysValues, first: Int[Array, " B"], mask: Mask
) -> Float[Array, "B T N H"]:
    """Computes bidirectional attention to kept keys and values, some of which new ones replace (see ``beside.attend_beside``).

    The kept ones are not copied. Scores of the new keys, and of the kept ones that are not replaced, share one softmax, which
    divides after the products with the values: their rows are shorter than those of the scores.

    Args:
        q: the queries, rotated.
        new: the new keys and values [B, Q, G, H].
        kept: what ``keep`` returned, of S canvas positions.
        first: the canvas position of each row's first new key.
        mask: which canvas positions are seen.
    """
    (queries, _, size), (width, groups), keys = q.shape[1:], new.k.shape[1:3], kept.k.shape[-1]
    precision, wide, q = matmul_precision(q), at_least_float32(q.dtype), _by_group(q, groups)
    after_first = jnp.arange(keys) - first[:, None]
    stays = mask.visible_keys(keys) & ((after_first < 0) | (after_first >= width))
    replaces = first[:, None] + jnp.arange(width) < jnp.minimum(mask.length, keys)[:, None]

    def scores(k: Array, seen: Array) -> Array:
        products = jnp.matmul(q, k, precision=precision, preferred_element_type=wide) * size**-0.5
        return jnp.where(seen[:, None, None], products, _HIDDEN)

    both, values = keep(*new), (kept.v, new.v.swapaxes(1, 2))
    parts = scores(kept.k, stays), scores(both.k, replaces)
    top = jnp.maximum(*(jnp.max(part, axis=-1, keepdims=True) for part in parts))
    weights = [jnp.exp(part - top) for part in parts]
    total = jnp.add(*(jnp.sum(part, axis=-1, keepdims=True) for part in weights))
    attended = jnp.add(
        *(
            jnp.matmul(part.astype(v.dtype), v, precision=precision, preferred_element_type=wide)
            for part, v in zip(weights, values, strict=True)
        )
    )
    return _by_position((attended / total).astype(new.v.dtype), queries)


def _by_group(q: Float[Array, "B T N H"], groups: int) -> Float[Array, "B G M H"]:
    """Returns the queries of the heads that share keys as one matrix: M is N / G times T, heads first."""
    rows, queries, heads, size = q.shape
    q = q.reshape(rows, queries, groups, heads // groups, size).transpose(0, 2, 3, 1, 4)
    return q.reshape(rows, groups, -1, size)


def _by_position(attended: Float[Array, "B G M H"], queries: int) -> Float[Array, "B T N H"]:
    """Undoes ``_by_group`` for what the queries attended to."""
    rows, groups, _, size = attended.shape
    return attended.reshape(rows, groups, -1, queries, size).transpose(0, 3, 1, 2, 4).reshape(rows, queries, -1, size)


def _visible(mask: Mask, queries: int, keys: int) -> Array:
    """Returns which keys each query sees, in a shape that broadcasts over [rows, groups, heads of a group, queries, keys]."""
    if mask.kind == "causal":
        return mask.dense(queries, keys)[:, None, None]
    return mask.visible_keys(keys)[:, None, None, None]
