"""Computes the arithmetic that training does per second, and its share of the devices' published peak (MFU)."""

from __future__ import annotations

import math
from typing import NamedTuple

import jax
from jax.sharding import Mesh

from jaxblock.models.architecture import Architecture
from jaxblock.models.spec import Table, matmul_flops_per_token
from jaxblock.parallel.chips import chip_of


class Work(NamedTuple):
    """Counts the rows and positions that the network computed in some steps, over all processes and draws.

    Attributes:
        rows: the number of rows, counted once for each draw.
        positions: the positions that were computed, summed over the rows.
        predicted: the positions that need the vocabulary projection, summed over the rows.
    """

    rows: int
    positions: int
    predicted: int


def model_flops(table: Table, arch: Architecture, work: Work, adapters: Table | None = None) -> float:
    """Returns the floating-point operations of the forward and backward passes, without those that remat repeats.

    Args:
        table: the network's parameters; with adapters, those of the frozen base.
        arch: the network's sizes.
        work: the rows and positions that the network computed.
        adapters: the trained adapters' parameters; None where all weights are trained. A frozen matrix has no
            gradient, so it needs two products where a trained one needs three.
    """
    context = round(work.positions / max(1, work.rows))
    weights = matmul_flops_per_token(table, arch, 0, head=False)
    attention = matmul_flops_per_token(table, arch, context, head=False) - weights
    head = 2.0 * arch.vocab_size * arch.d_model
    products = 3 if adapters is None else 2
    low_rank = 0.0 if adapters is None else sum(2.0 * math.prod(spec.shape) for spec in adapters.values())
    per_position = products * weights + 3 * (attention + low_rank)
    return work.positions * per_position + work.predicted * products * head


def peak_flops(mesh: Mesh) -> float | None:
    """Returns the published bfloat16 operations per second of a mesh's devices together; None for unknown chips."""
    device: jax.Device = mesh.devices.flat[0]
    chip = chip_of(device)
    return None if chip is None or chip.flops is None else chip.flops * mesh.size


def utilisation(flops: float, seconds: float, peak: float | None) -> dict[str, float]:
    """Returns the entries of a metrics row for the operations per second and their share of the peak; {} without a peak.

    Args:
        flops: the operations of some steps, from ``model_flops``.
        seconds: the time that these steps took.
        peak: the devices' peak, from ``peak_flops``; None where it is unknown.
    """
    if peak is None:
        return {}
    return {"model_flops_per_second": flops / seconds, "mfu": flops / seconds / peak}
