"""One ``dense``: the matmul of every projection, with its bias, its int8 scale and its low-rank branch.

A weight that is split over devices (FSDP) is gathered here, in the type that it is multiplied in, and its gradient is
brought back to the split that it is stored in.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.ad_checkpoint import checkpoint_name
from jax.typing import DTypeLike
from jaxtyping import Float, Shaped

from jaxblock.parallel import axes

GATHERED = "gathered"
"""The name of gathered weights: a backward pass gathers again what it would cost too much memory to keep."""


class Split(NamedTuple):
    """Logical names of a matrix's two dimensions (``parallel.axes``).

    Attributes:
        stored: as it is stored, and its gradient with it.
        used: as it is multiplied, but for ``fsdp``, over which it is gathered.
    """

    stored: tuple[str | None, str | None]
    used: tuple[str | None, str | None]

    @classmethod
    def of(cls, names: tuple[str | None, ...]) -> Split:
        """That of a matrix which is multiplied as it is stored."""
        n_in, n_out = names
        return cls((n_in, n_out), (n_in, n_out))


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
    split: Split | None = None,
) -> Float[Array, "*rows O"]:
    """``x @ w`` in x's type. float32 means float32 on every platform: no TF32, no bfloat16 passes.

    Args:
        x: inputs.
        w: the matrix; int8 where ``scale`` is given.
        scale: what each column of an int8 matrix is multiplied by.
        bias: added to every row.
        lora: the low-rank branch: ``dropout(x) @ a @ b * scale`` is added. ``w + a @ b`` is never formed.
        split: how the matrix lies on the devices, and its adapters with it; None leaves that to the compiler.

    Returns:
        The products, in x's type.
    """
    if scale is None:
        y = matmul(x, w, x.dtype, split)
    else:
        # The columns' scales come out of the sum, so the matrix stays int8 in memory. It is frozen: no gradient.
        wide = jnp.promote_types(x.dtype, jnp.float32)
        whole = jnp.matmul(x, _gathered(w, split).astype(x.dtype), precision=precision(x), preferred_element_type=wide)
        y = (whole * scale).astype(x.dtype)
    if bias is not None:
        y = y + bias.astype(x.dtype)
    return y if lora is None else y + _branch(x, lora, split)


def _branch(x: Array, lora: LowRank, split: Split | None) -> Array:
    if lora.keys is not None and lora.dropout > 0:
        keep = 1.0 - lora.dropout
        # Keys are per row: a row's draws do not depend on its batch, nor on how the batch is split over devices.
        kept = jax.vmap(lambda key: jax.random.bernoulli(key, keep, x.shape[1:]))(lora.keys)
        x = jnp.where(kept, x / keep, 0).astype(x.dtype)
    of_a, of_b = (None, None) if split is None else (
        Split(("adapter", None), (split.used[0], None)), Split((None, "adapter"), (None, split.used[1])),
    )  # fmt: skip
    inner = matmul(x, lora.a, x.dtype, of_a)
    return matmul(inner, lora.b, x.dtype, of_b) * jnp.asarray(lora.scale, x.dtype)


def matmul(x: Float[Array, "*rows I"], w: Float[Array, "I O"], out: DTypeLike, split: Split | None = None) -> Array:
    """``x @ w`` in x's type, the result of type ``out``; w's gradient is of w's own type and split.

    Args:
        x: inputs.
        w: the matrix.
        out: type of the result.
        split: how the matrix lies on the devices; None leaves that to the compiler.

    Returns:
        The products [*rows, O].
    """
    used = _gathered(jax.lax.stop_gradient(w).astype(x.dtype), split)
    return _product(x, w if split is None else _stored(w, split), used, out, w.dtype)


def _gathered(w: Array, split: Split | None) -> Array:
    return w if split is None else checkpoint_name(axes.gather(w, *split.used), GATHERED)


@partial(jax.custom_vjp, nondiff_argnums=(1,))
def _stored(w: Array, split: Split) -> Array:
    """w, whose gradient is summed to where w is stored: once for all that use it, so outside of any ``vmap``."""
    return w


_stored.defvjp(
    lambda w, split: (w, None),
    lambda split, _, grad: (axes.constrain(grad, *split.stored),),
)


@partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def _product(x: Array, w: Array, used: Array, out: DTypeLike, kept: DTypeLike) -> Array:
    """``x @ used``, where ``used`` is w (of type ``kept``) in x's type; the gradient of ``used`` goes to w, unrounded."""
    return jnp.matmul(x, used, precision=precision(x), preferred_element_type=out)


def _forward(x: Array, w: Array, used: Array, out: DTypeLike, kept: DTypeLike) -> tuple[Array, tuple[Array, Array]]:
    # Not _product: remat policies look for matmuls, and would not see one inside a function with a gradient of its own.
    y = jnp.matmul(x, used, precision=precision(x), preferred_element_type=out)
    return y, (x, used)


def _backward(out: DTypeLike, kept: DTypeLike, saved: tuple[Array, Array], grad: Array) -> tuple[Array, Array, None]:
    # JAX's own gradient of w is (grad^T x)^T. XLA's CPU backend then writes grad transposed from inside the loop that
    # computes it, which took a quarter of a train step (half of one with scanned layers); x^T grad needs none of that.
    x, used = saved
    grad = grad.astype(x.dtype)
    rows = tuple(range(x.ndim - 1))
    dx = jnp.matmul(grad, used.T, precision=precision(x))
    wide = jnp.promote_types(x.dtype, kept)  # float32 weights get the sum as it was accumulated, not rounded
    dw = jax.lax.dot_general(x, grad, ((rows, rows), ((), ())), precision=precision(x), preferred_element_type=wide)
    return dx, dw.astype(kept), None


_product.defvjp(_forward, _backward)


def precision(x: Array) -> str:
    """The stated precision of x's type, never left to the platform."""
    return "highest" if x.dtype == jnp.float32 else "default"
