"""Reads and writes LoRA adapters in PEFT's format: ``adapter_config.json`` and ``adapter_model.safetensors``."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import SingleDeviceSharding
from jax.typing import DTypeLike

from jaxblock.errors import UserError
from jaxblock.huggingface.checks import check_export, check_no_problems, tensor_problems
from jaxblock.huggingface.companions import GENERATION, Trained, copy_tokenizer, merged_generation_config
from jaxblock.huggingface.placement import read_parameter, tensor_names
from jaxblock.huggingface.tensor_files import FolderContents, scan_file
from jaxblock.huggingface.tensor_writer import pending_tensors, write_tensors
from jaxblock.io.files import read_json, write_json
from jaxblock.io.folders import new_folder
from jaxblock.io.paths import PathLike, is_remote
from jaxblock.models.architecture import Architecture
from jaxblock.models.families import registry
from jaxblock.models.families.llama import ALIGNMENT
from jaxblock.models.linear.lora import Lora, adapter_table
from jaxblock.models.spec import Table, flatten, nest
from jaxblock.types import Params

CONFIG = "adapter_config.json"
"""The file that is written last: a folder that has it is whole."""

WEIGHTS = "adapter_model.safetensors"

START = "diffusion_start.json"
"""The name of a file beside adapters of an autoregressive base; it holds the mask token and the logit alignment, which the
base's own config.json does not name."""

# Settings of PEFT that change what an adapter computes, and the values that we support: an adapter with another value is
# refused, because it would give wrong results.
_FIXED: dict[str, tuple[Any, ...]] = {
    "alpha_pattern": ({}, None),
    "arrow_config": (None,),
    "bias": ("none", None),
    "fan_in_fan_out": (False, None),
    "layer_replication": (None,),
    "lora_bias": (False, None),
    "modules_to_save": (None, []),
    "rank_pattern": ({}, None),
    "target_parameters": (None, []),
    "trainable_token_indices": (None,),
    "use_bdlora": (False, None),
    "use_dora": (False, None),
    "use_qalora": (False, None),
    "use_rslora": (False, None),
}


def save_adapter(
    folder: PathLike,
    arch: Architecture,
    lora: Lora,
    adapters: Params,
    *,
    base: str | None,
    dtype: DTypeLike | None = None,
    tokenizer: PathLike | None = None,
    trained: Trained | None = None,
) -> None:
    """Writes adapters so that ``peft`` loads them onto their base. The folder appears whole or not at all.

    Args:
        folder: the folder to make; it must not exist, or be empty.
        arch: the base's architecture.
        lora: which matrices are adapted, and the adapters' rank and scale.
        adapters: the weights, as ``models.linear.lora.adapter_table`` describes them.
        base: the base's folder or hub name, for ``base_model_name_or_path``.
        dtype: the type to cast to; None keeps float32.
        tokenizer: a folder whose tokenizer files are copied; None copies none.
        trained: what is recorded in generation_config.json and chat_template.jinja; None for nothing.

    Raises:
        UserError: the folder exists or cannot be written, or the adapters do not fit the architecture.
    """
    table = adapter_table(registry.param_table(arch), lora)
    check_export(folder, adapters, table, "the adapters that were described")
    pending = pending_tensors(table, flatten(adapters), dtype)
    with new_folder(folder, marker=CONFIG) as scratch:
        copy_tokenizer(tokenizer, scratch, trained)
        if trained is not None:
            write_json(scratch / GENERATION, merged_generation_config(None, arch, trained))
        write_tensors(scratch / WEIGHTS, pending, pending)
        if registry.FAMILIES[arch.family].autoregressive and arch.mask_id is not None:
            write_json(scratch / START, {"mask_token_id": arch.mask_id, ALIGNMENT: arch.alignment})
        write_json(scratch / CONFIG, _config(arch, lora, base))


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
    return {
        "base_model_name_or_path": base,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "lora_alpha": int(lora.alpha) if lora.alpha == int(lora.alpha) else lora.alpha,
        "lora_dropout": lora.dropout,
        "modules_to_save": None,
        "peft_type": "LORA",
        "r": lora.rank,
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
    """Reads the folder or hub name of the base that adapters were trained on.

    Raises:
        UserError: adapter_config.json does not name it.
    """
    config = read_json(Path(folder) / CONFIG)
    base = config.get("base_model_name_or_path") if isinstance(config, dict) else None
    if not isinstance(base, str) or not base:
        raise UserError(f"{Path(folder) / CONFIG}: no base_model_name_or_path: say where the base is (`base`)")
    return base


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
    config = read_json(path / CONFIG)
    _check_kind(path / CONFIG, config)
    contents = scan_file(path / WEIGHTS)
    base = registry.param_table(arch)
    lora = Lora(config.get("r", 8), float(config.get("lora_alpha", 8)), float(config.get("lora_dropout") or 0), ())
    lora = replace(lora, targets=_targets(lora, base, contents))
    table = adapter_table(base, lora)
    _check_tensors(path, arch, table, contents)
    default = SingleDeviceSharding(jax.local_devices()[0])
    placed = {} if place is None else flatten(place(table))
    return lora, nest(
        {
            name: read_parameter(spec, contents.stored, np.float32, placed.get(name) or default)
            for name, spec in table.items()
        }
    )


def _check_kind(where: Path, config: Any) -> None:
    """Raises a UserError where a config asks for anything but plain LoRA adapters, all of one rank."""
    if not isinstance(config, dict) or config.get("peft_type") != "LORA":
        found = config.get("peft_type") if isinstance(config, dict) else None
        raise UserError(f"{where}: peft_type is {found!r}; only LORA adapters are supported")
    wrong = [f"{name} is {config[name]!r}" for name, allowed in _FIXED.items() if config.get(name) not in allowed]
    if wrong:
        raise UserError(
            f"{where}: {'; '.join(wrong)}: not supported. Merge the adapters into their base with PEFT "
            "(merge_and_unload), save that, and load it"
        )
    rank = config.get("r", 8)
    if not isinstance(rank, int) or rank < 1:
        raise UserError(f"{where}: r is {rank!r}; it must be a whole number above 0")


def _targets(lora: Lora, base: Table, contents: FolderContents) -> tuple[str, ...]:
    """Returns the paths of the base's matrices that the file has adapters for."""
    found = contents.stored.keys() | contents.damaged.keys()
    matrices = tuple(path for path, spec in base.items() if spec.stacked and spec.is_matrix)
    pairs = adapter_table(base, replace(lora, targets=matrices))
    adapted = {path.rsplit("/", 1)[0] for path, spec in pairs.items() if found & set(tensor_names(spec))}
    return tuple(path for path in matrices if path in adapted)


def _check_tensors(folder: Path, arch: Architecture, table: Table, contents: FolderContents) -> None:
    """Raises a UserError that names every tensor that is not one of this base's adapters."""
    problems = tensor_problems(contents, table, unexpected="not of this base")
    if not table:
        problems.append("no matrix is adapted")
    headline = (
        f"{folder}: these adapters do not fit their base ({arch.family}, {arch.n_layers} layers, width {arch.d_model})"
    )
    advice = "Give the base that they were trained on, or download the adapters again"
    check_no_problems(problems, headline, advice)
