"""Sets a run up in two steps, ``open_session`` and ``load_session``; the train step is compiled between them.

Opening checks everything that can be wrong and reads nothing large, so that a run whose step does not fit the devices is
refused before minutes of reading weights. What a run starts from, in order of precedence:

1. The run folder holds a whole checkpoint, and ``train.resume`` is not ``never``: the run goes on from it.
   ``model.init_from`` is read again only for the frozen base of adapters. The config must be the one the run began with,
   except for the fields that a resumed run may change (``settings.may_change``).
2. ``model.init_from`` names a run or a Hugging Face folder: its weights and architecture, a new optimizer, step 0.
3. Random weights from ``train.seed`` and the ``model`` section's sizes.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh
from rich.console import Console

from jaxblock.config.config import Config
from jaxblock.config.yaml import to_tree
from jaxblock.data.mixture import mixture_of
from jaxblock.data.store.prepared_folder import Prepared, open_prepared
from jaxblock.data.store.records import Record
from jaxblock.diffusion import layouts
from jaxblock.errors import UserError
from jaxblock.evaluation.graders import find_grader
from jaxblock.io import locks
from jaxblock.io.files import check_writable
from jaxblock.io.folders import check_vacant
from jaxblock.io.locks import FolderLock
from jaxblock.io.paths import PathLike, as_path, is_remote
from jaxblock.parallel import processes
from jaxblock.parallel.mesh import make_mesh
from jaxblock.training import places, resume, weights
from jaxblock.training.checkpoints import run_folder
from jaxblock.training.checkpoints.retention import GRADER_VERSION, Keep, scored_by
from jaxblock.training.checkpoints.run_folder import Base
from jaxblock.training.checkpoints.writer import CheckpointWriter
from jaxblock.training.config import TrainConfig
from jaxblock.training.guard.debug import NanFinder, not_finite
from jaxblock.training.observe import metrics, trackers
from jaxblock.training.session import OpenedSession, Session
from jaxblock.training.state import TrainState, abstract_state, create_state
from jaxblock.training.step import Learner
from jaxblock.types import Params


@contextlib.contextmanager
def only_writer(folder: PathLike, console: Console) -> Iterator[FolderLock | None]:
    """Joins the process group, and keeps other processes from writing the run folder until the block ends.

    Args:
        folder: the run folder, which may be absent.
        console: prints what happens; it is silenced in all processes but the first.

    Yields:
        The lock, which process 0 holds for the whole group; None in other processes.

    Raises:
        UserError: another process writes the folder; raised in every process of the group.
    """
    process_index, _ = processes.join_group()
    console.quiet = process_index > 0  # only process 0 prints
    say = functools.partial(console.out, highlight=False)
    with processes.entered_by_first(lambda: locks.only_writer(folder, say, inside=run_folder.is_run(folder))) as lock:
        yield lock


def open_session(config: Config, console: Console) -> OpenedSession:
    """Joins the process group, opens data, run folder and devices, and checks that they fit together.

    Args:
        config: the run's settings, checked.
        console: prints what happens; it is silenced in all processes but the first.

    Returns:
        The run, which the caller closes.

    Raises:
        UserError: the parts do not fit together, a file is missing or damaged, or the run would overwrite something.
    """
    process_index, process_count = processes.join_group()
    console.quiet = process_index > 0  # only process 0 prints
    trackers.check_trackers(config.train)
    prepared = open_prepared(config.data.prepared, verify=config.data.verify)
    prepared.check_canvas(config.canvas)
    mixture = mixture_of(prepared.manifest.splits["train"], prepared.folder, config.data)
    folder = as_path(config.train.out)
    saved: Mapping[str, Any] = {}
    with contextlib.ExitStack() as failing:
        checkpoints, step = _existing_checkpoints(config, console, failing)
        if checkpoints is not None:
            saved = resume.check_resume(config, folder, checkpoints, step, prepared)
            asked, config = config, resume.keep_automatic(config, saved["config"])
            for name, now, kept in resume.kept_choices(asked, config):
                console.out(f"{name} stays {kept}, as the run began, and is not chosen anew ({now})", highlight=False)
        elif process_index == 0:
            _check_place(folder)
        for note in _nothing_comes_of(config.train, prepared, checkpoints, step):
            console.out(f"note: {note}", highlight=False)
        mesh = _mesh(config.train)
        resumed = run_folder.open_run(folder) if step is not None else None
        arch = weights.architecture(config, prepared, resumed)
        layouts.check_decoding(config.canvas, config.decode, arch)
        ways = mesh.size // config.train.tensor
        opened = OpenedSession(
            config=config,
            prepared=prepared,
            arch=arch,
            lines=places.choose_lines(config, prepared.records("train"), arch, ways, mixture),
            mesh=mesh,
            checkpoints=checkpoints,
            resumed=resumed,
            step=step,
            saved=saved,
            nans=NanFinder() if config.train.debug else None,
            process_index=process_index,
            process_count=process_count,
        )
        failing.pop_all()  # the caller closes what is open
    return opened


def load_session(opened: OpenedSession, learner: Learner, console: Console) -> Session:
    """Loads or draws the weights, and makes the run folder or restores its checkpoint.

    Args:
        opened: what ``open_session`` returned.
        learner: the network, objective and optimizer, built for ``opened.arch``.
        console: prints where the weights come from.

    Returns:
        The run, whose checkpoints the caller closes.

    Raises:
        UserError: the weights or the checkpoint cannot be read, or hold NaN or infinity in debug mode.
    """
    config, train = opened.config, opened.config.train
    with contextlib.ExitStack() as failing:
        loaded = _begin(opened, learner, console) if opened.step is None else _go_on(opened, learner, console)
        failing.callback(loaded.checkpoints.close)
        if train.debug and (bad := not_finite(loaded.state.params)):
            raise UserError(f"these weights hold NaN or infinity before the first step: {', '.join(bad)}")
        validation = _validation_records(opened.prepared, max(train.eval_problems, train.eval_nelbo_rows))
        failing.pop_all()
    return Session(
        config=config,
        prepared=opened.prepared,
        validation=validation,
        learner=learner,
        mesh=opened.mesh,
        state=loaded.state,
        frozen=loaded.frozen,
        base=loaded.base,
        checkpoints=loaded.checkpoints,
        step=opened.step or 0,
        resumed=opened.step is not None,
        nans=opened.nans,
        process_index=opened.process_index,
        process_count=opened.process_count,
    )


class _Loaded(NamedTuple):
    """Holds what a run has on the devices before its next step, and its run folder's checkpoints; see ``Session``."""

    state: TrainState
    frozen: Params
    base: Base | None
    checkpoints: CheckpointWriter


