"""Compiles the train step before weights are read. A run that does not fit is refused, and the error says what to change."""

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
"""A function that prints a line for the user."""

TRIES = 4
"""The number of changes that are compiled before a run is refused."""


class CompiledStep(NamedTuple):
    """Holds a compiled train step and its planned memory.

    Attributes:
        step: the compiled step, which is called as the jitted step is.
        plan: the memory that the compiler planned for the step.
    """

    step: Step
    plan: MemoryPlan


def compile_step(config: Config, learner: Learner, mesh: Mesh, say: Say) -> CompiledStep:
    """Compiles a run's train step for the shapes that it will be called with.

    Args:
        config: the run's settings, checked.
        learner: the static parts of the step (`build.learner`), built from these settings.
        mesh: the devices.
        say: prints what is tried if the step does not fit.

    Raises:
        UserError: the step needs more memory than the device has; the message says what to change.
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
    """Raises UserError where a step does not fit; the message names the cheapest change that was found to help.

    Args:
        result: the result of compiling the step.
        limit: the bytes of the device that programs may use; None for the compiler's own limit.
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
    """Returns a function that compiles the step of a changed config and compares the memory that it needs with a limit.

    Args:
        arch: the network's sizes and special ids.
        devices: the devices to compile for, which must be as many as the config's mesh has.
        limit: the bytes of one device that programs may use.
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
            return Trial(float("inf"), fits=False, compiled=False)  # the config does not split over the devices
        say(f"compiling a change: remat {config.model.remat}, {_rows(config)}")
        result = compile_lowered(lowered, least)
        needed = result.memory.total
        return Trial(needed, result.program is not None and needed <= limit, compiled=True)

    return try_config


def _rows(config: Config) -> str:
    """Describes the batch size and the types of moments or base, for the line that says what is being compiled."""
    train = config.train
    parts = f" in {train.accumulate} parts" if train.accumulate > 1 else ""
    kept = f"moments {config.optimizer.moments}" if not config.lora.rank else f"base {config.model.quantize}"
    return f"{train.batch_size} rows{parts}, {kept}"


def _with_mesh(config: Config, mesh: Mesh) -> Config:
    """Returns the config with the mesh's number of data-parallel devices, which ``advice.changes`` needs, in place of -1."""
    return dataclasses.replace(config, train=dataclasses.replace(config.train, data_parallel=mesh.shape["data"]))


def _what_helps(tried: Sequence[Found], found: Found | None) -> str:
    """Returns the sentence of the error that names the change that fits, or else the changes that were tried."""
    if found is not None:
        return f"This was compiled and fits ({gib(found.trial.needed)}): {found.flags} ({found.cost})."
    if not tried:
        return "Nothing is left to change: take more or larger devices."
    return f"None of these is enough: {'; '.join(one.flags for one in tried)}. Take more or larger devices."
