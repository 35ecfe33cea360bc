"""Describes a run's state and batch by shapes, so that its train step is lowered at full size without allocating arrays."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from jaxblock.config.config import Config
from jaxblock.data.loader import Batch
from jaxblock.models.spec import Table, abstract_params
from jaxblock.parallel import rules
from jaxblock.training.state import abstract_state, with_shardings
from jaxblock.training.step import Learner, jit_step


class RunShapes(NamedTuple):
    """Holds the arguments of a run's train step, as shapes with shardings.

    Attributes:
        state: the trained parameters and the optimizer's state.
        batch: the global batch.
        frozen: the frozen base of adapters; {} where the whole network is trained.
    """

    state: Any
    batch: Batch
    frozen: Any

    @property
    def bytes_per_device(self) -> float:
        """The bytes of state and frozen base on one device, which are in use for the whole run."""
        return float(bytes_per_device((self.state, self.frozen)))


def run_shapes(config: Config, learner: Learner, mesh: Mesh) -> RunShapes:
    """Returns the shapes of a run's state, batch and base.

    Args:
        config: the run's settings, checked.
        learner: the static parts of the step (`build.learner`), built from these settings.
        mesh: the devices that the step would run on.

    Raises:
        UserError: a tensor does not split evenly over the mesh.
    """
    net, averaged = learner.net, learner.ema > 0
    trained_dtype = "float32" if net.lora else config.model.param_dtype
    state = abstract_state(learner.optimizer, mesh, net.trainable, trained_dtype, averaged=averaged)
    frozen = param_shapes(net.param_table, mesh, config.model.param_dtype) if net.lora else {}
    return RunShapes(state, batch_shapes(config), frozen)


def param_shapes(table: Table, mesh: Mesh, dtype: str) -> Any:
    """Returns the parameters of a table as shapes, each with its sharding over a mesh."""
    return with_shardings(abstract_params(table, dtype), rules.param_shardings(mesh, table))


def batch_shapes(config: Config) -> Batch:
    """Returns the shapes of a global batch."""
    rows, canvas = config.train.batch_size, config.canvas
    widths = {"prompt_ids": (canvas.prompt_len,), "response_ids": (canvas.response_len,)}
    shapes: Any = [jax.ShapeDtypeStruct((rows, *widths.get(name, ())), jnp.int32) for name in Batch._fields]
    return Batch(*shapes)


def lower_step(learner: Learner, shapes: RunShapes, mesh: Mesh) -> jax.stages.Lowered:
    """Traces the train step, which takes seconds for a large network; ``.compile()`` of the result gives the program.

    Args:
        learner: the static parts of the step.
        shapes: the step's arguments.
        mesh: the devices that the step would run on.
    """
    with jax.set_mesh(mesh):
        return jit_step(learner, shapes.state, mesh).lower(*shapes)


def bytes_per_device(tree: Any) -> int:
    """Counts the bytes that one device holds of a tree of arrays, or of shapes with shardings."""
    leaves = jax.tree.leaves(tree)
    return sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in leaves)
