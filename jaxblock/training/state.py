"""The training state, and how it lies on the mesh."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import traverse_util
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

    Args:
        abstract_opt_state: the optimizer's state, or its shapes.
        mesh: the mesh.
        table: the parameters' specs.

    Returns:
        A ``TrainState`` of shardings.
    """
    params = axes.param_shardings(mesh, table)
    by_path = traverse_util.flatten_dict(params, sep="/")
    whole = axes.replicated(mesh)

    def place(path: tuple[Any, ...], leaf: Any) -> Any:
        keys = [str(part.key) for part in path if isinstance(part, jax.tree_util.DictKey)]
        return by_path.get("/".join(keys), whole)

    opt_state = jax.tree_util.tree_map_with_path(place, abstract_opt_state)
    placed: Any = TrainState(params, opt_state, whole)  # type: ignore[arg-type]
    return placed
