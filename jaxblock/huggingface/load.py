"""Reads a folder in Hugging Face's layout into our parameters: stacked, transposed, and straight into each device."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import fields, replace
from pathlib import Path

import jax
import numpy as np
from jax import Array
from jax.sharding import SingleDeviceSharding
from jax.typing import DTypeLike

from jaxblock.errors import UserError
from jaxblock.huggingface.placement import quantise_parameter, read_parameter, stored_shape, tensor_names
from jaxblock.huggingface.tensor_files import DTYPES, FolderContents, read_tensor, scan_folder
from jaxblock.io.files import read_json
from jaxblock.io.paths import PathLike, is_remote
from jaxblock.models.architecture import Architecture
from jaxblock.models.families import registry
from jaxblock.models.linear import int8 as quantisation
from jaxblock.models.spec import ParamSpec, Table, flatten, nest
from jaxblock.types import Params


def read_architecture(folder: PathLike) -> Architecture:
    """Reads config.json.

    Args:
        folder: a local folder.

    Returns:
        Sizes and special ids.

    Raises:
        UserError: there is no such folder or no config.json in it, or it is of a family that we do not know.
    """
    if is_remote(folder):
        raise UserError(f"{folder}: neither a run nor a checkpoint is there (no config.yaml, no config.json)")
    path = Path(folder)
    if not path.is_dir():
        raise UserError(f"{path}: no such folder; give a local folder that holds config.json and safetensors files")
    if not (path / "config.json").is_file():
        raise UserError(f"{path}: no config.json, so this is no Hugging Face checkpoint; give the folder that holds it")
    config = read_json(path / "config.json")
    if not isinstance(config, dict):
        raise UserError(f"{path / 'config.json'}: must be a JSON object; download the checkpoint again")
    return registry.from_hf(config, str(path / "config.json"))


def load_checkpoint(
    folder: PathLike,
    *,
    dtype: DTypeLike | None = None,
    shardings: Params | None = None,
    arch: Architecture | None = None,
    int8: bool = False,
) -> tuple[Architecture, Params]:
    """Reads a checkpoint. Nothing is executed, and every tensor is checked before the first is read.

    A stacked leaf is filled on the device one layer at a time, and each device is given its own slice only: the host
    holds one tensor at a time besides the result.

    Args:
        folder: a local folder with config.json and safetensors (one file, or shards with an index).
        dtype: cast to this type; None keeps each tensor's own.
        shardings: nested dict of shardings (``parallel.rules.param_shardings``); None puts all on one device.
        arch: what the file is read as, None for what it says itself: special ids, an autoregressive file's alignment
            and a longer vocabulary may differ (new rows of embedding and head are the mean of the file's).
        int8: quantise the layers' matrices, each leaf as soon as it is filled; ``shardings`` are then those of
            ``models.linear.int8.int8_table``.

    Returns:
        (the architecture, parameters as its table describes them, or ``models.linear.int8.int8_table``).

    Raises:
        UserError: not a checkpoint, a pickle, or tensors missing, extra, mis-shaped, of a type that we cannot keep, or
            cut short: all of them named at once; or ``arch`` is of other sizes.
    """
    own = read_architecture(folder)
    path = Path(folder)
    if arch is not None:
        _check_same_network(path, own, arch)
    contents = scan_folder(path)
    _check(path, own, registry.param_table(own), contents, dtype)
    wanted = own if arch is None else arch
    placed = flatten(shardings) if shardings is not None else {}
    default = SingleDeviceSharding(jax.local_devices()[0])
    flat: dict[str, Array] = {}
    for name, spec in registry.param_table(wanted).items():
        where = placed.get(name) or default
        flat[name] = read_parameter(spec, contents.stored, dtype, where)
        if int8 and quantisation.quantised(spec):
            scale = name + quantisation.SCALE
            flat[name], flat[scale] = quantise_parameter(flat.pop(name), where, placed.get(scale) or default)
    return wanted, nest(flat)


_MAY_DIFFER = {"vocab_size", "mask_id", "eos_id", "pad_id", "end_ids", "init_std", "extra"}


def _check_same_network(folder: Path, own: Architecture, wanted: Architecture) -> None:
    """Raises UserError where a file cannot be read as another architecture."""
    free = _MAY_DIFFER if "alignment" in registry.FAMILIES[own.family].TRAITS else _MAY_DIFFER | {"alignment"}
    pairs = [(f.name, getattr(own, f.name), getattr(wanted, f.name)) for f in fields(Architecture)]
    differing = [f"{name} is {a}, not {b}" for name, a, b in pairs if name not in free and a != b]
    if wanted.vocab_size < own.vocab_size:
        differing.append(f"vocab_size is {own.vocab_size}, more than {wanted.vocab_size}")
    if differing:
        raise UserError(
            f"{folder / 'config.json'}: this is another network than the one asked for: {'; '.join(differing)}. Give "
            "the folder that it was started from"
        )


def _check(folder: Path, arch: Architecture, table: Table, contents: FolderContents, dtype: DTypeLike | None) -> None:
    expected = {name: spec for spec in table.values() for name in tensor_names(spec)}
    stored, damaged = contents.stored, contents.damaged
    extra = [name for name in stored if name not in expected]
    problems = list(contents.notes)
    if arch.tie_embeddings:
        extra, difference = _drop_tied_head(arch, table, contents, extra)
        problems += difference
    problems += summary_line("missing", [n for n in expected if n not in stored and n not in damaged])
    problems += summary_line("not expected", extra)
    problems += summary_line("damaged", [f"{name} ({why})" for name, why in damaged.items()])
    shared = [(name, stored[name], spec) for name, spec in expected.items() if name in stored]
    wrong = [(n, s.shape, stored_shape(spec)) for n, s, spec in shared if s.shape != stored_shape(spec)]
    problems += summary_line("wrong shape", [f"{n} is {list(a)}, config.json asks for {list(b)}" for n, a, b in wrong])
    problems += summary_line("unsupported type", [f"{n} is {s.dtype}" for n, s, _ in shared if s.dtype not in DTYPES])
    if dtype is None:
        problems += _unkeepable(table, contents)
    if problems:
        sizes = f"{arch.family}, {arch.n_layers} layers, width {arch.d_model}, vocabulary {arch.vocab_size}"
        lines = "\n  ".join([f"{folder}: the tensors do not fit config.json ({sizes}):", *problems])
        raise UserError(f"{lines}\nDownload the checkpoint again, or correct config.json")


def summary_line(what: str, items: Iterable[str]) -> list[str]:
    """One line that counts and names some things; no line where there are none."""
    items = list(items)
    return [f"{what} ({len(items)}): {', '.join(items)}"] if items else []


def _unkeepable(table: Table, contents: FolderContents) -> list[str]:
    """Leaves whose type cannot be kept: float64 without jax_enable_x64, or layers of different types in one stack."""
    problems = []
    for spec in table.values():
        types = {n: s.dtype for n in tensor_names(spec) if (s := contents.stored.get(n)) and s.dtype in DTYPES}
        if len(set(types.values())) > 1:
            mixed = (f"{name} {dtype}" for name, dtype in types.items())
            problems += summary_line("layers of different types (set a type to cast to)", mixed)
        elif "F64" in types.values() and jax.dtypes.canonicalize_dtype(np.float64) != np.float64:
            problems += summary_line("float64 (set a type to cast to)", types)
    return problems


def _drop_tied_head(
    arch: Architecture, table: Table, contents: FolderContents, extra: list[str]
) -> tuple[list[str], list[str]]:
    """A tied checkpoint may store the head once more: fine where it equals the embedding, else an error."""
    head = registry.param_table(replace(arch, tie_embeddings=False))["head"].hf_name
    embed = table["embed"].hf_name
    if head not in extra or embed not in contents.stored:
        return extra, []
    a, b = contents.stored[head], contents.stored[embed]
    same = a.shape == b.shape and a.dtype == b.dtype
    rows = max(1, (1 << 24) // max(1, int(np.prod(a.shape[1:]))))
    for start in range(0, a.shape[0] if same else 0, rows):
        bounds = ((start, min(start + rows, a.shape[0])), *((0, n) for n in a.shape[1:]))
        same = same and read_tensor(a, head, bounds).tobytes() == read_tensor(b, embed, bounds).tobytes()
    problem = f"{head} differs from {embed}, but config.json ties them; set weight_tying to false there"
    return [name for name in extra if name != head], [] if same else [problem]


def tree_differences(params: Params, table: Mapping[str, ParamSpec]) -> list[str]:
    """What differs between a tree of arrays and the table: leaves missing, extra or mis-shaped.

    Args:
        params: nested dict of arrays.
        table: the family's specs.

    Returns:
        One line per difference.
    """
    flat = flatten(params)
    problems = summary_line("missing", [path for path in table if path not in flat])
    problems += summary_line("not expected", [path for path in flat if path not in table])
    shared = [(path, flat[path].shape, spec.shape) for path, spec in table.items() if path in flat]
    return problems + summary_line("wrong shape", [f"{p} is {list(a)}, not {list(b)}" for p, a, b in shared if a != b])
