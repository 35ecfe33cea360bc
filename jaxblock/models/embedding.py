"""The lookup of tokens' embeddings, and its gradient."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import DTypeLike
from jaxtyping import Float, Int


def look_up(table: Float[Array, "V D"], ids: Int[Array, "*rows"], dtype: DTypeLike) -> Float[Array, "*rows D"]:
    """Rows of a table, in a type; the table's gradient is summed in float32 or wider, whatever either's type.

    A batch has thousands of mask tokens, whose gradients go to one row: a sum in bfloat16 stops growing where a term is
    less than 1/256 of it.

    Args:
        table: the embeddings.
        ids: tokens.
        dtype: of the result.
    """
    # The sum's type is that of what is looked up. That is a table of zeros, which compilers leave out: the embeddings
    # in float32 would be a second, larger copy of them.
    values = jax.lax.stop_gradient(table)[ids].astype(dtype)
    return values + _wide_zeros(table)[ids].astype(dtype)


@jax.custom_vjp
def _wide_zeros(table: Array) -> Array:
    return jnp.zeros(table.shape, jnp.promote_types(table.dtype, jnp.float32))


# A token of the table's type, since a rule may not keep a type; it is no argument, so nothing is kept of the table.
_wide_zeros.defvjp(
    lambda table: (_wide_zeros(table), jnp.zeros((), table.dtype)),
    lambda token, grad: (grad.astype(token.dtype),),
)
