"""Reads and writes LoRA adapters in PEFT's format: ``adapter_config.json`` and ``adapter_model.safetensors``."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import SingleDeviceSharding
from jax.typing import DTypeLike

from jaxblock.errors import UserError, shown
from jaxblock.huggingface.checks import check_export, check_no_problems, summary_line, tensor_problems
from jaxblock.huggingface.companions import CARD, GENERATION, Trained, copy_tokenizer, merged_generation_config
from jaxblock.huggingface.peft_config import AdapterConfig, read_adapter_config
from jaxblock.huggingface.placement import stored_shape, stored_shapes, tensor_names
from jaxblock.huggingface.tensor_files import FolderContents, read_tensor, scan_file
from jaxblock.huggingface.tensor_writer import pending_tensors, write_tensors
from jaxblock.io.files import read_json, write_json, write_text
from jaxblock.io.folders import new_folder
from jaxblock.io.hub import split_revision, with_revision
from jaxblock.io.paths import PathLike, as_path, is_remote
from jaxblock.models.architecture import Architecture
from jaxblock.models.families import registry
from jaxblock.models.families.llama import ALIGNMENT
from jaxblock.models.linear.lora import Lora, adapter_table
from jaxblock.models.spec import ParamSpec, Table, flatten, nest
from jaxblock.types import Params

CONFIG = "adapter_config.json"
"""The file that is written last: a folder that has it is whole."""

WEIGHTS = "adapter_model.safetensors"

_SECOND = ".lora_B.weight"

BASE = "adapter_base.json"
"""The name of a file beside adapters; it holds a hash of the weights that they were trained on."""
_FINGERPRINT = "fingerprint"

START = "diffusion_start.json"
"""The name of a file beside adapters of an autoregressive base; it holds the mask token and the logit alignment, which the
base's own config.json does not name."""


def save_adapter(
    folder: PathLike,
    arch: Architecture,
    lora: Lora,
    adapters: Params,
    *,
    base: str | None,
    base_fingerprint: str | None = None,
    dtype: DTypeLike | None = None,
    tokenizer: PathLike | None = None,
    trained: Trained | None = None,
    card: str | None = None,
) -> None:
    """Writes adapters so that ``peft`` loads them onto their base. The folder appears whole or not at all.

    Args:
        folder: the folder to make; it must not exist, or be empty.
        arch: the base's architecture.
        lora: which matrices are adapted, and the adapters' rank and scale.
        adapters: the weights, as ``models.linear.lora.adapter_table`` describes them.
        base: the base's folder or hub name, for ``base_model_name_or_path``.
        base_fingerprint: a hash of the base's weights, by which another base is noticed; None records none.
        dtype: the type to cast to; None keeps float32.
        tokenizer: a folder whose tokenizer files are copied; None copies none.
        trained: what is recorded in generation_config.json and chat_template.jinja; None for nothing.
        card: the text of README.md; None writes none.

    Raises:
        UserError: the folder exists or cannot be written, or the adapters do not fit the architecture.
    """
    table = adapter_table(registry.param_table(arch), lora)
    check_export(folder, adapters, table, "the adapters that were described")
    pending = pending_tensors(table, flatten(adapters), dtype)
    with new_folder(folder, marker=CONFIG) as scratch:
        copy_tokenizer(tokenizer, scratch, trained)
        if card is not None:
            write_text(scratch / CARD, card)
        if trained is not None:
            write_json(scratch / GENERATION, merged_generation_config(None, arch, trained))
        write_tensors(scratch / WEIGHTS, pending, pending)
        if registry.FAMILIES[arch.family].autoregressive and arch.mask_id is not None:
            write_json(scratch / START, {"mask_token_id": arch.mask_id, ALIGNMENT: arch.alignment})
        if base_fingerprint is not None:
            write_json(scratch / BASE, {_FINGERPRINT: base_fingerprint})
        write_json(scratch / CONFIG, _config(arch, lora, base))


def read_base_fingerprint(folder: PathLike) -> str | None:
    """Returns the hash of the weights that adapters were trained on; None where nothing says it, as beside those of other libraries."""
    path = as_path(folder) / BASE
    if not path.exists():
        return None
    content = read_json(path)
    found = content.get(_FINGERPRINT) if isinstance(content, dict) else None
    if not isinstance(found, str):
        raise UserError(f"{path} does not say which base the adapters belong to: put it back, or take it out")
    return found


