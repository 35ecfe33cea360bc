"""Sets the precision of the network's arithmetic, independently of the type of weights and activations."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import DTypeLike
from jaxtyping import Float, Int


def at_least_float32(dtype: DTypeLike) -> jnp.dtype:
    """Returns float32, or the type itself where it is wider."""
    return jnp.promote_types(dtype, jnp.float32)


def matmul_precision(x: Array) -> str:
    """Returns the matmul precision for x's type, so that it does not depend on the platform.

    float32 is real float32 on every platform, without TF32 or bfloat16 passes.
    """
    return "highest" if x.dtype == jnp.float32 else "default"


def rounded_once(f: Callable[[Array, Array], Array], x: Float[Array, "*rows D"], v: Float[Array, " D"]) -> Array:
    """Applies ``f`` (multiply or add) to rows and a vector in float32 or wider, and rounds the result to x's type.

    The result is the same as that of ``f`` in x's type, but the gradient of the vector is computed in float32: it is a sum
    over all rows, which in bfloat16 would be wrong by about a percent, and by a different amount on each mesh.
    """
    wide = at_least_float32(x.dtype)
    return f(x.astype(wide), v.astype(wide)).astype(x.dtype)


@partial(jax.custom_jvp, nondiff_argnums=(2,))
def look_up(table: Float[Array, "V D"], ids: Int[Array, "*rows"], dtype: DTypeLike) -> Float[Array, "*rows D"]:
    """Looks up the embeddings of tokens; the gradient of the table is summed in float32 or wider for all types.

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
