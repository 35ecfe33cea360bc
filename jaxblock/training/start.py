"""From a config to everything a run needs, in the order of precedence that is written here.

1. The run folder holds a whole checkpoint, and ``train.resume`` is not ``never``: the run goes on from it.
   ``model.init_from`` is not read again. The config must be the one the run began with, except for
   the fields that say otherwise (``settings.may_change``).
2. ``model.init_from`` names a run or a Hugging Face folder: its weights and architecture, a new optimizer, step 0.
3. Random weights from ``train.seed`` and the ``model`` section's sizes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import optax
from jax.sharding import Mesh
from rich.console import Console

from jaxblock import build
from jaxblock.config.config import Config
from jaxblock.config.yaml import to_tree
from jaxblock.data.loader import Batch
from jaxblock.data.store.prepared_folder import Prepared, open_prepared
from jaxblock.data.store.records import Record
from jaxblock.diffusion import layouts
from jaxblock.errors import UserError
from jaxblock.io.files import check_writable
from jaxblock.io.folders import check_vacant
from jaxblock.io.paths import PathLike, as_path, is_remote
from jaxblock.models.families import registry
from jaxblock.models.linear import lora
from jaxblock.models.transformer import Transformer
from jaxblock.parallel import processes, rules
from jaxblock.parallel.mesh import make_mesh
from jaxblock.training import weights
from jaxblock.training.checkpoints import run_folder
from jaxblock.training.checkpoints.retention import Keep
from jaxblock.training.checkpoints.run_folder import Base
from jaxblock.training.checkpoints.writer import CheckpointWriter
from jaxblock.training.guard.debug import NanFinder, not_finite
from jaxblock.training.observe import metrics, trackers
from jaxblock.training.optim.make import make_optimizer
from jaxblock.training.state import TrainState, create
from jaxblock.training.step import Objective
from jaxblock.types import Params


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
    frozen: Params
    base: Base | None
    checkpoints: CheckpointWriter
    step: int
    resumed: bool
    nans: NanFinder | None
    process_index: int
    process_count: int
    ready: Any

    def params(self, trained: Params) -> Params:
        """What the network takes: what is trained, beside the frozen base where there is one."""
        return lora.attach(self.frozen, trained)

    def scored(self, state: TrainState) -> Params:
        """The parameters that evaluations use: the average where there is one."""
        return self.params(state.params if state.average is None else state.average)

    def on_mesh(self, batch: Batch) -> Batch:
        """This process's rows as its part of the global batch."""
        where = rules.sharding(self.mesh, "batch")
        if self.process_count == 1:
            return jax.device_put(batch, where)  # one call for all arrays
        return Batch(*(jax.make_array_from_process_local_data(where, leaf) for leaf in batch))


Compile = Callable[[Config, Transformer, Objective, optax.GradientTransformation, Mesh], Any]


def set_up(config: Config, console: Console, compile_first: Compile | None = None) -> Session:
    """Opens data, weights and run folder.

    Args:
        config: resolved and valid.
        console: where people are told what is going on.
        compile_first: called before any weights are read, which takes minutes for a large network: it may refuse a run
            that does not fit. What it returns is the session's ``ready``.

    Raises:
        UserError: anything that would make the run wrong or lose something.
    """
    process_index, process_count = processes.start()
    console.quiet = process_index > 0  # one process speaks for all
    train = config.train
    trackers.check_trackers(train)
    folder, nans = as_path(train.out), NanFinder() if train.debug else None
    prepared = open_prepared(config.data.prepared)
    check_data(config, prepared)
    checkpoints, step = _checkpoints(config, folder, console)
    if checkpoints is None and process_index == 0:
        _check_place(folder)
    saved = _check_resume(config, folder, checkpoints, step, prepared) if checkpoints is not None else {}
    mesh = _mesh(config)
    resumed = run_folder.open_run(folder) if step is not None else None
    arch = weights.architecture(config, prepared, resumed)
    layouts.check_decoding(config.canvas, config.decode, arch)
    net = build.network(arch, config.model, config.lora, nans.layer if nans else None)
    optimizer = make_optimizer(config.optimizer, train.steps, net.trainable, train.seed)
    loss, ready = objective(config, net, prepared.special.stop_ids), None
    if compile_first is not None and not train.debug and (step or 0) < train.steps:
        with jax.set_mesh(mesh):
            ready = compile_first(config, net, loss, optimizer, mesh)
    begun = weights.begin(config, prepared, mesh, resumed, console)
    with jax.set_mesh(mesh):
        state = create(begun.trained, optimizer, mesh, net.trainable, averaged=config.optimizer.ema > 0)
    if checkpoints is None:
        processes.wait("every process has looked at the run folder")
        if process_index == 0:
            run_folder.begin(folder, config, begun.arch, prepared, begun.base, begun.source)
        processes.wait("the run folder is there")
        checkpoints = _open(config, folder, console)
    elif step is None:
        console.out(f"{train.out} ended before its first checkpoint: beginning again", highlight=False)
    else:
        state = _restored(checkpoints, step, state, folder, saved)
        console.out(f"going on from step {step:,} of {train.out}", highlight=False)
    if train.debug and (bad := not_finite(state.params)):
        raise UserError(f"these weights hold NaN or infinity before the first step: {', '.join(bad)}")
    held_out = prepared.records("validation") if "validation" in prepared.manifest.splits else []
    return Session(
        config=config,
        prepared=prepared,
        validation=[held_out[i] for i in range(min(len(held_out), max(train.eval_problems, train.eval_nelbo_rows)))],
        net=net,
        objective=loss,
        optimizer=optimizer,
        mesh=mesh,
        state=state,
        frozen=begun.frozen,
        base=begun.base,
        checkpoints=checkpoints,
        step=step or 0,
        resumed=step is not None,
        nans=nans,
        process_index=process_index,
        process_count=process_count,
        ready=ready,
    )


