"""All that the kit needs of jaxblock beside its public names, in one place, so that a rename there is followed here alone."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import Mesh

from benchmarks.accelerator.measure import Compilation, Row, Skip, gib
from benchmarks.accelerator.sizes import Canvas, Sizes
from jaxblock import build
from jaxblock.config.config import Config
from jaxblock.config.yaml import load_config
from jaxblock.data.loader import Batch
from jaxblock.diffusion.canvas import for_decoding
from jaxblock.diffusion.decoding.config import CacheName
from jaxblock.diffusion.decoding.decoder import Responses, decode
from jaxblock.diffusion.layouts import decoding_layout
from jaxblock.fit.memory import compile_lowered
from jaxblock.fit.shapes import RunShapes, bytes_per_device, lower_step, param_shapes, run_shapes
from jaxblock.fit.sizes import planned_architecture
from jaxblock.models.architecture import Architecture
from jaxblock.models.attention.backends import attend, backend_of
from jaxblock.models.attention.mask import Mask
from jaxblock.models.config import Backend
from jaxblock.models.families.registry import param_table
from jaxblock.models.linear.int8 import SCALE, int8_table, quantise, quantised
from jaxblock.models.spec import ParamSpec, Table, count_params, flatten, init_params, matmul_flops_per_token, nest
from jaxblock.models.transformer import Transformer
from jaxblock.parallel import rules
from jaxblock.parallel.chips import chip_of
from jaxblock.parallel.mesh import make_mesh
from jaxblock.training.checkpoints.reader import CheckpointReader
from jaxblock.training.checkpoints.retention import Keep
from jaxblock.training.checkpoints.writer import CheckpointWriter
from jaxblock.training.observe.device_memory import device_limit, device_peak
from jaxblock.training.observe.device_memory import gib as shown_gib
from jaxblock.training.observe.throughput import Work, model_flops, peak_flops
from jaxblock.training.state import TrainState, create_state
from jaxblock.training.step import Learner
from jaxblock.types import Params

__all__ = [
    "Architecture", "Backend", "CheckpointReader", "CheckpointWriter", "Keep", "Mask", "attend", "backend_of", "chip_of",
    "CacheName", "count_params",
]  # fmt: skip
"""What the items take from here as it is."""

PRESET = Path(__file__).resolve().parents[2] / "configs" / "llada_8b_lora.yaml"


def config(sizes: Sizes, canvas: Canvas, *, quantize: bool = False) -> Config:
    """Returns the LLaDA-8B LoRA preset for a batch of this shape, over all devices of this host."""
    preset = load_config(str(PRESET))
    devices = jax.local_device_count()
    return dataclasses.replace(
        preset,
        canvas=dataclasses.replace(
            preset.canvas, prompt_len=canvas.prompt, response_len=canvas.response, block=canvas.block
        ),
        model=dataclasses.replace(preset.model, quantize="int8" if quantize else "none"),
        lora=dataclasses.replace(preset.lora, rank=sizes.lora_rank or preset.lora.rank),
        train=dataclasses.replace(preset.train, batch_size=canvas.rows * devices, fsdp=devices),
        decode=dataclasses.replace(preset.decode, steps_per_block=sizes.steps_per_block, early_stop=False),
    )


def architecture(sizes: Sizes, preset: Config) -> Architecture:
    """Returns the published architecture that the preset starts from, with the fields that the sizes replace."""
    found, _ = planned_architecture(preset, None)
    return dataclasses.replace(found, **sizes.architecture)


def mesh(axis: str) -> Mesh:
    """Returns a mesh of this host's devices that splits along one axis: ``fsdp`` to train, ``tensor`` to decode."""
    devices = jax.local_devices()
    return make_mesh(1, devices=devices, **{axis: len(devices)})


def weight_maker(table: Table, dtype: str, mesh: Mesh, *, quantize: bool = False) -> Callable[[], Params]:
    """Returns what makes random weights on the devices; called again it compiles nothing.

    It makes one layer of one tensor at a time, so that the device needs little more memory than the weights take.

    Args:
        table: the specs of the weights in their own type.
        dtype: the type of the weights.
        mesh: where they go.
        quantize: round the layers' matrices to int8, as under ``model.quantize``.
    """
    placed = flatten(rules.param_shardings(mesh, int8_table(table) if quantize else table))
    makers: dict[tuple[str, ...], Callable[[], tuple[Array, ...]]] = {}
    for path, spec in table.items():
        names = (path, path + SCALE) if quantize and quantised(spec) else (path,)
        draw = partial(_draw, path, spec, dtype, quantize=len(names) > 1)
        makers[names] = jax.jit(draw, out_shardings=tuple(placed[name] for name in names))

    def make() -> Params:
        flat: dict[str, Array] = {}
        for names, maker in makers.items():
            flat.update(zip(names, jax.block_until_ready(maker()), strict=True))
        return nest(flat)

    return make


