"""Counts the costs of running a compiled program once, for one device: operations, memory traffic, and bytes sent."""

from __future__ import annotations

from typing import NamedTuple

from jaxblock.fit.flops import instruction_flops
from jaxblock.fit.hlo import Module
from jaxblock.fit.loops import executed_computations
from jaxblock.fit.traffic import instruction_traffic
from jaxblock.fit.transfers import COLLECTIVE_KINDS, Collective, find_collectives


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
