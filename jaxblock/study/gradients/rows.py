"""Computes gradients of weighted token losses, of a whole batch or of each row, as vectors ordered by groups of parameters."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Float

from jaxblock.data.loader import filled
from jaxblock.diffusion.canvas import Canvas, Layout
from jaxblock.diffusion.objective import token_losses
from jaxblock.diffusion.sampling import Draw
from jaxblock.models.spec import Table, flatten
from jaxblock.models.transformer import Transformer
from jaxblock.types import Params

CHUNK = 16
"""The number of rows whose gradients are computed by one call."""


class Part(NamedTuple):
    """Names the slice of a gradient vector that belongs to a group of parameters."""

    name: str
    start: int
    end: int

    def of(self, gradients: Float[np.ndarray, "*n P"]) -> Float[np.ndarray, "*n p"]:
        """Returns this group's entries of gradients."""
        return gradients[..., self.start : self.end]


def group_of(path: str) -> str:
    """Returns the group of a parameter: embedding, attention, feed-forward, norms or head.

    Args:
        path: the parameter's path in the table, such as ``blocks/q``.
    """
    name = path.rsplit("/", 1)[-1]
    if name.endswith("norm"):
        return "norms"
    if name in ("embed", "head"):
        return {"embed": "embedding", "head": "head"}[name]
    return "feed-forward" if name in ("gate", "up", "down") else "attention"


def ordered_paths(table: Table) -> tuple[str, ...]:
    """Returns the paths of the parameters in the order of a gradient vector: group by group."""
    groups = list(dict.fromkeys(group_of(path) for path in table))
    return tuple(sorted(table, key=lambda path: groups.index(group_of(path))))


def parts_of(table: Table) -> list[Part]:
    """Returns where each group of parameters stands in a gradient vector; the first part, ``all``, is the whole vector."""
    sizes = {path: int(np.prod(table[path].shape)) for path in ordered_paths(table)}
    parts, at = [Part("all", 0, sum(sizes.values()))], 0
    for group, paths in itertools.groupby(sizes, group_of):
        end = at + sum(sizes[path] for path in paths)
        parts.append(Part(group, at, end))
        at = end
    return parts


@partial(jax.jit, static_argnums=(0, 1))
def summed_gradient(
    net: Transformer, layout: Layout, params: Params, canvas: Canvas, draw: Draw, token_weight: Float[Array, "B A"]
) -> Float[Array, " P"]:
    """Computes the gradient of a weighted sum of token losses over all rows.

    Args:
        net: the network (static).
        layout: the canvas's static part.
        params: the network's parameters.
        canvas: the rows.
        draw: the active block and the masked set of each row; its weights are not read.
        token_weight: the weight of each position of the active block; positions that are not masked have no loss.

    Returns:
        The gradient in float32 or wider, in the order of ``ordered_paths``.
    """

    def total(params: Params) -> Array:
        return jnp.sum(token_losses(net, params, layout, canvas, draw) * token_weight)

    gradient = flatten(jax.grad(total)(params))
    pieces = [gradient[path].reshape(-1) for path in ordered_paths(net.param_table)]
    return jnp.concatenate([piece.astype(jnp.promote_types(piece.dtype, jnp.float32)) for piece in pieces])


@partial(jax.jit, static_argnums=(0, 1))
def each_gradient(
    net: Transformer, layout: Layout, params: Params, canvas: Canvas, draw: Draw, token_weight: Float[Array, "B A"]
) -> Float[Array, "B P"]:
    """Computes the gradient of each row's weighted sum of token losses; see ``summed_gradient``."""
    alone = jax.tree.map(lambda x: x[:, None], (canvas, draw, token_weight))
    return jax.vmap(lambda one: summed_gradient(net, layout, params, *one))(alone)


def row_gradients(
    net: Transformer,
    layout: Layout,
    params: Params,
    canvas: Canvas,
    draw: Draw,
    token_weight: Float[np.ndarray, "N A"],
) -> Iterator[tuple[slice, Float[np.ndarray, "n P"]]]:
    """Yields the gradients of rows, a chunk at a time, with the place of each chunk; see ``each_gradient``."""
    rows = len(token_weight)
    for at in range(0, rows, CHUNK):
        place = slice(at, min(at + CHUNK, rows))
        taken = np.array(filled(range(at, place.stop), CHUNK))
        piece = jax.tree.map(lambda x, taken=taken: np.asarray(x)[taken], (canvas, draw, token_weight))
        yield place, np.asarray(each_gradient(net, layout, params, *piece))[: place.stop - at]


def all_rows(
    net: Transformer, layout: Layout, params: Params, canvas: Canvas, draw: Draw, token_weight: np.ndarray
) -> Float[np.ndarray, "N P"]:
    """Returns the gradients of all rows in one array; see ``each_gradient``."""
    return np.concatenate([found for _, found in row_gradients(net, layout, params, canvas, draw, token_weight)])
