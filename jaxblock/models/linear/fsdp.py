"""Matrix products whose weight is split over devices: what is gathered, and where the gradient is summed, is stated here.

XLA decides both by itself in the plain product (``plain_matmul``), and sends more: it gathers a weight in the wider of its
types or twice in a backward pass, and sums gradients by all-reduces. ``matmul`` is the same product with the exchanges
stated: the weight is gathered in the narrower of its type and that of the product, and its gradient is summed by
reduce-scatters to the split that the weight is stored in. The plain product is the oracle of the other: ``split=None``
(``Transformer.products = "plain"``) switches to it, and a test compares the two.
"""

from __future__ import annotations

from functools import partial
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import DTypeLike
from jaxtyping import Float, Shaped

from jaxblock.models.numerics import matmul_precision
from jaxblock.parallel import collectives
from jaxblock.parallel.rules import constrain

Products = Literal["fsdp", "plain"]
"""Which products a network takes: those with stated exchanges, or the plain ones that are their oracle."""


class Split(NamedTuple):
    """The logical names of a matrix's two dimensions, which ``parallel.rules`` maps to axes of the mesh.

    Attributes:
        stored: the names under which the matrix is stored, and its gradient with it.
        used: the names under which it is multiplied; before that it is gathered over ``fsdp``.
    """

    stored: tuple[str | None, str | None]
    used: tuple[str | None, str | None]

    @classmethod
    def of(cls, names: tuple[str | None, ...]) -> Split:
        """Returns the split of a matrix whose dimensions have the same names when it is stored and multiplied."""
        n_in, n_out = names
        return cls((n_in, n_out), (n_in, n_out))


class GatheredWeight(NamedTuple):
    """A matrix that has been gathered for several products.

    Attributes:
        gradient_to: receives the gradient of all these products; its values are never read.
        whole: the matrix [I, O], gathered over ``fsdp``, in the type that it is multiplied in.
    """

    gradient_to: Array
    whole: Float[Array, "I O"]


def plain_matmul(x: Float[Array, "*rows I"], w: Shaped[Array, "I O"], out: DTypeLike) -> Float[Array, "*rows O"]:
    """Multiplies ``x @ w`` in x's type, with a result of type ``out``, and leaves every exchange to the compiler."""
    return jnp.matmul(x, w.astype(x.dtype), precision=matmul_precision(x), preferred_element_type=out)


def matmul(x: Float[Array, "*rows I"], w: Float[Array, "I O"], out: DTypeLike, split: Split | None) -> Array:
    """Multiplies ``x @ w`` in x's type; the gradient of w has w's own type and split.

    A gradient in bfloat16 is the sum of each device's part, rounded to bfloat16 before it is sent: half the bytes of
    float32. Differentiated in reverse only.

    Args:
        x: the inputs. For gradients under a mesh that splits rows, its first axis is the batch, and divides by the split.
        w: the matrix, as it is stored.
        out: the type of the result.
        split: how the matrix is split over the devices; None takes the plain product.

    Returns:
        The products [*rows, O].
    """
    if split is None:
        return plain_matmul(x, w, out)
    return _multiply(x, _gradient_target(w, split), w, _Product(out, w.dtype, split, gathered=False))


def matmul_frozen(x: Float[Array, "*rows I"], w: Shaped[Array, "I O"], out: DTypeLike, split: Split | None) -> Array:
    """Multiplies ``x @ w`` as ``matmul`` does, for a matrix that has no gradient; int8 is sent as int8."""
    if split is None:
        return plain_matmul(x, jax.lax.stop_gradient(w), out)
    return _multiply(x, None, w, _Product(out, None, split, gathered=False))


def gather_weight(w: Float[Array, "I O"], dtype: DTypeLike, split: Split | None) -> GatheredWeight:
    """Gathers a matrix for several products; the parts of its gradient are added up where they are, and summed once."""
    if split is None:
        return GatheredWeight(w, w.astype(dtype))
    # The compiler would otherwise spread the gathered layout to the copy of w that is kept.
    own = constrain(jax.lax.stop_gradient(w), *split.stored)
    return GatheredWeight(_gradient_target(w, split), _gather(own, dtype, split))


