"""Writes safetensors files, holding one tensor in memory at a time.

The `safetensors` library's own writer holds all tensors of a file in memory twice. The format is simple: a header, then bytes.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax import Array
from jax.sharding import NamedSharding
from jax.typing import DTypeLike

from jaxblock.errors import UserError
from jaxblock.huggingface.placement import stored_shape, tensor_names, transposed
from jaxblock.huggingface.tensor_files import DTYPES
from jaxblock.models.spec import ParamSpec, Table
from jaxblock.parallel import rules

_SLICE_BYTES = 1 << 25


class PendingTensor(NamedTuple):
    """Describes a tensor that is to be written; its values are copied to the host only when `fetch` is called.

    Attributes:
        dtype: the tensor's type in the file.
        shape: the tensor's shape in the file.
        fetch: a function that returns the tensor's values on the host. Where the tensor is spread over several processes, all
            of them must call it, for the same tensors in the same order.
    """

    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    fetch: Callable[[], np.ndarray]

    @property
    def n_bytes(self) -> int:
        """The tensor's size in the file, in bytes."""
        return int(np.prod(self.shape, dtype=np.int64)) * self.dtype.itemsize


def split_into_files(tensors: Mapping[str, PendingTensor], max_shard_bytes: int) -> dict[str, list[str]]:
    """Splits tensors over files, in order; a file exceeds the limit only if its single tensor does.

    Args:
        tensors: the tensors by name, in the order in which they are to be written.
        max_shard_bytes: the largest size of a file, in bytes.

    Returns:
        The names of each file's tensors, by file name; a single file is ``model.safetensors``.
    """
    groups: list[list[str]] = [[]]
    room = max_shard_bytes
    for name, tensor in tensors.items():
        if groups[-1] and tensor.n_bytes > room:
            groups.append([])
            room = max_shard_bytes
        groups[-1].append(name)
        room -= tensor.n_bytes
    if len(groups) == 1:
        return {"model.safetensors": groups[0]}
    return {f"model-{i:05d}-of-{len(groups):05d}.safetensors": group for i, group in enumerate(groups, 1)}


