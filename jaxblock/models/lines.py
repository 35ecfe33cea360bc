"""Lays rows of several widths side by side in lines, so that positions which no row needs are not computed.

A line has a fixed number of places, each with its own width. Norms and matrix products treat all positions of a line alike;
only attention and what is drawn by row must know where a row begins and ends, and split the line again.
"""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Int, Shaped

from jaxblock.types import Places, positions_of_line, rows_of_line


def widths_of_rows(places: Places) -> np.ndarray:
    """Returns the width of each place of a line, the widest first."""
    return np.repeat([width for _, width in places], [count for count, _ in places])


def by_width(x: Shaped[Array, "rows *rest"], places: Places) -> list[Shaped[Array, "_ *rest"]]:
    """Splits what belongs to rows into one array for each width: [lines * count, ...]; a line's rows follow each other."""
    per_line = x.reshape(-1, rows_of_line(places), *x.shape[1:])
    parts = jnp.split(per_line, np.cumsum([count for count, _ in places])[:-1], axis=1)
    return [part.reshape(-1, *x.shape[1:]) for part in parts]


def split_lines(x: Shaped[Array, "lines N *rest"], places: Places) -> list[Shaped[Array, "_ _ *rest"]]:
    """Splits lines into one array of rows for each width: [lines * count, width, ...].

    Lines of which only some positions are left must have kept equally many of each row.
    """
    whole = x.shape[1] == positions_of_line(places)
    kept = None if whole else x.shape[1] // rows_of_line(places)
    sizes = [count * (kept or width) for count, width in places]
    parts = jnp.split(x, np.cumsum(sizes)[:-1], axis=1)
    rows = zip(parts, places, strict=True)
    return [part.reshape(-1, kept or width, *x.shape[2:]) for part, (_, width) in rows]


def join_lines(parts: list[Shaped[Array, "_ _ *rest"]], places: Places) -> Shaped[Array, "lines N *rest"]:
    """Puts the rows of each width side by side in lines again; undoes ``split_lines``."""
    lines = parts[0].shape[0] // places[0][0]
    return jnp.concatenate([part.reshape(lines, -1, *part.shape[2:]) for part in parts], axis=1)


def lay(x: Shaped[Array, "rows T *rest"], places: Places) -> Shaped[Array, "lines N *rest"]:
    """Cuts each row to the width of its place, and lays the rows of a line side by side."""
    widths = [width for _, width in places]
    return join_lines([part[:, :width] for part, width in zip(by_width(x, places), widths, strict=True)], places)


def lay_positions(at: Int[Array, "rows A"], places: Places) -> Int[Array, "lines _"]:
    """Returns where positions of rows are in their lines, row after row."""
    widths = widths_of_rows(places)
    starts = np.cumsum(widths) - widths
    of_line = at.reshape(-1, len(widths), at.shape[1]) + starts[:, None]
    return of_line.reshape(of_line.shape[0], -1).astype(at.dtype)
