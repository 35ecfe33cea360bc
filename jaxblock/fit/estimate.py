"""Estimates step time with the roofline model: the time of a chip's busiest resource if nothing ever waited."""

from __future__ import annotations

from typing import NamedTuple

from jaxblock.fit.costs import Costs
from jaxblock.parallel.chips import Chip


class StepTime(NamedTuple):
    """Holds the time, in seconds, that each resource is busy at its published peak: a lower bound, not a measurement.

    Attributes:
        compute: the time of the matrix products.
        memory: the time of reading and writing the chip's main memory.
        links: the time of sending to other chips of the slice.
        across: the time of sending to other slices.
    """

    compute: float
    memory: float
    links: float
    across: float

    @property
    def step(self) -> float:
        """Returns the longest of the four times."""
        return max(self)

    @property
    def bound(self) -> str:
        """Returns the name of the resource that is busy longest."""
        return max(self._asdict(), key=lambda name: self._asdict()[name])


def estimate_step(costs: Costs, chip: Chip) -> StepTime | None:
    """Divides costs by a chip's published peaks; returns None for a chip without published peaks (the host's CPU)."""
    if chip.flops is None or chip.bandwidth is None or chip.links is None:
        return None
    across = costs.across / chip.across if chip.across else 0.0
    return StepTime(costs.flops / chip.flops, costs.traffic / chip.bandwidth, costs.sent() / chip.links, across)
