"""Searches for a change that makes a run fit into memory; changes are tried by compiling them, the cheapest first."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from jaxblock.config.config import Config

TryConfig = Callable[[Config], "Trial"]
"""A function that finds out whether a config fits."""


class Trial(NamedTuple):
    """Holds the result of trying a config.

    Attributes:
        needed: the bytes that the step needs on each device. Where `compiled` is false they are those of the state alone, which
            is too large already, or infinite if the config does not split over the devices.
        fits: whether the step fits into the memory of a device.
        compiled: whether the step was compiled. It is not if the config cannot fit whatever the compiler does.
    """

    needed: float
    fits: bool
    compiled: bool


class Change(NamedTuple):
    """Describes a change to a config that lowers its memory.

    Attributes:
        flags: the change, as flags of the command line.
        cost: a description of what the change costs.
        config: the config after the change.
    """

    flags: str
    cost: str
    config: Config


class Found(NamedTuple):
    """Holds one change, or several that were made together, and the result of trying them.

    Attributes:
        flags: the changes, as flags of the command line.
        cost: a description of what the changes cost.
        trial: the result of trying the config with these changes.
    """

    flags: str
    cost: str
    trial: Trial


def changes(config: Config, ways: int, chips: int) -> Iterator[Change]:
    """Yields single changes to a config that lower its memory, the cheapest first.

    Args:
        config: the config that does not fit; its mesh must be given in full (no ``data_parallel: -1``).
        ways: the number of devices that rows are split over.
        chips: the number of devices of a slice.
    """
    train, model = config.train, config.model

    def change(section: str, cost: str, **fields: Any) -> Change:
        part = dataclasses.replace(getattr(config, section), **fields)
        flags = " ".join(f"--{section}.{name} {value}" for name, value in fields.items())
        return Change(flags, cost, dataclasses.replace(config, **{section: part}))

    whole = train.fsdp * train.tensor
    if whole < chips and chips % train.tensor == 0:
        fsdp = chips // train.tensor
        yield change("train", "weights are gathered layer by layer", fsdp=fsdp, data_parallel=1)
    if model.remat in ("none", "dots"):
        yield change("model", "the forward pass is computed twice: about a third more time", remat="full")
    if config.method.objective == "classical" and model.loss_chunk is None:
        chunk = _chunk(config.canvas.response_len)
        yield change("model", "almost nothing: the head runs in parts", loss_chunk=chunk)
    rows = train.batch_size // ways
    parts = next((n for n in (2, 4, 8, 16) if rows % (n * train.accumulate) == 0 and rows > n * train.accumulate), 0)
    if rows > train.accumulate:
        most = rows if not parts else train.accumulate * parts
        yield change(
            "train", "parts of the batch are processed one after the other; the update stays the same", accumulate=most
        )
        if most < rows:
            yield change("train", "rows are processed one after the other; the update stays the same", accumulate=rows)
    yield from _smaller_state(config, change)
    if rows > 1:
        yield change("train", "training changes: half as many rows per update", batch_size=train.batch_size // 2)
    if model.remat != "offload":
        yield change("model", "layers' inputs are copied to the host and back", remat="offload")
    if not config.lora.rank and model.init_from is not None:
        yield change("lora", "training changes: adapters are trained, the weights are not", rank=64)


def _smaller_state(config: Config, change: Callable[..., Change]) -> Iterator[Change]:
    """Yields changes to smaller types: of the frozen base, or of moments and weights."""
    if config.lora.rank:
        if config.model.quantize == "none":
            yield change("model", "the frozen base is rounded to 8 bits", quantize="int8")
        return
    if config.optimizer.moments != "int8" and config.optimizer.name == "adamw":
        yield change("optimizer", "moments are rounded to 8 bits", moments="int8")
    if config.model.param_dtype == "float32":
        yield change(
            "model", "weights are rounded to 16 bits after each update, stochastically", param_dtype="bfloat16"
        )


def _chunk(length: int) -> int:
    """Returns the largest divisor of a response's length that is at most 32."""
    return max(size for size in range(1, min(length, 32) + 1) if length % size == 0)


def advise(
    config: Config, ways: int, chips: int, try_config: TryConfig, tries: int
) -> tuple[list[Found], Found | None]:
    """Searches for the cheapest change that makes a config fit.

    Single changes are tried first, the cheapest first. If none is enough, they are made together: one more at each try.

    Args:
        config: the config that does not fit; its mesh must be given in full (no ``data_parallel: -1``).
        ways: the number of devices that rows are split over.
        chips: the number of devices of a slice.
        try_config: a function that finds out whether a config fits.
        tries: the number of configs that may be compiled; one that is rejected without compiling is not counted.

    Returns:
        (all changes that were tried, the one that fits or None).
    """
    tried: list[Found] = []
    left = tries
    singles = list(changes(config, ways, chips))
    for single in singles:
        if left <= 0:
            return tried, None
        trial = try_config(single.config)
        left -= trial.compiled
        tried.append(Found(single.flags, single.cost, trial))
        if trial.fits:
            return tried, tried[-1]
    so_far, flags, costs = config, "", ""
    made: set[str] = set()
    while left > 0:
        # The list is made again for each change, since a change depends on those before it (by the rows per device, say).
        following = next((c for c in changes(so_far, ways, chips) if _field(c.flags) not in made), None)
        if following is None:
            break
        made.add(_field(following.flags))
        so_far = following.config
        flags, costs = f"{flags} {following.flags}".strip(), f"{costs}; {following.cost}".strip("; ")
        if following.flags in {single.flags for single in singles} and flags == following.flags:
            continue  # this change was tried as a single change above
        trial = try_config(so_far)
        left -= trial.compiled
        tried.append(Found(flags, costs, trial))
        if trial.fits:
            return tried, tried[-1]
    return tried, None


def _field(flags: str) -> str:
    """Returns the name of the first flag of a change, which identifies the kind of change."""
    return flags.split()[0]
