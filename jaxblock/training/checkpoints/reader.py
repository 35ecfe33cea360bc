"""Lists and reads the checkpoints of a run, and compares them with their checksums.

``decode`` and ``evaluate`` read while a run still writes. Orbax's ``CheckpointManager`` caches its list of checkpoints and
allows one job per folder, so the folder itself is listed each time instead (see ``writer`` for writing). A checkpoint
stores nothing about the data but the step, so a run may be resumed on another number of devices or processes.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from etils import epath

from jaxblock.errors import UserError, first_line
from jaxblock.io.paths import PathLike, as_path, is_remote
from jaxblock.training.checkpoints import integrity, retention
from jaxblock.training.checkpoints.integrity import AVERAGE, OPTIMIZER, PARAMS
from jaxblock.training.state import TrainState
from jaxblock.types import Params

CHECKPOINTS_FOLDER = "checkpoints"
"""The folder, inside the run folder, that has one folder for each checkpoint, named by its step."""


class CheckpointReader:
    """Reads the checkpoints of one run folder.

    Attributes:
        folder: the folder that holds the checkpoints.
    """

    _orbax_class: type[ocp.Checkpointer] = ocp.Checkpointer

    def __init__(self, run: PathLike) -> None:
        """Opens the checkpoints of a run folder; there may be none."""
        folder = as_path(run) / CHECKPOINTS_FOLDER
        self.folder = os.fspath(folder if is_remote(run) else folder.absolute())
        self._root = as_path(self.folder)
        self._orbax = self._orbax_class(ocp.CompositeCheckpointHandler())
        self._unusable: set[int] = set()
        self._checked: set[int] = set()
        self._scores: dict[int, tuple[float | None, Mapping[str, Any]]] = {}

    def steps(self) -> list[int]:
        """Returns the steps of all whole checkpoints, in ascending order."""
        usable = (step for step in self._named_steps() if step not in self._unusable)
        return [step for step in usable if integrity.is_whole(self._at(step))]

    def best(self) -> int | None:
        """Returns the step of the best checkpoint by the run's ``train.keep_best``; None if none was scored.

        Where a resume changed how checkpoints are scored, only those that are scored as the newest one are compared.
        """
        return retention.best(self._known_scores())

    def restore(self, step: int, like: TrainState) -> TrainState:
        """Reads a whole training state.

        Args:
            step: the step of the checkpoint.
            like: the shapes, types and shardings of the result, as ``state.abstract_state`` returns them.

        Raises:
            UserError: the checkpoint is damaged, or does not fit the state that this config describes.
        """
        found = self._restore(step, state_items(like), "", " does not fit this config")
        counter = jax.device_put(jnp.int32(step), like.step.sharding)
        return TrainState(found[PARAMS], found[OPTIMIZER], counter, found.get(AVERAGE))

    def restore_params(self, step: int, like: Params, *, average: bool = False) -> Params:
        """Reads only the trained parameters.

        Args:
            step: the step of the checkpoint.
            like: the shapes, types and shardings of the result.
            average: read the parameters' moving average instead.

        Raises:
            UserError: the checkpoint is damaged, or tensors are missing or have another shape.
        """
        item = AVERAGE if average else PARAMS
        params: Params = self._restore(step, {item: like}, f"{item}/", ": the parameters cannot be read")[item]
        return params

    def meta(self, step: int) -> dict[str, Any]:
        """Reads the plain values saved with a checkpoint.

        Raises:
            UserError: they cannot be read.
        """
        try:
            return integrity.read_meta(self._at(step))
        except (ValueError, TypeError, OSError) as error:
            raise UserError(self._damaged(step, f"its meta cannot be read ({first_line(error)})")) from error

    def close(self) -> None:
        """Releases the threads that Orbax reads and writes with."""
        self._orbax.close()

    def _restore(self, step: int, like: Mapping[str, Any], under: str, problem: str) -> dict[str, Any]:
        """Compares the files whose names begin with ``under`` with their checksums, then reads items of a checkpoint."""
        self._check_undamaged(step, under)
        wanted = jax.tree.map(ocp.tree.to_shape_dtype_struct, dict(like))
        args = ocp.args.Composite(**{name: ocp.args.StandardRestore(item) for name, item in wanted.items()})
        try:
            return dict(self._orbax.restore(self._at(step), args=args).items())
        except (ValueError, KeyError, TypeError, FileNotFoundError) as error:
            raise UserError(f"{self.folder}/{step}{problem} ({first_line(error)})") from error

    def _check_undamaged(self, step: int, under: str) -> None:
        if step not in self._checked and (problem := integrity.find_damage(self._at(step), under)) is not None:
            raise UserError("checkpoint " + self._damaged(step, problem))

    def _damaged(self, step: int, problem: str) -> str:
        others = [str(other) for other in self.steps() if other != step]
        advice = f"--step {' or '.join(others)}" if others else "there is no other"
        return f"{self.folder}/{step} is damaged: {problem}. Use another one: {advice}"

    def _known_scores(self) -> dict[int, float | None]:
        """Returns the score of each whole checkpoint; None for those that have none that can be compared."""
        found = {step: self._score(step) for step in self.steps()}
        now = self._scoring([scoring for score, scoring in found.values() if score is not None])
        return {
            step: score if retention.same_scoring(scoring, now) else None for step, (score, scoring) in found.items()
        }

    def _scoring(self, of_checkpoints: list[Mapping[str, Any]]) -> Mapping[str, Any]:
        """Returns how the scores are measured that count: as that of the newest checkpoint that has one."""
        return of_checkpoints[-1] if of_checkpoints else {}

    def _score(self, step: int) -> tuple[float | None, Mapping[str, Any]]:
        """Returns the score of a checkpoint, if it has one, and how it was measured (``retention.scored_by``)."""
        if step not in self._scores:
            try:
                meta = self.meta(step)
                scoring = retention.scored_by(meta["config"], meta) if "config" in meta else {}
                self._scores[step] = meta.get("score"), scoring
            except UserError:
                self._scores[step] = None, {}
        return self._scores[step]

    def _at(self, step: int) -> epath.Path:
        return self._root / str(step)

    def _named_steps(self) -> list[int]:
        """Returns the steps of all checkpoint folders, whole or not, in ascending order."""
        entries = [*self._root.iterdir()] if self._root.exists() else []
        numbered = [entry for entry in entries if entry.name.isascii() and entry.name.isdigit()]
        # A file of such a name is none; in an object store there are no folders to tell it from.
        return sorted(int(entry.name) for entry in numbered if is_remote(self._root) or entry.is_dir())


def state_items(state: TrainState) -> dict[str, Any]:
    """Returns the trees of a training state by their names in a checkpoint; the step is not one of them."""
    average = {} if state.average is None else {AVERAGE: state.average}
    return {PARAMS: state.params, OPTIMIZER: state.opt_state, **average}
