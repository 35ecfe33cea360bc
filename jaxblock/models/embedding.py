"""The lookup of tokens' embeddings, and its gradient."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import DTypeLike
from jaxtyping import Float, Int


@partial(jax.custom_jvp, nondiff_argnums=(2,))
def look_up(table: Float[Array, "V D"], ids: Int[Array, "*rows"], dtype: DTypeLike) -> Float[Array, "*rows D"]:
    """Rows of a table, in a type; the table's gradient is summed in float32 or wider, whatever either's type.

    A batch has thousands of mask tokens, whose gradients go to one row: a sum in bfloat16 stops growing where a term is
    less than 1/256 of it.

    Args:
        table: the embeddings.
        ids: tokens.
        dtype: of the result.
    """
    return table[ids].astype(dtype)


@look_up.defjvp
def _change(dtype: DTypeLike, primals: tuple[Array, Array], tangents: tuple[Array, Any]) -> tuple[Array, Array]:
    # Only the change is widened: its transpose sums. The table itself in float32 would be a second, larger copy.
    wide = tangents[0].astype(jnp.promote_types(tangents[0].dtype, jnp.float32))
    return look_up(*primals, dtype), wide[primals[1]].astype(dtype)
