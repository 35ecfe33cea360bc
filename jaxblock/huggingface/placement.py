"""Fills leaves from files, on the devices: stacked, transposed, each device its own slice, one tensor on the host at a time."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import Sharding
from jax.typing import DTypeLike

from jaxblock.huggingface.tensor_files import DTYPES, StoredTensor, read_tensor
from jaxblock.models.linear import int8
from jaxblock.models.spec import ParamSpec

Bounds = tuple[tuple[int, int], ...]


def tensor_names(spec: ParamSpec) -> list[str]:
    """The checkpoint's names of a leaf's tensors: one per layer, or just one."""
    return [spec.hf_name.format(layer=i) for i in range(spec.shape[0])] if spec.stacked else [spec.hf_name]


def stored_shape(spec: ParamSpec) -> tuple[int, ...]:
    """The shape of one of a leaf's tensors as the checkpoint stores it."""
    shape = spec.shape[1:] if spec.stacked else spec.shape
    return shape[::-1] if spec.transpose else shape


def transposed(x: np.ndarray) -> np.ndarray:
    """A matrix's transpose, in memory order.

    In panels of 8 rows: walking down whole columns, as NumPy and XLA's CPU backend do, misses the cache at every step
    where the width is a power of two (4 and 5 times slower at 5632 x 2048).
    """
    plain = x.view(f"u{x.dtype.itemsize}")  # NumPy copies bfloat16 through a function call an element
    out = np.empty(plain.shape[::-1], plain.dtype)
    for row in range(0, plain.shape[0], 8):
        out[:, row : row + 8] = plain[row : row + 8].T
    return out.view(x.dtype)


def read_parameter(
    spec: ParamSpec, stored: Mapping[str, StoredTensor], dtype: DTypeLike | None, sharding: Sharding
) -> Array:
    """One leaf of the tree. Each device's part is read from the files by itself.

    Args:
        spec: what the leaf is; along the vocabulary it may have more rows than the file.
        stored: where its tensors lie.
        dtype: cast to this type; None keeps the file's.
        sharding: where the leaf goes.

    Returns:
        The leaf. Rows of the vocabulary that the file lacks are the mean of those that it has.
    """
    names = tensor_names(spec)
    target = np.dtype(dtype) if dtype is not None else DTYPES[stored[names[0]].dtype]
    owners: dict[Bounds, list[jax.Device]] = {}
    for device, index in sharding.addressable_devices_indices_map(spec.shape).items():
        bounds = tuple(s.indices(size)[:2] for s, size in zip(index or (), spec.shape, strict=True))
        owners.setdefault(bounds, []).append(device)
    parts = []
    for bounds, devices in owners.items():
        part = _stack if spec.stacked else _single
        parts += part(spec, names, stored, target, bounds, devices)
    whole = jax.make_array_from_single_device_arrays(spec.shape, sharding, parts)
    held = stored[names[0]].shape[0]
    if "vocab" in spec.axes and held < spec.shape[spec.axes.index("vocab")]:
        whole = jax.jit(_extended, static_argnums=(1, 2), out_shardings=sharding, donate_argnums=0)(
            whole, held, spec.axes.index("vocab")
        )
    return whole


def quantise_parameter(leaf: Array, numbers: Sharding, scales: Sharding) -> tuple[Array, Array]:
    """The int8 form of a leaf (``models.linear.int8.quantise``), its two arrays where they belong; the leaf is given up."""
    found = jax.jit(int8.quantise, out_shardings=(numbers, scales))(leaf)
    jax.block_until_ready(found)
    leaf.delete()
    return found


def _single(
    spec: ParamSpec,
    names: list[str],
    stored: Mapping[str, StoredTensor],
    dtype: np.dtype[Any],
    bounds: Bounds,
    devices: list[jax.Device],
) -> list[Array]:
    """The same part of an unstacked leaf on each of some devices: read once, sent to all."""
    one = stored[names[0]]
    inner = bounds[::-1] if spec.transpose else bounds
    held = tuple((min(first, size), min(last, size)) for (first, last), size in zip(inner, one.shape, strict=True))
    host, transpose = _ready(read_tensor(one, names[0], held), spec.transpose, devices)
    inner = bounds if transpose != spec.transpose else inner
    missing = [(0, (last - first) - size) for (first, last), size in zip(inner, host.shape, strict=True)]
    parts = []
    for device in devices:
        parts.append(_oriented(jax.device_put(host, device), transpose, dtype, tuple(missing)).block_until_ready())
    return parts


def _stack(
    spec: ParamSpec,
    names: list[str],
    stored: Mapping[str, StoredTensor],
    dtype: np.dtype[Any],
    bounds: Bounds,
    devices: list[jax.Device],
) -> list[Array]:
    """The same part of a stacked leaf on each of some devices, filled layer by layer."""
    inner = bounds[1:][::-1] if spec.transpose else bounds[1:]
    first, last = bounds[0]
    parts = [jnp.zeros(tuple(stop - start for start, stop in bounds), dtype, device=d) for d in devices]
    for layer in range(first, last):
        host, transpose = _ready(read_tensor(stored[names[layer]], names[layer], inner), spec.transpose, devices)
        sent = [jax.device_put(host, device) for device in devices]
        parts = [_insert(p, x, layer - first, transpose) for p, x in zip(parts, sent, strict=True)]
        # Without the wait, transfers queue up and the host holds every layer that is still under way.
        jax.block_until_ready(parts)
    return parts


def _ready(host: np.ndarray, transpose: bool, devices: list[jax.Device]) -> tuple[np.ndarray, bool]:
    """(what is sent to the devices, whether they still have to transpose it): all but CPUs do that faster than a host."""
    here = transpose and devices[0].platform == "cpu"
    return (transposed(host), False) if here else (host, transpose)


@partial(jax.jit, static_argnums=(1, 2, 3))
def _oriented(x: Array, transpose: bool, dtype: np.dtype[Any], missing: tuple[tuple[int, int], ...]) -> Array:
    x = jnp.pad(x, missing)
    return (x.T if transpose else x).astype(dtype)


@partial(jax.jit, static_argnums=3, donate_argnums=0)
def _insert(stack: Array, x: Array, layer: Array | int, transpose: bool) -> Array:
    x = (x.T if transpose else x).astype(stack.dtype)
    return jax.lax.dynamic_update_index_in_dim(stack, x, layer, 0)


def _extended(x: Array, held: int, axis: int) -> Array:
    """Puts the mean of the rows that the file had in those that it had not: an untrained token begins as an average one."""
    known = jax.lax.broadcasted_iota(jnp.int32, x.shape, axis) < held
    wide = jnp.promote_types(x.dtype, jnp.float32)
    mean = jnp.sum(jnp.where(known, x, 0).astype(wide), axis=axis, keepdims=True) / held
    return jnp.where(known, x, mean.astype(x.dtype))
