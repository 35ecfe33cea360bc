"""Logical axis names and where they lie on the mesh: the only file that writes a PartitionSpec.

Mesh axes are ``Auto``, stated: the default of ``jax.make_mesh`` has been ``Explicit`` since JAX 0.9, under which
sharded gathers raise.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util
from jax import Array
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Float

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


MESH_AXES = ("slice", "data", "fsdp", "tensor")

RULES: dict[str, tuple[str, ...]] = {
    # Rows are split over all axes but one: under FSDP every device has its own rows. Slices are joined by the slow
    # data-centre network: nothing is split over them but rows, so that only gradients cross it.
    "batch": ("slice", "data", "fsdp"),
    # Rows as they lie while a width is split over fsdp in their place.
    "rows": ("slice", "data"),
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


def make_mesh(
    data: int = -1,
    fsdp: int = 1,
    tensor: int = 1,
    *,
    slices: int = 1,
    devices: Sequence[jax.Device] | None = None,
) -> Mesh:
    """A (slice, data, fsdp, tensor) mesh.

    Args:
        data: devices of a slice along ``data``; -1 for all that the others leave.
        fsdp: devices along ``fsdp``.
        tensor: devices along ``tensor``; neighbours in the order of ``devices``, since they talk the most.
        slices: slices joined by the data-centre network.
        devices: which devices; None for all of the process group.

    Returns:
        The mesh, with Auto axes.

    Raises:
        UserError: the product is not the number of devices, or the devices are of another number of slices.
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
    return Mesh(_placed(devices, (slices, data, fsdp, tensor)), MESH_AXES, axis_types=(AxisType.Auto,) * 4)


def _placed(devices: list[jax.Device], shape: tuple[int, int, int, int]) -> np.ndarray:
    """Devices in the shape of a mesh, whose first axis runs over slices; hosts' own devices have none and go in order.

    An axis may split a side of a slice (tensor 2 on 8 x 8 chips), which ``jax.make_mesh`` allows on v5e alone.
    """
    slices = shape[0]
    if slices == 1:
        return mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    found = len({getattr(device, "slice_index", 0) for device in devices})
    if found == 1 and devices[0].platform != "tpu":
        return np.array(devices).reshape(shape)
    if found != slices:
        raise UserError(f"train.slices is {slices}, but these devices are of {found} slices: set it to {found}")
    return mesh_utils.create_hybrid_device_mesh(
        (1, *shape[1:]), (slices, 1, 1, 1), devices=devices, allow_split_physical_axes=True
    )


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
                fields = [f"train.{axis}" for axis in RULES[name or ""] if mesh.shape[axis] > 1]
                raise UserError(
                    f"parameter {path}: {name} of size {size} does not divide by {ways}; set {' or '.join(fields)} lower"
                )
        flat[path] = sharding(mesh, *entry.axes)
    return traverse_util.unflatten_dict(flat, sep="/")


def _ways(mesh: Mesh | AbstractMesh, name: str | None) -> int:
    """Into how many parts a dimension of this logical name is split."""
    return math.prod(mesh.shape[axis] for axis in RULES.get(name or "", ()))


def per_device(
    f: Callable[..., Array], given: Sequence[Sequence[str | None]], result: Sequence[str | None]
) -> Callable[..., Array]:
    """Runs a function on each device's own parts, as kernels that XLA cannot split must be.

    Args:
        f: a function of arrays whose rows (or heads) do not need each other.
        given: logical names of each argument's dimensions.
        result: those of its result.

    Returns:
        The function over whole arrays under the ambient mesh; without one, ``f``.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return f
    specs = tuple(spec(*names) for names in given)
    split: Callable[..., Array] = jax.shard_map(f, in_specs=specs, out_specs=spec(*result), check_vma=False)
    return split


def constrain(x: Array, *names: str | None) -> Array:
    """Pins an activation's sharding by logical names under the ambient mesh (``jax.set_mesh``); without one, x."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return x
    return jax.lax.with_sharding_constraint(x, spec(*names))


def splits_rows() -> bool:
    """Whether rows are split under the ambient mesh, so that a weight's gradient is a sum over devices."""
    mesh = jax.sharding.get_abstract_mesh()
    return not mesh.empty and _ways(mesh, "batch") > 1