def check_base_rows(folder: PathLike, arch: Architecture, base: Architecture) -> None:
    """Checks that the base has all rows of the vocabulary that the adapters were trained with.

    Args:
        folder: the folder to export to, for the message.
        arch: the architecture that the adapters were trained with.
        base: the architecture in the base's own config.json.

    Raises:
        UserError: the vocabulary was extended for training, and the base does not have the new rows.
    """
    if base.vocab_size < arch.vocab_size:
        raise UserError(
            f"cannot export adapters alone to {folder}: the vocabulary grew from {base.vocab_size} to "
            f"{arch.vocab_size} rows for the mask token, and the base that PEFT would load has no such rows: export the "
            "merged network"
        )


def with_saved_start(folder: PathLike, arch: Architecture) -> Architecture:
    """Returns a base's architecture with the mask token and logit alignment that were saved beside its adapters.

    Args:
        folder: the folder of the adapters.
        arch: the base's own architecture; if it has a mask token, it is returned as it is.

    Raises:
        UserError: the file (`START`) that holds them is damaged, or they do not fit the base.
    """
    path = Path(folder) / START
    if arch.mask_id is not None or not path.is_file():
        return arch
    start = read_json(path)
    mask_id = start.get("mask_token_id") if isinstance(start, dict) else None
    if not isinstance(mask_id, int) or start.get(ALIGNMENT) not in ("same_position", "shifted"):
        raise UserError(f"{path}: names no mask_token_id and {ALIGNMENT}: export the adapters again")
    return registry.with_mask(arch, mask_id, start[ALIGNMENT])


def _config(arch: Architecture, lora: Lora, base: str | None) -> dict[str, Any]:
    name, revision = (None, None) if base is None else split_revision(base)
    return {
        "base_model_name_or_path": name,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "lora_alpha": int(lora.alpha) if lora.alpha == int(lora.alpha) else lora.alpha,
        "lora_dropout": lora.dropout,
        "modules_to_save": None,
        "peft_type": "LORA",
        "r": lora.rank,
        "revision": revision,
        "target_modules": target_modules(registry.param_table(arch), lora),
        # PEFT's wrapper of this type asks the base for methods that the diffusion families' code may lack.
        "task_type": "CAUSAL_LM" if registry.FAMILIES[arch.family].autoregressive else None,
        "use_dora": False,
        "use_rslora": False,
    }


def target_modules(table: Table, lora: Lora) -> list[str] | str:
    """Returns the adapted modules as PEFT's ``target_modules`` names them.

    PEFT compares a plain name with a module's last component, so LLaDA's ``ff_out`` would adapt the head too. Where plain
    names would match other modules as well, one regular expression of whole names is returned.

    Args:
        table: the base's parameters.
        lora: which of its matrices are adapted.
    """
    modules = {path: _module(spec.hf_name) for path, spec in table.items()}
    short = {path: name.rsplit(".", 1)[-1] for path, name in modules.items()}
    wanted = list(dict.fromkeys(short[path] for path in lora.targets))
    if not any(short[path] in wanted for path, spec in table.items() if spec.is_matrix and path not in lora.targets):
        return wanted
    whole = (re.escape(modules[path]).replace(re.escape("{layer}"), r"\d+") for path in lora.targets)
    return f"(?:{'|'.join(whole)})"


def _module(hf_name: str) -> str:
    return hf_name.removesuffix(".weight").removesuffix(".bias")


def is_adapter(folder: PathLike) -> bool:
    """Returns whether a folder holds adapters in PEFT's format."""
    return not is_remote(folder) and (Path(folder) / CONFIG).is_file()


def read_base_name(folder: PathLike) -> str:
    """Reads the folder of the base that adapters were trained on, or its hub name (``org/name@revision``, where one is given).

    Raises:
        UserError: adapter_config.json does not name it, or its revision is no text.
    """
    config = read_json(Path(folder) / CONFIG)
    base = config.get("base_model_name_or_path") if isinstance(config, dict) else None
    if not isinstance(base, str) or not base:
        raise UserError(f"{Path(folder) / CONFIG}: no base_model_name_or_path: say where the base is (`base`)")
    revision = config.get("revision")
    if revision is not None and not isinstance(revision, str):
        raise UserError(f"{Path(folder) / CONFIG}: revision is {shown(revision)}; it must be a text, or null")
    return with_revision(base, revision) if revision else base


