"""Writes our parameters as a Hugging Face checkpoint, and reads back what was written."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import DTypeLike
from jaxtyping import Int

from jaxblock import storage
from jaxblock.errors import UserError
from jaxblock.huggingface import shards, writer
from jaxblock.huggingface.load import load, same_tree, stored_shape, tensor_names
from jaxblock.huggingface.writer import Pending
from jaxblock.models import families
from jaxblock.models.params import Architecture, ParamSpec, Table, flatten
from jaxblock.models.transformer import Transformer
from jaxblock.types import Params

MARKER = "config.json"
"""The file that says an exported folder is whole."""

GENERATION = "generation_config.json"

# What travels with a checkpoint besides weights. Python files are copied as they are and never run.
_COMPANIONS = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "template.jinja",
    "chat_template.jinja",
    "configuration_*.py",
    "modeling_*.py",
    "tokenization_*.py",
)


def save(
    folder: storage.PathLike,
    arch: Architecture,
    params: Params,
    *,
    tokenizer: storage.PathLike | None = None,
    dtype: DTypeLike | None = None,
    max_shard_bytes: int = 5 * 10**9,
) -> None:
    """Writes safetensors, config.json, generation_config.json and the tokenizer's files.

    The host holds one layer's tensor at a time. The folder appears whole or not at all.

    Args:
        folder: what to make; it must not exist (or be empty).
        arch: sizes and ids; what its own config.json held besides is written back.
        params: as the family's table describes them.
        tokenizer: a folder whose tokenizer files (and model code, if any) are copied; None copies none.
        dtype: cast to this type; None keeps each tensor's own.
        max_shard_bytes: above it the weights are split over several files with an index.

    Raises:
        UserError: the folder exists or cannot be written, the parameters are not those of the architecture, are of a
            type that safetensors' readers do not share, or are spread over several processes.
    """
    table = families.table(arch)
    problems = same_tree(params, table)
    if problems:
        listed = "; ".join(problems)
        raise UserError(f"cannot export to {folder}: these are not the parameters of the architecture: {listed}")
    pending = _pending(table, flatten(params), dtype)
    files = writer.plan(pending, max_shard_bytes)
    storage.check_vacant(folder, marker=MARKER)
    size = sum(t.n_bytes for t in pending.values())
    if not storage.is_remote(folder):
        storage.check_writable(Path(folder).absolute().parent, need_bytes=size)
    with storage.new_folder(folder, marker=MARKER) as scratch:
        origin = _copy_companions(tokenizer, scratch)
        for name, tensors in files.items():
            writer.write(scratch / name, tensors, pending)
        if len(files) > 1:
            where = {tensor: name for name, tensors in files.items() for tensor in tensors}
            _write_json(scratch / shards.INDEX, {"metadata": {"total_size": size}, "weight_map": where})
        _write_json(scratch / GENERATION, origin | _generation(arch))
        sizes: Counter[str] = Counter()
        for tensor in pending.values():
            sizes[tensor.dtype.name] += tensor.n_bytes
        _write_json(scratch / MARKER, families.to_hf(arch, sizes.most_common(1)[0][0]))


def verify(folder: storage.PathLike, net: Transformer, params: Params, ids: Int[Array, "B T"]) -> float:
    """Reads an exported folder back and compares logits.

    Args:
        folder: what `save` wrote.
        net: the network it came from.
        params: the parameters it came from; the copy is placed as they are.
        ids: tokens to run, all visible.

    Returns:
        The largest absolute difference of any logit: 0 where the types are the same.

    Raises:
        UserError: the types are the same and the logits are not, or the folder's config.json gives another network.
    """
    shardings = jax.tree.map(lambda leaf: leaf.sharding if isinstance(leaf, Array) else None, params)
    arch, again = load(folder, shardings=shardings)
    if families.table(arch) != families.table(net.arch) or _ids(arch) != _ids(net.arch):
        raise UserError(f"{folder}: config.json gives another network than the one exported: {arch} against {net.arch}")
    positions = jnp.broadcast_to(jnp.arange(ids.shape[1], dtype=jnp.int32), ids.shape)
    length = jnp.full(ids.shape[0], ids.shape[1], jnp.int32)
    forward = jax.jit(net.all_logits)
    ours, theirs = (np.asarray(forward(p, ids, positions, length)) for p in (params, again))
    difference = float(np.abs(ours - theirs).max())
    same_types = all(jax.tree.leaves(jax.tree.map(lambda a, b: a.dtype == b.dtype, params, again)))
    if same_types and not difference == 0:  # also true of NaN
        raise UserError(
            f"{folder}: logits of the exported checkpoint differ by {difference:.3g} from its origin's, and "
            "should be equal; do not use it (NaN: the weights hold one), and export again"
        )
    return difference


def _ids(arch: Architecture) -> tuple[Any, ...]:
    return (arch.mask_id, arch.eos_id, arch.pad_id, arch.n_heads, arch.norm_eps, arch.rope_theta, arch.alignment)


def _pending(table: Table, flat: dict[str, Any], dtype: DTypeLike | None) -> dict[str, Pending]:
    """Every tensor in the order of the network: embedding, layer by layer, then what follows the layers."""
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
        if target not in shards.DTYPES.values():
            raise UserError(f"parameter {path} is {target.name}; an export is float64, float32, float16 or bfloat16")
        if isinstance(leaf, Array) and not leaf.is_fully_addressable:
            raise UserError(
                f"parameter {path} is spread over several processes; export from one: run `export` on the run folder"
            )
        tensors[tensor_names(spec)[layer]] = Pending(target, stored_shape(spec), _fetch(leaf, spec, layer, target))
    return tensors


def _fetch(leaf: Any, spec: ParamSpec, layer: int, dtype: np.dtype[Any]) -> Callable[[], np.ndarray]:
    def fetch() -> np.ndarray:
        one = leaf[layer] if spec.stacked else leaf
        host = np.asarray(one).astype(dtype, copy=False)
        return host.T if spec.transpose else host

    return fetch


def _generation(arch: Architecture) -> dict[str, Any]:
    return {"eos_token_id": arch.eos_id, "mask_token_id": arch.mask_id, "pad_token_id": arch.pad_id}


def _copy_companions(tokenizer: storage.PathLike | None, target: Path) -> dict[str, Any]:
    """Copies what travels with the weights; returns the origin's generation config, to be kept."""
    if tokenizer is None:
        return {}
    source = Path(tokenizer)
    if not source.is_dir():
        raise UserError(f"{source}: no such folder; give the folder of the tokenizer's files")
    for pattern in _COMPANIONS:
        for file in source.glob(pattern):
            shutil.copyfile(file, target / file.name)
    # Readers of the checkpoint look for the chat template under this name.
    if (target / "template.jinja").exists() and not (target / "chat_template.jinja").exists():
        shutil.copyfile(target / "template.jinja", target / "chat_template.jinja")
    generation = source / GENERATION
    return dict(storage.read_json(generation)) if generation.exists() else {}


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