def _begin(opened: OpenedSession, learner: Learner, console: Console) -> _Loaded:
    """Loads or draws the first weights, makes the optimizer's state, and makes the run folder where there is none."""
    begun = weights.starting_weights(opened.config, learner.net, opened.mesh, console)
    with jax.set_mesh(opened.mesh):
        state = create_state(
            begun.trained, learner.optimizer, opened.mesh, learner.net.trainable, averaged=learner.ema > 0
        )
    checkpoints = opened.checkpoints
    if checkpoints is None:
        checkpoints = _new_run_folder(opened, begun, console)
    else:
        console.out(f"{opened.config.train.out} has no whole checkpoint: beginning again", highlight=False)
    return _Loaded(state, begun.frozen, begun.base, checkpoints)


def _go_on(opened: OpenedSession, learner: Learner, console: Console) -> _Loaded:
    """Restores the checkpoint onto the devices. No other state is made first: two might not fit where one does."""
    config, mesh, net, checkpoints = opened.config, opened.mesh, learner.net, opened.checkpoints
    assert opened.step is not None and opened.resumed is not None and checkpoints is not None
    frozen, base = weights.resumed_base(config, net, mesh, opened.resumed)
    dtype = "float32" if net.lora else config.model.param_dtype
    like = abstract_state(learner.optimizer, mesh, net.trainable, dtype, averaged=learner.ema > 0)
    state = checkpoints.restore(opened.step, like)
    if opened.process_index == 0:
        metrics.restore_rows(config.train.out, opened.saved.get(metrics.UNWRITTEN_ROWS, []))
    console.out(f"going on from step {opened.step:,} of {config.train.out}", highlight=False)
    return _Loaded(state, frozen, base, checkpoints)


