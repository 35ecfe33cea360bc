"""Splits the rows of a batch over the devices that hold a network's weights, and brings results back to every process."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax import Array
from jax.sharding import Mesh, NamedSharding

from jaxblock.parallel import rules
from jaxblock.types import Params


def mesh_of(params: Params) -> Mesh | None:
    """Returns the mesh that the weights were placed on; None where they are on a device without a mesh."""
    place = getattr(jax.tree.leaves(params)[0], "sharding", None)
    return place.mesh if isinstance(place, NamedSharding) and isinstance(place.mesh, Mesh) else None


def on_mesh_of(params: Params) -> contextlib.AbstractContextManager[object]:
    """Makes the weights' mesh the ambient one for a ``with`` block; does nothing where they are on a single device."""
    mesh = mesh_of(params)
    return contextlib.nullcontext() if mesh is None or mesh.size == 1 else jax.set_mesh(mesh)


def whole_results(params: Params) -> NamedSharding | None:
    """Returns the sharding that copies results to every device, so that every process can read them; None without a mesh."""
    mesh = mesh_of(params)
    return None if mesh is None else rules.replicated(mesh)


def devices_of(params: Params) -> set[jax.Device]:
    """Returns the devices that hold the weights; JAX's first one where they are still on the host."""
    leaf = jax.tree.leaves(params)[0]
    return leaf.devices() if isinstance(leaf, Array) else {jax.devices()[0]}


def spans_processes(params: Params) -> bool:
    """Says whether weights are spread over the devices of several processes, so that one alone cannot read them."""
    return any(isinstance(leaf, Array) and not leaf.is_fully_addressable for leaf in jax.tree.leaves(params))


def even_size(params: Params, size: int) -> int:
    """Returns the smallest number of rows, at least ``size``, that splits evenly over the devices of the weights' mesh."""
    mesh = mesh_of(params)
    ways = 1 if mesh is None else rules.ways(mesh, "batch")
    return -(-size // ways) * ways


def split_rows(params: Params, arrays: Sequence[np.ndarray]) -> tuple[np.ndarray, ...] | tuple[Array, ...]:
    """Splits rows over the devices of the weights' mesh; where they do not split evenly, every device gets all rows.

    Every process must pass all rows. Where the weights are on no mesh, the rows are returned as they are.
    """
    mesh = mesh_of(params)
    if mesh is None:
        return tuple(arrays)
    evenly = even_size(params, len(arrays[0])) == len(arrays[0])
    where = rules.sharding(mesh, "batch") if evenly else rules.replicated(mesh)
    return tuple(jax.make_array_from_callback(rows.shape, where, rows.__getitem__) for rows in arrays)


def split_filled_rows(params: Params, arrays: Sequence[np.ndarray]) -> tuple[np.ndarray, ...] | tuple[Array, ...]:
    """Splits rows evenly over the devices, after filling them up with copies of the first row where they do not split.

    The caller drops what is computed for the copies.
    """
    missing = even_size(params, len(arrays[0])) - len(arrays[0])
    return split_rows(params, [np.concatenate([rows, rows[:1].repeat(missing, axis=0)]) for rows in arrays])


def run_on_mesh_of(params: Params, function: Callable[..., Any], static: tuple[Any, ...], *arguments: Any) -> Any:
    """Runs a function, compiled, on the devices that hold the weights; every device gets all results.

    Args:
        params: the weights.
        function: the function.
        static: its first arguments, for whose values it is compiled.
        *arguments: its other arguments.
    """
    with on_mesh_of(params):
        return _compiled(function, len(static), whole_results(params))(*static, *arguments)


@functools.cache
def _compiled(function: Callable[..., Any], static: int, results: NamedSharding | None) -> Callable[..., Any]:
    """Returns the compiled function, whose first ``static`` arguments are static; ``results`` says where its results go."""
    return jax.jit(function, static_argnums=tuple(range(static)), out_shardings=results)
