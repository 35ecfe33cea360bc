"""Checkpoints of a run, by Orbax: parameters, optimizer state and the step, saved together and committed last.

The data's only state is the step, so a restore may change the number of devices or processes.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import Any

import jax
import orbax.checkpoint as ocp

from jaxblock import storage
from jaxblock.errors import UserError
from jaxblock.training.state import TrainState
from jaxblock.types import Params

FOLDER = "checkpoints"
AVERAGE = "average"


class Checkpoints:
    """The checkpoints of one run folder. Saves run in the background; ``close`` waits for them."""

    def __init__(self, run: storage.PathLike, keep: int | None = None) -> None:
        """Opens (or begins) the run's checkpoints.

        Args:
            run: the run folder.
            keep: how many of the newest to keep; None keeps all (readers).
        """
        folder = storage.as_path(run) / FOLDER
        self.folder = os.fspath(folder if storage.is_remote(run) else folder.absolute())
        options = ocp.CheckpointManagerOptions(max_to_keep=keep, create=keep is not None)
        self._manager = ocp.CheckpointManager(self.folder, options=options)

    def latest(self) -> int | None:
        """The step of the newest whole checkpoint; None without one."""
        step: int | None = self._manager.latest_step()
        return step

    def save(self, state: TrainState, step: int, meta: dict[str, Any]) -> None:
        """Begins to save; returns when the state has been copied off the device.

        Args:
            state: what to save.
            step: its step, as a host number.
            meta: plain values that go with it (fingerprints that a resume checks).
        """
        if step in self._manager.all_steps():
            return
        average = {} if state.average is None else {AVERAGE: ocp.args.StandardSave(state.average)}
        with self._explained():
            self._manager.save(
                step,
                args=ocp.args.Composite(
                    **average,
                    params=ocp.args.StandardSave(state.params),
                    optimizer=ocp.args.StandardSave(state.opt_state),
                    meta=ocp.args.JsonSave({**meta, "step": step}),
                ),
            )

    def restore(self, step: int, like: TrainState) -> TrainState:
        """Reads a whole state onto ``like``'s shardings.

        Args:
            step: which checkpoint.
            like: shapes, types and shardings (arrays will do).

        Raises:
            UserError: it does not fit the state that this config describes.
        """
        wanted = jax.tree.map(ocp.utils.to_shape_dtype_struct, like)
        average = {} if like.average is None else {AVERAGE: ocp.args.StandardRestore(wanted.average)}
        try:
            found = self._manager.restore(
                step,
                args=ocp.args.Composite(
                    **average,
                    params=ocp.args.StandardRestore(wanted.params),
                    optimizer=ocp.args.StandardRestore(wanted.opt_state),
                ),
            )
        except (ValueError, KeyError, TypeError, FileNotFoundError) as error:
            raise UserError(f"{self.folder}/{step} does not fit this config ({_first_line(error)})") from error
        counter = jax.device_put(jax.numpy.int32(step), like.step.sharding)
        return TrainState(found.params, found.optimizer, counter, found[AVERAGE] if average else None)

    def restore_params(self, step: int, like: Params, *, average: bool = False) -> Params:
        """Reads the parameters alone, or their moving average.

        Raises:
            UserError: tensors are missing or of another shape.
        """
        try:
            item = AVERAGE if average else "params"
            found = self._manager.restore(step, args=ocp.args.Composite(**{item: ocp.args.StandardRestore(like)}))
        except (ValueError, KeyError, TypeError, FileNotFoundError) as error:
            raise UserError(f"{self.folder}/{step}: the parameters cannot be read ({_first_line(error)})") from error
        params: Params = found[item]
        return params

    def meta(self, step: int) -> dict[str, Any]:
        """The plain values saved with a checkpoint.

        Raises:
            UserError: they cannot be read.
        """
        try:
            found = self._manager.restore(step, args=ocp.args.Composite(meta=ocp.args.JsonRestore()))
        except (ValueError, KeyError, TypeError, OSError) as error:
            raise UserError(
                f"{self.folder}/{step} is damaged: its meta cannot be read ({_first_line(error)})"
            ) from error
        meta: dict[str, Any] = found.meta
        return meta

    def close(self) -> None:
        """Waits for saves under way. An error of a background save is raised here."""
        with self._explained():
            try:
                self._manager.wait_until_finished()
            finally:
                self._manager.close()

    @contextlib.contextmanager
    def _explained(self) -> Iterator[None]:
        """An error of a save, perhaps of one that was begun earlier, as a UserError."""
        try:
            with storage.explained("save a checkpoint in", self.folder):
                yield
        except (ValueError, RuntimeError) as error:  # what TensorStore and Orbax raise
            full = "RESOURCE_EXHAUSTED" in str(error) or "No space left" in str(error)
            cause = "the disk is full: free some space" if full else _first_line(error)
            raise UserError(
                f"cannot save a checkpoint in {self.folder}: {cause}. Checkpoints saved before are whole: the same "
                "command goes on from the last of them"
            ) from error


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:300]
