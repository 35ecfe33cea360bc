"""From a config to everything a run needs, in the order of precedence that is written here.

1. The run folder holds a whole checkpoint, and ``train.resume`` is not ``never``: the run goes on from it.
   ``model.init_from`` is not read again. The config must be the one the run began with, except for ``MAY_CHANGE``.
2. ``model.init_from`` names a run or a Hugging Face folder: its weights and architecture, a new optimizer, step 0.
3. Random weights from ``train.seed`` and the ``model`` section's sizes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import optax
from jax.sharding import Mesh
from rich.console import Console

from jaxblock import config_io, storage, wiring
from jaxblock.config import Config
from jaxblock.data.loader import Batch
from jaxblock.data.prepared import Prepared, open_prepared
from jaxblock.data.records import Record
from jaxblock.errors import UserError
from jaxblock.huggingface import load as huggingface
from jaxblock.models import families
from jaxblock.models import params as parameters
from jaxblock.models.params import Architecture
from jaxblock.models.transformer import Transformer
from jaxblock.parallel import axes, distributed
from jaxblock.training import optimizer as optimizers
from jaxblock.training import run_folder
from jaxblock.training.checkpoint import Checkpoints
from jaxblock.training.debug import NanFinder, not_finite
from jaxblock.training.state import TrainState, create
from jaxblock.training.step import Objective
from jaxblock.types import Params

MAY_CHANGE = {
    "data": {"prepared", "overwrite"},
    "model": {"remat", "attention", "scan_layers", "init_from"},
    "train": {
        "out", "resume", "log_every", "eval_every", "eval_problems", "eval_nelbo_rows", "save_every", "keep",
        "tensorboard", "loader_workers", "debug", "data_parallel", "fsdp",
    },
    "decode": {field.name for field in dataclasses.fields(config_io.Config().decode)},
    "evaluate": {field.name for field in dataclasses.fields(config_io.Config().evaluate)},
}  # fmt: skip
"""Fields that a resumed run may change: they do not change what is learnt (up to rounding)."""


@dataclass(frozen=True)
class Session:
    """A run, ready to go."""

    config: Config
    prepared: Prepared
    validation: Sequence[Record]
    net: Transformer
    objective: Objective
    optimizer: optax.GradientTransformation
    mesh: Mesh
    state: TrainState
    checkpoints: Checkpoints
    step: int
    resumed: bool
    nans: NanFinder | None
    process_index: int
    process_count: int

    def on_mesh(self, batch: Batch) -> Batch:
        """This process's rows as its part of the global batch."""
        where = axes.sharding(self.mesh, "batch")
        if self.process_count == 1:
            return jax.device_put(batch, where)  # one call for all arrays
        return Batch(*(jax.make_array_from_process_local_data(where, leaf) for leaf in batch))


def set_up(config: Config, console: Console) -> Session:
    """Opens data, weights and run folder.

    Args:
        config: resolved and valid.
        console: where people are told what is going on.

    Raises:
        UserError: anything that would make the run wrong or lose something.
    """
    process_index, process_count = distributed.start()
    console.quiet = process_index > 0  # one process speaks for all
    train = config.train
    folder = Path(train.out)
    prepared = open_prepared(config.data.prepared)
    check_data(config, prepared)
    checkpoints, step = _checkpoints(config, folder)
    if checkpoints is None and process_index == 0:
        storage.check_vacant(folder, marker=run_folder.CONFIG)
        try:
            storage.check_writable(folder.absolute().parent)
        except UserError as error:
            raise UserError(f"train.out {train.out}: {error}") from error
    if checkpoints is not None:
        _check_resume(config, folder, checkpoints, step, prepared)
    mesh = axes.make_mesh(train.data_parallel, train.fsdp)
    ways = mesh.size
    if train.batch_size % ways:
        raise UserError(
            f"train.batch_size {train.batch_size} does not split over {ways} devices: use a multiple of {ways}"
        )
    nans = NanFinder() if train.debug else None
    arch, params = _weights(config, prepared, mesh, folder if step is not None else None, console)
    wiring.check_decoding(config.canvas, config.decode, arch)
    net = wiring.network(arch, config.model, nans.layer if nans else None)
    optimizer = optimizers.make(config.optimizer, train.steps, net.table)
    with jax.set_mesh(mesh):
        state = create(params, optimizer, mesh, net.table)
    if checkpoints is None:
        distributed.wait("every process has looked at the run folder")
        if process_index == 0:
            run_folder.begin(folder, config, arch, prepared)
        distributed.wait("the run folder is there")
        checkpoints = Checkpoints(folder, train.keep)
    elif step is None:
        console.out(f"{train.out} ended before its first checkpoint: beginning again", highlight=False)
    else:
        state = checkpoints.restore(step, state)
        console.out(f"going on from step {step:,} of {train.out}", highlight=False)
    bad = not_finite(state.params) if train.debug else []
    if bad:
        raise UserError(f"these weights hold NaN or infinity before the first step: {', '.join(bad)}")
    held_out = prepared.records("validation") if "validation" in prepared.manifest.splits else []
    return Session(
        config=config,
        prepared=prepared,
        validation=[held_out[i] for i in range(min(len(held_out), max(train.eval_problems, train.eval_nelbo_rows)))],
        net=net,
        objective=objective(config, net, prepared),
        optimizer=optimizer,
        mesh=mesh,
        state=state,
        checkpoints=checkpoints,
        step=step or 0,
        resumed=step is not None,
        nans=nans,
        process_index=process_index,
        process_count=process_count,
    )


