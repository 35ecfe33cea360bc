"""Lists and reads the tensors in the safetensors files of a folder, and collects everything that is wrong with them.

The `safetensors` library checks and reads the files; a header is parsed here only to name the tensors that a damaged file lost.
"""

from __future__ import annotations

import json
import os
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open

from jaxblock.errors import UserError, shown
from jaxblock.io.files import read_json

INDEX = "model.safetensors.index.json"

DTYPES: dict[str, np.dtype[Any]] = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(jnp.bfloat16),
}
"""The types that we can load and save, by the names that safetensors gives them."""

SINGLE = "model.safetensors"
"""The file that ``transformers`` reads, where it is there, whatever else a folder holds."""

_OTHER_FILES = re.compile(r"(adapter_model|consolidated).*\.safetensors")
"""The names of files that hold other tensors than the network's own in transformers' layout: adapters, Meta's and Mistral's layout."""

BUFFERS = re.compile(r"(.*\.)?rotary_emb\.(inv_freq|cos_cached|sin_cached)")
"""Names of the tables of rotary positions that older checkpoints store; they are computed from config.json and never read."""

_PICKLES = (".bin", ".pt", ".pth", ".ckpt")
_TRAINING_STATE = re.compile(r"(training_args|optimizer|scheduler|rng_state|scaler).*")
_CONVERT = (
    "jaxblock never unpickles, since a pickle can run any code. If you trust them, convert each where torch is installed: "
    'python -c "import torch, safetensors.torch as s; '
    "w = torch.load('{name}', weights_only=True, map_location='cpu'); "
    "s.save_file({{k: v.clone().contiguous() for k, v in w.items()}}, '{stem}.safetensors')\""
)


class StoredTensor(NamedTuple):
    """Says where a tensor is stored, and its type and shape.

    Attributes:
        name: the tensor's name in the file.
        path: the file that holds it.
        dtype: the tensor's type, as safetensors names it.
        shape: the tensor's shape as stored (in torch's orientation).
    """

    name: str
    path: Path
    dtype: str
    shape: tuple[int, ...]


@dataclass
class FolderContents:
    """Holds the list of the tensors in the safetensors files of a folder.

    Attributes:
        stored: every readable tensor, by name.
        damaged: what is wrong with each tensor that cannot be read, by name.
        notes: what is wrong with files as a whole.
    """

    stored: dict[str, StoredTensor] = field(default_factory=dict)
    damaged: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def scan_folder(folder: Path) -> FolderContents:
    """Opens the files of a network's weights and lists their tensors; damage is listed in the result and raises no error.

    Where a folder holds several sets of files, the choice is that of ``transformers``: ``model.safetensors`` alone, else the
    shards that the index names, and only without either all safetensors files of the folder but those of adapters.

    Args:
        folder: a local folder with one safetensors file, or several with or without an index.

    Raises:
        UserError: there is no safetensors file, or the index is not valid.
    """
    promised = {} if (folder / SINGLE).exists() else _read_index(folder)
    if (folder / SINGLE).exists():
        names = [SINGLE]
    elif promised:
        names = sorted(set(promised.values()))
    else:
        names = sorted(p.name for p in folder.glob("*.safetensors") if not _OTHER_FILES.fullmatch(p.name))
    if not names:
        raise _no_shards(folder, "*.safetensors file of a whole network")
    contents = FolderContents()
    for name in names:
        _scan_file(folder / name, [t for t, file in promised.items() if file == name], contents)
    for tensor, file in promised.items():
        if tensor not in contents.stored and tensor not in contents.damaged and not BUFFERS.fullmatch(tensor):
            contents.damaged[tensor] = f"{INDEX} says it is in {file}, which does not hold it"
    return contents


def _read_index(folder: Path) -> dict[str, str]:
    """Returns the name of each tensor's file from the index, by the tensor's name; empty where there is no index."""
    path = folder / INDEX
    if not path.exists():
        return {}
    index = read_json(path)
    promised = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(promised, dict) or not all(isinstance(file, str) for file in promised.values()) or not promised:
        raise UserError(f"{path}: no weight_map of tensor names to file names; download the checkpoint again")
    for tensor, file in promised.items():
        # An index could otherwise name any file of the machine.
        if file != os.path.basename(file):
            raise UserError(f"{path}: tensor {shown(tensor)} is in {shown(file)}; shards must lie in the folder itself")
        if not file.isprintable() or not 0 < len(file.encode()) < 256:
            raise UserError(f"{path}: tensor {shown(tensor)} is in {shown(file)}, which can be no file's name")
    return promised


