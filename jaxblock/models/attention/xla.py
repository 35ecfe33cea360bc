"""Computes attention as matrix products and a softmax that XLA compiles, for every platform, type and mask."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float

from jaxblock.models.attention.mask import Mask
from jaxblock.models.numerics import at_least_float32, matmul_precision

_HIDDEN = -0.7 * float(jnp.finfo(jnp.float32).max)  # finite, so that no gradient is NaN


def attend(
    q: Float[Array, "B T N H"], k: Float[Array, "B S G H"], v: Float[Array, "B S G H"], mask: Mask
) -> Float[Array, "B T N H"]:
    """Computes scaled dot-product attention (see ``backends.attend``); the softmax is in float32 for every type.

    Heads come before positions in all products, forward and backward, and the queries of heads that share keys are one
    matrix. The gradient of ``jax.nn.dot_product_attention``, whose products have the heads within, takes twice as long on a CPU.
    """
    (rows, queries, heads, size), (keys, groups) = q.shape, k.shape[1:3]
    shared = heads // groups
    q = q.reshape(rows, queries, groups, shared, size).transpose(0, 2, 3, 1, 4).reshape(rows, groups, -1, size)
    k, v = k.swapaxes(1, 2), v.swapaxes(1, 2)
    precision, wide = matmul_precision(q), at_least_float32(q.dtype)
    scores = jnp.matmul(q, k.swapaxes(2, 3), precision=precision, preferred_element_type=wide) * size**-0.5
    scores = scores.reshape(rows, groups, shared, queries, keys)
    weights = jax.nn.softmax(jnp.where(_visible(mask, queries, keys), scores, _HIDDEN), axis=-1)
    weights = weights.reshape(rows, groups, -1, keys).astype(v.dtype)
    out = jnp.matmul(weights, v, precision=precision).reshape(rows, groups, shared, queries, size)
    return out.transpose(0, 3, 1, 2, 4).reshape(rows, queries, heads, size)


def _visible(mask: Mask, queries: int, keys: int) -> Array:
    """Returns which keys each query sees, in a shape that broadcasts over [rows, groups, heads of a group, queries, keys]."""
    if mask.kind == "causal":
        return mask.dense(queries, keys)[:, None, None]
    return mask.visible_keys(keys)[:, None, None, None]