def matmul_gathered(x: Float[Array, "*rows I"], w: GatheredWeight, out: DTypeLike, split: Split | None) -> Array:
    """Multiplies x by a matrix that has been gathered already; otherwise as ``matmul``."""
    if split is None:
        return plain_matmul(x, w.gradient_to, out)
    return _multiply(x, w.gradient_to, w.whole, _Product(out, w.gradient_to.dtype, split, gathered=True))


def _gather(part: Array, dtype: DTypeLike, split: Split) -> Array:
    """Returns the whole matrix in type ``dtype``; the narrower of this and its own type is what devices send."""
    if jnp.dtype(dtype).itemsize < part.dtype.itemsize:
        part = part.astype(dtype)
    return collectives.gather(part, *split.used).astype(dtype)


def _gradient_target(w: Array, split: Split) -> Array:
    """Returns what the gradient of w is given to: w itself, or the stack of its partial sums where rows are split."""
    return _stack_of_partial_sums(w, split) if collectives.splits_rows() else w


@partial(jax.custom_vjp, nondiff_argnums=(1,))
def _stack_of_partial_sums(w: Array, split: Split) -> Array:
    """Returns an array in the shape of the gradient's partial sums, one for each group of rows.

    As a function of w of its own, it makes the sum over devices happen once for all products that use w, and outside of
    any ``vmap``.
    """
    return collectives.shaped_like_partial_sums(w)


_stack_of_partial_sums.defvjp(
    lambda w, split: (collectives.shaped_like_partial_sums(w), None),
    lambda split, _, parts: (collectives.sum_over_devices(parts, split.used, split.stored),),
)


class _Product(NamedTuple):
    """What is static about a product.

    Attributes:
        out: the type of the result.
        gradient: the type of the matrix's gradient; None where the matrix is frozen.
        split: how the matrix is split over the devices.
        gathered: whether the matrix has been gathered already. A matrix that has not must be an argument of the layer
            itself: a scan over layers keeps its arguments for the backward pass where they are, and would stack copies
            of anything that is made of them.
    """

    out: DTypeLike
    gradient: DTypeLike | None
    split: Split
    gathered: bool

    def whole(self, w: Array, dtype: DTypeLike) -> Array:
        """Returns the whole matrix in type ``dtype``."""
        return w if self.gathered else _gather(w, dtype, self.split)


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def _multiply(x: Array, gradient_to: Array | None, w: Array, product: _Product) -> Array:
    """Multiplies ``x @ w``; the gradient of w is given to ``gradient_to`` (None where w is frozen), not to w."""
    return plain_matmul(x, product.whole(w, x.dtype), product.out)


def _forward(x: Array, gradient_to: Array | None, w: Array, product: _Product) -> tuple[Array, tuple[Array, Array]]:
    # Not a call of _multiply: remat policies look for matmuls, and do not see one inside a function with a gradient of
    # its own. Where the forward pass is computed again just before the backward one, XLA makes one of the two gathers,
    # since both are stated alike.
    return plain_matmul(x, product.whole(w, x.dtype), product.out), (x, w)


def _backward(product: _Product, saved: tuple[Array, Array], grad: Array) -> tuple[Array, Array | None, None]:
    x, w = saved
    grad = grad.astype(x.dtype)
    dx = jnp.matmul(grad, product.whole(w, x.dtype).T, precision=matmul_precision(x))
    kept = product.gradient
    if kept is None:
        return dx, None, None
    wide = jnp.promote_types(x.dtype, kept)  # float32 weights get the sum as it was accumulated, not rounded

    # JAX's own gradient of w is (grad^T x)^T. XLA's CPU backend then writes grad transposed from inside the loop that
    # computes it, which took a quarter of a train step (half of one with scanned layers); x^T grad needs none of that.
    def over_rows(x: Array, grad: Array) -> Array:
        rows = tuple(range(x.ndim - 1))
        numbers = ((rows, rows), ((), ()))
        dw = jax.lax.dot_general(x, grad, numbers, precision=matmul_precision(x), preferred_element_type=wide)
        return dw.astype(kept)

    if not collectives.splits_rows():
        return dx, over_rows(x, grad), None
    return dx, collectives.partial_sums(over_rows, x, grad, product.split.used), None


_multiply.defvjp(_forward, _backward)
