"""Arranges the devices in a mesh of four axes: slice, data, fsdp and tensor.

The axes are set to ``Auto``, because the default of ``jax.make_mesh`` has been ``Explicit`` since JAX 0.9, under which
sharded gathers raise.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh

from jaxblock.errors import UserError

MESH_AXES = ("slice", "data", "fsdp", "tensor")


def make_mesh(
    data: int = -1,
    fsdp: int = 1,
    tensor: int = 1,
    *,
    slices: int = 1,
    devices: Sequence[jax.Device] | None = None,
) -> Mesh:
    """Makes a mesh with the axes (slice, data, fsdp, tensor).

    Args:
        data: the number of devices of a slice along ``data``; -1 takes all that the other axes leave.
        fsdp: the number of devices along ``fsdp``.
        tensor: the number of devices along ``tensor``; they are neighbours in the order of ``devices``, since they
            exchange the most data.
        slices: the number of slices joined by the data-centre network.
        devices: the devices to use; None for all of the process group.

    Returns:
        The mesh, with Auto axes.

    Raises:
        UserError: the product of the sizes is not the number of devices, or the devices belong to another number of
            slices.
    """
    devices = list(jax.devices() if devices is None else devices)
    if data == -1:
        data = max(len(devices) // (fsdp * tensor * slices), 1)
    if (product := data * fsdp * tensor * slices) != len(devices):
        several = f"train.slices {slices} x " if slices > 1 else ""
        raise UserError(
            f"{several}train.data_parallel {data} x train.fsdp {fsdp} x train.tensor {tensor} = {product} devices, but "
            f"there are {len(devices)}: set them so that their product is the number of devices (-1 takes what is left)"
        )
    return Mesh(_arrange(devices, (slices, data, fsdp, tensor)), MESH_AXES, axis_types=(AxisType.Auto,) * 4)


def _arrange(devices: list[jax.Device], shape: tuple[int, int, int, int]) -> np.ndarray:
    """Arranges devices in the shape of a mesh so that neighbours on an axis are close on the network.

    An axis may take part of a side of a slice (tensor 2 on 8 x 8 chips), which ``jax.make_mesh`` allows only on v5e.
    """
    slices = shape[0]
    if slices == 1:
        return mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    found = len({getattr(device, "slice_index", 0) for device in devices})
    if found == 1 and devices[0].platform != "tpu":
        # The CPU devices that stand for several slices in tests have no slice index: they are taken in order.
        return np.array(devices).reshape(shape)
    if found != slices:
        raise UserError(f"train.slices is {slices}, but these devices are of {found} slices: set it to {found}")
    return mesh_utils.create_hybrid_device_mesh(
        (1, *shape[1:]), (slices, 1, 1, 1), devices=devices, allow_split_physical_axes=True
    )
