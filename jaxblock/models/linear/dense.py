"""One ``dense``: the matmul of every projection, with its bias, its int8 scale and its low-rank branch.

A weight that is split over devices (FSDP) is gathered here, in the narrower of its type and that of the product, and its
gradient is brought back to the split that it is stored in.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import DTypeLike
from jaxtyping import Float, Shaped

from jaxblock.parallel import collectives, rules


class Split(NamedTuple):
    """Logical names of a matrix's two dimensions (``parallel.rules``).

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

    Differentiated in reverse only.

    Args:
        x: inputs. For gradients under a mesh that splits rows, its first axis is the batch, and divides by the split.
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
        y = (_product(x, None, w, wide, None, split, True) * scale).astype(x.dtype)
    if bias is not None:
        y = widely(jnp.add, y, bias.astype(x.dtype))
    return y if lora is None else y + _branch(x, lora, split)


def widely(f: Callable[[Array, Array], Array], x: Float[Array, "*rows D"], v: Float[Array, " D"]) -> Array:
    """``f`` (multiply, add) of rows and a vector of their type, in float32 or wider, rounded once: what it is in that type.

    The vector's gradient is a sum over all rows. In bfloat16 that would be off by a percent, and by another on each mesh.
    """
    wide = jnp.promote_types(x.dtype, jnp.float32)
    return f(x.astype(wide), v.astype(wide)).astype(x.dtype)


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


class Weight(NamedTuple):
    """A matrix made ready for products.

    Attributes:
        stored: what the gradient goes to; never read.
        used: [I, O], gathered, in the type that it is multiplied in.
    """

    stored: Array
    used: Float[Array, "I O"]


def matmul(x: Float[Array, "*rows I"], w: Float[Array, "I O"], out: DTypeLike, split: Split | None = None) -> Array:
    """``x @ w`` in x's type, the result of type ``out``; w's gradient is of w's own type and split.

    A gradient in bfloat16 is the sum of each device's part, rounded to it before it is sent: half the bytes of float32.

    Args:
        x: inputs; see ``dense``.
        w: the matrix.
        out: type of the result.
        split: how the matrix lies on the devices; None leaves that to the compiler.

    Returns:
        The products [*rows, O].
    """
    return _product(x, _to_sum(w, split), w, out, w.dtype, split, True)


def ready(w: Float[Array, "I O"], dtype: DTypeLike, split: Split | None) -> Weight:
    """Gathers a matrix for one or several products: its gradient's parts are added up where they are, and summed once."""
    return Weight(_to_sum(w, split), _whole(_own_part(jax.lax.stop_gradient(w), split), dtype, split))


def product(x: Float[Array, "*rows I"], w: Weight, out: DTypeLike, split: Split | None) -> Float[Array, "*rows O"]:
    """``x @ w``; see ``matmul``."""
    return _product(x, w.stored, w.used, out, w.stored.dtype, split, False)


def _own_part(w: Array, split: Split | None) -> Array:
    """w, pinned to where it is stored: the compiler would spread the gathered layout to what is kept of it."""
    return w if split is None else rules.constrain(w, *split.stored)


def _whole(part: Array, dtype: DTypeLike, split: Split | None) -> Array:
    if jnp.dtype(dtype).itemsize < part.dtype.itemsize:
        part = part.astype(dtype)  # the narrower of the two is sent
    return (part if split is None else collectives.gather(part, *split.used)).astype(dtype)


def _to_sum(w: Array, split: Split | None) -> Array:
    return w if split is None or not collectives.splits_rows() else _parts(w, split)


@partial(jax.custom_vjp, nondiff_argnums=(1,))
def _parts(w: Array, split: Split) -> Array:
    """w in the shape of its gradient's parts, one of each group of rows.

    Stated as a function of w, the sum over devices is taken once for all that use w, and outside of any ``vmap``.
    """
    return collectives.shaped_like_partial_sums(w)


_parts.defvjp(
    lambda w, split: (collectives.shaped_like_partial_sums(w), None),
    lambda split, _, parts: (collectives.sum_over_devices(parts, split.used, split.stored),),
)


@partial(jax.custom_vjp, nondiff_argnums=(3, 4, 5, 6))
def _product(
    x: Array, stored: Array | None, w: Array, out: DTypeLike, kept: DTypeLike | None, split: Split | None, gather: bool
) -> Array:
    """``x @ w``, where w's gradient, of type ``kept``, goes to ``stored`` (both None: w is frozen).

    With ``gather`` w is as it is stored. It must then be an argument of the layer itself: a scan over layers keeps
    those for the backward pass where they are, and would stack copies of anything that is made of them.
    """
    used = _whole(w, x.dtype, split) if gather else w
    return jnp.matmul(x, used, precision=precision(x), preferred_element_type=out)


def _forward(
    x: Array, stored: Array | None, w: Array, out: DTypeLike, kept: DTypeLike | None, split: Split | None, gather: bool
) -> tuple[Array, tuple[Array, Array]]:
    # Not _product: remat policies look for matmuls, and would not see one inside a function with a gradient of its own.
    # Where the forward pass is computed again just before, XLA makes one of the two gathers, since both are stated alike.
    used = _whole(w, x.dtype, split) if gather else w
    return jnp.matmul(x, used, precision=precision(x), preferred_element_type=out), (x, w)


def _backward(
    out: DTypeLike,
    kept: DTypeLike | None,
    split: Split | None,
    gather: bool,
    saved: tuple[Array, Array],
    grad: Array,
) -> tuple[Array, Array | None, None]:
    x, w = saved
    used = _whole(w, x.dtype, split) if gather else w
    grad = grad.astype(x.dtype)
    dx = jnp.matmul(grad, used.T, precision=precision(x))
    if kept is None:
        return dx, None, None
    wide = jnp.promote_types(x.dtype, kept)  # float32 weights get the sum as it was accumulated, not rounded

    # JAX's own gradient of w is (grad^T x)^T. XLA's CPU backend then writes grad transposed from inside the loop that
    # computes it, which took a quarter of a train step (half of one with scanned layers); x^T grad needs none of that.
    def over_rows(x: Array, grad: Array) -> Array:
        rows = tuple(range(x.ndim - 1))
        numbers = ((rows, rows), ((), ()))
        dw = jax.lax.dot_general(x, grad, numbers, precision=precision(x), preferred_element_type=wide)
        return dw.astype(kept)

    if split is None or not collectives.splits_rows():
        return dx, over_rows(x, grad), None
    return dx, collectives.partial_sums(over_rows, x, grad, split.used), None


_product.defvjp(_forward, _backward)


def precision(x: Array) -> str:
    """The stated precision of x's type, never left to the platform."""
    return "highest" if x.dtype == jnp.float32 else "default"
