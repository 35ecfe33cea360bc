"""One ``dense``: the matmul of every projection, with its bias, its int8 scale and its low-rank branch."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Shaped

from jaxblock.models.linear.fsdp import Split, matmul, matmul_frozen


class LowRank(NamedTuple):
    """The LoRA branch of one matrix.

    Attributes:
        a: the matrix [I, R] that takes an input to the rank, float32.
        b: the matrix [R, O] that takes it from there to the output, float32.
        scale: what the branch is multiplied by: alpha / rank.
        dropout: the chance that an input of the branch is dropped; applied where there are keys.
        keys: one random key for each row of the batch; None for no dropout.
    """

    a: Float[Array, "I R"]
    b: Float[Array, "R O"]
    scale: float
    dropout: float = 0.0
    keys: Shaped[Array, " B"] | None = None


def dense(
    x: Float[Array, "*rows I"],
    w: Shaped[Array, "I O"],
    *,
    scale: Float[Array, " O"] | None = None,
    bias: Float[Array, " O"] | None = None,
    lora: LowRank | None = None,
    split: Split | None = None,
) -> Float[Array, "*rows O"]:
    """Multiplies ``x @ w`` in x's type and adds what else the projection has (see ``fsdp.matmul``).

    Args:
        x: the inputs.
        w: the matrix; int8 where ``scale`` is given, and then frozen: it has no gradient.
        scale: what each column of an int8 matrix is multiplied by.
        bias: the vector that is added to every row.
        lora: the low-rank branch: ``dropout(x) @ a @ b * scale`` is added. ``w + a @ b`` is never formed.
        split: how the matrix is split over the devices, and its adapters with it; None takes the plain product.

    Returns:
        The outputs, in x's type.
    """
    chex.assert_equal(x.shape[-1], w.shape[0])
    chex.assert_shape([v for v in (scale, bias) if v is not None], (w.shape[1],))
    if scale is None:
        y = matmul(x, w, x.dtype, split)
    else:
        # The scale of a column is the same for all terms of its sum, so the matrix stays int8 in memory.
        wide = jnp.promote_types(x.dtype, jnp.float32)
        y = (matmul_frozen(x, w, wide, split) * scale).astype(x.dtype)
    if bias is not None:
        y = rounded_once(jnp.add, y, bias.astype(x.dtype))
    return y if lora is None else y + _low_rank(x, lora, split)


def rounded_once(f: Callable[[Array, Array], Array], x: Float[Array, "*rows D"], v: Float[Array, " D"]) -> Array:
    """Applies ``f`` (multiply or add) to rows and a vector in float32 or wider, and rounds the result to x's type.

    The values are those of ``f`` in x's type. The vector's gradient is not: it is a sum over all rows, which in bfloat16
    would be off by a percent, and by another on each mesh.
    """
    wide = jnp.promote_types(x.dtype, jnp.float32)
    return f(x.astype(wide), v.astype(wide)).astype(x.dtype)


def _low_rank(x: Array, lora: LowRank, split: Split | None) -> Array:
    """Computes the output of a low-rank branch, with dropout on its input."""
    if lora.keys is not None and lora.dropout > 0:
        keep = 1.0 - lora.dropout
        # Keys are per row: a row's draws depend neither on the other rows nor on how the batch is split over devices.
        kept = jax.vmap(lambda key: jax.random.bernoulli(key, keep, x.shape[1:]))(lora.keys)
        x = jnp.where(kept, x / keep, 0).astype(x.dtype)
    split_a = None if split is None else Split(("adapter", None), (split.used[0], None))
    split_b = None if split is None else Split((None, "adapter"), (None, split.used[1]))
    inner = matmul(x, lora.a, x.dtype, split_a)
    return matmul(inner, lora.b, x.dtype, split_b) * jnp.asarray(lora.scale, x.dtype)
