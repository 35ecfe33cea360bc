"""Multiplies by matrices that are split over devices, and states how they are gathered and where gradients are summed.

In a plain product (``plain_matmul``) XLA decides both, and sends more than it must: it gathers a weight in the wider of its
types, or twice in a backward pass, and sums gradients by all-reduces. ``matmul`` computes the same product, but gathers the
weight in the narrower of its own type and the product's, and sums its gradient by reduce-scatters into the split in which
the weight is stored. ``split=None`` (``Transformer.products = "plain"``) selects the plain product, and a test compares the
two.
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
"""Which products a network uses: those with stated exchanges (``fsdp``), or plain ones, with which tests compare them."""


class Split(NamedTuple):
    """Holds the logical names of a matrix's two dimensions, which ``parallel.rules`` maps to axes of the mesh.

    Attributes:
        stored: the names of the dimensions when the matrix and its gradient are stored.
        used: the names of the dimensions when the matrix is multiplied, after it has been gathered over ``fsdp``.
    """

    stored: tuple[str | None, str | None]
    used: tuple[str | None, str | None]

    @classmethod
    def of(cls, names: tuple[str | None, ...]) -> Split:
        """Returns the split of a matrix whose dimensions have the same names when it is stored and multiplied."""
        n_in, n_out = names
        return cls((n_in, n_out), (n_in, n_out))


class GatheredWeight(NamedTuple):
    """Holds a matrix that has been gathered for several products.

    Attributes:
        gradient_to: an array that receives the gradient of all these products; its values are not used.
        whole: the matrix [I, O], gathered over ``fsdp``, in the type of the products.
    """

    gradient_to: Array
    whole: Float[Array, "I O"]


def plain_matmul(x: Float[Array, "*rows I"], w: Shaped[Array, "I O"], out: DTypeLike) -> Float[Array, "*rows O"]:
    """Multiplies ``x @ w`` in x's type, with a result of type ``out``, and leaves every exchange to the compiler."""
    return jnp.matmul(x, w.astype(x.dtype), precision=matmul_precision(x), preferred_element_type=out)


def matmul(x: Float[Array, "*rows I"], w: Float[Array, "I O"], out: DTypeLike, split: Split | None) -> Array:
    """Multiplies ``x @ w`` in x's type; the gradient of w has w's own type and split.

    For a bfloat16 weight, each device rounds its part of the gradient to bfloat16 before it is sent, which takes half the
    bytes of float32. Only reverse-mode differentiation works.

    Args:
        x: the inputs. For gradients under a mesh that splits rows, its first axis is the batch, and divides by the split.
        w: the matrix, as it is stored.
        out: the type of the result.
        split: how the matrix is split over the devices; None uses the plain product.

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
    """Gathers a matrix for several products.

    Each device adds up its own parts of the gradient, and these sums are then added across devices once.
    """
    if split is None:
        return GatheredWeight(w, w.astype(dtype))
    # Without this, XLA may also store w itself in the gathered layout.
    own = constrain(jax.lax.stop_gradient(w), *split.stored)
    return GatheredWeight(_gradient_target(w, split), _gather(own, dtype, split))


def matmul_gathered(x: Float[Array, "*rows I"], w: GatheredWeight, out: DTypeLike, split: Split | None) -> Array:
    """Multiplies ``x @ w`` as ``matmul`` does, for a matrix that has been gathered already."""
    if split is None:
        return plain_matmul(x, w.gradient_to, out)
    return _multiply(x, w.gradient_to, w.whole, _Product(out, w.gradient_to.dtype, split, gathered=True))


def _gather(part: Array, dtype: DTypeLike, split: Split) -> Array:
    """Returns the whole matrix in type ``dtype``; devices send the narrower of this and its own type."""
    if jnp.dtype(dtype).itemsize < part.dtype.itemsize:
        part = part.astype(dtype)
    return collectives.gather(part, *split.used).astype(dtype)


def _gradient_target(w: Array, split: Split) -> Array:
    """Returns the array that receives the gradient of w: w itself or, where rows are split, a stack of partial sums."""
    return _stack_of_partial_sums(w, split) if collectives.splits_rows() else w


@partial(jax.custom_vjp, nondiff_argnums=(1,))
def _stack_of_partial_sums(w: Array, split: Split) -> Array:
    """Returns an array in the shape of the gradient's partial sums, one for each group of rows.

    Autodiff adds up the gradients of all products with respect to this array first, on each device. It then calls this
    function's own backward pass, which sums over devices, so that this happens only once and outside of any ``vmap``.
    """
    return collectives.shaped_like_partial_sums(w)


_stack_of_partial_sums.defvjp(
    lambda w, split: (collectives.shaped_like_partial_sums(w), None),
    lambda split, _, parts: (collectives.sum_over_devices(parts, split.used, split.stored),),
)


class _Product(NamedTuple):
    """Holds the static arguments of a product.

    Attributes:
        out: the type of the result.
        gradient: the type of the matrix's gradient; None where the matrix is frozen.
        split: how the matrix is split over the devices.
        gathered: whether the matrix has been gathered already. One that has not must be an argument of the layer itself,
            not computed from one: for the backward pass, a scan over layers keeps its arguments without copying them,
            but stacks copies of computed arrays.
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
    # This does not call _multiply, because remat policies do not see a matmul inside a custom_vjp function. Where the
    # forward pass is recomputed just before the backward pass, XLA merges their two gathers, which are identical.
    return plain_matmul(x, product.whole(w, x.dtype), product.out), (x, w)


def _backward(product: _Product, saved: tuple[Array, Array], grad: Array) -> tuple[Array, Array | None, None]:
    x, w = saved
    grad = grad.astype(x.dtype)
    dx = jnp.matmul(grad, product.whole(w, x.dtype).T, precision=matmul_precision(x))
    kept = product.gradient
    if kept is None:
        return dx, None, None
    wide = jnp.promote_types(x.dtype, kept)  # float32 weights get the unrounded float32 sum

    # JAX's own gradient of w is (grad^T x)^T. XLA's CPU backend then writes the transposed grad inside the loop that
    # computes it, which took a quarter of a train step (half with scanned layers). x^T grad needs no transposed copy.
    def over_rows(x: Array, grad: Array) -> Array:
        rows = tuple(range(x.ndim - 1))
        numbers = ((rows, rows), ((), ()))
        dw = jax.lax.dot_general(x, grad, numbers, precision=matmul_precision(x), preferred_element_type=wide)
        return dw.astype(kept)

    if not collectives.splits_rows():
        return dx, over_rows(x, grad), None
    return dx, collectives.partial_sums(over_rows, x, grad, product.split.used), None


_multiply.defvjp(_forward, _backward)