def write_tensors(path: Path, names: Iterable[str], tensors: Mapping[str, PendingTensor]) -> None:
    """Writes one safetensors file, holding one tensor in memory at a time.

    Args:
        path: the file to make.
        names: the names of the tensors to write, in order.
        tensors: the tensors by name; only those in ``names`` are written.

    Raises:
        OSError: the file cannot be written.
    """
    names = list(names)
    spelled = {dtype: name for name, dtype in DTYPES.items()}
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name in names:
        dtype, shape, _ = tensors[name]
        begin, end = end, end + tensors[name].n_bytes
        header[name] = {"dtype": spelled[dtype], "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # so that the data is aligned when the file is mapped
    with open(path, "xb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in names:
            values = np.ascontiguousarray(tensors[name].fetch())
            file.write(values.reshape(-1).view(np.uint8).data)
        file.flush()
        os.fsync(file.fileno())


def pending_tensors(table: Table, flat: Mapping[str, Any], dtype: DTypeLike | None) -> dict[str, PendingTensor]:
    """Lists every tensor of a table in the network's order: embedding, layer by layer, then what follows the layers.

    Args:
        table: the specs of the parameters, by path.
        flat: the parameters' arrays, by path.
        dtype: the type to cast to; None keeps each tensor's own.

    Returns:
        The tensors by their names in the checkpoint.

    Raises:
        UserError: a parameter has a type that other readers of safetensors do not know.
    """
    n_layers = max((s.shape[0] for s in table.values() if s.stacked), default=0)
    paths = list(table)
    first_stacked = min((i for i, p in enumerate(paths) if table[p].stacked), default=len(paths))
    order: list[tuple[str, int]] = [(p, 0) for p in paths[:first_stacked]]
    order += [(p, layer) for layer in range(n_layers) for p in paths if table[p].stacked]
    order += [(p, 0) for p in paths[first_stacked:] if not table[p].stacked]
    tensors = {}
    for path, layer in order:
        spec, leaf = table[path], flat[path]
        target = np.dtype(dtype if dtype is not None else leaf.dtype)
        if target not in DTYPES.values():
            raise UserError(f"parameter {path} is {target.name}; an export is float64, float32, float16 or bfloat16")
        tensors[tensor_names(spec)[layer]] = PendingTensor(
            target, stored_shape(spec), _fetch(path, leaf, spec, layer, target)
        )
    return tensors


def _fetch(path: str, leaf: Any, spec: ParamSpec, layer: int, dtype: np.dtype[Any]) -> Callable[[], np.ndarray]:
    """Returns a function that copies one layer of a parameter (or an unstacked one) to the host, as the file stores it.

    The function raises UserError where the type cannot hold a number.
    """

    def fetch() -> np.ndarray:
        if isinstance(leaf, Array) and not leaf.is_fully_addressable:
            part = _gathered(leaf, layer if spec.stacked else None)
        else:
            part = _layer(leaf, layer) if spec.stacked else leaf
        if isinstance(part, Array) and spec.is_matrix and not spec.stacked:
            return _in_slices(path, part, dtype, spec.transpose)
        host = _cast(path, np.asarray(part), dtype)
        return transposed(host) if spec.transpose else host

    return fetch


def _cast(path: str, values: np.ndarray, dtype: np.dtype[Any]) -> np.ndarray:
    """Returns numbers in a type of the file; raises UserError where a finite one would become infinite."""
    with np.errstate(over="ignore"):
        cast = values.astype(dtype, copy=False)
    if dtype == np.float16 and np.isinf(cast).any() and np.isfinite(values).all():
        largest = float(np.abs(values.astype(np.float32)).max())
        raise UserError(
            f"parameter {path} has a number of size {largest:.3g}, which float16 cannot hold: export as bfloat16 or float32"
        )
    return cast


def _layer(leaf: Any, layer: int) -> Any:
    """Returns one layer of a stacked parameter; a CPU's array is read where it is, others are sliced by one program."""
    if not isinstance(leaf, Array) or _in_host_memory(leaf):
        return np.asarray(leaf)[layer]
    return jax.jit(_layer_of, static_argnums=1)(leaf, True, layer)


def _in_host_memory(x: Array) -> bool:
    """Whether an array is on a single CPU device, so that NumPy sees its values without a copy."""
    devices = x.devices()
    return len(devices) == 1 and next(iter(devices)).platform == "cpu"


def _gathered(leaf: Array, layer: int | None) -> Array:
    """Gathers one layer of a parameter from all processes, or a whole unstacked parameter; returns this process's copy."""
    assert isinstance(leaf.sharding, NamedSharding)
    where = rules.replicated(leaf.sharding.mesh)
    whole = jax.jit(_layer_of, static_argnums=1, out_shardings=where)(leaf, layer is not None, layer or 0)
    return whole.addressable_data(0)


def _layer_of(leaf: Array, stacked: bool, layer: Array | int) -> Array:
    return jax.lax.dynamic_index_in_dim(leaf, layer, keepdims=False) if stacked else leaf


def _in_slices(path: str, leaf: Array, dtype: np.dtype[Any], transpose: bool) -> np.ndarray:
    """Copies a large matrix to the host, as the file stores it.

    It copies slices, because a JAX array that was copied whole keeps that copy on the host as long as it exists; and it
    copies each shard separately, because a slice of the whole array would first be gathered on every device.
    """
    bits = f"u{dtype.itemsize}"
    out = np.empty(leaf.shape[::-1] if transpose else leaf.shape, bits)
    whole = out.T if transpose else out
    for shard in leaf.addressable_shards:
        if shard.replica_id:
            continue
        part, data = whole[shard.index], np.asarray(shard.data) if _in_host_memory(shard.data) else shard.data
        rows = max(1, _SLICE_BYTES // max(1, data.nbytes // data.shape[0]))
        for start in range(0, data.shape[0], rows):
            host = _cast(path, np.asarray(data[start : start + rows]), dtype)
            if transpose:
                part.T[:, start : start + rows] = transposed(host).view(bits)
            else:
                part[start : start + rows] = host.view(bits)
    return out.view(dtype)
