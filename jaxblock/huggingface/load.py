"""Reads a folder in Hugging Face's layout into our parameters: stacked, transposed, and straight into each device."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import Sharding, SingleDeviceSharding
from jax.typing import DTypeLike

from jaxblock import storage
from jaxblock.errors import UserError
from jaxblock.huggingface import shards
from jaxblock.huggingface.shards import Contents
from jaxblock.models import families
from jaxblock.models.params import Architecture, ParamSpec, Table, flatten, nest
from jaxblock.types import Params

Bounds = tuple[tuple[int, int], ...]


def architecture(folder: storage.PathLike) -> Architecture:
    """Reads config.json.

    Args:
        folder: a local folder.

    Returns:
        Sizes and special ids.

    Raises:
        UserError: there is no such folder or no config.json in it, or it is of a family that we do not know.
    """
    if storage.is_remote(folder):
        raise UserError(f"{folder}: a checkpoint is read from a local folder; copy it to this machine first")
    path = Path(folder)
    if not path.is_dir():
        raise UserError(f"{path}: no such folder; give a local folder that holds config.json and safetensors files")
    if not (path / "config.json").is_file():
        raise UserError(f"{path}: no config.json, so this is no Hugging Face checkpoint; give the folder that holds it")
    config = storage.read_json(path / "config.json")
    if not isinstance(config, dict):
        raise UserError(f"{path / 'config.json'}: must be a JSON object; download the checkpoint again")
    return families.from_hf(config, str(path / "config.json"))


def load(
    folder: storage.PathLike, *, dtype: DTypeLike | None = None, shardings: Params | None = None
) -> tuple[Architecture, Params]:
    """Reads a checkpoint. Nothing is executed, and every tensor is checked before the first is read.

    A stacked leaf is filled on the device one layer at a time, and each device is given its own slice only: the host
    holds one tensor at a time besides the result.

    Args:
        folder: a local folder with config.json and safetensors (one file, or shards with an index).
        dtype: cast to this type; None keeps each tensor's own.
        shardings: nested dict of shardings (``parallel.axes.param_shardings``); None puts all on one device.

    Returns:
        (the architecture, parameters as its table describes them).

    Raises:
        UserError: not a checkpoint, a pickle, or tensors missing, extra, mis-shaped, of a type that we cannot keep, or
            cut short: all of them named at once.
    """
    arch = architecture(folder)
    path = Path(folder)
    table = families.table(arch)
    contents = shards.scan(path)
    _check(path, arch, table, contents, dtype)
    placed = flatten(shardings) if shardings is not None else {}
    default = SingleDeviceSharding(jax.local_devices()[0])
    flat = {p: _leaf(spec, contents, dtype, placed.get(p) or default) for p, spec in table.items()}
    return arch, nest(flat)


def tensor_names(spec: ParamSpec) -> list[str]:
    """The checkpoint's names of a leaf's tensors: one per layer, or just one."""
    return [spec.hf_name.format(layer=i) for i in range(spec.shape[0])] if spec.stacked else [spec.hf_name]


def stored_shape(spec: ParamSpec) -> tuple[int, ...]:
    """The shape of one of a leaf's tensors as the checkpoint stores it."""
    shape = spec.shape[1:] if spec.stacked else spec.shape
    return shape[::-1] if spec.transpose else shape


def _check(folder: Path, arch: Architecture, table: Table, contents: Contents, dtype: DTypeLike | None) -> None:
    expected = {name: spec for spec in table.values() for name in tensor_names(spec)}
    stored, damaged = contents.stored, contents.damaged
    extra = [name for name in stored if name not in expected]
    problems = list(contents.notes)
    if arch.tie_embeddings:
        extra, difference = _drop_tied_head(arch, table, contents, extra)
        problems += difference
    problems += _listed("missing", [n for n in expected if n not in stored and n not in damaged])
    problems += _listed("not expected", extra)
    problems += _listed("damaged", [f"{name} ({why})" for name, why in damaged.items()])
    shared = [(name, stored[name], spec) for name, spec in expected.items() if name in stored]
    wrong = [(n, s.shape, stored_shape(spec)) for n, s, spec in shared if s.shape != stored_shape(spec)]
    problems += _listed("wrong shape", [f"{n} is {list(a)}, config.json asks for {list(b)}" for n, a, b in wrong])
    problems += _listed("unsupported type", [f"{n} is {s.dtype}" for n, s, _ in shared if s.dtype not in shards.DTYPES])
    if dtype is None:
        problems += _unkeepable(table, contents)
    if problems:
        sizes = f"{arch.family}, {arch.n_layers} layers, width {arch.d_model}, vocabulary {arch.vocab_size}"
        lines = "\n  ".join([f"{folder}: the tensors do not fit config.json ({sizes}):", *problems])
        raise UserError(f"{lines}\nDownload the checkpoint again, or correct config.json")


def _listed(what: str, items: Iterable[str]) -> list[str]:
    items = list(items)
    return [f"{what} ({len(items)}): {', '.join(items)}"] if items else []


