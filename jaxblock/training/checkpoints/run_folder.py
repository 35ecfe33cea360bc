"""Makes and opens run folders: what ``train`` writes, and what every later command reads.

config.yaml     the resolved config
model.json      the architecture, in the form of a Hugging Face config.json
base.json       where the frozen base of the adapters is (LoRA runs only)
files.json      sizes and hashes of the files that never change
manifest.json   the prepared data's manifest
tokenizer/      the tokenizer and its template
origin/         model code and generation config of the checkpoint that the run began with (if any), for the export
metrics.jsonl   one row per log line and evaluation
samples.jsonl   the answers to a few validation problems at every evaluation
checkpoints/    one folder per checkpoint, written by Orbax
plots/          pictures of the metrics
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import Any, NamedTuple

from etils import epath

from jaxblock.config.config import Config
from jaxblock.config.yaml import load_config, to_yaml
from jaxblock.data.store.manifest import Manifest, write_manifest
from jaxblock.data.store.prepared_folder import Prepared, open_prepared
from jaxblock.errors import UserError
from jaxblock.huggingface import companions
from jaxblock.io.files import read_json, write_json, write_text
from jaxblock.io.folders import copy_files, new_folder
from jaxblock.io.inventory import write_inventory
from jaxblock.io.paths import PathLike, as_path
from jaxblock.models.architecture import Architecture
from jaxblock.models.config import Checkpoint
from jaxblock.models.families import registry
from jaxblock.training.checkpoints.reader import CHECKPOINTS_FOLDER, CheckpointReader

CONFIG, MODEL, BASE, TOKENIZER, ORIGIN = "config.yaml", "model.json", "base.json", "tokenizer", "origin"

FINGERPRINT_FORM = 2


class Base(NamedTuple):
    """Names the frozen weights that a run's adapters belong to.

    Attributes:
        folder: the run or Hugging Face folder that the weights were read from.
        fingerprint: a hash of their content, since the adapters fit no other weights.
        step: the step of their checkpoint if the folder is a run; None otherwise.
        form: what the fingerprint is a hash of; a base.json of an earlier version has none, and its hash of a run is of
            model.json and config.yaml.
    """

    folder: str
    fingerprint: str
    step: int | None
    form: int = 1


@dataclass(frozen=True)
class Run:
    """Holds the contents of a run folder.

    Attributes:
        folder: the run folder.
        config: the config that the run began with.
        arch: the architecture of its network.
        prepared: its tokenizer, template and manifest.
        base: where the frozen weights of its adapters are; None without adapters.
    """

    folder: epath.Path
    config: Config
    arch: Architecture
    prepared: Prepared
    base: Base | None

    @property
    def manifest(self) -> Manifest:
        """Returns the manifest of the data that the run was trained on."""
        return self.prepared.manifest


def is_run(folder: PathLike) -> bool:
    """Tells whether a folder holds a run.

    Raises:
        UserError: it holds the checkpoints of a run and only one of the two files that say what run it is.
    """
    path = as_path(folder)
    missing = [name for name in (CONFIG, MODEL) if not (path / name).exists()]
    if len(missing) == 1 and (path / CHECKPOINTS_FOLDER).exists():
        raise UserError(f"{path} is the folder of a run, but its {missing[0]} is missing: put it back")
    return not missing


def create_run_folder(
    folder: PathLike,
    config: Config,
    arch: Architecture,
    prepared: Prepared,
    base: Base | None,
    source: str | None,
) -> None:
    """Makes a run folder with everything but metrics and checkpoints. If that fails, nothing is left.

    Args:
        folder: the run folder; it may exist if it is empty.
        config: the resolved config.
        arch: the architecture of the network.
        prepared: the prepared data.
        base: where the frozen weights of the adapters are; None without adapters.
        source: the run or Hugging Face folder that the weights came from; None for random ones.

    Raises:
        UserError: the folder holds something else, or cannot be written.
    """
    with new_folder(folder, marker=CONFIG) as scratch:
        copy_files(as_path(prepared.folder) / TOKENIZER, scratch / TOKENIZER)
        write_manifest(scratch, prepared.manifest)
        write_json(scratch / MODEL, registry.to_hf(arch, config.model.param_dtype))
        if source is not None:
            kept = as_path(source) / ORIGIN
            if not is_run(source):
                companions.copy_origin(source, scratch / ORIGIN)
            elif kept.exists():
                copy_files(kept, scratch / ORIGIN)
        if base is not None:
            write_json(scratch / BASE, base._asdict())
        write_text(scratch / CONFIG, to_yaml(config))
        write_inventory(
            scratch, leave_out=[MODEL]
        )  # model.json is compared with what the checkpoints say, field by field


def open_run(folder: PathLike) -> Run:
    """Reads a run folder's config, architecture, prepared data and base.

    Raises:
        UserError: the folder holds no run, or a file of it is damaged.
    """
    path = as_path(folder)
    if not is_run(path):
        raise UserError(f"{path} is not the folder of a training run (no {CONFIG} and {MODEL})")
    model = read_json(path / MODEL)
    if not isinstance(model, dict):
        raise UserError(f"{path / MODEL} holds no JSON object: it is not the description of a network")
    arch = registry.from_hf(model, str(path / MODEL))
    config = load_config(str(path / CONFIG))
    return Run(path, config, arch, open_prepared(path), _base(path) if config.lora.rank else None)


def _base(path: epath.Path) -> Base:
    try:
        return Base(**read_json(path / BASE))
    except (TypeError, UserError) as error:
        raise UserError(
            f"{path / BASE}, which names the base of this run's adapters, cannot be read: {error}"
        ) from error


def check_model(run: Run, saved: dict[str, Any]) -> None:
    """Checks that model.json has not changed since a checkpoint was saved.

    Args:
        run: the run folder, opened.
        saved: the checkpoint's plain values (``CheckpointReader.meta``).

    Raises:
        UserError: model.json was changed, or belongs to another run; names the fields and both values.
    """
    now = registry.to_hf(run.arch, run.config.model.param_dtype)
    before = saved.get("model", now)
    changed = [
        f"{name} = {before.get(name)!r} then, {now.get(name)!r} now"
        for name in sorted(before.keys() | now.keys())
        if before.get(name) != now.get(name)
    ]
    if changed:
        raise UserError(
            f"{run.folder / MODEL} does not describe the network that was trained: {'; '.join(changed)}. Put it back"
        )


def find_step(run: Run, wanted: Checkpoint = "latest") -> int:
    """Returns the step of one of the run's whole checkpoints.

    Args:
        run: the run folder, opened.
        wanted: the newest (``latest``), the best by the run's `train.keep_best` (``best``), or the one of a step.

    Raises:
        UserError: there is no such checkpoint; lists the ones that exist.
    """
    with contextlib.closing(CheckpointReader(run.folder)) as checkpoints:
        steps = checkpoints.steps()
        if not steps:
            raise UserError(f"{run.folder} has no whole checkpoint yet; train until the first save (train.save_every)")
        found = steps[-1] if wanted == "latest" else checkpoints.best() if wanted == "best" else wanted
    there = ", ".join(map(str, steps))
    if found is None:
        raise UserError(
            f"{run.folder}: no checkpoint was saved as the best (train.keep_best is {run.config.train.keep_best}); there "
            f"are those of steps {there}"
        )
    if found not in steps:
        raise UserError(f"{run.folder} has no whole checkpoint of step {found}; there are {there}")
    return int(found)
