"""Defines the training state, and how it is placed on the mesh."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array
from jax.sharding import Mesh
from jax.typing import DTypeLike

from jaxblock.models.spec import Table, abstract_params
from jaxblock.parallel import rules
from jaxblock.types import Params


class TrainState(NamedTuple):
    """Holds all that a step reads and writes. The order of the data and the random draws depend on ``step`` alone.

    Attributes:
        params: the trained parameters: the adapters where there are any, else the whole network.
        opt_state: the optimizer's state.
        step: the number of steps done, skipped ones included.
        average: the exponential moving average of ``params`` in float32; None without one.
    """

    params: Params
    opt_state: Any
    step: Array
    average: Params | None = None


def create_state(
    params: Params, optimizer: optax.GradientTransformation, mesh: Mesh, table: Table, *, averaged: bool = False
) -> TrainState:
    """Makes the state before the first update, with the optimizer's state on the devices of its parameters.

    Args:
        params: the trained parameters, placed on the mesh.
        optimizer: the update rule.
        mesh: the mesh.
        table: the specs of the trained parameters.
        averaged: whether to keep a moving average too; it begins equal to the parameters.
    """
    placed = state_shardings(jax.eval_shape(optimizer.init, params), mesh, table, averaged=averaged)
    opt_state = jax.jit(optimizer.init, out_shardings=placed.opt_state)(params)
    average = jax.jit(first_average, out_shardings=placed.average)(params) if averaged else None
    return TrainState(params, opt_state, jax.device_put(jnp.zeros((), jnp.int32), placed.step), average)


def abstract_state(
    optimizer: optax.GradientTransformation, mesh: Mesh, table: Table, dtype: DTypeLike, *, averaged: bool = False
) -> TrainState:
    """Describes the state that ``create_state`` makes, by shapes, types and shardings alone; nothing is allocated.

    Args:
        optimizer: the update rule.
        mesh: the mesh.
        table: the specs of the trained parameters.
        dtype: the type of the trained parameters.
        averaged: whether the state holds a moving average.

    Raises:
        UserError: a parameter does not split over the mesh.
    """
    params = abstract_params(table, dtype)
    opt_state = jax.eval_shape(optimizer.init, params)
    average = jax.eval_shape(first_average, params) if averaged else None
    step: Any = jax.ShapeDtypeStruct((), jnp.int32)
    shapes = TrainState(params, opt_state, step, average)
    placed: TrainState = with_shardings(shapes, state_shardings(opt_state, mesh, table, averaged=averaged))
    return placed


def with_shardings(shapes: Any, placed: Any) -> Any:
    """Returns a tree of shapes in which each has its sharding, from a tree of shardings of the same structure."""
    return jax.tree.map(lambda leaf, s: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=s), shapes, placed)


def first_average(params: Params) -> Params:
    """Returns the average before the first update: a float32 copy of the parameters.

    It must be a copy, since the train step donates both.
    """
    return jax.tree.map(lambda leaf: jnp.array(leaf, jnp.promote_types(leaf.dtype, jnp.float32)), params)


def next_average(average: Params, params: Params, step: Array, decay: float) -> Params:
    """Computes the average after an update: ``d * average + (1 - d) * params`` with d = min(decay, (1 + k) / (10 + k)).

    Early updates k have more weight, so that the average of a short run is not dominated by its initial weights.

    Args:
        average: the average before the update.
        params: the parameters after the update.
        step: k, the number of updates before this one.
        decay: the decay d of a long run.
    """
    k = step.astype(jnp.float32)
    share = 1 - jnp.minimum(decay, (1 + k) / (10 + k))
    return jax.tree.map(lambda mean, leaf: mean + share * (leaf.astype(mean.dtype) - mean), average, params)


def state_shardings(abstract_opt_state: Any, mesh: Mesh, table: Table, *, averaged: bool = False) -> Any:
    """Returns the sharding of every leaf of a state; the path of an optimizer's leaf says to which parameter it belongs.

    A leaf with its parameter's shape is placed as the parameter. One of the same rank (the scales of 8-bit moments) is split
    along the axes that have the parameter's size; one of another rank (Adafactor's row and column means) is small, and is
    not split.

    Args:
        abstract_opt_state: the optimizer's state, or its shapes.
        mesh: the mesh.
        table: the specs of the trained parameters.
        averaged: whether the state holds a moving average.

    Returns:
        A ``TrainState`` of shardings.
    """
    params = rules.param_shardings(mesh, table)
    whole = rules.replicated(mesh)

    def place(path: tuple[Any, ...], leaf: Any) -> Any:
        keys = [str(part.key) for part in path if isinstance(part, jax.tree_util.DictKey)]
        spec = table.get("/".join(keys))
        if spec is None or len(leaf.shape) != len(spec.shape):
            return whole
        # The statistics of rows have an axis of size 1, which cannot be split as the parameter's is.
        names = (
            name if size == full else None for name, size, full in zip(spec.axes, leaf.shape, spec.shape, strict=True)
        )
        return rules.sharding(mesh, *names)

    opt_state = jax.tree_util.tree_map_with_path(place, abstract_opt_state)
    placed: Any = TrainState(params, opt_state, whole, params if averaged else None)  # type: ignore[arg-type]
    return placed