def _unkeepable(table: Table, contents: Contents) -> list[str]:
    """Leaves whose type cannot be kept: float64 without jax_enable_x64, or layers of different types in one stack."""
    problems = []
    for spec in table.values():
        types = {n: s.dtype for n in tensor_names(spec) if (s := contents.stored.get(n)) and s.dtype in shards.DTYPES}
        if len(set(types.values())) > 1:
            mixed = (f"{name} {dtype}" for name, dtype in types.items())
            problems += _listed("layers of different types (set a type to cast to)", mixed)
        elif "F64" in types.values() and jax.dtypes.canonicalize_dtype(np.float64) != np.float64:
            problems += _listed("float64 (set a type to cast to)", types)
    return problems


def _drop_tied_head(
    arch: Architecture, table: Table, contents: Contents, extra: list[str]
) -> tuple[list[str], list[str]]:
    """A tied checkpoint may store the head once more: fine where it equals the embedding, else an error."""
    head = families.table(replace(arch, tie_embeddings=False))["head"].hf_name
    embed = table["embed"].hf_name
    if head not in extra or embed not in contents.stored:
        return extra, []
    a, b = contents.stored[head], contents.stored[embed]
    same = a.shape == b.shape and a.dtype == b.dtype
    rows = max(1, (1 << 24) // max(1, int(np.prod(a.shape[1:]))))
    for start in range(0, a.shape[0] if same else 0, rows):
        bounds = ((start, min(start + rows, a.shape[0])), *((0, n) for n in a.shape[1:]))
        same = same and shards.read(a, head, bounds).tobytes() == shards.read(b, embed, bounds).tobytes()
    problem = f"{head} differs from {embed}, but config.json ties them; set weight_tying to false there"
    return [name for name in extra if name != head], [] if same else [problem]


def _leaf(spec: ParamSpec, contents: Contents, dtype: DTypeLike | None, sharding: Sharding) -> Array:
    """One leaf of the tree, each device's part read from the files by itself."""
    names = tensor_names(spec)
    target = np.dtype(dtype) if dtype is not None else shards.DTYPES[contents.stored[names[0]].dtype]
    owners: dict[Bounds, list[jax.Device]] = {}
    for device, index in sharding.addressable_devices_indices_map(spec.shape).items():
        bounds = tuple(s.indices(size)[:2] for s, size in zip(index or (), spec.shape, strict=True))
        owners.setdefault(bounds, []).append(device)
    parts = []
    for bounds, devices in owners.items():
        parts += _parts(spec, names, contents, target, bounds, devices)
    return jax.make_array_from_single_device_arrays(spec.shape, sharding, parts)


def _parts(
    spec: ParamSpec,
    names: list[str],
    contents: Contents,
    dtype: np.dtype[Any],
    bounds: Bounds,
    devices: list[jax.Device],
) -> list[Array]:
    """The same part of a leaf on each of some devices: read once, sent to all."""
    inner = bounds[1:] if spec.stacked else bounds
    inner = inner[::-1] if spec.transpose else inner
    if not spec.stacked:
        host = shards.read(contents.stored[names[0]], names[0], inner)
        return [_oriented(jax.device_put(host, d), spec.transpose, dtype).block_until_ready() for d in devices]
    first, last = bounds[0]
    parts = [jnp.zeros(tuple(stop - start for start, stop in bounds), dtype, device=d) for d in devices]
    for layer in range(first, last):
        host = shards.read(contents.stored[names[layer]], names[layer], inner)
        sent = [jax.device_put(host, device) for device in devices]
        parts = [_insert(p, x, layer - first, spec.transpose) for p, x in zip(parts, sent, strict=True)]
        # Without the wait, transfers queue up and the host holds every layer that is still under way.
        jax.block_until_ready(parts)
    return parts


@partial(jax.jit, static_argnames=("transpose", "dtype"))
def _oriented(x: Array, transpose: bool, dtype: np.dtype[Any]) -> Array:
    return (x.T if transpose else x).astype(dtype)


@partial(jax.jit, static_argnames="transpose", donate_argnums=0)
def _insert(stack: Array, x: Array, layer: Array | int, transpose: bool) -> Array:
    return jax.lax.dynamic_update_index_in_dim(stack, _oriented(x, transpose, stack.dtype), layer, 0)


def same_tree(params: Params, table: Mapping[str, ParamSpec]) -> list[str]:
    """What differs between a tree of arrays and the table: leaves missing, extra or mis-shaped.

    Args:
        params: nested dict of arrays.
        table: the family's specs.

    Returns:
        One line per difference.
    """
    flat = flatten(params)
    problems = _listed("missing", [path for path in table if path not in flat])
    problems += _listed("not expected", [path for path in flat if path not in table])
    shared = [(path, flat[path].shape, spec.shape) for path, spec in table.items() if path in flat]
    return problems + _listed("wrong shape", [f"{p} is {list(a)}, not {list(b)}" for p, a, b in shared if a != b])