def objective(config: Config, net: Transformer, prepared: Prepared) -> Objective:
    """The loss that the config describes. ``classical`` has one block, so ``pairs`` and sequences are the same."""
    method = config.method
    if method.objective == "classical":
        method = dataclasses.replace(method, blocks="per_sequence")
    return Objective(
        net=net,
        layout=wiring.training_layout(config.canvas, method, net.arch, prepared.special.stop_ids),
        sampling=wiring.sampling(method),
        normalize=method.normalize,
        ablation=wiring.ablation(method),
        seed=config.train.seed,
        rows=config.train.batch_size,
    )


def meta(session: Session) -> dict[str, Any]:
    """What is saved with a checkpoint besides the arrays: what a resume must agree on."""
    return {
        "data": session.prepared.manifest.fingerprint,
        "config": config_io.to_tree(session.config),
        "model": families.to_hf(session.net.arch, session.config.model.param_dtype),
    }


def _checkpoints(config: Config, folder: Path) -> tuple[Checkpoints | None, int | None]:
    """The run folder's checkpoints and the step to resume from; (None, None) where there is nothing to resume."""
    exists = run_folder.is_run(folder)
    checkpoints = Checkpoints(folder, config.train.keep) if exists else None
    step = checkpoints.latest() if checkpoints else None
    if config.train.resume == "must" and step is None:
        raise UserError(f"train.resume is must, but {folder} has no whole checkpoint; set it to auto to begin a run")
    if config.train.resume == "never" and exists:
        raise UserError(f"{folder} already holds a run; choose another train.out (train.resume auto goes on with it)")
    return checkpoints, step


def check_data(config: Config, prepared: Prepared) -> None:
    """Raises UserError where the canvas may be too small for the prepared records."""
    canvas, there = config.canvas, prepared.manifest.canvas_config
    for name in ("prompt_len", "response_len"):
        if getattr(canvas, name) < getattr(there, name):
            raise UserError(
                f"canvas.{name} is {getattr(canvas, name)}, but {config.data.prepared} was prepared with "
                f"{getattr(there, name)}: records may be longer; use the same, or prepare again"
            )


def _weights(
    config: Config, prepared: Prepared, mesh: Mesh, resumed: Path | None, console: Console
) -> tuple[Architecture, Params]:
    source = config.model.init_from
    dtype = config.model.param_dtype
    if resumed is not None:
        # Values come from the checkpoint; random ones hold their place (and their shardings) until then.
        arch = run_folder.open_run(resumed).arch
    elif source is None:
        special = prepared.special
        arch = wiring.architecture(
            config.model, vocab_size=prepared.manifest.vocab_size, mask_id=special.mask, eos_id=special.eos
        )
    elif run_folder.is_run(source):
        run = run_folder.open_run(source)
        check_vocabulary(run.arch, prepared, source)
        params, step = run_folder.load_params(run, mesh, dtype)
        console.out(f"starting from step {step:,} of {source}", highlight=False)
        return run.arch, params
    else:
        arch = huggingface.architecture(source)
        check_vocabulary(arch, prepared, source)
        placed = axes.param_shardings(mesh, families.table(arch))
        console.out(f"starting from {source}", highlight=False)
        return huggingface.load(source, dtype=dtype, shardings=placed)
    table = families.table(arch)
    placed = axes.param_shardings(mesh, table)
    make = jax.jit(lambda: parameters.init(table, config.train.seed, dtype), out_shardings=placed)
    if resumed is None:
        console.out(f"random weights: {parameters.count(table):,} parameters", highlight=False)
    return arch, make()


def check_vocabulary(arch: Architecture, prepared: Prepared, source: str) -> None:
    """Raises UserError where checkpoint and tokenizer differ about an id. Padding rows beyond the tokenizer are fine."""
    manifest, special = prepared.manifest, prepared.special
    if manifest.vocab_size > arch.vocab_size:
        raise UserError(
            f"{source} has {arch.vocab_size} embedding rows, but the data's tokenizer has ids up to "
            f"{manifest.vocab_size - 1}: prepare the data with the checkpoint's own tokenizer (data.tokenizer)"
        )
    for name, ours, theirs in (("mask", special.mask, arch.mask_id), ("end-of-sequence", special.eos, arch.eos_id)):
        if ours != theirs:
            raise UserError(
                f"{source} calls {theirs} its {name} token, the data's tokenizer calls {ours} so: prepare the data "
                "with the checkpoint's own tokenizer (data.tokenizer)"
            )


def _check_resume(config: Config, folder: Path, checkpoints: Checkpoints, step: int | None, prepared: Prepared) -> None:
    """What an existing run was begun with must be what this config says."""
    run = run_folder.open_run(folder)
    if step is None:
        # Without a checkpoint the start is made again: it must be the same start.
        saved: dict[str, Any] = {"data": run.manifest.fingerprint, "config": config_io.to_tree(run.config)}
        may_change = {**MAY_CHANGE, "model": MAY_CHANGE["model"] - {"init_from"}}
    else:
        saved, may_change = checkpoints.meta(step), MAY_CHANGE
        run_folder.check_model(run, saved)
    _check_same(config, folder, saved["config"], may_change)
    if saved["data"] != prepared.manifest.fingerprint:
        raise UserError(
            f"{folder} was trained on other data than {config.data.prepared} holds now: a resumed run would not be "
            "exact. Prepare the same data, or begin a run with model.init_from"
        )


def _check_same(config: Config, folder: Path, before: dict[str, Any], may_change: Mapping[str, set[str]]) -> None:
    changed = [
        f"{section}.{name} = {before.get(section, {}).get(name)!r} then, {value!r} now"
        for section, values in config_io.to_tree(config).items()
        for name, value in values.items()
        if name not in may_change.get(section, set()) and before.get(section, {}).get(name) != value
    ]
    if changed:
        raise UserError(
            f"{folder} was begun with other settings: {'; '.join(changed)}. Undo that, or begin another run "
            "(train.out) from this one (model.init_from)"
        )
