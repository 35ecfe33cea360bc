"""Implements ``jaxblock.load``: opens a run, a Hugging Face folder or hub id, or a folder of adapters as a ``Model``.

The file is not called ``load.py``, because a module ``jaxblock.load`` would hide the function of this name.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from jaxblock import build
from jaxblock.data.store.manifest import MANIFEST_FILE
from jaxblock.data.tokens.load import has_tokenizer
from jaxblock.errors import UserError, shown
from jaxblock.huggingface import peft
from jaxblock.huggingface.load import read_architecture
from jaxblock.io.hub import local_checkpoint
from jaxblock.io.paths import PathLike, as_path
from jaxblock.model import Model
from jaxblock.models.architecture import Architecture
from jaxblock.models.config import Checkpoint, ModelConfig, Quantize
from jaxblock.models.families import registry
from jaxblock.models.linear import int8, lora
from jaxblock.models.spec import flatten
from jaxblock.parallel import rules
from jaxblock.parallel.mesh import make_mesh
from jaxblock.settings import Alignment
from jaxblock.training.base_identity import check_adapter_base
from jaxblock.training.checkpoints import run_folder
from jaxblock.training.config import TrainConfig
from jaxblock.training.stored_text import StoredText, read_text, text_of_run, with_recorded_end
from jaxblock.training.stored_weights import load_base, load_run_params


def load(
    folder: PathLike,
    *,
    dtype: str | None = None,
    base: PathLike | None = None,
    quantize: Quantize | None = None,
    mask_id: int | None = None,
    alignment: Alignment | None = None,
    step: Checkpoint = "latest",
    mesh: Mesh | Literal["all"] | None = None,
) -> Model:
    """Loads a run folder, a Hugging Face folder (or hub id), or a folder of PEFT adapters.

    Args:
        folder: a run folder of ``jaxblock train``, a folder with config.json and safetensors (the tokenizer is optional),
            a hub id, or a folder with adapter_config.json.
        dtype: the type to compute and store in, ``float32`` or ``bfloat16``; None keeps what is stored (float16 is computed
            in float32).
        base: the folder of the frozen weights that adapters belong to; None for the one that their run or
            adapter_config.json names.
        quantize: ``int8`` keeps the layers' matrices in int8, where there are adapters; None for the setting of their run.
        mask_id: the mask token of an autoregressive checkpoint that has none (adapters exported by jaxblock record it);
            for a new token the embedding gets new rows.
        alignment: the logit alignment of an autoregressive checkpoint; None for ``shifted``.
        step: the checkpoint of a run: the newest, the best by `train.keep_best`, or that of a step.
        mesh: the devices that share the weights and the rows of every batch (``parallel.mesh.make_mesh``); None for one
            device, ``all`` for all devices of all processes, split as the run's `train` section says where it fits them. With
            several processes, all of them must make the same calls.

    Returns:
        The model. An autoregressive checkpoint without a mask token has logits, but cannot decode.

    Raises:
        UserError: the folder is none of these kinds, or is damaged; the message says what is missing.
    """
    if dtype not in (None, "float32", "bfloat16"):
        raise UserError(f"dtype is {dtype!r}: choose float32 or bfloat16, or None for what is stored")
    _check_choices(folder, quantize, mask_id, alignment, mesh)
    if run_folder.is_run(folder):
        if mask_id is not None or alignment is not None:
            raise UserError(f"{folder} is a run, which records its mask token and alignment: leave them out")
        return _load_run(folder, dtype, base, quantize, step, mesh)
    _check_kind(folder)
    if step != "latest":
        raise UserError(f"{folder} is no run, so it has no checkpoint {step}: leave `step` out")
    weights_folder, adapter_folder = _split_adapter(local_checkpoint(folder), base)
    if quantize == "int8" and adapter_folder is None:
        raise UserError(f"{folder}: quantize int8 is for the weights beneath adapters, and there are none")
    if adapter_folder is not None:
        check_adapter_base(adapter_folder, weights_folder, peft.read_base_fingerprint(adapter_folder))
    arch = read_architecture(weights_folder)
    if mask_id is not None or alignment is not None:
        arch = registry.with_mask(arch, arch.need_mask_id() if mask_id is None else mask_id, alignment)
    elif adapter_folder is not None:
        arch = with_recorded_end(adapter_folder, peft.with_saved_start(adapter_folder, arch))
    devices = _all_devices(arch, None) if mesh == "all" else mesh
    return _load_checkpoint(weights_folder, adapter_folder, arch, dtype, quantize or "none", devices)


def check_there(folder: PathLike, base: PathLike | None = None) -> None:
    """Checks that there is a checkpoint to load, before other work that would be in vain; downloads one from the hub.

    Args:
        folder: as for ``load``.
        base: as for ``load``.

    Raises:
        UserError: the folder is none of the kinds that ``load`` takes, or its config.json cannot be read.
    """
    if not run_folder.is_run(folder):
        _check_kind(folder)
        read_architecture(_split_adapter(local_checkpoint(folder), base)[0])


def _check_choices(folder: PathLike, quantize: Any, mask_id: Any, alignment: Any, mesh: Any) -> None:
    """Raises UserError where an argument of ``load`` has a value that it does not take."""
    for name, value, right, choices in (
        ("folder", folder, bool(str(folder).strip()), "the path of a checkpoint"),
        ("quantize", quantize, quantize in (None, *get_args(Quantize)), " or ".join(get_args(Quantize))),
        ("mask_id", mask_id, mask_id is None or type(mask_id) is int, "a token id"),
        ("alignment", alignment, alignment in (None, *get_args(Alignment)), " or ".join(get_args(Alignment))),
        ("mesh", mesh, mesh in (None, "all") or isinstance(mesh, Mesh), "all, or a jax.sharding.Mesh"),
    ):
        if not right:
            raise UserError(f"{name} is {shown(value)}: it must be {choices}")


def _check_kind(folder: PathLike) -> None:
    """Raises UserError where a file or prepared data are given for a checkpoint."""
    path = as_path(folder)
    if path.is_file():
        raise UserError(f"{path} is a file, and a checkpoint is a folder; a YAML file of settings is given by --config")
    if (path / MANIFEST_FILE).exists() and not (path / "config.json").exists():
        raise UserError(
            f"{path} holds prepared data, not a checkpoint: give it as --data.prepared, and as checkpoint the folder of a run "
            "(train.out), a Hugging Face folder or adapters"
        )


def _all_devices(arch: Architecture, train: TrainConfig | None) -> Mesh | None:
    """Returns a mesh of all devices of all processes; None where there is one device.

    Args:
        arch: the network's sizes.
        train: the `train` section of the run, whose mesh is taken where it fits the devices. Elsewhere, as for a run that was
            trained on another number of devices, weights are split over as many devices as divide the network's widths.
    """
    devices = jax.devices()
    if len(devices) == 1:
        return None
    if train is not None:
        with contextlib.suppress(UserError):
            return make_mesh(train.data_parallel, train.fsdp, train.tensor, slices=train.slices)
    slices = len({getattr(device, "slice_index", 0) for device in devices})
    matrices = [spec for spec in registry.param_table(arch).values() if spec.stacked and spec.is_matrix]
    widths = {size for spec in matrices for size in spec.shape[1:]}
    return make_mesh(fsdp=math.gcd(len(devices) // slices, *widths), slices=slices)


def _load_checkpoint(
    weights_folder: str,
    adapter_folder: str | None,
    arch: Architecture,
    dtype: str | None,
    quantize: Quantize,
    mesh: Mesh | None,
) -> Model:
    """Loads a Hugging Face folder's weights, and adapters for them where there are any."""
    # Adapters are loaded first, so that those for another base are refused before gigabytes are read.
    place = None if mesh is None else functools.partial(rules.param_shardings, mesh)
    adapted, adapters = (None, None) if adapter_folder is None else peft.load_adapter(adapter_folder, arch, place)
    params = load_base(weights_folder, arch, mesh, dtype, step=None, quantize=quantize)
    # Where a file mixes types, such as bfloat16 norms with float32 matrices, the widest loses nothing.
    # The scales of int8 matrices are always float32.
    leaves = [
        leaf for name, leaf in flatten(params).items() if not name.endswith(int8.SCALE) and leaf.dtype != jnp.int8
    ]
    compute = dtype or jnp.result_type(*leaves).name
    # float16 is only for storage: its range is too small for computing, and CPUs do not compute in it.
    compute = "float32" if compute == "float16" else compute
    # How layers run and attend is left to jaxblock, as in a run.
    chosen = ModelConfig(dtype=compute, quantize=quantize)  # type: ignore[arg-type]
    net = dataclasses.replace(build.network(arch, chosen), lora=adapted)
    origin = adapter_folder if adapter_folder is not None and has_tokenizer(adapter_folder) else weights_folder
    text = read_text(origin, arch)
    tokenizer = text.tokenizer
    if tokenizer is not None and tokenizer.vocab_size > arch.vocab_size:
        raise UserError(
            f"{origin}: the tokenizer has ids up to {tokenizer.vocab_size - 1}, but the embedding of {weights_folder} has "
            f"{arch.vocab_size} rows: use the checkpoint's own tokenizer files, or (for an added mask token) say mask_id"
        )
    return Model(
        net=net,
        params=params if adapters is None else lora.attach(params, adapters),
        **_fields(text),
        origin=origin,
        base=None if adapter_folder is None else weights_folder,
    )


