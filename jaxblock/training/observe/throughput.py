"""Arithmetic that training needs a second, and what share of the chips' published peak that is."""

from __future__ import annotations

import math
from typing import NamedTuple

import jax
from jax.sharding import Mesh

from jaxblock.models.architecture import Architecture
from jaxblock.models.spec import Table, matmul_flops_per_token
from jaxblock.parallel.chips import chip_of


class Work(NamedTuple):
    """What goes through the network in some steps, over all processes and draws.

    Attributes:
        rows: rows, each draw counted.
        positions: that a row's queries can see, of all rows.
        predicted: that the vocabulary projection is needed for, of all rows.
    """

    rows: int
    positions: int
    predicted: int


def model_flops(table: Table, arch: Architecture, work: Work, adapters: Table | None = None) -> float:
    """Floating-point operations of forward and backward passes: what the method needs, not what remat adds to it.

    Args:
        table: the network's specs; the frozen base's with adapters.
        arch: sizes.
        work: what was done.
        adapters: specs of the trained adapters; None where all weights are trained. A frozen matrix has no gradient: two
            products for three.
    """
    context = round(work.positions / max(1, work.rows))
    weights = matmul_flops_per_token(table, arch, 0, head=False)
    attention = matmul_flops_per_token(table, arch, context, head=False) - weights
    head = 2.0 * arch.vocab_size * arch.d_model
    products = 3 if adapters is None else 2
    low_rank = 0.0 if adapters is None else sum(2.0 * math.prod(spec.shape) for spec in adapters.values())
    per_position = products * weights + 3 * (attention + low_rank)
    return work.positions * per_position + work.predicted * products * head


def peak(mesh: Mesh) -> float | None:
    """Published bfloat16 operations a second of a mesh's devices together; None where a chip is not known."""
    device: jax.Device = mesh.devices.flat[0]
    chip = chip_of(device)
    return None if chip is None or chip.flops is None else chip.flops * mesh.size


def speeds(flops: float, seconds: float, best: float | None) -> dict[str, float]:
    """For a row of metrics; empty where the peak is not known, since a bare number of operations says little.

    Args:
        flops: of some steps (``model_flops``).
        seconds: they took.
        best: ``peak``.
    """
    if best is None:
        return {}
    return {"model_flops_per_second": flops / seconds, "mfu": flops / seconds / best}