def scan_file(path: Path) -> FolderContents:
    """Lists the tensors of one local safetensors file; damage is listed in the result and raises no error.

    Raises:
        UserError: there is no such file.
    """
    if not path.is_file():
        raise _no_shards(path.parent, path.name)
    contents = FolderContents()
    _scan_file(path, [], contents)
    return contents


def _no_shards(folder: Path, wanted: str) -> UserError:
    pickles = sorted(p for p in folder.iterdir() if p.suffix in _PICKLES and not _TRAINING_STATE.match(p.name))
    if pickles:
        listed = ", ".join(p.name for p in pickles)
        advice = _CONVERT.format(name=pickles[0], stem=folder / pickles[0].stem)
        return UserError(f"{folder}: only pickled weights are here ({listed}), no safetensors. {advice}")
    return UserError(f"{folder}: no {wanted}; give the folder that holds it beside its config")


def _scan_file(path: Path, promised: list[str], contents: FolderContents) -> None:
    """Adds the tensors of one file to `contents`; `promised` are the names of the tensors that the index expects in it."""
    if not path.exists():
        contents.damaged |= dict.fromkeys(promised, f"its file {path.name} is missing")
        return
    try:
        with safe_open(path, framework="np") as file:
            names = file.keys()
            slices = {name: file.get_slice(name) for name in names}
            found = {name: StoredTensor(name, path, s.get_dtype(), tuple(s.get_shape())) for name, s in slices.items()}
    except (SafetensorError, OSError) as error:
        cut = _diagnose(path)
        if cut is None:
            contents.notes.append(f"{path.name} is not a whole safetensors file: {error}")
            contents.damaged |= dict.fromkeys(promised, f"its file {path.name} cannot be read")
        else:
            contents.damaged |= cut
        return
    for tensor, where in found.items():
        if BUFFERS.fullmatch(tensor):
            continue
        if tensor in contents.stored:
            contents.notes.append(f"tensor {tensor} is in both {contents.stored[tensor].path.name} and {path.name}")
        contents.stored[tensor] = where


def _diagnose(path: Path) -> dict[str, str] | None:
    """Says for every tensor of a file that ends early whether it is whole; None if that is not what is wrong with the file."""
    try:
        with open(path, "rb") as file:
            header_len = int.from_bytes(file.read(8), "little")
            size = path.stat().st_size - 8 - header_len
            if size < 0:
                return None
            header = json.loads(file.read(header_len))
            entries = {name: entry["data_offsets"] for name, entry in header.items() if name != "__metadata__"}
            if max(end for _, end in entries.values()) <= size:
                return None
            return {
                tensor: f"cut short: {path.name} has {max(size - begin, 0):,} of its {end - begin:,} bytes"
                if end > size
                else f"whole, but its file {path.name} ends early"
                for tensor, (begin, end) in entries.items()
            }
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def read_tensor(tensor: StoredTensor, bounds: tuple[tuple[int, int], ...]) -> np.ndarray:
    """Reads a slice of one tensor, in the orientation in which it is stored.

    The file is opened again for each tensor. Closing it frees its mapped pages, so that a process does not hold all the
    tensors that it has read so far.

    Args:
        tensor: the tensor to read.
        bounds: the (start, stop) of the slice along each dimension.

    Returns:
        A copy of the slice.

    Raises:
        UserError: a number is NaN or infinite.
    """
    with safe_open(tensor.path, framework="np") as file:
        values = np.asarray(file.get_slice(tensor.name)[tuple(slice(*b) for b in bounds)])
    if not _all_finite(values):
        raise UserError(
            f"{tensor.path}: tensor {tensor.name} holds NaN or infinite numbers, with which every output would be wrong; "
            "download the checkpoint again, or export one from before its training failed"
        )
    return values


def _all_finite(values: np.ndarray) -> bool:
    """Returns whether no number is NaN or infinite, from the largest bit patterns, which takes no memory and no conversion.

    The exponent bits of NaN and infinity are all ones, so that among numbers of one sign their patterns are the largest. Read as
    signed integers the positive ones come last, and as unsigned integers the negative ones.
    """
    if not values.size or values.dtype not in DTYPES.values():
        return True
    bits = 8 * values.dtype.itemsize
    infinity = int(np.asarray(np.inf, values.dtype).view(f"u{bits // 8}"))
    signed, unsigned = values.view(f"i{bits // 8}"), values.view(f"u{bits // 8}")
    return bool(signed.max() < infinity and unsigned.max() < infinity + (1 << (bits - 1)))
