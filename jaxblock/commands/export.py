"""``jaxblock export``: writes a checkpoint for other libraries to read."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from jaxblock.config.config import Config
from jaxblock.errors import UserError
from jaxblock.io.folders import folder_bytes
from jaxblock.models.config import Checkpoint


@dataclass(frozen=True)
class Options:
    """Writes a checkpoint as a Hugging Face folder, or its adapters as PEFT's; reads it back and compares logits."""

    checkpoint: str
    """A run folder, a Hugging Face folder (or hub id), or a folder of PEFT adapters."""
    out: str
    """The folder to make; an existing one is refused, unless `overwrite` is set."""
    overwrite: bool = False
    """Whether to replace an existing export, once the new one is whole and right."""
    format: Literal["merged", "adapter"] = "merged"
    """How adapters are written: `merged` into their base, as a whole checkpoint, or as an `adapter` in PEFT's format."""
    base: str | None = None
    """The folder of the weights that adapters belong to; None for the one used in training."""
    step: Checkpoint = "latest"
    """The checkpoint of a run: the newest, the best by its `train.keep_best`, or that of a step."""
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """The type of the tensors; None keeps each tensor's own."""


def run(options: Options, config: Config) -> int:
    """Writes the folder, reads it back, and prints the largest difference of any logit."""
    from jaxblock import loading
    from jaxblock.parallel import processes
    from jaxblock.training.checkpoints import run_folder

    process, _ = processes.join_group()
    if options.format == "adapter":
        if options.dtype is not None:
            raise UserError("format adapter keeps float32: leave out --dtype")
        model = loading.load(options.checkpoint, base=options.base, step=options.step, mesh="all")
        difference = model.save_adapter(options.out, overwrite=options.overwrite)
    else:
        # Merging needs the base in full precision, even where the adapters were trained on an int8 copy of it.
        has_base = run_folder.is_run(options.checkpoint) and run_folder.open_run(options.checkpoint).base is not None
        quantize: Literal["none"] | None = "none" if has_base else None
        model = loading.load(options.checkpoint, base=options.base, quantize=quantize, step=options.step, mesh="all")
        difference = model.save(options.out, options.dtype, overwrite=options.overwrite)
    if process > 0:  # one process speaks for all
        return 0
    size = folder_bytes(options.out)
    print(f"wrote {options.out} ({size / 1e6:.1f} MB); read back: largest difference of any logit {difference:.3g}")
    return 0
