"""Reads parameters from tensor files, stacks and transposes them, and sends each device only its own slice.

The host holds one tensor at a time.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import Sharding
from jax.typing import DTypeLike

from jaxblock.huggingface.tensor_files import DTYPES, StoredTensor, read_tensor
from jaxblock.models.linear import int8
from jaxblock.models.spec import ParamSpec, Table
from jaxblock.parallel import rules

Bounds = tuple[tuple[int, int], ...]


def tensor_names(spec: ParamSpec) -> list[str]:
    """Returns a parameter's names in the checkpoint: one for each layer if it is stacked, else a single one."""
    return [spec.hf_name.format(layer=i) for i in range(spec.shape[0])] if spec.stacked else [spec.hf_name]


def stored_shape(spec: ParamSpec) -> tuple[int, ...]:
    """Returns the shape in which the checkpoint stores a parameter, or one layer of it where it is stacked."""
    shape = spec.shape[1:] if spec.stacked else spec.shape
    return shape[::-1] if spec.transpose else shape


def stored_shapes(table: Table) -> dict[str, tuple[int, ...]]:
    """Returns the shapes in which a checkpoint stores the parameters of a table, by the tensors' names."""
    return {name: stored_shape(spec) for spec in table.values() for name in tensor_names(spec)}


def transposed(x: np.ndarray) -> np.ndarray:
    """Returns a matrix's transpose as a contiguous copy.

    It copies 8 rows at a time. NumPy and XLA's CPU backend walk down whole columns, which misses the cache at every step
    where the width is a power of two (they are 4 and 5 times slower at 5632 x 2048).
    """
    plain = x.view(f"u{x.dtype.itemsize}")  # because NumPy copies bfloat16 with one function call per element
    out = np.empty(plain.shape[::-1], plain.dtype)
    for row in range(0, plain.shape[0], 8):
        out[:, row : row + 8] = plain[row : row + 8].T
    return out.view(x.dtype)


def read_parameter(
    spec: ParamSpec, stored: Mapping[str, StoredTensor], dtype: DTypeLike | None, sharding: Sharding
) -> Array:
    """Reads one parameter from the files; each device's part is read separately.

    Args:
        spec: the parameter's spec; it may have more rows along the vocabulary than the file.
        stored: the tensors in the files, by name.
        dtype: the type to cast to; None keeps the file's.
        sharding: how the parameter is split over the devices.

    Returns:
        The array. Rows of the vocabulary that the file lacks are the mean of the rows that it has.
    """
    tensors = [stored[name] for name in tensor_names(spec)]
    target = np.dtype(dtype) if dtype is not None else DTYPES[tensors[0].dtype]
    if spec.stacked:
        return _read_stack(spec, tensors, target, sharding)
    sent, transpose = _send(tensors[0], spec.shape, sharding, spec.transpose)
    whole = sent
    if transpose or sent.dtype != target:
        whole = jax.jit(_oriented, static_argnums=(1, 2), out_shardings=sharding)(sent, transpose, target)
    held = tensors[0].shape[0]
    if "vocab" in spec.axes and held < spec.shape[spec.axes.index("vocab")]:
        whole = jax.jit(_extended, static_argnums=(1, 2), out_shardings=sharding, donate_argnums=0)(
            whole, held, spec.axes.index("vocab")
        )
    return whole.block_until_ready()


def quantise_parameter(leaf: Array, numbers: Sharding, scales: Sharding) -> tuple[Array, Array]:
    """Quantises a parameter to int8 (``models.linear.int8.quantise``) and frees the original.

    Args:
        leaf: the parameter.
        numbers: the sharding of the int8 array.
        scales: the sharding of its scales.

    Returns:
        (the int8 array, its scales).
    """
    found = jax.jit(int8.quantise, out_shardings=(numbers, scales))(leaf)
    jax.block_until_ready(found)
    leaf.delete()
    return found


def _read_stack(spec: ParamSpec, tensors: list[StoredTensor], dtype: np.dtype[Any], sharding: Sharding) -> Array:
    """Fills a stacked parameter on its devices, layer by layer."""
    of_layer = rules.of_dimensions(sharding, range(1, len(spec.shape)))
    insert = jax.jit(_insert, static_argnums=3, donate_argnums=0, out_shardings=sharding)
    stack = jax.jit(jnp.zeros, static_argnums=(0, 1), out_shardings=sharding)(spec.shape, dtype)
    for layer, tensor in enumerate(tensors):
        sent, transpose = _send(tensor, spec.shape[1:], of_layer, spec.transpose)
        # Without this wait, the host would hold every layer whose transfer has not ended.
        stack = insert(stack, sent, layer, transpose).block_until_ready()
    return stack


def _send(tensor: StoredTensor, shape: tuple[int, ...], sharding: Sharding, transpose: bool) -> tuple[Array, bool]:
    """Sends each device its part of one tensor, which is read once for all devices that hold it.

    Args:
        tensor: the tensor in the file.
        shape: the shape of the parameter, or of one layer of it.
        sharding: how an array of that shape is split over the devices.
        transpose: whether the file holds the transpose of that array.

    Returns:
        (the array, whether the devices still have to transpose it). What the file lacks of the shape is zeros.
    """
    owners: dict[Bounds, list[jax.Device]] = {}
    for device, index in sharding.addressable_devices_indices_map(shape).items():
        bounds = tuple(s.indices(size)[:2] for s, size in zip(index or (), shape, strict=True))
        owners.setdefault(bounds[::-1] if transpose else bounds, []).append(device)
    parts, still = [], False
    for bounds, devices in owners.items():
        held = tuple((min(first, n), min(last, n)) for (first, last), n in zip(bounds, tensor.shape, strict=True))
        host = read_tensor(tensor, held)
        if held != bounds:  # rows of the vocabulary that the file lacks
            host = np.pad(host, [(0, last - first - n) for (first, last), n in zip(bounds, host.shape, strict=True)])
        host, still = _transposed_on_cpu(host, transpose, devices)
        parts += [jax.device_put(host, device) for device in devices]
    if still:
        shape, sharding = shape[::-1], rules.of_dimensions(sharding, range(len(shape))[::-1])
    return jax.make_array_from_single_device_arrays(shape, sharding, parts), still


def _transposed_on_cpu(host: np.ndarray, transpose: bool, devices: list[jax.Device]) -> tuple[np.ndarray, bool]:
    """Transposes an array for CPU devices on the host; other devices transpose faster than the host, and do it themselves.

    Returns:
        (the array to send to the devices, whether they still have to transpose it).
    """
    here = transpose and devices[0].platform == "cpu"
    return (transposed(host), False) if here else (host, transpose)


def _oriented(x: Array, transpose: bool, dtype: np.dtype[Any]) -> Array:
    return (x.T if transpose else x).astype(dtype)


def _insert(stack: Array, x: Array, layer: Array | int, transpose: bool) -> Array:
    return jax.lax.dynamic_update_index_in_dim(stack, _oriented(x, transpose, stack.dtype), layer, 0)


def _extended(x: Array, held: int, axis: int) -> Array:
    """Fills the rows that the file lacks with the mean of its rows, so that a new token begins as an average token."""
    known = jax.lax.broadcasted_iota(jnp.int32, x.shape, axis) < held
    wide = jnp.promote_types(x.dtype, jnp.float32)
    mean = jnp.sum(jnp.where(known, x, 0).astype(wide), axis=axis, keepdims=True) / held
    return jnp.where(known, x, mean.astype(x.dtype))
