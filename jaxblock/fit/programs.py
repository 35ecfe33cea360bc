"""The programs of a plan, compiled by shapes alone: the train step, and one block of the decoder."""

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
from jaxblock.diffusion import layouts
from jaxblock.diffusion.decoding import decoder
from jaxblock.fit import layout, memory
from jaxblock.fit import shapes as abstract
from jaxblock.fit.costs import Costs, count_costs
from jaxblock.fit.hlo import parse_program
from jaxblock.fit.memory import Memory
from jaxblock.fit.shapes import Abstract, bytes_per_device
from jaxblock.models.architecture import Architecture
from jaxblock.models.linear.lora import attach
from jaxblock.models.spec import abstract_params
from jaxblock.training import start as setup


class Program(NamedTuple):
    """A compiled program's needs, per device.

    Attributes:
        memory: what it takes.
        parts: of the arguments by kind, and of the temporaries as far as shapes tell; bytes by name.
        costs: what running it once costs; None where it does not fit.
        seconds: the compiler took.
    """

    memory: Memory
    parts: dict[str, float]
    costs: Costs | None
    seconds: float


def train_step(config: Config, arch: Architecture, mesh: Mesh) -> Program:
    """Compiles the train step.

    Args:
        config: settled: its mesh is ``mesh``'s.
        arch: the network.
        mesh: of devices to compile for.
    """
    found = abstract.build(config, arch, mesh)
    arguments = _arguments(found, config, mesh)
    inside = _inside(config, arch, found, mesh.devices.flat[0].platform)
    return _compiled(found.lower(), {**arguments, **inside}, sum(arguments.values()), mesh)


def _arguments(found: Abstract, config: Config, mesh: Mesh) -> dict[str, float]:
    rows = -(-config.train.batch_size // layout.ways(config))
    state = found.state
    sizes: dict[str, Any] = {
        "parameters": state.params,
        "frozen base": found.frozen,
        "optimizer state": state.opt_state,
        "moving average": state.average,
    }
    parts = {name: float(bytes_per_device(tree)) for name, tree in sizes.items() if jax.tree.leaves(tree)}
    return {**parts, "batch": 4.0 * rows * (config.canvas.prompt_len + config.canvas.response_len + 5)}


def _inside(config: Config, arch: Architecture, found: Abstract, platform: str) -> dict[str, float]:
    """What shapes tell of the temporaries: upper bounds, since not all of it lives at once."""
    train, canvas, model = config.train, config.canvas, config.model
    rows = max(train.batch_size // (layout.ways(config) * train.accumulate), 1)
    classical = config.method.objective == "classical"
    positions = (model.loss_chunk or canvas.response_len) if classical else canvas.block
    parts = {"gradients": float(bytes_per_device(found.state.params))}
    if model.remat != "offload":  # those are in the host's memory
        parts["activations"] = activations(config, arch, rows, platform)
    parts["logits"] = 4.0 * rows * config.method.draws * positions * arch.vocab_size / train.tensor
    return parts


def activations(config: Config, arch: Architecture, rows: int, platform: str) -> float:
    """Bytes that the forward pass of some rows leaves for the backward pass, logits among them, weights not.

    Args:
        config: settled. What devices of a tensor group split between them is counted whole.
        arch: the network.
        rows: of one device, in one part of the batch.
        platform: it would run on.
    """
    config = dataclasses.replace(config, train=dataclasses.replace(config.train, batch_size=rows))
    net = build.network(arch, config.model, config.lora, platform=platform)
    objective = setup.objective(config, net, (arch.eos_id,))
    trained = abstract_params(net.trainable, "float32" if net.lora else config.model.param_dtype)
    frozen = abstract_params(net.param_table, config.model.param_dtype) if net.lora else {}

    def kept(trained: Any, frozen: Any, batch: Any) -> Any:
        total = lambda params: objective(attach(frozen, params), batch, jnp.int32(0)).loss.total  # noqa: E731
        return jax.vjp(total, trained)[1]

    leaves = jax.tree.leaves(jax.eval_shape(kept, trained, frozen, abstract.batch(config)))
    weights = {(leaf.shape, leaf.dtype) for leaf in jax.tree.leaves((trained, frozen))}
    return float(sum(leaf.size * leaf.dtype.itemsize for leaf in leaves if (leaf.shape, leaf.dtype) not in weights))


def decode_block(config: Config, arch: Architecture, mesh: Mesh) -> Program:
    """Compiles the decoder of one block, with the weights placed as in training.

    Args:
        config: settled.
        arch: the network.
        mesh: of devices to compile for.
    """
    net = build.network(arch, config.model, config.lora, platform=mesh.devices.flat[0].platform)
    params = abstract.placed(net.trainable, mesh, "float32" if net.lora else config.model.param_dtype)
    if net.lora:
        params = attach(abstract.placed(net.param_table, mesh, config.model.param_dtype), params)
    place = layouts.decoding_layout(config.canvas, config.decode, arch, (arch.eos_id,))
    ways = layout.ways(config)
    rows = -(-config.decode.batch_size // ways) * ways

    def run(params: Any, prompts: Any, lengths: Any, block: Any) -> Any:
        index = jnp.arange(rows, dtype=jnp.int32)
        canvas = canvases.for_decoding(place, prompts, lengths, index)
        carry = decoder.start(place, canvas, config.decode.seed)
        return decoder.decode_block(net, place, config.decode, params, canvas, carry, block)[:-1]

    whole: Any = [jax.ShapeDtypeStruct(shape, jnp.int32) for shape in ((rows, config.canvas.prompt_len), (rows,), ())]
    with jax.set_mesh(mesh):
        lowered = jax.jit(run).lower(params, *whole)
    size = float(bytes_per_device(params))
    logits = 4.0 * rows / ways * place.block * arch.vocab_size / config.train.tensor
    return _compiled(lowered, {"parameters": size, "logits": logits}, size, mesh)


def _compiled(lowered: jax.stages.Lowered, parts: dict[str, float], arguments: float, mesh: Mesh) -> Program:
    begin = time.perf_counter()
    built = memory.build(lowered, arguments)
    seconds = time.perf_counter() - begin
    if built.program is None:
        return Program(built.memory, parts, None, seconds)
    text = built.program.as_text() or ""
    return Program(built.memory, parts, count_costs(parse_program(text), mesh.size), seconds)
