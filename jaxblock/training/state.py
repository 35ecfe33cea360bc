"""The training state, and how it lies on the mesh."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array
from jax.sharding import Mesh

from jaxblock.models.params import Table
from jaxblock.parallel import axes
from jaxblock.types import Params


class TrainState(NamedTuple):
    """All that a step reads and writes. ``step`` is also the only state of the data and of the draws."""

    params: Params
    opt_state: Any
    step: Array


def create(params: Params, optimizer: optax.GradientTransformation, mesh: Mesh, table: Table) -> TrainState:
    """The state before the first update; the optimizer's state is allocated where its parameters lie."""
    placed = shardings(jax.eval_shape(optimizer.init, params), mesh, table)
    opt_state = jax.jit(optimizer.init, out_shardings=placed.opt_state)(params)
    return TrainState(params, opt_state, jax.device_put(jnp.zeros((), jnp.int32), placed.step))


def shardings(abstract_opt_state: Any, mesh: Mesh, table: Table) -> Any:
    """The sharding of every leaf of a state; the optimizer's follow their parameters, found by path.

    A leaf of a parameter's shape lies as the parameter. One of its rank (the scales of 8-bit moments) is split along
    the axes that have the parameter's size; one of another rank (Adafactor's row and column means) is small, and whole.

    Args:
        abstract_opt_state: the optimizer's state, or its shapes.
        mesh: the mesh.
        table: the parameters' specs.

    Returns:
        A ``TrainState`` of shardings.
    """
    params = axes.param_shardings(mesh, table)
    whole = axes.replicated(mesh)

    def place(path: tuple[Any, ...], leaf: Any) -> Any:
        keys = [str(part.key) for part in path if isinstance(part, jax.tree_util.DictKey)]
        spec = table.get("/".join(keys))
        if spec is None or len(leaf.shape) != len(spec.shape):
            return whole
        # Statistics of rows keep an axis of size 1 where their parameter may be split.
        names = (
            name if size == full else None for name, size, full in zip(spec.axes, leaf.shape, spec.shape, strict=True)
        )
        return axes.sharding(mesh, *names)

    opt_state = jax.tree_util.tree_map_with_path(place, abstract_opt_state)
    placed: Any = TrainState(params, opt_state, whole)  # type: ignore[arg-type]
    return placed
