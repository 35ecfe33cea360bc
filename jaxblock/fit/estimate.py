"""The roofline's step time: what the slowest of a chip's resources would take if nothing ever waited."""

from __future__ import annotations

from typing import NamedTuple

from jaxblock.fit.costs import Costs
from jaxblock.parallel.chips import Chip


class Estimate(NamedTuple):
    """Seconds that each resource would be busy, at published peaks. A bound from below, never a measurement.

    Attributes:
        compute: matrix products.
        memory: the chip's main memory.
        links: what is sent within a slice.
        across: what is sent between slices.
    """

    compute: float
    memory: float
    links: float
    across: float

    @property
    def step(self) -> float:
        """The longest of them."""
        return max(self)

    @property
    def bound(self) -> str:
        """Which one that is."""
        return max(self._asdict(), key=lambda name: self._asdict()[name])


def estimate(costs: Costs, chip: Chip) -> Estimate | None:
    """Divides costs by a chip's figures; None for a chip without any (CPU)."""
    if chip.flops is None or chip.bandwidth is None or chip.links is None:
        return None
    across = costs.across / chip.across if chip.across else 0.0
    return Estimate(costs.flops / chip.flops, costs.traffic / chip.bandwidth, costs.sent() / chip.links, across)
