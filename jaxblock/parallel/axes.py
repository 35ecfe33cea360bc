"""Logical axis names and where they lie on the mesh: the only file that writes a PartitionSpec.

Mesh axes are ``Auto``, stated: the default of ``jax.make_mesh`` has been ``Explicit`` since JAX 0.9, under which
sharded gathers raise.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol, runtime_checkable

import jax
from flax import traverse_util
from jax import Array
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from jaxblock.errors import UserError
from jaxblock.types import Params


@runtime_checkable
class NamedAxes(Protocol):
    """A tensor's shape and the logical name of each dimension (``models.params.ParamSpec``)."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Sizes."""
        ...

    @property
    def axes(self) -> tuple[str | None, ...]:
        """Names."""
        ...


MESH_AXES = ("data", "fsdp", "tensor")

RULES: dict[str, tuple[str, ...]] = {
    # Rows are split over both axes: under FSDP every device has its own rows.
    "batch": ("data", "fsdp"),
    # Parameters and their optimizer state are split along the model's width.
    "embed": ("fsdp",),
    # Devices of a tensor group compute different heads, feed-forward columns and words of the same rows.
    "heads": ("tensor",),
    "kv_heads": ("tensor",),
    "mlp": ("tensor",),
    "vocab": ("tensor",),
    # The side of an adapter that is not its rank: split over all that split weights, and its optimizer state with it.
    "adapter": ("tensor", "fsdp"),
}


def make_mesh(data: int = -1, fsdp: int = 1, tensor: int = 1, *, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A (data, fsdp, tensor) mesh.

    Args:
        data: devices along ``data``; -1 for all that the others leave.
        fsdp: devices along ``fsdp``.
        tensor: devices along ``tensor``; neighbours in the order of ``devices``, since they talk the most.
        devices: which devices; None for all of the process group.

    Returns:
        The mesh, with Auto axes.

    Raises:
        UserError: the product is not the number of devices.
    """
    devices = list(jax.devices() if devices is None else devices)
    if data == -1:
        data = max(len(devices) // (fsdp * tensor), 1)
    if (product := data * fsdp * tensor) != len(devices):
        raise UserError(
            f"train.data_parallel {data} x train.fsdp {fsdp} x train.tensor {tensor} = {product} devices, but there are "
            f"{len(devices)}: set them so that their product is the number of devices (-1 takes what is left)"
        )
    return jax.make_mesh((data, fsdp, tensor), MESH_AXES, axis_types=(AxisType.Auto,) * 3, devices=devices)


def spec(*names: str | None) -> PartitionSpec:
    """The PartitionSpec of logical axis names, one per dimension; None and names without a rule are not split."""
    return PartitionSpec(*(RULES.get(name) if name else None for name in names))


def sharding(mesh: Mesh, *names: str | None) -> NamedSharding:
    """The sharding of an array whose dimensions have these logical names."""
    return NamedSharding(mesh, spec(*names))


def replicated(mesh: Mesh | AbstractMesh) -> NamedSharding:
    """Every device has the whole array."""
    return NamedSharding(mesh, PartitionSpec())


def param_shardings(mesh: Mesh, table: Mapping[str, NamedAxes]) -> Params:
    """Shardings of every parameter.

    Raises:
        UserError: a split dimension does not divide by its mesh axes; names the tensor.
    """
    flat: dict[str, NamedSharding] = {}
    for path, entry in table.items():
        for size, name in zip(entry.shape, entry.axes, strict=True):
            ways = _ways(mesh, name)
            if size % ways:
                raise UserError(
                    f"parameter {path}: {name} of size {size} does not divide by {ways}; set "
                    f"train.{RULES[name or ''][0]} lower"
                )
        flat[path] = sharding(mesh, *entry.axes)
    return traverse_util.unflatten_dict(flat, sep="/")


def _ways(mesh: Mesh, name: str | None) -> int:
    ways = 1
    for axis in RULES.get(name or "", ()):
        ways *= mesh.shape[axis]
    return ways


def constrain(x: Array, *names: str | None) -> Array:
    """Pins an activation's sharding by logical names under the ambient mesh (``jax.set_mesh``); without one, x."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return x
    return jax.lax.with_sharding_constraint(x, spec(*names))