def _restored(
    checkpoints: CheckpointWriter, step: int, like: TrainState, folder: PathLike, saved: Mapping[str, Any]
) -> TrainState:
    """A checkpoint's state; the rows of metrics that it kept go where they belong."""
    state = checkpoints.restore(step, like)
    if jax.process_index() == 0:
        metrics.restore_rows(folder, saved.get(metrics.UNWRITTEN_ROWS, []))
    return state


def _check_place(folder: PathLike) -> None:
    """Whether a new run may be made there."""
    check_vacant(folder, marker=run_folder.CONFIG)
    path = as_path(folder)
    try:
        check_writable(path.parent if is_remote(folder) else path.absolute().parent)
    except UserError as error:
        raise UserError(f"train.out {folder}: {error}") from error


def _mesh(config: Config) -> Mesh:
    train = config.train
    mesh = make_mesh(train.data_parallel, train.fsdp, train.tensor, slices=train.slices)
    ways = mesh.size // train.tensor
    if train.batch_size % (ways * train.accumulate):
        parts = f" in {train.accumulate} parts (train.accumulate)" if train.accumulate > 1 else ""
        raise UserError(
            f"train.batch_size {train.batch_size} does not split over {ways} devices{parts}: use a multiple of "
            f"{ways * train.accumulate}"
        )
    return mesh


def objective(config: Config, net: Transformer, stop_ids: tuple[int, ...]) -> Objective:
    """The loss that the config describes."""
    return Objective(
        net=net,
        layout=layouts.training_layout(config.canvas, config.method, net.arch, stop_ids),
        method=config.method,
        seed=config.train.seed,
        rows=config.train.batch_size,
        dropout=net.lora is not None and net.lora.dropout > 0,
    )


def meta(session: Session) -> dict[str, Any]:
    """What is saved with a checkpoint besides the arrays: what a resume must agree on."""
    base = {} if session.base is None else {"base": session.base.fingerprint}
    return {
        **base,
        "data": session.prepared.manifest.fingerprint,
        "config": to_tree(session.config),
        "model": registry.to_hf(session.net.arch, session.config.model.param_dtype),
    }


def _open(config: Config, folder: PathLike, console: Console) -> CheckpointWriter:
    train = config.train
    keep = Keep(train.keep, train.keep_every, train.keep_best)
    return CheckpointWriter(folder, keep, lambda text: console.out(text, highlight=False))


def _checkpoints(config: Config, folder: PathLike, console: Console) -> tuple[CheckpointWriter | None, int | None]:
    """The run folder's checkpoints and the step to resume from; (None, None) where there is nothing to resume."""
    exists = run_folder.is_run(folder)
    if config.train.resume == "never" and exists:
        raise UserError(f"{folder} already holds a run; choose another train.out (train.resume auto goes on with it)")
    checkpoints = _open(config, folder, console) if exists else None
    step = checkpoints.recover() if checkpoints else None
    if config.train.resume == "must" and step is None:
        raise UserError(f"train.resume is must, but {folder} has no whole checkpoint; set it to auto to begin a run")
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
    if canvas.total_len is not None:
        for split in prepared.manifest.splits:
            longest = int(prepared.records(split).lengths().sum(-1).max(initial=0))
            if longest > canvas.total_len:
                raise UserError(
                    f"canvas.total_len is {canvas.total_len}, but a {split} record of {config.data.prepared} has {longest} "
                    "tokens: prepare with data.max_total_len set to it, or raise it"
                )


def _check_resume(
    config: Config, folder: PathLike, checkpoints: CheckpointWriter, step: int | None, prepared: Prepared
) -> dict[str, Any]:
    """What an existing run was begun with must be what this config says. Returns what was saved with its checkpoint."""
    run = run_folder.open_run(folder)
    if step is None:
        # Without a checkpoint the start is made again: it must be the same start.
        saved: dict[str, Any] = {"data": run.manifest.fingerprint, "config": to_tree(run.config)}
    else:
        saved = checkpoints.meta(step)
        run_folder.check_model(run, saved)
    _check_same(config, folder, saved["config"], saved=step is not None)
    if saved["data"] != prepared.manifest.fingerprint:
        raise UserError(
            f"{folder} was trained on other data than {config.data.prepared} holds now: a resumed run would not be "
            "exact. Prepare the same data, or begin a run with model.init_from"
        )
    return saved


def _check_same(config: Config, folder: PathLike, before: dict[str, Any], *, saved: bool) -> None:
    """Raises UserError where a field that a resumed run may not change has changed."""
    changed = [
        f"{section.section_name}.{name} = {then.get(name)!r} then, {value!r} now"
        for section in config.sections()
        for then in [before.get(section.section_name, {})]
        for name, value in to_tree(section).items()
        if name not in section.changeable(saved=saved) and then.get(name) != value
    ]
    if changed:
        raise UserError(
            f"{folder} was begun with other settings: {'; '.join(changed)}. Undo that, or begin another run "
            "(train.out) from this one (model.init_from)"
        )