def _draw(path: str, spec: ParamSpec, dtype: str, *, quantize: bool) -> tuple[Array, ...]:
    if not spec.stacked:
        return (flatten(init_params({path: spec}, 0, dtype))[path],)
    # The values do not matter here, so every layer may have a seed of its own and the same spread.
    layer = dataclasses.replace(spec, shape=spec.shape[1:], axes=spec.axes[1:], depth_scaled=False)

    def one(seed: Array) -> tuple[Array, ...]:
        drawn = flatten(init_params({path: layer}, seed, dtype))[path]  # type: ignore[arg-type]
        return quantise(drawn) if quantize else (drawn,)

    return jax.lax.map(one, jnp.arange(spec.shape[0]))


def size(tree: Any) -> int:
    """Returns the bytes of all arrays (or shapes) of a tree, over all devices."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def peak_gib() -> float | None:
    """Returns the most memory that has been in use on any device of this host since the process began, in GiB."""
    peaks = [device_peak(device) for device in jax.local_devices()]
    return None if None in peaks else gib(max(filter(None, peaks)))


def check_room(tree: Any) -> None:
    """Raises Skip where arrays (given as shapes with shardings) are more than a device gives to programs."""
    needed, limit = float(bytes_per_device(tree)), device_limit(jax.local_devices()[0])
    if limit is not None and needed > limit:
        raise Skip(
            f"the weights alone take {shown_gib(needed)} of a device, which gives {shown_gib(limit)} to programs"
        )


class Planned(NamedTuple):
    """A program that was compiled ahead of time.

    Attributes:
        run: the compiled program.
        plan: its memory as the compiler planned it, per device, and how long it took to compile.
        gib: the whole of that memory, in GiB.
    """

    run: Callable[..., Any]
    plan: Row
    gib: float


def planned(lower: Callable[[], jax.stages.Lowered], arguments: Any) -> Planned:
    """Compiles a program ahead of time.

    Args:
        lower: traces the program.
        arguments: its large arguments, as arrays or shapes with shardings.

    Raises:
        Skip: it needs more memory than a device gives to programs.
    """
    with Compilation() as compiling:
        built = compile_lowered(lower(), float(bytes_per_device(arguments)))
    found, device = built.memory, jax.local_devices()[0]
    limit = device_limit(device) or found.limit
    if built.program is None or (limit is not None and found.total > limit):
        raise Skip(f"it needs {shown_gib(found.total)} of a device, which gives {shown_gib(limit or 0)} to programs")
    plan = {
        **compiling.described(),
        "memory planned by the compiler, GiB": gib(found.total),
        "of it arguments, GiB": gib(found.arguments),
        "of it temporaries, GiB": gib(found.temporaries),
        "memory that the device gives, GiB": gib(limit),
    }
    return Planned(built.program, plan, found.total / 2**30)


class LoraRun(NamedTuple):
    """A LoRA run without its values.

    Attributes:
        preset: the settings.
        learner: the network, the loss and the optimizer.
        mesh: the devices.
        shapes: the shapes of the state, the batch and the base.
    """

    preset: Config
    learner: Learner
    mesh: Mesh
    shapes: RunShapes

    @classmethod
    def of(cls, sizes: Sizes, canvas: Canvas, *, quantize: bool = False) -> LoraRun:
        """Describes the run that the preset makes of a batch of this shape."""
        preset = config(sizes, canvas, quantize=quantize)
        arch, devices = architecture(sizes, preset), mesh("fsdp")
        learner = build.learner(preset, arch, (arch.eos_id,))
        return cls(preset, learner, devices, run_shapes(preset, learner, devices))

    @property
    def arch(self) -> Architecture:
        """The network's sizes."""
        return self.learner.net.arch

    def lower(self) -> jax.stages.Lowered:
        """Traces the train step."""
        return lower_step(self.learner, self.shapes, self.mesh)

    def state(self) -> TrainState:
        """Makes the state before the first step: random adapters, and the optimizer's state."""
        table = self.learner.net.trainable
        return create_state(weight_maker(table, "float32", self.mesh)(), self.learner.optimizer, self.mesh, table)

    def base_maker(self) -> Callable[[], Params]:
        """Returns what makes random weights of the frozen base.

        Raises:
            Skip: they do not fit.
        """
        check_room(self.shapes.frozen)
        model = self.preset.model
        return weight_maker(param_table(self.arch), model.param_dtype, self.mesh, quantize=model.quantize == "int8")

    def batch(self) -> Batch:
        """Makes a batch of random tokens that fills its canvas."""
        canvas, rows = self.preset.canvas, self.preset.train.batch_size
        draw = np.random.default_rng(0)
        widths = {"prompt": canvas.prompt_len, "response": canvas.response_len}
        ids = {name: _tokens(draw, self.arch, (rows, width)) for name, width in widths.items()}
        batch = Batch(
            prompt_ids=ids["prompt"],
            prompt_len=np.full(rows, canvas.prompt_len, np.int32),
            response_ids=ids["response"],
            text_len=np.full(rows, canvas.response_len, np.int32),
            block=np.full(rows, -1, np.int32),
            index=np.arange(rows, dtype=np.int32),
            row_id=np.arange(rows, dtype=np.int32),
        )
        return jax.device_put(batch, rules.sharding(self.mesh, "batch"))

    @property
    def tokens(self) -> int:
        """Positions of a batch."""
        return self.preset.train.batch_size * (self.preset.canvas.prompt_len + self.preset.canvas.response_len)

    def flops(self) -> float:
        """Counts a step's floating-point operations as the training loop does for its MFU: what remat repeats is left out."""
        rows = self.preset.train.batch_size
        work = Work(rows, self.tokens, rows * self.preset.canvas.block)
        return model_flops(self.learner.net.param_table, self.arch, work, self.learner.net.trainable)

    def peak_flops(self) -> float | None:
        """Returns the published peak of the devices together; None where it is not known."""
        return peak_flops(self.mesh)


