"""A run's state and step by shapes alone: compiled at full size, with nothing allocated."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from jaxblock import build as assembly
from jaxblock.config.config import Config
from jaxblock.data.loader import Batch
from jaxblock.models.architecture import Architecture
from jaxblock.models.spec import Table, abstract_params
from jaxblock.models.transformer import Transformer
from jaxblock.parallel import rules
from jaxblock.training import start as setup
from jaxblock.training.optim.make import make_optimizer
from jaxblock.training.state import TrainState, begin_average, shardings
from jaxblock.training.step import compile_step


class Abstract(NamedTuple):
    """A run without its values.

    Attributes:
        state: what is trained and the optimizer's part, as shapes with shardings.
        frozen: the base beneath adapters, likewise; {} without.
        lower: traces the train step (seconds, for a large one); ``lower().compile()`` is the program.
    """

    state: Any
    frozen: Any
    lower: Callable[[], jax.stages.Lowered]


def build(config: Config, arch: Architecture, mesh: Mesh) -> Abstract:
    """The train step that a config would run on an architecture, and its state.

    Args:
        config: resolved and valid.
        arch: the network, as its config.json gives it.
        mesh: where it would run.

    Raises:
        UserError: a tensor does not split over the mesh.
    """
    net = assembly.network(arch, config.model, config.lora, platform=mesh.devices.flat[0].platform)
    optimizer = make_optimizer(config.optimizer, config.train.steps, net.trainable, config.train.seed)
    state, frozen = shapes(config, net, optimizer, mesh)
    objective = setup.objective(config, net, (arch.eos_id,))
    frozen_table: Table | None = net.param_table if net.lora else None
    how: Any = {"accumulate": config.train.accumulate, "ema": config.optimizer.ema}

    def lower() -> jax.stages.Lowered:
        with jax.set_mesh(mesh):
            jitted = compile_step(objective, optimizer, state, mesh, net.trainable, frozen_table, **how)
            return jitted.lower(state, batch(config), frozen)  # type: ignore[attr-defined]

    return Abstract(state, frozen, lower)


def shapes(config: Config, net: Transformer, optimizer: optax.GradientTransformation, mesh: Mesh) -> tuple[Any, Any]:
    """The state and the base beneath adapters ({} without) of a run, as shapes with shardings.

    Args:
        config: resolved and valid.
        net: the network.
        optimizer: the update rule.
        mesh: where they would be.
    """
    params = abstract_params(net.trainable, "float32" if net.lora else config.model.param_dtype)
    opt_state = jax.eval_shape(optimizer.init, params)
    averaged = config.optimizer.ema > 0
    where = shardings(opt_state, mesh, net.trainable, averaged=averaged)
    average = jax.eval_shape(begin_average, params) if averaged else None
    step: Any = jax.ShapeDtypeStruct((), jnp.int32)
    state = _placed(TrainState(params, opt_state, step, average), where)
    frozen: Any = {}
    if net.lora:
        frozen = placed(net.param_table, mesh, config.model.param_dtype)
    return state, frozen


def placed(table: Table, mesh: Mesh, dtype: str) -> Any:
    """The weights of a table as shapes, each with where it lies on a mesh."""
    return _placed(abstract_params(table, dtype), rules.param_shardings(mesh, table))


def bytes_per_device(tree: Any) -> int:
    """What one device holds of a tree of placed shapes."""
    leaves = jax.tree.leaves(tree)
    return sum(_elements(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in leaves)


def _elements(shape: tuple[int, ...]) -> int:
    count = 1
    for size in shape:
        count *= size
    return count


def _placed(tree: Any, where: Any) -> Any:
    return jax.tree.map(lambda leaf, s: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=s), tree, where)


def batch(config: Config) -> Batch:
    """The shapes of a global batch."""
    rows, canvas = config.train.batch_size, config.canvas
    widths = {"prompt_ids": (canvas.prompt_len,), "response_ids": (canvas.response_len,)}
    shapes: Any = [jax.ShapeDtypeStruct((rows, *widths.get(name, ())), jnp.int32) for name in Batch._fields]
    return Batch(*shapes)
