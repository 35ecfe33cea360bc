"""Writes our parameters as a Hugging Face checkpoint, and reads back what was written."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import DTypeLike
from jaxtyping import Int

from jaxblock.errors import UserError
from jaxblock.huggingface import companions
from jaxblock.huggingface.checks import check_export
from jaxblock.huggingface.load import load_checkpoint
from jaxblock.huggingface.tensor_files import INDEX
from jaxblock.huggingface.tensor_writer import PendingTensor, pending_tensors, split_into_files, write_tensors
from jaxblock.io.files import check_writable, write_json, write_text
from jaxblock.io.folders import check_vacant, new_folder
from jaxblock.io.paths import PathLike, is_remote
from jaxblock.io.remote import local_folder
from jaxblock.models.architecture import Architecture
from jaxblock.models.families import registry
from jaxblock.models.linear.lora import KEY
from jaxblock.models.spec import flatten
from jaxblock.models.transformer import Transformer
from jaxblock.parallel import processes
from jaxblock.parallel.rows import on_mesh_of, spans_processes, split_filled_rows, whole_results
from jaxblock.types import Params

MARKER = "config.json"
"""The file that is written last: a folder that has it is whole."""


def save_checkpoint(
    folder: PathLike,
    arch: Architecture,
    params: Params,
    *,
    tokenizer: PathLike | None = None,
    origin: PathLike | None = None,
    trained: companions.Trained | None = None,
    card: str | None = None,
    dtype: DTypeLike | None = None,
    max_shard_bytes: int = 5 * 10**9,
) -> None:
    """Writes safetensors, config.json, generation_config.json and the tokenizer's files.

    The host holds one layer's tensor at a time. The folder appears whole or not at all. Weights that are spread over several
    processes are gathered tensor by tensor; process 0 writes them, and all return when the folder is there.

    Args:
        folder: the folder to make; it must not exist, or be empty.
        arch: the architecture; other fields of the config.json that it was read from are written back.
        params: the weights as the family's table describes them; adapters must be merged (``models.linear.lora.merge``).
        tokenizer: a folder whose tokenizer files are copied; None copies none.
        origin: a folder whose generation config and model code, if any, are copied; None for those of ``tokenizer``.
        trained: what is recorded in generation_config.json and chat_template.jinja of a network that jaxblock trained; None
            for nothing.
        card: the text of README.md; None writes none.
        dtype: the type to cast to; None keeps each tensor's own.
        max_shard_bytes: the size of weights, in bytes, above which they are split over several files with an index.

    Raises:
        UserError: the folder exists or cannot be written; or the parameters do not fit the architecture, or have a type
            that other readers of safetensors do not know.
    """
    table = registry.param_table(arch)
    _check_exportable(folder, params)
    check_export(folder, params, table, "the parameters of the architecture")
    pending = pending_tensors(table, flatten(params), dtype)
    files = split_into_files(pending, max_shard_bytes)
    check_vacant(folder, marker=MARKER)
    together = spans_processes(params)
    if together:
        processes.wait(f"every process has looked at {folder}")
    if together and jax.process_index() > 0:
        for tensor in pending.values():
            tensor.fetch()  # this process's part in gathering the tensor
    else:
        _write_folder(folder, arch, pending, files, tokenizer, tokenizer if origin is None else origin, trained, card)
    if together:
        processes.wait(f"{folder} is written")


def _write_folder(
    folder: PathLike,
    arch: Architecture,
    pending: Mapping[str, PendingTensor],
    files: Mapping[str, Sequence[str]],
    tokenizer: PathLike | None,
    origin: PathLike | None,
    trained: companions.Trained | None,
    card: str | None,
) -> None:
    """Writes the tensors and everything beside them.

    Args:
        folder: the folder to make.
        arch: the architecture.
        pending: the tensors by their names in the checkpoint.
        files: the names of each file's tensors, by file name.
        tokenizer: a folder whose tokenizer files are copied; None copies none.
        origin: a folder whose generation config and model code, if any, are copied; None copies none.
        trained: what is recorded of a network that jaxblock trained; None for nothing.
        card: the text of README.md; None writes none.
    """
    size = sum(t.n_bytes for t in pending.values())
    if not is_remote(folder):
        check_writable(Path(folder).absolute().parent, need_bytes=size)
    with new_folder(folder, marker=MARKER) as scratch:
        companions.copy_tokenizer(tokenizer, scratch, trained)
        companions.copy_code(origin, scratch)
        if card is not None:
            write_text(scratch / companions.CARD, card)
        for name, tensors in files.items():
            write_tensors(scratch / name, tensors, pending)
        if len(files) > 1:
            where = {tensor: name for name, tensors in files.items() for tensor in tensors}
            write_json(scratch / INDEX, {"metadata": {"total_size": size}, "weight_map": where})
        write_json(scratch / companions.GENERATION, companions.merged_generation_config(origin, arch, trained))
        sizes: Counter[str] = Counter()
        for tensor in pending.values():
            sizes[tensor.dtype.name] += tensor.n_bytes
        config = registry.to_hf(arch, sizes.most_common(1)[0][0])
        companions.point_auto_map_at(config, scratch, registry.FAMILIES[arch.family].code)
        write_json(scratch / MARKER, config)


def _check_exportable(folder: PathLike, params: Params) -> None:
    """Raises a UserError where parameters hold separate adapters or were rounded to int8."""
    if KEY in params:
        raise UserError(
            f"cannot export to {folder}: these parameters hold LoRA adapters beside their base: merge them first "
            "(jaxblock.models.linear.lora.merge), or export the adapters alone (jaxblock.huggingface.peft.save_adapter)"
        )
    rounded = [path for path, leaf in flatten(params).items() if leaf.dtype == jnp.int8]
    if rounded:
        raise UserError(
            f"cannot export to {folder}: an int8 base is a rounded copy ({', '.join(rounded)}): load the checkpoint "
            "without int8 (model.quantize: none), merge the adapters into that, and export it"
        )


def verify_checkpoint(folder: PathLike, net: Transformer, params: Params, ids: Int[Array, "B T"]) -> float:
    """Reads an exported folder back and compares logits.

    Args:
        folder: the folder that `save_checkpoint` wrote.
        net: the network that was exported.
        params: the parameters that were exported; those that are read back are split over the devices in the same way.
        ids: the tokens to run the network on; all of them are visible.

    Returns:
        The largest absolute difference of any logit, which is 0 if the export has the parameters' own types.

    Raises:
        UserError: the export has the parameters' own types but other logits, or logits that are not finite, or its config.json
            describes another network.
    """
    shardings = jax.tree.map(lambda leaf: leaf.sharding if isinstance(leaf, Array) else None, params)
    # An export in an object store is downloaded, so that the stored files are what is compared.
    arch, again = load_checkpoint(local_folder(folder, ["*.json", "*.safetensors"]), shardings=shardings)
    if registry.param_table(arch) != registry.param_table(net.arch) or _computed(arch) != _computed(net.arch):
        raise UserError(f"{folder}: config.json gives another network than the one exported: {arch} against {net.arch}")
    positions = np.broadcast_to(np.arange(ids.shape[1], dtype=np.int32), ids.shape)
    length = np.full(ids.shape[0], ids.shape[1], np.int32)
    rows = split_filled_rows(params, (np.asarray(ids), positions, length))
    forward = jax.jit(Transformer.all_logits, static_argnums=0, out_shardings=whole_results(params))
    with on_mesh_of(params):
        ours, theirs = (np.asarray(forward(net, p, *rows)) for p in (params, again))
    difference = float(np.abs(ours - theirs).max())
    same_types = all(jax.tree.leaves(jax.tree.map(lambda a, b: a.dtype == b.dtype, params, again)))
    if not np.isfinite(difference) or (same_types and difference > 0):
        raise UserError(
            f"{folder}: logits of the exported checkpoint differ by {difference:.3g} from its origin's, and "
            "should be equal (NaN: the weights hold one)"
        )
    return difference


def _computed(arch: Architecture) -> tuple[Any, ...]:
    """Returns the fields that change what a network computes without changing its table of parameters."""
    shared = (arch.mask_id, arch.eos_id, arch.pad_id, arch.n_heads, arch.norm_eps, arch.alignment)
    return (*shared, arch.rope_theta, arch.rope_scaling)
