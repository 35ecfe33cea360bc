"""How precisely the network computes, whatever type its weights and activations have."""

from __future__ import annotations

from collections.abc import Callable

import jax.numpy as jnp
from jax import Array
from jax.typing import DTypeLike
from jaxtyping import Float


def at_least_float32(dtype: DTypeLike) -> jnp.dtype:
    """Returns float32, or the type itself where it is wider."""
    return jnp.promote_types(dtype, jnp.float32)


def matmul_precision(x: Array) -> str:
    """Returns the matmul precision for x's type: it is stated, never left to the platform.

    float32 means float32 on every platform: no TF32, no bfloat16 passes.
    """
    return "highest" if x.dtype == jnp.float32 else "default"


def rounded_once(f: Callable[[Array, Array], Array], x: Float[Array, "*rows D"], v: Float[Array, " D"]) -> Array:
    """Applies ``f`` (multiply or add) to rows and a vector in float32 or wider, and rounds the result to x's type.

    The values are those of ``f`` in x's type. The vector's gradient is not: it is a sum over all rows, which in bfloat16
    would be off by a percent, and by another on each mesh.
    """
    wide = at_least_float32(x.dtype)
    return f(x.astype(wide), v.astype(wide)).astype(x.dtype)