def _nothing_comes_of(
    train: TrainConfig, prepared: Prepared, checkpoints: CheckpointWriter | None, step: int | None
) -> Iterator[str]:
    """Yields what a run is asked for and cannot do.

    Raises:
        UserError: the best checkpoint is to be kept, and nothing is there to score it by.
    """
    evaluated = train.eval_every or train.keep_best != "none"
    if evaluated and not prepared.manifest.splits.get("validation", {}).get("kept"):
        without = f"the data in {prepared.folder} hold no validation records"
        advice = "prepare them with data.validation_records or data.validation"
        if train.keep_best != "none":
            raise UserError(
                f"train.keep_best is {train.keep_best}, but {without}: {advice}, or set train.keep_best to none"
            )
        yield f"{without}, so nothing is evaluated while training: {advice}"
    passed = set(train.keep_steps) - set(checkpoints.steps() if checkpoints else ())
    if gone := sorted(at for at in passed if step is not None and at <= step):
        yield f"train.keep_steps: the run is past step {', '.join(map(str, gone))}, of which it has no checkpoint"


def _existing_checkpoints(
    config: Config, console: Console, failing: contextlib.ExitStack
) -> tuple[CheckpointWriter | None, int | None]:
    """Returns the run folder's checkpoints, which ``failing`` closes, and the step to go on from; each is None where there is none.

    Raises:
        UserError: ``train.resume`` is ``never`` and the run exists, or ``must`` and there is no checkpoint; or all checkpoints
            are damaged or missing, and it is not ``restart``.
    """
    train = config.train
    exists = run_folder.is_run(train.out)
    if train.resume == "never" and exists:
        raise UserError(
            f"{train.out} already holds a run; choose another train.out (train.resume auto goes on with it)"
        )
    checkpoints = _checkpoints(config, console) if exists else None
    if checkpoints is not None:
        failing.callback(checkpoints.close)
    step = checkpoints.recover(begin_again=train.resume == "restart") if checkpoints else None
    if train.resume == "must" and step is None:
        raise UserError(f"train.resume is must, but {train.out} has no whole checkpoint; set it to auto to begin a run")
    return checkpoints, step


def _checkpoints(config: Config, console: Console) -> CheckpointWriter:
    """Opens the checkpoints of the run folder, to be saved and kept as the ``train`` section says."""
    train = config.train
    version = {GRADER_VERSION: find_grader(config.evaluate.grader).version} if train.keep_best == "pass_at_1" else {}
    scoring = scored_by(to_tree(config), version)
    keep = Keep(train.keep, train.keep_every, train.keep_best, train.keep_steps)
    return CheckpointWriter(train.out, keep, lambda text: console.out(text, highlight=False), scoring)


def _new_run_folder(opened: OpenedSession, begun: weights.Weights, console: Console) -> CheckpointWriter:
    """Makes the run folder in process 0 while the others wait, and opens its checkpoints."""
    processes.wait("every process has looked at the run folder")
    if opened.process_index == 0:
        run_folder.create_run_folder(
            opened.config.train.out, opened.config, opened.arch, opened.prepared, begun.base, begun.source
        )
    processes.wait("the run folder is there")
    return _checkpoints(opened.config, console)


def _check_place(folder: PathLike) -> None:
    """Raises UserError where no run folder can be made."""
    check_vacant(folder, marker=run_folder.CONFIG)
    path = as_path(folder)
    try:
        check_writable(path.parent if is_remote(folder) else path.absolute().parent)
    except UserError as error:
        raise UserError(f"train.out {folder}: {error}") from error


def _mesh(train: TrainConfig) -> Mesh:
    """Makes the mesh that the ``train`` section describes, over which the batch must split."""
    mesh = make_mesh(train.data_parallel, train.fsdp, train.tensor, slices=train.slices)
    ways = mesh.size // train.tensor
    if train.batch_size % (ways * train.accumulate):
        parts = f" in {train.accumulate} parts (train.accumulate)" if train.accumulate > 1 else ""
        raise UserError(
            f"train.batch_size {train.batch_size} does not split over {ways} devices{parts}: use a multiple of "
            f"{ways * train.accumulate}"
        )
    return mesh


def _validation_records(prepared: Prepared, count: int) -> list[Record]:
    """Returns the first ``count`` validation records; fewer where there are fewer."""
    if "validation" not in prepared.manifest.splits:
        return []
    held_out = prepared.records("validation")
    return [held_out[index] for index in range(min(len(held_out), count))]
