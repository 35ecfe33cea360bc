"""One ``dense``: the matmul of every projection, with its bias, its int8 scale and its low-rank branch."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import DTypeLike
from jaxtyping import Float, Shaped


class LowRank(NamedTuple):
    """A LoRA branch of one matrix.

    Attributes:
        a: [I, R], float32.
        b: [R, O], float32.
        scale: alpha / rank.
        dropout: chance that an input of the branch is dropped; used where there are keys.
        keys: one random key a row of the batch; None for no dropout.
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
) -> Float[Array, "*rows O"]:
    """``x @ w`` in x's type. float32 means float32 on every platform: no TF32, no bfloat16 passes.

    Args:
        x: inputs.
        w: the matrix; int8 where ``scale`` is given.
        scale: what each column of an int8 matrix is multiplied by.
        bias: added to every row.
        lora: the low-rank branch: ``dropout(x) @ a @ b * scale`` is added. ``w + a @ b`` is never formed.

    Returns:
        The products, in x's type.
    """
    if scale is None:
        y = matmul(x, w, x.dtype)
    else:
        # The columns' scales come out of the sum, so the matrix stays int8 in memory. It is frozen: no gradient.
        wide = jnp.promote_types(x.dtype, jnp.float32)
        whole = jnp.matmul(x, w.astype(x.dtype), precision=precision(x), preferred_element_type=wide)
        y = (whole * scale).astype(x.dtype)
    if bias is not None:
        y = y + bias.astype(x.dtype)
    return y if lora is None else y + _branch(x, lora)


def _branch(x: Array, lora: LowRank) -> Array:
    if lora.keys is not None and lora.dropout > 0:
        keep = 1.0 - lora.dropout
        # Keys are per row: a row's draws do not depend on its batch, nor on how the batch is split over devices.
        kept = jax.vmap(lambda key: jax.random.bernoulli(key, keep, x.shape[1:]))(lora.keys)
        x = jnp.where(kept, x / keep, 0).astype(x.dtype)
    inner = matmul(x, lora.a, x.dtype)
    return matmul(inner, lora.b, x.dtype) * jnp.asarray(lora.scale, x.dtype)


def _plain_matmul(x: Array, w: Array, out: DTypeLike) -> Array:
    return jnp.matmul(x, w.astype(x.dtype), precision=precision(x), preferred_element_type=out)


matmul = jax.custom_vjp(_plain_matmul, nondiff_argnums=(2,))
"""``matmul(x, w, out)``: [*rows, I] times [I, O] in x's type, the result of type ``out``."""


def _matmul_forward(x: Array, w: Array, out: DTypeLike) -> tuple[Array, tuple[Array, Array]]:
    # Not matmul: remat policies look for matmuls, and would not see one inside a function with a gradient of its own.
    return _plain_matmul(x, w, out), (x, w)


def _matmul_backward(out: DTypeLike, saved: tuple[Array, Array], grad: Array) -> tuple[Array, Array]:
    # JAX's own gradient of w is (grad^T x)^T. XLA's CPU backend then writes grad transposed from inside the loop that
    # computes it, which took a quarter of a train step (half of one with scanned layers); x^T grad needs none of that.
    x, w = saved
    grad = grad.astype(x.dtype)
    rows = tuple(range(x.ndim - 1))
    dx = jnp.matmul(grad, w.T.astype(x.dtype), precision=precision(x))
    wide = jnp.promote_types(x.dtype, w.dtype)  # float32 weights get the sum as it was accumulated, not rounded
    dw = jax.lax.dot_general(x, grad, ((rows, rows), ((), ())), precision=precision(x), preferred_element_type=wide)
    return dx, dw.astype(w.dtype)


matmul.defvjp(_matmul_forward, _matmul_backward)


def precision(x: Array) -> str:
    """The stated precision of x's type, never left to the platform."""
    return "highest" if x.dtype == jnp.float32 else "default"
