"""Defines what is known of a run once it is opened (``OpenedSession``), and once its weights are loaded (``Session``)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
from jax.sharding import Mesh

from jaxblock.config.config import Config
from jaxblock.data.loader import Batch
from jaxblock.data.store.prepared_folder import Prepared
from jaxblock.data.store.records import Record
from jaxblock.models.architecture import Architecture
from jaxblock.models.linear import lora
from jaxblock.parallel import rules
from jaxblock.training.checkpoints.run_folder import Base, Run
from jaxblock.training.checkpoints.writer import CheckpointWriter
from jaxblock.training.guard.debug import NanFinder
from jaxblock.training.state import TrainState
from jaxblock.training.step import Learner
from jaxblock.types import Lines, Params


@dataclass(frozen=True)
class OpenedSession:
    """Holds a run that has been checked and can begin or go on; no weights have been read yet.

    Attributes:
        config: the run's settings, checked.
        prepared: the prepared data.
        arch: the network's sizes and special ids.
        mesh: the devices.
        checkpoints: the run folder's checkpoints; None where the run folder is still to be made.
        resumed: the contents of the run folder, where one of its checkpoints is restored; None for a new run.
        step: the step of the checkpoint to restore; None for a new run.
        saved: the plain values that were saved with the run; {} for a new run.
        lines: the widths at which a step computes its rows; None for the canvas's.
        nans: locates the first layer that is not finite; None except in debug mode.
        process_index: this process's number in its group.
        process_count: the number of processes in the group.
    """

    config: Config
    prepared: Prepared
    arch: Architecture
    lines: Lines | None
    mesh: Mesh
    checkpoints: CheckpointWriter | None
    resumed: Run | None
    step: int | None
    saved: Mapping[str, Any]
    nans: NanFinder | None
    process_index: int
    process_count: int

    @property
    def finished(self) -> bool:
        """Whether the checkpoint is of the run's last step, so that nothing is left to train."""
        return (self.step or 0) >= self.config.train.steps

    def close(self) -> None:
        """Releases the run folder's checkpoints, where there is a run; a second call does nothing."""
        if self.checkpoints is not None:
            self.checkpoints.close()


@dataclass(frozen=True)
class Session:
    """Holds a run whose state is on the devices, with all that the training loop needs.

    Attributes:
        config: the run's settings, checked.
        prepared: the prepared data.
        validation: the records that are scored during training.
        learner: the network, its objective and its optimizer.
        mesh: the devices.
        state: the state to begin or go on with.
        frozen: the frozen base of the adapters; {} where the whole network is trained.
        base: where the frozen base came from; None where the whole network is trained.
        checkpoints: the run folder's checkpoints.
        step: the number of updates done.
        resumed: whether the state comes from one of the run's own checkpoints.
        nans: locates the first layer that is not finite; None except in debug mode.
        process_index: this process's number in its group.
        process_count: the number of processes in the group.
    """

    config: Config
    prepared: Prepared
    validation: Sequence[Record]
    learner: Learner
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

    def params_to_score(self, state: TrainState) -> Params:
        """Returns the parameters that evaluations use: the moving average where there is one, beside the frozen base."""
        return lora.attach(self.frozen, state.params if state.average is None else state.average)

    def on_mesh(self, batch: Batch) -> Batch:
        """Places this process's rows of the global batch on its devices."""
        where = rules.sharding(self.mesh, "batch")
        if self.process_count == 1:
            return jax.device_put(batch, where)  # one call for all arrays
        return Batch(*(jax.make_array_from_process_local_data(where, leaf) for leaf in batch))
