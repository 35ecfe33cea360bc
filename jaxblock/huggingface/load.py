"""Reads a folder in Hugging Face's layout into our parameters, which are stacked, transposed and put on the devices."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
from jax import Array
from jax.sharding import SingleDeviceSharding
from jax.typing import DTypeLike

from jaxblock.errors import UserError
from jaxblock.huggingface.checks import check_no_problems, summary_line, tensor_problems
from jaxblock.huggingface.placement import quantise_parameter, read_parameter, stored_shapes, tensor_names
from jaxblock.huggingface.tensor_files import DTYPES, FolderContents, StoredTensor, read_tensor, scan_folder
from jaxblock.io.files import read_json
from jaxblock.io.paths import PathLike, is_remote
from jaxblock.models.architecture import Architecture
from jaxblock.models.families import registry
from jaxblock.models.linear import int8 as quantisation
from jaxblock.models.spec import Table, flatten, nest
from jaxblock.types import Params


def read_architecture(folder: PathLike) -> Architecture:
    """Reads the sizes and special ids of a checkpoint from its config.json.

    Args:
        folder: the local folder of the checkpoint.

    Raises:
        UserError: there is no such folder or no config.json in it, or its family is unknown.
    """
    if is_remote(folder):
        raise UserError(f"{folder}: neither a run nor a checkpoint is there (no config.yaml, no config.json)")
    path = Path(folder)
    if not path.is_dir():
        raise UserError(
            f"{path}: no such folder; give a local folder that holds config.json and safetensors files, or a hub id: "
            "org/name (org/name@main where a folder `org` is here)"
        )
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
    """Reads a checkpoint's weights onto the devices.

    Nothing in the folder is executed, and every tensor is checked before the first is read. A stacked parameter is
    filled on the device one layer at a time, and each device is sent only its own slice: apart from the result, the host
    holds one tensor at a time.

    Args:
        folder: a local folder with config.json and safetensors (one file, or shards with an index).
        dtype: the type to cast to; None keeps each tensor's own.
        shardings: a nested dict of shardings (``parallel.rules.param_shardings``); None puts all parameters on one device.
        arch: the architecture of the result; None for the one that config.json describes. It may differ from that one in
            special ids, in the logit alignment of an autoregressive checkpoint, and by a larger vocabulary (new rows of
            embedding and head are the mean of the file's rows).
        int8: whether the layers' matrices are quantised, each as soon as it is filled; ``shardings`` are then those of the
            parameters in ``models.linear.int8.int8_table``.

    Returns:
        (the architecture, the parameters as the family's table describes them, or with ``int8`` as
        ``models.linear.int8.int8_table`` does).

    Raises:
        UserError: the folder is not a checkpoint or holds only pickles; or tensors are missing, extra, mis-shaped, cut
            short, or of a type that cannot be kept (the message names all of them); or ``arch`` has other sizes.
    """
    own = read_architecture(folder)
    path = Path(folder)
    if arch is not None:
        _check_same_network(path, own, arch)
    contents = scan_folder(path)
    _check_tensors(path, own, registry.param_table(own), contents, dtype)
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
    """Raises a UserError where a checkpoint cannot be read as another architecture."""
    free = _MAY_DIFFER | ({"alignment"} if registry.FAMILIES[own.family].autoregressive else set())
    pairs = [(name, value, vars(wanted)[name]) for name, value in vars(own).items()]
    differing = [f"{name} is {a}, not {b}" for name, a, b in pairs if name not in free and a != b]
    if wanted.vocab_size < own.vocab_size:
        differing.append(f"vocab_size is {own.vocab_size}, more than {wanted.vocab_size}")
    if differing:
        raise UserError(
            f"{folder / 'config.json'}: this is another network than the one asked for: {'; '.join(differing)}. Give "
            "the folder that it was started from"
        )


def _check_tensors(
    folder: Path, arch: Architecture, table: Table, contents: FolderContents, dtype: DTypeLike | None
) -> None:
    """Raises a UserError that names every tensor that is missing, extra, damaged or of a wrong shape or type."""
    sizes = f"{arch.family}, {arch.n_layers} layers, width {arch.d_model}, vocabulary {arch.vocab_size}"
    headline = f"{folder}: the tensors do not fit config.json ({sizes})"
    advice = "Download the checkpoint again, or correct config.json"
    held = len(contents.stored) + len(contents.damaged)
    if arch.n_layers > held:  # before the names of all layers are made: there could be billions
        few = f"{arch.n_layers:,} layers need more tensors than the {held:,} that the files hold"
        check_no_problems([*contents.notes, few], headline, advice)
    ignored, problems = _tied_head(arch, table, contents) if arch.tie_embeddings else ((), [])
    problems += tensor_problems(contents, stored_shapes(table), ignored=ignored)
    if dtype is None:
        problems += _types_that_cannot_be_kept(table, contents)
    check_no_problems(problems, headline, advice)


def _types_that_cannot_be_kept(table: Table, contents: FolderContents) -> list[str]:
    """Lists parameters in float64 without jax_enable_x64, or with layers of different types in one stack."""
    problems = []
    for spec in table.values():
        types = {n: s.dtype for n in tensor_names(spec) if (s := contents.stored.get(n)) and s.dtype in DTYPES}
        if len(set(types.values())) > 1:
            mixed = (f"{name} {dtype}" for name, dtype in types.items())
            problems += summary_line("layers of different types (set a type to cast to)", mixed)
        elif "F64" in types.values() and jax.dtypes.canonicalize_dtype(np.float64) != np.float64:
            problems += summary_line("float64 (set a type to cast to)", types)
    return problems


def _tied_head(arch: Architecture, table: Table, contents: FolderContents) -> tuple[tuple[str, ...], list[str]]:
    """Compares the head with the embedding, in a checkpoint that ties the two but stores both; a head alone is taken for both.

    Returns:
        (the head's name if it is stored and so may be ignored, a problem if head and embedding are not equal).
    """
    head = registry.param_table(replace(arch, tie_embeddings=False))["head"].hf_name
    embed = table["embed"].hf_name
    if head in contents.stored and embed not in {*contents.stored, *contents.damaged}:
        contents.stored[embed] = contents.stored.pop(head)
    if head not in contents.stored or embed not in contents.stored:
        return (), []
    a, b = contents.stored[head], contents.stored[embed]
    if a.shape == b.shape and {a.dtype, b.dtype} <= DTYPES.keys() and _equal_after_rounding(a, b):
        return (head,), []
    field = registry.FAMILIES[arch.family].tied_field
    return (head,), [f"{head} differs from {embed}, but config.json ties them; set {field} to false there"]


def _equal_after_rounding(a: StoredTensor, b: StoredTensor) -> bool:
    """Returns whether two tensors of one shape are equal, or would be if one of them were rounded to the other's type."""
    rows = max(1, (1 << 24) // max(1, int(np.prod(a.shape[1:]))))
    rounded = {a.dtype: True, b.dtype: True}
    for start in range(0, a.shape[0], rows):
        bounds = ((start, min(start + rows, a.shape[0])), *((0, n) for n in a.shape[1:]))
        one, two = read_tensor(a, bounds), read_tensor(b, bounds)
        for kind in rounded:
            with np.errstate(over="ignore"):
                rounded[kind] &= bool((one.astype(DTYPES[kind]) == two.astype(DTYPES[kind])).all())
    return any(rounded.values())
