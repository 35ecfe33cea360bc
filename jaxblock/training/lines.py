"""Sorts the rows of a batch into lines, whose places have few widths, most of them narrower than the canvas.

Which widths the places have follows from the lengths of the training records (``training.places``). The rows of a line take the
places by length, the longest row the widest place. Whatever the places, a step computes the same draws, losses and gradients,
up to the rounding of sums.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Int

from jaxblock.models.lines import widths_of_rows
from jaxblock.parallel import rules
from jaxblock.types import Places, rows_of_line

if TYPE_CHECKING:
    from jaxblock.data.loader import Batch


def sort_into_lines(batch: Batch, needed: Int[Array, " B"], places: Places) -> tuple[Batch, Bool[Array, ""]]:
    """Sorts the rows of each line by length.

    Args:
        batch: the rows; those of a line follow each other.
        needed: the positions that each row needs.
        places: the places of a line.

    Returns:
        (the rows, of each line the longest first; whether all of them fit their places).
    """
    size = rows_of_line(places)
    order = jnp.argsort(-_by_line(needed, size), axis=1, stable=True)

    def in_order(x: Array) -> Array:
        return jax.vmap(lambda line, at: line[at])(_by_line(x, size), order)

    fits = jnp.all(in_order(needed) <= widths_of_rows(places))
    return jax.tree.map(lambda x: in_order(jnp.asarray(x)).reshape(x.shape), batch), fits


def _by_line(x: Array, size: int) -> Array:
    """Splits rows [B, ...] into lines [B / size, size, ...], so that no row leaves its device."""
    return rules.constrain(x.reshape(-1, size, *x.shape[1:]), "batch", *(None,) * x.ndim)
