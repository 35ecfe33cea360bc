"""Counts the costs of running a compiled program once, for one device, and estimates the time that they take.

The costs are operations, memory traffic and bytes sent. The estimate follows the roofline model: it is the time of the chip's
busiest resource if nothing ever waited.
"""

from __future__ import annotations

from typing import NamedTuple

from jaxblock.fit.flops import instruction_flops
from jaxblock.fit.hlo import Module
from jaxblock.fit.loops import executed_computations
from jaxblock.fit.traffic import instruction_traffic
from jaxblock.fit.transfers import COLLECTIVE_KINDS, Collective, find_collectives
from jaxblock.parallel.chips import Chip


class Costs(NamedTuple):
    """Holds the costs of running a program once, for one device.

    Attributes:
        flops: the floating-point operations of matrix products (two per multiplication).
        traffic: the bytes read from and written to the chip's main memory, estimated from the program's operations.
        collectives: the program's collective operations, those that send most first.
    """

    flops: float
    traffic: float
    collectives: list[Collective]

    def sent(self, kind: str | None = None) -> float:
        """Adds up the bytes that a device sends in collectives of one kind; None for all kinds within its slice."""
        return sum((c.sent for c in self.collectives if (c.kind == kind if kind else c.kind in COLLECTIVE_KINDS)), 0.0)

    @property
    def across(self) -> float:
        """Returns the bytes that a device sends to other slices."""
        return self.sent("across slices")


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


def count_costs(module: Module, devices: int) -> Costs:
    """Adds up the costs of running a program once.

    Args:
        module: the program of one device.
        devices: the number of devices that run the program, which is the group of a collective that names no groups.
    """
    flops = traffic = 0.0
    for name, times, fused in executed_computations(module):
        computation = module.computations.get(name, {})
        for instruction in computation.values():
            flops += times * instruction_flops(instruction, computation)
            if not fused:
                traffic += times * instruction_traffic(module, instruction, computation)
    return Costs(flops, traffic, find_collectives(module, devices))


def estimate_step(costs: Costs, chip: Chip) -> StepTime | None:
    """Divides costs by a chip's published peaks; returns None for a chip without published peaks (the host's CPU)."""
    if chip.flops is None or chip.bandwidth is None or chip.links is None:
        return None
    across = costs.across / chip.across if chip.across else 0.0
    return StepTime(costs.flops / chip.flops, costs.traffic / chip.bandwidth, costs.sent() / chip.links, across)