def gather(w: Array, *names: str | None) -> Array:
    """Brings the parts of a weight that ``fsdp`` splits together, under the ambient mesh; other splits stay.

    Said where the weight is used, it makes XLA gather once for all that the weight is multiplied with, and nothing but
    the weight: left to itself it gathers twice in a backward pass, or sends pieces round a ring.

    Args:
        w: the weight.
        names: logical names of its dimensions, as it is used.

    Returns:
        The weight, whole along ``fsdp``.
    """
    if jax.sharding.get_abstract_mesh().empty:
        return w
    return jax.lax.with_sharding_constraint(w, PartitionSpec(*_gathered(names)))


def _gathered(names: Sequence[str | None]) -> tuple[tuple[str, ...] | None, ...]:
    kept = (tuple(axis for axis in RULES.get(name or "", ()) if axis != "fsdp") for name in names)
    return tuple(over or None for over in kept)


def stack_of_parts(w: Array) -> Array:
    """A matrix [I, O] in the shape of its gradient's parts: [ways, I, O], one part for each group of rows."""
    return jnp.broadcast_to(w, (_ways(jax.sharding.get_abstract_mesh(), "batch"), *w.shape))


def parts_of_sum(
    f: Callable[[Array, Array], Array], left: Array, right: Array, names: Sequence[str | None]
) -> Float[Array, "ways I O"]:
    """Each device's part of a sum over rows; nothing is sent.

    Args:
        f: of (left, right) of some rows, their product [I, O] summed over these rows.
        left: [B, ..., I]; B divides by the parts.
        right: [B, ..., O].
        names: logical names of I and O.

    Returns:
        The parts, each where its rows are.

    Raises:
        ValueError: B does not divide (JAX's own error).
    """
    rows, between, (n_in, n_out) = RULES["batch"], (None,) * (left.ndim - 2), _gathered(names)
    specs = (PartitionSpec(rows, *between, n_in), PartitionSpec(rows, *between, n_out))
    parts: Callable[..., Array] = jax.shard_map(
        lambda a, b: f(a, b)[None], in_specs=specs, out_specs=PartitionSpec(rows, n_in, n_out), check_vma=False
    )
    return parts(left, right)


_ONE_STAGE = 8
"""Devices along ``fsdp`` up to which XLA for TPUs keeps a reduce-scatter as one."""


def _stages(size: int) -> list[list[list[int]] | None]:
    """Groups of the stages of a reduce-scatter: the columns of a square-like grid of devices, then its rows.

    Both send what one stage would, ``(size - 1) / size`` of the array. XLA for TPUs turns one stage over 16 or 64 chips
    into an all-reduce, even one that is asked for by name. On a slice the grid is that of its links.
    """
    if size == 1:
        return []
    if size <= _ONE_STAGE:
        return [None]
    width = next(d for d in range(1, size + 1) if size % d == 0 and d * d >= size)
    columns = [list(range(at, size, width)) for at in range(width)]
    rows = [list(range(at, at + width)) for at in range(0, size, width)]
    return [columns, rows] if width < size else [None]


def sum_of_parts(parts: Float[Array, "ways I O"], used: Sequence[str | None], stored: Sequence[str | None]) -> Array:
    """Sums the parts of a gradient to where its matrix is stored: over ``fsdp`` by reduce-scatters.

    XLA left to itself takes an all-reduce, which sends twice as much, where there are many devices.

    Args:
        parts: of ``parts_of_sum``.
        used: logical names of I and O as it was multiplied.
        stored: as it is stored.

    Returns:
        The sum [I, O].
    """
    split = tuple(RULES.get(name or "", ()) for name in stored)
    place = next(at for at, over in enumerate(split) if "fsdp" in over)
    tensor = "tensor" in split[place] and "tensor" not in (_gathered(used)[place] or ())

    def total(part: Array) -> Array:
        own = part[0]
        if tensor:  # devices of a tensor group have the same rows, and each keeps its share of an adapter
            ways = jax.lax.axis_size("tensor")
            size = own.shape[place] // ways
            own = jax.lax.dynamic_slice_in_dim(own, jax.lax.axis_index("tensor") * size, size, place)
        for groups in _stages(jax.lax.axis_size("fsdp")):
            own = jax.lax.psum_scatter(own, "fsdp", scatter_dimension=place, tiled=True, axis_index_groups=groups)
        return jax.lax.psum(own, ("slice", "data"))

    lying = PartitionSpec(RULES["batch"], *_gathered(used))
    summed: Callable[..., Array] = jax.shard_map(total, in_specs=lying, out_specs=spec(*stored), check_vma=False)
    return summed(parts)
