"""``jaxblock export``: writes a checkpoint for other libraries to read, and pushes it to the Hugging Face hub."""

from __future__ import annotations

import os
from dataclasses import dataclass
from shlex import quote
from typing import Literal

from jaxblock.commands import say
from jaxblock.config.config import Config
from jaxblock.errors import UserError
from jaxblock.io.files import check_writable, read_json
from jaxblock.io.folders import EXPORT_FILES, check_vacant, folder_bytes
from jaxblock.io.paths import as_path
from jaxblock.models.config import Checkpoint


@dataclass(frozen=True)
class Options:
    """Writes a checkpoint as a Hugging Face folder, or its adapters as PEFT's; reads it back, compares logits, pushes to the hub."""

    checkpoint: str
    """A run folder, a Hugging Face folder (or hub id), or a folder of PEFT adapters."""
    out: str | None = None
    """The folder to make; an existing one is refused, unless `overwrite` is set. None where an export that is there is pushed."""
    overwrite: bool = False
    """Whether to replace an existing export, once the new one is whole and right; with `push`, also the one in the repository."""
    format: Literal["merged", "adapter"] = "merged"
    """How adapters are written: `merged` into their base, as a whole checkpoint, or as an `adapter` in PEFT's format."""
    base: str | None = None
    """The folder of the weights that adapters belong to; None for the one used in training."""
    step: Checkpoint = "latest"
    """The checkpoint of a run: the newest, the best by its `train.keep_best`, or that of a step."""
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """The type of the tensors; None keeps each tensor's own."""
    scores: tuple[str, ...] = ()
    """The folders of evaluations whose scores the model card has; none looks for those beside the run."""
    push: str | None = None
    """The repository on the Hugging Face hub, ORG/NAME, to push the export to; it is made where it does not exist."""
    public: bool = False
    """Whether everybody may see a repository that is made."""


def run(options: Options, config: Config) -> int:
    """Writes the folder, reads it back, prints the largest difference of any logit, and pushes the folder."""
    from jaxblock.io import hub_upload
    from jaxblock.parallel import processes

    process, _ = processes.join_group()
    if options.push is None and (options.public or options.out is None):
        raise UserError(
            "public is for push: leave out --public" if options.public else "no --out: name the folder to make"
        )
    if options.push is not None and process == 0:
        hub_upload.find_repository(options.push, private=not options.public, overwrite=options.overwrite)
    folder = _checked_export(options) if options.out is None else _export(options, options.out, process)
    if options.push is not None and process == 0:
        _push(options, folder)
    return 0


def _export(options: Options, out: str, process: int) -> str:
    """Writes the export to the folder ``out`` and returns it."""
    from jaxblock import loading
    from jaxblock.huggingface import peft, save
    from jaxblock.training.checkpoints import run_folder

    alone = options.format == "adapter"
    if alone and options.dtype is not None:
        raise UserError("format adapter keeps float32: leave out --dtype")
    inputs = (options.checkpoint, options.base, *options.scores)
    check_vacant(out, marker=peft.CONFIG if alone else save.MARKER, overwrite=options.overwrite, inputs=inputs)
    if process == 0:
        check_writable(as_path(out).parent)
    if alone:
        model = loading.load(options.checkpoint, base=options.base, step=options.step, mesh="all")
        difference = model.save_adapter(out, overwrite=options.overwrite, name=options.push, scores=options.scores)
    else:
        # Merging needs the base in full precision, even where the adapters were trained on an int8 copy of it.
        has_base = run_folder.is_run(options.checkpoint) and run_folder.open_run(options.checkpoint).base is not None
        quantize: Literal["none"] | None = "none" if has_base else None
        model = loading.load(options.checkpoint, base=options.base, quantize=quantize, step=options.step, mesh="all")
        overwrite, name = options.overwrite, options.push
        difference = model.save(out, options.dtype, overwrite=overwrite, name=name, scores=options.scores)
    if process == 0:  # one process speaks for all
        size = folder_bytes(out)
        print(f"wrote {out} ({size / 1e6:.1f} MB); read back: largest difference of any logit {difference:.3g}")
    return out


def _checked_export(options: Options) -> str:
    """Returns the folder of an export that is pushed as it is; raises UserError where it is none, or would have to be changed."""
    from jaxblock.training.checkpoints import run_folder

    folder = options.checkpoint
    changes = {"format": "merged", "base": None, "step": "latest", "dtype": None, "scores": ()}
    changed = [f"--{name}" for name, default in changes.items() if getattr(options, name) != default]
    if run_folder.is_run(folder) or not os.path.isdir(folder) or changed:
        why = f"{' and '.join(changed)} would change it" if changed else f"{folder} is no local export"
        raise UserError(f"{why}: give --out too, the folder for the export that is pushed")
    return folder


def _push(options: Options, folder: str) -> None:
    """Uploads the export, and prints the address of its page and how it is loaded."""
    from jaxblock.io import hub_upload
    from jaxblock.io.remote import local_folder

    name = str(options.push)
    public, replace = " --public" if options.public else "", " --overwrite" if options.overwrite else ""
    say(
        f"pushing to {name}; if that stops: jaxblock export --checkpoint {quote(folder)} --push {name}{public}{replace}"
    )
    local = str(local_folder(folder, EXPORT_FILES))
    address = hub_upload.push_folder(local, name, private=not options.public, overwrite=options.overwrite, say=say)
    config = as_path(local) / "adapter_config.json"
    nameless = config.exists() and not read_json(config).get("base_model_name_or_path")  # the base is no hub repository
    print(f'pushed to {address}; to load it: jaxblock.load("{name}"{", base=..." if nameless else ""})')
