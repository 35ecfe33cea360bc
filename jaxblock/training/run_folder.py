"""A run folder: what ``train`` leaves, and what every later verb needs of it.

config.yaml     the resolved config
model.json      the architecture, as config.json would give it
manifest.json   the prepared data's manifest
tokenizer/      tokenizer and template
metrics.jsonl   one row per log line and evaluation
checkpoints/    Orbax
plots/          PNG
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from jaxblock import config_io, storage
from jaxblock.config import Config
from jaxblock.data import manifest as manifests
from jaxblock.data.manifest import Manifest
from jaxblock.data.prepared import Prepared, open_prepared
from jaxblock.errors import UserError
from jaxblock.models import families
from jaxblock.models import params as parameters
from jaxblock.models.params import Architecture
from jaxblock.parallel import axes
from jaxblock.training.checkpoint import Checkpoints
from jaxblock.types import Params

CONFIG, MODEL, TOKENIZER = "config.yaml", "model.json", "tokenizer"


@dataclass(frozen=True)
class Run:
    """A run folder, opened for reading."""

    folder: Path
    config: Config
    arch: Architecture
    prepared: Prepared

    @property
    def manifest(self) -> Manifest:
        """The manifest of the data the run was trained on."""
        return self.prepared.manifest


def is_run(folder: storage.PathLike) -> bool:
    """Whether a folder holds a run."""
    path = storage.as_path(folder)
    return (path / CONFIG).exists() and (path / MODEL).exists()


def begin(folder: Path, config: Config, arch: Architecture, prepared: Prepared) -> None:
    """Makes the folder with all but metrics and checkpoints in it, whole or not at all.

    Args:
        folder: the run folder; it may exist if it is empty.
        config: the resolved config.
        arch: the network's sizes and ids.
        prepared: the data.

    Raises:
        UserError: the folder holds something else, or cannot be written.
    """
    with storage.new_folder(folder, marker=CONFIG) as scratch:
        shutil.copytree(Path(prepared.folder) / TOKENIZER, scratch / TOKENIZER)
        manifests.write(scratch, prepared.manifest)
        storage.write_json(scratch / MODEL, families.to_hf(arch, config.model.param_dtype))
        storage.write_text(scratch / CONFIG, config_io.dump(config))


def open_run(folder: storage.PathLike) -> Run:
    """Opens a run folder.

    Raises:
        UserError: it is no run, or a file of it is damaged.
    """
    path = Path(folder)
    if not is_run(path):
        raise UserError(f"{path} is not the folder of a training run (no {CONFIG} and {MODEL})")
    arch = families.from_hf(storage.read_json(path / MODEL), str(path / MODEL))
    return Run(path, config_io.load(str(path / CONFIG)), arch, open_prepared(path))


def check_model(run: Run, saved: dict[str, Any]) -> None:
    """Compares model.json with what was written when a checkpoint was saved.

    Args:
        run: the run.
        saved: the checkpoint's plain values.

    Raises:
        UserError: model.json was changed, or is another run's; names the fields and both values.
    """
    now = families.to_hf(run.arch, run.config.model.param_dtype)
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


def load_params(run: Run, mesh: Mesh | None = None, dtype: str | None = None) -> tuple[Params, int]:
    """The parameters of the run's newest checkpoint.

    Args:
        run: the run.
        mesh: where they go; None for one device.
        dtype: their type; None for the type they were trained in.

    Returns:
        (parameters, step).

    Raises:
        UserError: there is no checkpoint, or it does not fit model.json.
    """
    checkpoints = Checkpoints(run.folder)
    step = checkpoints.latest()
    if step is None:
        raise UserError(f"{run.folder} has no whole checkpoint yet; train until the first save (train.save_every)")
    check_model(run, checkpoints.meta(step))
    mesh = mesh or axes.make_mesh(1, 1, jax.local_devices()[:1])
    table = families.table(run.arch)
    placed = axes.param_shardings(mesh, table)
    like = jax.tree.map(
        lambda leaf, where: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where),
        parameters.abstract(table, run.config.model.param_dtype),
        placed,
    )
    params = checkpoints.restore_params(step, like)
    checkpoints.close()
    if dtype is not None:
        params = jax.tree.map(lambda leaf: leaf.astype(dtype), params)
    return params, step
