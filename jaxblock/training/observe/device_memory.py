"""Compares the planned memory of a compiled step with the memory that the device has, and with what was used at its peak."""

from __future__ import annotations

from typing import NamedTuple

import jax


class MemoryPlan(NamedTuple):
    """Holds what the compiler planned for the train step on one device.

    Attributes:
        needed: the bytes that the step takes.
        limit: the bytes that programs can use on the device; None where the platform does not report it.
    """

    needed: float
    limit: float | None

    def describe(self) -> str | None:
        """Returns a line that compares the plan with the device's memory; None where that is not known."""
        if self.limit is None:
            return None
        return f"the step is planned to take {gib(self.needed)} of the {gib(self.limit)} of a device"

    def compare(self, device: jax.Device) -> str | None:
        """Returns a line that compares planned with peak memory; None where the platform does not report the peak."""
        peak = device_peak(device)
        if peak is None:
            return None
        return f"the step was planned to take {gib(self.needed)} of a device; at its peak {gib(peak)} were in use"


def device_limit(device: jax.Device) -> float | None:
    """Returns the bytes that programs can use on a device; None where the platform does not report it (CPU)."""
    return _statistic(device, "bytes_limit")


def device_peak(device: jax.Device) -> float | None:
    """Returns the most bytes that have been in use on a device; None where the platform does not report it (CPU)."""
    return _statistic(device, "peak_bytes_in_use")


def _statistic(device: jax.Device, name: str) -> float | None:
    """Returns one of a device's memory statistics; None where the platform has none."""
    try:
        found = device.memory_stats()
    except Exception:  # some platforms raise where others return None
        return None
    return float(found[name]) if found and name in found else None


def gib(size: float) -> str:
    """Formats a number of bytes: ``3.33 GiB``, ``12.50 MiB``."""
    for unit, name in ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB")):
        if size >= unit:
            return f"{size / unit:.2f} {name}"
    return f"{size:.0f} B"
