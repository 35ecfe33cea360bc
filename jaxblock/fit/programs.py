"""Compiles the programs of a plan, the train step and one block of the decoder, from shapes and without weights."""

from __future__ import annotations

import dataclasses
import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from jaxblock import build
from jaxblock.config.config import Config
from jaxblock.diffusion import canvas as canvases
from jaxblock.diffusion.decoding import decoder
from jaxblock.diffusion.layouts import decoding_layout
from jaxblock.fit.costs import Costs, count_costs
from jaxblock.fit.hlo import parse_program
from jaxblock.fit.memory import Memory, compile_lowered
from jaxblock.fit.placement import row_shards
from jaxblock.fit.shapes import RunShapes, batch_shapes, bytes_per_device, lower_step, param_shapes, run_shapes
from jaxblock.models.architecture import Architecture
from jaxblock.models.linear.lora import attach
from jaxblock.models.spec import abstract_params


class Program(NamedTuple):
    """Holds the memory and costs of a program, for one device.

    Attributes:
        memory: the memory that the program needs.
        parts: the bytes of each kind of argument, and estimates of the bytes of some temporaries, by name.
        costs: the costs of running the program once; None where it does not fit.
        seconds: the time that the compiler took.
    """

    memory: Memory
    parts: dict[str, float]
    costs: Costs | None
    seconds: float


def train_program(config: Config, arch: Architecture, mesh: Mesh) -> Program:
    """Compiles the train step.

    Args:
        config: the run's settings, which describe the mesh ``mesh``.
        arch: the network's sizes and special ids.
        mesh: the devices to compile for.
    """
    platform = mesh.devices.flat[0].platform
    learner = build.learner(config, arch, (arch.eos_id,), platform=platform)
    shapes = run_shapes(config, learner, mesh)
    arguments = _arguments(shapes, config)
    parts = {**arguments, **_temporaries(config, arch, shapes, platform)}
    return _compiled(lower_step(learner, shapes, mesh), parts, sum(arguments.values()), mesh)


def _arguments(shapes: RunShapes, config: Config) -> dict[str, float]:
    """Returns the bytes on one device of each kind of argument of the train step."""
    rows = -(-config.train.batch_size // row_shards(config))
    state = shapes.state
    sizes: dict[str, Any] = {
        "parameters": state.params,
        "frozen base": shapes.frozen,
        "optimizer state": state.opt_state,
        "moving average": state.average,
    }
    parts = {name: float(bytes_per_device(tree)) for name, tree in sizes.items() if jax.tree.leaves(tree)}
    return {**parts, "batch": 4.0 * rows * (config.canvas.prompt_len + config.canvas.response_len + 5)}


def _temporaries(config: Config, arch: Architecture, shapes: RunShapes, platform: str) -> dict[str, float]:
    """Estimates the train step's temporaries from shapes: upper bounds, since not all of them exist at the same time."""
    train, canvas, model = config.train, config.canvas, config.model
    rows = max(train.batch_size // (row_shards(config) * train.accumulate), 1)
    classical = config.method.objective == "classical"
    positions = (model.loss_chunk or canvas.response_len) if classical else canvas.block
    parts = {"gradients": float(bytes_per_device(shapes.state.params))}
    if model.remat != "offload":  # which keeps activations in the host's memory
        parts["activations"] = activations(config, arch, rows, platform)
    parts["logits"] = 4.0 * rows * config.method.draws * positions * arch.vocab_size / train.tensor
    return parts


def activations(config: Config, arch: Architecture, rows: int, platform: str) -> float:
    """Counts the bytes that the forward pass keeps for the backward pass; logits are included, weights are not.

    Activations that tensor parallelism splits over devices are counted at their full size.

    Args:
        config: the run's settings.
        arch: the network's sizes and special ids.
        rows: the number of rows that one device processes at a time, which is smaller with gradient accumulation.
        platform: the platform that the step would run on.
    """
    config = dataclasses.replace(config, train=dataclasses.replace(config.train, batch_size=rows))
    net = build.network(arch, config.model, config.lora, platform=platform)
    objective = build.objective(config, net, (arch.eos_id,))
    trained = abstract_params(net.trainable, "float32" if net.lora else config.model.param_dtype)
    frozen = abstract_params(net.param_table, config.model.param_dtype) if net.lora else {}

    def kept(trained: Any, frozen: Any, batch: Any) -> Any:
        total = lambda params: objective(attach(frozen, params), batch, jnp.int32(0)).loss.total  # noqa: E731
        return jax.vjp(total, trained)[1]

    leaves = jax.tree.leaves(jax.eval_shape(kept, trained, frozen, batch_shapes(config)))
    weights = {(leaf.shape, leaf.dtype) for leaf in jax.tree.leaves((trained, frozen))}
    return float(sum(leaf.size * leaf.dtype.itemsize for leaf in leaves if (leaf.shape, leaf.dtype) not in weights))


def decoder_program(config: Config, arch: Architecture, mesh: Mesh) -> Program:
    """Compiles the decoder for one block, with the weights split over the devices as in training.

    Args:
        config: the run's settings, which describe the mesh ``mesh``.
        arch: the network's sizes and special ids.
        mesh: the devices to compile for.
    """
    net = build.network(arch, config.model, config.lora, platform=mesh.devices.flat[0].platform)
    params = param_shapes(net.trainable, mesh, "float32" if net.lora else config.model.param_dtype)
    if net.lora:
        params = attach(param_shapes(net.param_table, mesh, config.model.param_dtype), params)
    layout = decoding_layout(config.canvas, config.decode, arch, (arch.eos_id,))
    ways = row_shards(config)
    rows = -(-config.decode.batch_size // ways) * ways

    def run(params: Any, prompts: Any, lengths: Any, blocks: Any) -> Any:
        canvas = canvases.for_decoding(layout, prompts, lengths, jnp.arange(rows, dtype=jnp.int32))
        carry = decoder.start_decoding(layout, canvas, config.decode.seed)
        return decoder.decode_block(net, layout, config.decode, params, canvas, carry, blocks)[:-1]

    whole: Any = [
        jax.ShapeDtypeStruct(shape, jnp.int32) for shape in ((rows, config.canvas.prompt_len), (rows,), (rows,))
    ]
    with jax.set_mesh(mesh):
        lowered = jax.jit(run).lower(params, *whole)
    size = float(bytes_per_device(params))
    logits = 4.0 * rows / ways * layout.block * arch.vocab_size / config.train.tensor
    return _compiled(lowered, {"parameters": size, "logits": logits}, size, mesh)


def _compiled(lowered: jax.stages.Lowered, parts: dict[str, float], arguments: float, mesh: Mesh) -> Program:
    """Compiles a program, and reads its memory and costs from the result.

    Args:
        lowered: the program.
        parts: the bytes of its arguments and some temporaries, by name (``Program.parts``).
        arguments: the bytes of its arguments on one device.
        mesh: the devices that it is compiled for.
    """
    begin = time.perf_counter()
    result = compile_lowered(lowered, arguments)
    seconds = time.perf_counter() - begin
    if result.program is None:
        return Program(result.memory, parts, None, seconds)
    text = result.program.as_text() or ""
    return Program(result.memory, parts, count_costs(parse_program(text), mesh.size), seconds)
