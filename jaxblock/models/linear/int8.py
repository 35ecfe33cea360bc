"""Stores a frozen base in int8: each layer's matrices become whole numbers with one scale per column.

This takes half of bfloat16's memory and is only for frozen weights under LoRA. Embedding, head, norms and biases keep their
type.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Int8

from jaxblock.models.spec import ParamSpec, Table

SCALE = "_scale"
"""The suffix of the scales' name: the columns of the int8 matrix ``blocks/q`` have the scales ``blocks/q_scale``."""


def quantised(spec: ParamSpec) -> bool:
    """Says whether a parameter is stored in int8, as the layers' matrices are."""
    return spec.stacked and spec.is_matrix


def int8_table(base: Table) -> Table:
    """Returns the specs of the int8 network: its matrices are int8, and have their scales beside them."""
    specs: dict[str, ParamSpec] = {}
    for path, spec in base.items():
        specs[path] = spec
        if quantised(spec):
            specs[path] = replace(spec, dtype="int8")
            (n_layers, _, n_out), (_, _, axis) = spec.shape, spec.axes
            specs[path + SCALE] = ParamSpec((n_layers, n_out), ("layers", axis), None, "", dtype="float32")
    return specs


@partial(jax.jit, donate_argnums=0)
def quantise(w: Float[Array, "*layers I O"]) -> tuple[Int8[Array, "*layers I O"], Float[Array, "*layers O"]]:
    """Rounds each column to 255 levels, symmetric about 0.

    Args:
        w: the matrices; their memory is donated.

    Returns:
        The whole numbers and the scales; ``numbers * scales`` is within half a scale of w.
    """
    wide = w.astype(jnp.float32)
    scale = jnp.maximum(jnp.max(jnp.abs(wide), axis=-2), jnp.finfo(jnp.float32).tiny) / 127.0
    return jnp.round(wide / scale[..., None, :]).astype(jnp.int8), scale
