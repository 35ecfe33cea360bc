"""States how weights are gathered and gradients summed over devices, where XLA by itself would send more than is needed.

Every function acts under the ambient mesh (``jax.set_mesh``).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import PartitionSpec  # noqa: TID251
from jaxtyping import Float

from jaxblock.parallel.rules import RULES, partition_spec, ways

_SINGLE_STAGE_LIMIT = 8
"""The most devices along ``fsdp`` for which XLA for TPUs keeps one reduce-scatter, instead of making it an all-reduce."""


def per_device(
    f: Callable[..., Array], given: Sequence[Sequence[str | None]], result: Sequence[str | None]
) -> Callable[..., Array]:
    """Makes a function run on each device's own part of its arguments, as kernels that XLA cannot split must.

    Args:
        f: a function that treats the rows (or heads) of its arguments independently.
        given: the logical names of each argument's dimensions.
        result: the logical names of the result's dimensions.

    Returns:
        The function over whole arrays; ``f`` itself where there is no ambient mesh.
    """
    if jax.sharding.get_abstract_mesh().empty:
        return f
    specs = tuple(partition_spec(*names) for names in given)
    split: Callable[..., Array] = jax.shard_map(f, in_specs=specs, out_specs=partition_spec(*result), check_vma=False)
    return split


def splits_rows() -> bool:
    """Says whether the ambient mesh splits rows, so that a weight's gradient is a sum over devices."""
    mesh = jax.sharding.get_abstract_mesh()
    return not mesh.empty and ways(mesh, "batch") > 1


def gather(w: Array, *names: str | None) -> Array:
    """Gathers the parts of a weight that are split over ``fsdp``; splits over other axes stay.

    Called where the weight is used, it makes XLA gather the weight, and only the weight, once for all products with it. By
    itself XLA gathers twice in a backward pass, or replaces the gather by a series of permutes.

    Args:
        w: the weight.
        names: the logical names of the weight's dimensions when it is multiplied.

    Returns:
        The weight, whole along ``fsdp``; w itself where there is no ambient mesh.
    """
    if jax.sharding.get_abstract_mesh().empty:
        return w
    return jax.lax.with_sharding_constraint(w, PartitionSpec(*_without_fsdp(names)))


def _without_fsdp(names: Sequence[str | None]) -> tuple[tuple[str, ...] | None, ...]:
    """Returns the mesh axes that split each dimension, without ``fsdp``."""
    kept = (tuple(axis for axis in RULES.get(name or "", ()) if axis != "fsdp") for name in names)
    return tuple(over or None for over in kept)


def shaped_like_partial_sums(w: Float[Array, "I O"]) -> Float[Array, "ways I O"]:
    """Broadcasts a matrix to the shape of its gradient's partial sums: one copy for each group of rows."""
    return jnp.broadcast_to(w, (ways(jax.sharding.get_abstract_mesh(), "batch"), *w.shape))


def partial_sums(
    f: Callable[[Array, Array], Array], left: Array, right: Array, names: Sequence[str | None]
) -> Float[Array, "ways I O"]:
    """Computes each device's part of a sum over rows, and leaves it on that device.

    Args:
        f: takes (left, right) of some rows and returns the sum over these rows of their products [I, O].
        left: the left factors [B, ..., I]; B divides by the number of parts.
        right: the right factors [B, ..., O].
        names: the logical names of I and O.

    Returns:
        One partial sum for each group of rows.

    Raises:
        ValueError: B does not divide (JAX's own error).
    """
    rows, between, (n_in, n_out) = RULES["batch"], (None,) * (left.ndim - 2), _without_fsdp(names)
    specs = (PartitionSpec(rows, *between, n_in), PartitionSpec(rows, *between, n_out))
    parts: Callable[..., Array] = jax.shard_map(
        lambda a, b: f(a, b)[None], in_specs=specs, out_specs=PartitionSpec(rows, n_in, n_out), check_vma=False
    )
    return parts(left, right)


def sum_over_devices(
    parts: Float[Array, "ways I O"], used: Sequence[str | None], stored: Sequence[str | None]
) -> Array:
    """Adds up the partial sums of a gradient by reduce-scatters over ``fsdp``, and leaves the sum split as its matrix is.

    On many devices XLA by itself uses an all-reduce, which sends twice as much.

    Args:
        parts: what ``partial_sums`` returned.
        used: the logical names of I and O as the matrix was multiplied.
        stored: the logical names of I and O as the matrix is stored.

    Returns:
        The sum [I, O].
    """
    split = tuple(RULES.get(name or "", ()) for name in stored)
    dim = next(dim for dim, over in enumerate(split) if "fsdp" in over)
    over_tensor_too = "tensor" in split[dim] and "tensor" not in (_without_fsdp(used)[dim] or ())

    def total(part: Array) -> Array:
        own = part[0]
        if over_tensor_too:  # devices of a tensor group have the same rows, and each keeps its share of an adapter
            size = own.shape[dim] // jax.lax.axis_size("tensor")
            own = jax.lax.dynamic_slice_in_dim(own, jax.lax.axis_index("tensor") * size, size, dim)
        for groups in _reduce_scatter_stages(jax.lax.axis_size("fsdp")):
            own = jax.lax.psum_scatter(own, "fsdp", scatter_dimension=dim, tiled=True, axis_index_groups=groups)
        return jax.lax.psum(own, ("slice", "data"))

    given = PartitionSpec(RULES["batch"], *_without_fsdp(used))
    summed: Callable[..., Array] = jax.shard_map(
        total, in_specs=given, out_specs=partition_spec(*stored), check_vma=False
    )
    return summed(parts)


def _reduce_scatter_stages(size: int) -> list[list[list[int]] | None]:
    """Splits a reduce-scatter over many devices into two: over the columns of a nearly square grid, then over its rows.

    Both together send as much as a single one, ``(size - 1) / size`` of the array. XLA for TPUs turns a single one over 16 or
    64 chips into an all-reduce, even if the program names a reduce-scatter. On a TPU slice the grid matches its links.

    Args:
        size: the number of devices.

    Returns:
        The groups of devices of each stage; None for one group of all.
    """
    if size == 1:
        return []
    if size <= _SINGLE_STAGE_LIMIT:
        return [None]
    width = next(d for d in range(1, size + 1) if size % d == 0 and d * d >= size)
    columns = [list(range(start, size, width)) for start in range(width)]
    rows = [list(range(start, start + width)) for start in range(0, size, width)]
    return [columns, rows] if width < size else [None]
