"""The train step, compiled before the first batch: a run that cannot fit is refused with what to change."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh

from jaxblock.config.config import Config
from jaxblock.errors import UserError
from jaxblock.fit import memory
from jaxblock.fit import shapes as abstract
from jaxblock.fit.advice import Fits, Found, Trial, advise
from jaxblock.fit.memory import Built, gib
from jaxblock.models.architecture import Architecture
from jaxblock.parallel.mesh import make_mesh

Say = Callable[[str], None]

TRIES = 4
"""Changes that are compiled before a refusal."""


class Ahead(NamedTuple):
    """A step that is ready to run.

    Attributes:
        step: the compiled step, called as the jitted one is.
        needed: bytes of a device that the compiler planned.
        limit: bytes that the device gives to programs; None where it does not say.
    """

    step: Callable[..., Any]
    needed: float
    limit: float | None

    def said(self) -> str | None:
        """The plan in a line; None where there is nothing to compare it with."""
        if self.limit is None:
            return None
        return f"the step is planned to take {gib(self.needed)} of the {gib(self.limit)} of a device"

    def compared(self, device: jax.Device) -> str | None:
        """The plan against the most that a device has used; None where it does not say."""
        peak = memory.device_peak(device)
        if peak is None:
            return None
        return f"the step was planned to take {gib(self.needed)} of a device; at its peak {gib(peak)} were in use"


def prepare(jitted: Any, config: Config, arch: Architecture, mesh: Mesh, state: Any, frozen: Any, say: Say) -> Ahead:
    """Compiles a step for what it will be called with.

    Args:
        jitted: what ``training.step.compile_step`` gives.
        config: resolved and valid.
        arch: the network.
        mesh: the mesh; the ambient one.
        state: a state, or its shapes.
        frozen: the base beneath adapters; {} without.
        say: told what is tried, should it not fit.

    Returns:
        The step.

    Raises:
        UserError: it needs more memory than the device has; says what to change.
    """
    lowered = jitted.lower(state, abstract.batch(config), frozen)
    built = memory.build(lowered, float(abstract.bytes_per_device((state, frozen))))
    limit = memory.device_limit(next(d for d in mesh.devices.flat if d.process_index == jax.process_index()))
    check(built, limit, config, arch, mesh, say)
    assert built.program is not None
    return Ahead(built.program, built.memory.total, limit)


def check(built: Built, limit: float | None, config: Config, arch: Architecture, mesh: Mesh, say: Say) -> None:
    """Raises UserError, with the smallest change that is found to help, where a program does not fit."""
    needed, limit = built.memory.total, limit if limit is not None else built.memory.limit
    if built.program is not None and (limit is None or needed <= limit):
        return
    assert limit is not None
    say(f"the step needs {gib(needed)} of a device, which has {gib(limit)}: looking for what to change")
    written_out = _with_mesh(config, mesh)
    fits = trier(arch, list(mesh.devices.flat), limit, say)
    slices = mesh.shape["slice"]
    tried, found = advise(written_out, mesh.size // mesh.shape["tensor"], mesh.size // slices, fits, TRIES)
    raise UserError(
        f"the train step needs {gib(needed)} of a device, which has {gib(limit)}. {_what_helps(tried, found)} "
        "`jaxblock plan` says more"
    )


def trier(arch: Architecture, devices: Sequence[jax.Device], limit: float, say: Say) -> Fits:
    """What compiles a changed config and compares it with a limit.

    Args:
        arch: the network.
        devices: to compile for; the config's mesh must be of so many.
        limit: bytes of one.
        say: told what is being compiled.
    """

    def fits(config: Config) -> Trial:
        train = config.train
        try:
            mesh = make_mesh(train.data_parallel, train.fsdp, train.tensor, slices=train.slices, devices=devices)
            found = abstract.build(config, arch, mesh)
            least = float(abstract.bytes_per_device((found.state, found.frozen)))
            if least > limit:
                return Trial(least, fits=False, compiled=False)
            lowered = found.lower()
        except (UserError, ValueError):
            return Trial(float("inf"), fits=False, compiled=False)  # does not split: no way out
        say(f"compiling a change: remat {config.model.remat}, {_rows(config)}")
        built = memory.build(lowered, least)
        needed = built.memory.total
        return Trial(needed, built.program is not None and needed <= limit, compiled=True)

    return fits


def _rows(config: Config) -> str:
    train = config.train
    parts = f" in {train.accumulate} parts" if train.accumulate > 1 else ""
    kept = f"moments {config.optimizer.moments}" if not config.lora.rank else f"base {config.model.quantize}"
    return f"{train.batch_size} rows{parts}, {kept}"


def _with_mesh(config: Config, mesh: Mesh) -> Config:
    """The config with its mesh written out, as ``advice.changes`` needs it."""
    return dataclasses.replace(config, train=dataclasses.replace(config.train, data_parallel=mesh.shape["data"]))


def _what_helps(tried: Sequence[Found], found: Found | None) -> str:
    if found is not None:
        return f"This was compiled and fits ({gib(found.trial.needed)}): {found.flags} ({found.cost})."
    if not tried:
        return "Nothing is left to change: take more or larger devices."
    return f"None of these is enough: {'; '.join(one.flags for one in tried)}. Take more or larger devices."
