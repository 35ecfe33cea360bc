"""Compares the memory that a compiled step was planned to take with what the device has, and with what it used."""

from __future__ import annotations

from typing import NamedTuple

import jax


class MemoryPlan(NamedTuple):
    """Holds what the compiler planned for the train step on one device.

    Attributes:
        needed: the bytes that the step takes.
        limit: the bytes that the device gives to programs; None where the platform does not say.
    """

    needed: float
    limit: float | None

    def describe(self) -> str | None:
        """Returns the plan as a line for people; None where there is no limit to compare it with."""
        if self.limit is None:
            return None
        return f"the step is planned to take {gib(self.needed)} of the {gib(self.limit)} of a device"

    def compare(self, device: jax.Device) -> str | None:
        """Returns the plan against the most that a device has used, as a line; None where the platform does not say."""
        peak = device_peak(device)
        if peak is None:
            return None
        return f"the step was planned to take {gib(self.needed)} of a device; at its peak {gib(peak)} were in use"


def device_limit(device: jax.Device) -> float | None:
    """Returns the bytes that a device gives to programs; None where the platform does not say (CPU)."""
    return _statistic(device, "bytes_limit")


def device_peak(device: jax.Device) -> float | None:
    """Returns the most bytes that have been in use on a device; None where the platform does not say (CPU)."""
    return _statistic(device, "peak_bytes_in_use")


def _statistic(device: jax.Device, name: str) -> float | None:
    """Returns one of a device's memory statistics; None where the platform has none."""
    try:
        found = device.memory_stats()
    except Exception:  # some platforms raise where others return None
        return None
    return float(found[name]) if found and name in found else None


def gib(size: float) -> str:
    """Returns a number of bytes for people: ``3.33 GiB``, ``12.5 MiB``."""
    for unit, name in ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB")):
        if size >= unit:
            return f"{size / unit:.2f} {name}"
    return f"{size:.0f} B"
