"""The lookup of tokens' embeddings, with a gradient that is summed in float32."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
from jax import Array
from jax.typing import DTypeLike
from jaxtyping import Float, Int

from jaxblock.models.numerics import at_least_float32


@partial(jax.custom_jvp, nondiff_argnums=(2,))
def look_up(table: Float[Array, "V D"], ids: Int[Array, "*rows"], dtype: DTypeLike) -> Float[Array, "*rows D"]:
    """Looks up the embeddings of tokens; the gradient of the table is summed in float32 or wider, whatever the types.

    A batch has thousands of mask tokens, whose gradients are summed in one row of the table. A bfloat16 sum stops growing
    when a term is less than 1/256 of it.

    Args:
        table: the embeddings of all tokens.
        ids: the tokens to look up.
        dtype: the type of the result.
    """
    return table[ids].astype(dtype)


@look_up.defjvp
def _look_up_jvp(dtype: DTypeLike, primals: tuple[Array, Array], tangents: tuple[Array, Any]) -> tuple[Array, Array]:
    # Only the tangent is cast: the transpose of its lookup, which sums the gradients of a row, is then in float32. Casting
    # the table too would make a second, larger copy of it.
    wide = tangents[0].astype(at_least_float32(tangents[0].dtype))
    return look_up(*primals, dtype), wide[primals[1]].astype(dtype)