def _tokens(draw: np.random.Generator, arch: Architecture, shape: tuple[int, int]) -> np.ndarray:
    ids = draw.integers(0, arch.vocab_size, shape, dtype=np.int32)
    return np.where(np.isin(ids, (arch.need_mask_id(), arch.eos_id)), 0, ids)


class Decoding(NamedTuple):
    """The decoder over random weights.

    Attributes:
        preset: the settings.
        arch: the network's sizes.
        net: the network.
        mesh: the devices.
        params: the weights.
    """

    preset: Config
    arch: Architecture
    net: Transformer
    mesh: Mesh
    params: Params

    @classmethod
    def of(cls, sizes: Sizes) -> Decoding:
        """Makes the weights, split over the devices by heads and columns, so that every batch size works on all of them.

        Raises:
            Skip: they do not fit.
        """
        preset = config(sizes, sizes.decoding)
        arch, devices = architecture(sizes, preset), mesh("tensor")
        net, dtype = build.network(arch, preset.model), preset.model.param_dtype
        check_room(param_shapes(net.param_table, devices, dtype))
        return cls(preset, arch, net, devices, weight_maker(net.param_table, dtype, devices)())

    def program(self, rows: int, cache: CacheName = "none") -> tuple[Planned, Callable[[], Responses]]:
        """Compiles the decoder for a number of prompts; returns the program, and a call that decodes random prompts."""
        layout = decoding_layout(self.preset.canvas, self.preset.decode, self.arch, (self.arch.eos_id,))
        options = dataclasses.replace(self.preset.decode, cache=cache).static(layout.block)
        width = self.preset.canvas.prompt_len
        prompts = jnp.asarray(_tokens(np.random.default_rng(0), self.arch, (rows, width)))
        lengths = jnp.full(rows, width, jnp.int32)
        canvas = for_decoding(layout, prompts, lengths, jnp.arange(rows, dtype=jnp.int32))
        canvas = jax.device_put(canvas, rules.replicated(self.mesh))
        seed = jax.device_put(jnp.int32(0), rules.replicated(self.mesh))
        jitted = jax.jit(decode, static_argnums=(0, 1, 2))
        found = planned(lambda: jitted.lower(self.net, layout, options, self.params, canvas, seed), self.params)
        return found, lambda: found.run(self.params, canvas, seed)

    def bytes_read(self) -> int:
        """Returns the bytes of the weights that a forward pass reads: all but the embedding, of which it looks up rows."""
        looked_up = 0 if self.arch.tie_embeddings else size(self.params["embed"])
        return size(self.params) - looked_up

    def flops(self, rows: int) -> float:
        """Counts the floating-point operations of a forward pass whose head runs on the active block."""
        canvas = self.preset.canvas
        length = canvas.prompt_len + canvas.response_len
        trunk = length * matmul_flops_per_token(self.net.param_table, self.arch, length, head=False)
        return rows * (trunk + 2.0 * canvas.block * self.arch.vocab_size * self.arch.d_model)