def load_adapter(
    folder: PathLike, arch: Architecture, place: Callable[[Table], Params] | None = None
) -> tuple[Lora, Params]:
    """Reads adapters that ``save_adapter`` or PEFT wrote.

    Args:
        folder: the local folder that holds the adapters.
        arch: the base's architecture.
        place: takes the adapters' specs and returns their shardings (``parallel.rules.param_shardings``); None puts all
            adapters on one device.

    Returns:
        (which matrices are adapted and how, the adapters in float32 as ``models.linear.lora.adapter_table`` describes them).

    Raises:
        UserError: there are no adapters, they are of a kind that the network does not support, or their tensors do not fit
            this base (the message names all of them).
    """
    path = Path(folder)
    if not (path / CONFIG).is_file():
        raise UserError(f"{path}: no {CONFIG}, so these are no PEFT adapters; give the folder that holds it")
    config = read_adapter_config(path / CONFIG)
    contents = scan_file(path / WEIGHTS)
    base = registry.param_table(arch)
    branches = _branches(config, base)
    _check_tensors(path, arch, base, branches, contents)
    rank, alpha = max((branch for of_layers in branches.values() for branch in of_layers.values()), key=lambda b: b[0])
    lora = Lora(rank, alpha or 1.0, config.dropout, tuple(branches))
    table = adapter_table(base, lora)
    default = SingleDeviceSharding(jax.local_devices()[0])
    placed = {} if place is None else flatten(place(table))
    flat = {}
    for name, spec in table.items():
        held = _read_branches(spec, contents, branches[name.rsplit("/", 1)[0]], lora)
        flat[name] = jax.make_array_from_callback(
            spec.shape, placed.get(name) or default, functools.partial(_part, held)
        )
    return lora, nest(flat)


def _part(values: np.ndarray, at: tuple[slice, ...]) -> np.ndarray:
    """Returns a copy of a part: on a CPU, JAX could otherwise go on using the memory of the whole array."""
    return values[at].copy()


Branches = dict[str, dict[int, tuple[int, float]]]
"""The rank and alpha of each adapted layer, by the path of the matrix and the layer's index."""


def _branches(config: AdapterConfig, base: Table) -> Branches:
    """Returns the branches that a config describes, for the matrices of this base."""
    branches: Branches = {}
    for path, spec in base.items():
        if spec.stacked and spec.is_matrix:
            modules = enumerate(name.removesuffix(".weight") for name in tensor_names(spec))
            found = {layer: config.rank_and_alpha(module) for layer, module in modules if config.adapts(module)}
            if found:
                branches[path] = found
    return branches


def _read_branches(
    spec: ParamSpec, contents: FolderContents, branches: dict[int, tuple[int, float]], lora: Lora
) -> np.ndarray:
    """Reads one of the two matrices of all layers' branches, so that all have the rank and scale of ``lora``.

    Zeros fill up smaller ranks and layers without a branch, and a scale of its own becomes part of the second matrix.
    """
    stack = np.zeros(spec.shape, np.float32)
    for layer, (rank, alpha) in branches.items():
        tensor = contents.stored[spec.hf_name.format(layer=layer)]
        x = read_tensor(tensor, tuple((0, size) for size in tensor.shape)).astype(np.float32).T
        if spec.hf_name.endswith(_SECOND):
            stack[layer, :rank] = x if alpha / rank == lora.scale else x * np.float32(alpha / rank / lora.scale)
        else:
            stack[layer, :, :rank] = x
    return stack


def _check_tensors(folder: Path, arch: Architecture, base: Table, branches: Branches, contents: FolderContents) -> None:
    """Raises a UserError that names every tensor that is not one of the adapters which the config describes."""
    matrices = tuple(path for path, spec in base.items() if spec.stacked and spec.is_matrix)
    expected: dict[str, tuple[int, ...]] = {}
    for path, of_layers in branches.items():
        for layer, (rank, _) in of_layers.items():
            table = adapter_table(base, Lora(rank, 1.0, 0.0, (path,)))
            expected |= {spec.hf_name.format(layer=layer): stored_shape(spec) for spec in table.values()}
    any_adapter = stored_shapes(adapter_table(base, Lora(1, 1.0, 0.0, matrices)))
    untargeted = [name for name in contents.stored if name in any_adapter and name not in expected]
    problems = tensor_problems(contents, expected, unexpected="not of this base", ignored=untargeted)
    problems += summary_line(
        f"not adapted by {CONFIG} (target_modules, layers_to_transform, exclude_modules)", untargeted
    )
    if not expected:
        problems.append("no matrix is adapted")
    headline = (
        f"{folder}: these adapters do not fit their base ({arch.family}, {arch.n_layers} layers, width {arch.d_model})"
    )
    advice = "Give the base that they were trained on, or download the adapters again"
    check_no_problems(problems, headline, advice)
