"""Chooses the mesh and batch size of a plan; those of the config are used where they fit the topology."""

from __future__ import annotations

import dataclasses
from typing import Any

from jax.sharding import Mesh

from jaxblock.config.config import Config
from jaxblock.errors import UserError
from jaxblock.fit.topology import Topology, devices_to_compile_for
from jaxblock.parallel.mesh import make_mesh


def place_run(config: Config, topology: Topology) -> tuple[Config, list[str]]:
    """Fits a config's mesh and batch size to a topology.

    Args:
        config: the run's settings, checked.
        topology: the devices that the run is planned for.

    Returns:
        (the config with all sizes of its mesh given, a note for each setting that was chosen, with its flag).

    Raises:
        UserError: the config names a mesh that does not fit the topology.
    """
    train = config.train
    notes: list[str] = []
    mesh: dict[str, Any]
    left = topology.chips // (train.fsdp * train.tensor)
    if train.slices not in (1, topology.slices):
        raise UserError(f"train.slices is {train.slices}, but {topology.name} has {topology.slices}: leave it out")
    if train.fsdp == train.tensor == 1 and train.data_parallel in (-1, 1) and topology.chips > 1:
        mesh = {"slices": topology.slices, "data_parallel": 1, "fsdp": topology.chips, "tensor": 1}
        notes.append(f"the config names no mesh: weights are split over all chips (--train.fsdp {topology.chips})")
    else:
        data = left if train.data_parallel == -1 else train.data_parallel
        if data * train.fsdp * train.tensor != topology.chips or not left:
            raise UserError(
                f"train.data_parallel {train.data_parallel} x train.fsdp {train.fsdp} x train.tensor {train.tensor} is not "
                f"{topology.name}'s {topology.chips} chips: set them so, or all to 1 for the plan to choose"
            )
        mesh = {"slices": topology.slices, "data_parallel": data, "fsdp": train.fsdp, "tensor": train.tensor}
    if topology.slices > 1 and train.slices == 1:
        notes.append(f"rows are split over the slices too (--train.slices {topology.slices})")
    ways = mesh["slices"] * mesh["data_parallel"] * mesh["fsdp"] * train.accumulate
    rows = -(-train.batch_size // ways) * ways
    if rows != train.batch_size:
        notes.append(
            f"train.batch_size {train.batch_size} does not split over {ways} parts: planned with --train.batch_size {rows}"
        )
    return dataclasses.replace(config, train=dataclasses.replace(train, **mesh, batch_size=rows)), notes


def row_shards(config: Config) -> int:
    """Counts the devices that rows are split over; the config must give all sizes of its mesh (see ``place_run``)."""
    train = config.train
    return train.slices * train.data_parallel * train.fsdp


def planned_mesh(config: Config, topology: Topology) -> Mesh:
    """Makes the mesh of a config that ``place_run`` returned, from devices that programs can be compiled for."""
    train = config.train
    return make_mesh(
        train.data_parallel, train.fsdp, train.tensor, slices=train.slices, devices=devices_to_compile_for(topology)
    )