def _fields(text: StoredText) -> dict[str, Any]:
    """Returns the fields of ``Model`` that say how it turns text into tokens and decodes."""
    fields = text._asdict()
    fields["decode_defaults"] = fields.pop("decode")
    return fields


def _split_adapter(folder: str, base: PathLike | None) -> tuple[str, str | None]:
    """Returns (the folder of the weights, the folder of the adapters or None).

    Args:
        folder: a local folder, of weights or of adapters.
        base: the folder of the weights that adapters belong to; None for the one that adapter_config.json names.

    Raises:
        UserError: a base is given but there are no adapters, or the base is a run.
    """
    if peft.is_adapter(folder):
        beneath = local_checkpoint(base if base is not None else peft.read_base_name(folder))
        if run_folder.is_run(beneath):
            raise UserError(f"{beneath}, the base of {folder}, is a run: export it, and give the export as base")
        return beneath, folder
    if base is not None:
        raise UserError(f"{folder} holds no adapters, so `base` means nothing: leave it out")
    return folder, None


def _load_run(
    folder: PathLike,
    dtype: str | None,
    base: PathLike | None,
    quantize: Quantize | None,
    step: Checkpoint,
    mesh: Mesh | Literal["all"] | None,
) -> Model:
    """Loads a checkpoint of a run, with the tokenizer and the settings that the run folder keeps."""
    run = run_folder.open_run(folder)
    model = run.config.model
    if run.base is None and (base is not None or quantize == "int8"):
        raise UserError(f"{folder} holds no adapters: leave out base and quantize")
    quantize = "none" if run.base is None else quantize or model.quantize
    devices = _all_devices(run.arch, run.config.train) if mesh == "all" else mesh
    params, found = load_run_params(
        run, devices, dtype, step=step, base=None if base is None else str(base), quantize=quantize
    )
    net = dataclasses.replace(build.network(run.arch, model, run.config.lora), quantize=quantize)
    return Model(
        net=net if dtype is None else dataclasses.replace(net, dtype=dtype),
        params=params,
        **_fields(text_of_run(run)),
        origin=str(folder),
        base=None if run.base is None else str(base or model.init_from),
        step=found,
    )
