"""Compiles the train step before weights are read; a run that cannot fit is refused, with what to change."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
from jax.sharding import Mesh

from jaxblock import build
from jaxblock.config.config import Config
from jaxblock.errors import UserError
from jaxblock.fit.advice import Found, Trial, TryConfig, advise
from jaxblock.fit.memory import CompileResult, compile_lowered
from jaxblock.fit.shapes import lower_step, run_shapes
from jaxblock.models.architecture import Architecture
from jaxblock.parallel.mesh import make_mesh
from jaxblock.training.observe import device_memory
from jaxblock.training.observe.device_memory import MemoryPlan, gib
from jaxblock.training.step import Learner, Step

Say = Callable[[str], None]
"""Prints a line for the user."""

TRIES = 4
"""How many changes are compiled before a run is refused."""


class CompiledStep(NamedTuple):
    """Holds a train step that is ready to run.

    Attributes:
        step: the compiled step, called as the jitted one is.
        plan: the memory that it was planned to take.
    """

    step: Step
    plan: MemoryPlan


def compile_step(config: Config, learner: Learner, mesh: Mesh, say: Say) -> CompiledStep:
    """Compiles a run's train step for the shapes that it will be called with.

    Args:
        config: the run's settings, checked.
        learner: what is trained, built from them.
        mesh: the devices.
        say: prints what is tried, should the step not fit.

    Raises:
        UserError: the step needs more memory than the device has; says what to change.
    """
    shapes = run_shapes(config, learner, mesh)
    result = compile_lowered(lower_step(learner, shapes, mesh), shapes.bytes_per_device)
    own_device = next(d for d in mesh.devices.flat if d.process_index == jax.process_index())
    limit = device_memory.device_limit(own_device)
    check_fits(result, limit, config, learner.net.arch, mesh, say)
    assert result.program is not None
    return CompiledStep(result.program, MemoryPlan(result.memory.total, limit))


def check_fits(
    result: CompileResult, limit: float | None, config: Config, arch: Architecture, mesh: Mesh, say: Say
) -> None:
    """Raises UserError where a step does not fit, with the smallest change that is found to help.

    Args:
        result: the step, compiled, or what is known of it.
        limit: the bytes that the device gives to programs; None for the compiler's own limit.
        config: the run's settings.
        arch: the network's sizes and special ids.
        mesh: the devices.
        say: prints what is tried.
    """
    needed, limit = result.memory.total, limit if limit is not None else result.memory.limit
    if result.program is not None and (limit is None or needed <= limit):
        return
    assert limit is not None
    say(f"the step needs {gib(needed)} of a device, which has {gib(limit)}: looking for what to change")
    try_config = try_by_compiling(arch, list(mesh.devices.flat), limit, say)
    chips = mesh.size // mesh.shape["slice"]
    tried, found = advise(_with_mesh(config, mesh), mesh.size // mesh.shape["tensor"], chips, try_config, TRIES)
    raise UserError(
        f"the train step needs {gib(needed)} of a device, which has {gib(limit)}. {_what_helps(tried, found)} "
        "`jaxblock plan` says more"
    )


def try_by_compiling(arch: Architecture, devices: Sequence[jax.Device], limit: float, say: Say) -> TryConfig:
    """Returns a function that compiles a changed config and compares what it needs with a limit.

    Args:
        arch: the network's sizes and special ids.
        devices: the devices to compile for; the config's mesh must be of as many.
        limit: the bytes of one device.
        say: prints what is being compiled.
    """

    def try_config(config: Config) -> Trial:
        train = config.train
        try:
            mesh = make_mesh(train.data_parallel, train.fsdp, train.tensor, slices=train.slices, devices=devices)
            learner = build.learner(config, arch, (arch.eos_id,), platform=devices[0].platform)
            shapes = run_shapes(config, learner, mesh)
            least = shapes.bytes_per_device
            if least > limit:
                return Trial(least, fits=False, compiled=False)
            lowered = lower_step(learner, shapes, mesh)
        except (UserError, ValueError):
            return Trial(float("inf"), fits=False, compiled=False)  # it does not split over the devices
        say(f"compiling a change: remat {config.model.remat}, {_rows(config)}")
        result = compile_lowered(lowered, least)
        needed = result.memory.total
        return Trial(needed, result.program is not None and needed <= limit, compiled=True)

    return try_config


def _rows(config: Config) -> str:
    """Describes the batch and the types of what is kept, for a line that says what is being compiled."""
    train = config.train
    parts = f" in {train.accumulate} parts" if train.accumulate > 1 else ""
    kept = f"moments {config.optimizer.moments}" if not config.lora.rank else f"base {config.model.quantize}"
    return f"{train.batch_size} rows{parts}, {kept}"


def _with_mesh(config: Config, mesh: Mesh) -> Config:
    """Returns the config with its mesh written out, as ``advice.changes`` needs it."""
    return dataclasses.replace(config, train=dataclasses.replace(config.train, data_parallel=mesh.shape["data"]))


def _what_helps(tried: Sequence[Found], found: Found | None) -> str:
    """Says which change helps; where none does, which were tried."""
    if found is not None:
        return f"This was compiled and fits ({gib(found.trial.needed)}): {found.flags} ({found.cost})."
    if not tried:
        return "Nothing is left to change: take more or larger devices."
    return f"None of these is enough: {'; '.join(one.flags for one in tried)}. Take more or larger devices."
