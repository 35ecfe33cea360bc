"""The programs of a plan, compiled by shapes alone: the train step, and one block of the decoder."""

from __future__ import annotations

import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from jaxblock import wiring
from jaxblock.config import Config
from jaxblock.diffusion import canvas as canvases
from jaxblock.diffusion import decoder
from jaxblock.models import lora as adapters
from jaxblock.models.params import Architecture
from jaxblock.plan import costs, hlo, layout
from jaxblock.plan.costs import Costs
from jaxblock.training import abstract, memory
from jaxblock.training.abstract import Abstract, bytes_per_device
from jaxblock.training.memory import Memory


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
    return _compiled(found.step, {**arguments, **_inside(config, arch, found)}, sum(arguments.values()), mesh)


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


def _inside(config: Config, arch: Architecture, found: Abstract) -> dict[str, float]:
    """What shapes tell of the temporaries: upper bounds, since not all of it lives at once."""
    train, canvas, model = config.train, config.canvas, config.model
    rows = max(train.batch_size // (layout.ways(config) * train.accumulate), 1)
    width = canvas.total_len or canvas.prompt_len + canvas.response_len
    classical = config.method.objective == "classical"
    positions = (model.loss_chunk or canvas.response_len) if classical else canvas.block
    draws = rows * config.method.draws
    parts = {"gradients": float(bytes_per_device(found.state.params))}
    if model.remat == "full":
        size = jnp.dtype(model.dtype).itemsize
        parts["layers' inputs"] = float(draws * width * arch.d_model * arch.n_layers * size)
    parts["logits"] = 4.0 * draws * positions * arch.vocab_size / train.tensor
    return parts


def decode_block(config: Config, arch: Architecture, mesh: Mesh) -> Program:
    """Compiles the decoder of one block, with the weights placed as in training.

    Args:
        config: settled.
        arch: the network.
        mesh: of devices to compile for.
    """
    lora = wiring.adapters(config.lora, arch)
    net = wiring.network(arch, config.model, lora, platform=mesh.devices.flat[0].platform)
    params = abstract.placed(net.trainable, mesh, "float32" if lora else config.model.param_dtype)
    if lora:
        params = adapters.attach(abstract.placed(net.table, mesh, config.model.param_dtype), params)
    place = wiring.decoding_layout(config.canvas, config.decode, arch, (arch.eos_id,))
    options = wiring.decoding(config.decode, place)
    ways = layout.ways(config)
    rows = -(-config.decode.batch_size // ways) * ways

    def run(params: Any, prompts: Any, lengths: Any, block: Any) -> Any:
        index = jnp.arange(rows, dtype=jnp.int32)
        canvas = canvases.for_decoding(place, prompts, lengths, index)
        carry = decoder.start(place, canvas, config.decode.seed, index)
        return decoder.decode_block(net, place, options, params, canvas, carry, block)[:-2]

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
    return Program(built.memory, parts, costs.read(hlo.parse(text), mesh.size), seconds)
