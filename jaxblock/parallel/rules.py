"""Maps the logical names of an array's dimensions to the axes of the mesh that split them.

``PartitionSpec`` appears only in this package; the rest of the package names dimensions (``batch``, ``embed``, ``heads``).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Protocol, runtime_checkable

import jax
from flax import traverse_util
from jax import Array
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec, Sharding  # noqa: TID251

from jaxblock.errors import UserError
from jaxblock.types import Params

RULES: dict[str, tuple[str, ...]] = {
    # Rows of a batch are split over all axes but ``tensor``: under FSDP every device has its own rows. Only rows are split
    # over slices, so that only gradients cross the slow data-centre network between them.
    "batch": ("slice", "data", "fsdp"),
    # For activations whose width is split over fsdp (the embedding lookup): their rows are split over the other axes.
    "rows": ("slice", "data"),
    # Parameters and their optimizer state are split along the model's width.
    "embed": ("fsdp",),
    # The devices of a tensor group compute different heads, feed-forward columns and words of the same rows.
    "heads": ("tensor",),
    "kv_heads": ("tensor",),
    "mlp": ("tensor",),
    "vocab": ("tensor",),
    # The dimension of a LoRA adapter that is not its rank. It is split over all axes that split weights; the adapter's
    # optimizer state follows it.
    "adapter": ("tensor", "fsdp"),
}


@runtime_checkable
class NamedAxes(Protocol):
    """Has a tensor's shape and the logical name of each dimension, as ``models.spec.ParamSpec`` does."""

    @property
    def shape(self) -> tuple[int, ...]:
        """The size of each dimension."""
        ...

    @property
    def axes(self) -> tuple[str | None, ...]:
        """The logical name of each dimension; None where it is not split."""
        ...


def partition_spec(*names: str | None) -> PartitionSpec:
    """Returns the PartitionSpec for the logical names of dimensions; None and names without a rule are not split."""
    return PartitionSpec(*(RULES.get(name) if name else None for name in names))


def sharding(mesh: Mesh, *names: str | None) -> NamedSharding:
    """Returns the sharding of an array whose dimensions have these logical names."""
    return NamedSharding(mesh, partition_spec(*names))


def of_dimensions(whole: Sharding, dimensions: Sequence[int]) -> Sharding:
    """Returns the sharding of an array that has only some dimensions of another, or has them in another order.

    Args:
        whole: the sharding of the other array.
        dimensions: the indices of the dimensions in the other array.
    """
    if not isinstance(whole, NamedSharding):
        return whole  # on one device
    split = dict(enumerate(whole.spec))
    return NamedSharding(whole.mesh, PartitionSpec(*(split.get(at) for at in dimensions)))


def replicated(mesh: Mesh | AbstractMesh) -> NamedSharding:
    """Returns the sharding under which every device has the whole array."""
    return NamedSharding(mesh, PartitionSpec())


def param_shardings(mesh: Mesh, table: Mapping[str, NamedAxes]) -> Params:
    """Returns the sharding of every parameter of a table, as a nested dict.

    Raises:
        UserError: a dimension does not divide by the mesh axes that split it; the message names the tensor.
    """
    flat: dict[str, NamedSharding] = {}
    for path, entry in table.items():
        for size, name in zip(entry.shape, entry.axes, strict=True):
            parts = ways(mesh, name)
            if size % parts:
                fields = [f"train.{axis}" for axis in RULES[name or ""] if mesh.shape[axis] > 1]
                raise UserError(
                    f"parameter {path}: {name} of size {size} does not divide by {parts}; set {' or '.join(fields)} lower"
                )
        flat[path] = sharding(mesh, *entry.axes)
    return traverse_util.unflatten_dict(flat, sep="/")


def ways(mesh: Mesh | AbstractMesh, name: str | None) -> int:
    """Returns the number of parts into which the mesh splits a dimension with this logical name."""
    return math.prod(mesh.shape[axis] for axis in RULES.get(name or "", ()))


def constrain(x: Array, *names: str | None) -> Array:
    """Pins the sharding of an array inside a jitted function, by the logical names of its dimensions.

    The mesh is the ambient one (``jax.set_mesh``); without one, x is returned as it is.
    """
    if jax.sharding.get_abstract_mesh().empty:
        return x
    return jax.lax.with_sharding_constraint(x, partition_spec(*names))
