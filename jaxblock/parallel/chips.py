"""Lists the published figures of accelerators: memory, peak arithmetic and bandwidths."""

from __future__ import annotations

from typing import NamedTuple

import jax


class Chip(NamedTuple):
    """Holds the published figures of one chip of an accelerator.

    Attributes:
        name: the name of this kind of chip.
        memory: the bytes of memory that programs can use.
        flops: the peak number of bfloat16 operations per second; None where there is no meaningful figure.
        bandwidth: the bytes per second of main memory; None where it is not known.
        links: the bytes per second that a chip can send within its slice (or node), over all links, in one direction.
        across: the bytes per second that a chip can send over the data-centre network; None where it is not published.
        source: where the figures are from.
    """

    name: str
    memory: float
    flops: float | None
    bandwidth: float | None
    links: float | None
    across: float | None
    source: str


_GB, _GIB, _TERA = 1e9, 2.0**30, 1e12
_TPU = "Google Cloud TPU documentation, page of the version"
_NVIDIA = "NVIDIA's data sheet (SXM, dense)"

CHIPS: dict[str, Chip] = {
    # TPU memory is what the compiler lets programs use of the published 16, 32, 95 and 32 GB. Links are half of the published
    # bidirectional bandwidth. Across is a pod's published data-centre bandwidth divided by its 256 chips.
    "v5e": Chip("TPU v5e", 15.75 * _GIB, 197 * _TERA, 819 * _GB, 200 * _GB, 3.125 * _GB, _TPU),
    "v6e": Chip("TPU v6e", 31.25 * _GIB, 918 * _TERA, 1640 * _GB, 400 * _GB, 12.5 * _GB, _TPU),
    "v5p": Chip("TPU v5p", 95.74 * _GIB, 459 * _TERA, 2765 * _GB, 600 * _GB, None, _TPU),
    "v4": Chip("TPU v4", 30.75 * _GIB, 275 * _TERA, 1228 * _GB, 300 * _GB, None, _TPU),
    # Nine tenths of the card's memory: driver and allocator need the rest. JAX takes three quarters by default;
    # launch/gpu.sh and launch/slurm.sbatch set XLA_CLIENT_MEM_FRACTION=0.9.
    "h100": Chip("H100 80 GB", 0.9 * 80 * _GB, 989 * _TERA, 3350 * _GB, 450 * _GB, None, _NVIDIA),
    "h200": Chip("H200 141 GB", 0.9 * 141 * _GB, 989 * _TERA, 4800 * _GB, 450 * _GB, None, _NVIDIA),
}

# The names that JAX gives to devices. Other H100s (PCIe, NVL) have other figures, and are not in the table.
_KINDS = {
    "TPU v4": "v4",
    "TPU v5": "v5p",
    "TPU v5p": "v5p",
    "TPU v5 lite": "v5e",
    "TPU v5e": "v5e",
    "TPU v6 lite": "v6e",
    "TPU v6e": "v6e",
    "NVIDIA H100 80GB HBM3": "h100",
    "NVIDIA H200": "h200",
}


def chip_of(device: jax.Device) -> Chip | None:
    """Returns the figures of a device; None where they are not known (a CPU, other accelerators)."""
    kind = _KINDS.get(device.device_kind)
    return None if kind is None else CHIPS[kind]
