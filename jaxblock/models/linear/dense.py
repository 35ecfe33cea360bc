"""Computes every projection of the network: a matmul with optional bias, int8 scale and low-rank branch."""

from __future__ import annotations

import chex
import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Shaped

from jaxblock.models.linear.fsdp import Split, matmul, matmul_frozen
from jaxblock.models.linear.lora import LowRank
from jaxblock.models.lines import by_width, join_lines, split_lines
from jaxblock.models.numerics import at_least_float32, rounded_once


def dense(
    x: Float[Array, "*rows I"],
    w: Shaped[Array, "I O"],
    *,
    scale: Float[Array, " O"] | None = None,
    bias: Float[Array, " O"] | None = None,
    lora: LowRank | None = None,
    split: Split | None = None,
) -> Float[Array, "*rows O"]:
    """Multiplies ``x @ w`` in x's type (see ``fsdp.matmul``), and applies scale, bias and low-rank branch where given.

    Args:
        x: the inputs.
        w: the matrix. Where ``scale`` is given it is int8 and frozen: it has no gradient.
        scale: what each column of an int8 matrix is multiplied by.
        bias: the vector that is added to every row.
        lora: the low-rank branch: ``dropout(x) @ a @ b * scale`` is added. ``w + a @ b`` is never formed.
        split: how the matrix and its adapters are split over the devices; None uses the plain product.

    Returns:
        The outputs, in x's type.
    """
    chex.assert_equal(x.shape[-1], w.shape[0])
    chex.assert_shape([v for v in (scale, bias) if v is not None], (w.shape[1],))
    y = matmul(x, w, x.dtype, split) if scale is None else _int8_matmul(x, w, scale, split)
    if bias is not None:
        y = rounded_once(jnp.add, y, bias.astype(x.dtype))
    return y if lora is None else y + _low_rank(x, lora, split)


def _int8_matmul(x: Array, w: Array, scale: Array, split: Split | None) -> Array:
    """Multiplies by an int8 matrix and then scales each column of the result, so that the matrix stays int8 in memory."""
    return (matmul_frozen(x, w, at_least_float32(x.dtype), split) * scale).astype(x.dtype)


def _low_rank(x: Array, lora: LowRank, split: Split | None) -> Array:
    """Computes the output of a low-rank branch, with dropout on its input."""
    if lora.keys is not None and lora.dropout > 0:
        if lora.places:
            rows = zip(split_lines(x, lora.places), by_width(lora.keys, lora.places), strict=True)
            x = join_lines([_dropped(*each, lora.dropout) for each in rows], lora.places)
        else:
            x = _dropped(x, lora.keys, lora.dropout)
    split_a = None if split is None else Split(("adapter", None), (split.used[0], None))
    split_b = None if split is None else Split((None, "adapter"), (None, split.used[1]))
    inner = matmul(x, lora.a, x.dtype, split_a)
    return matmul(inner, lora.b, x.dtype, split_b) * jnp.asarray(lora.scale, x.dtype)


def _dropped(x: Float[Array, "B *rest I"], keys: Shaped[Array, " B"], chance: float) -> Float[Array, "B *rest I"]:
    """Drops inputs by chance. With a key per row, what a row drops depends neither on other rows nor on the row's width."""
    keep = 1.0 - chance
    kept = jax.vmap(lambda key: jax.random.bernoulli(key, keep, x.shape[1:]))(keys)
    return jnp.where(kept, x / keep, 0).astype(x.dtype)
