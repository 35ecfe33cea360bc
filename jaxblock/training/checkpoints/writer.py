"""Saves the checkpoints of a run in the background. A save that fails is reported, and training goes on.

Orbax's ``AsyncCheckpointer`` copies the state off the devices and writes it beside the training. Its
``CheckpointManager`` would also delete old checkpoints, choose the best and remove unfinished folders, but it cannot
keep what this module promises (Orbax 0.12.8):

- a checkpoint is whole when its checksums are there, and only then may an older one be deleted. The manager deletes as soon as
  Orbax has committed, and offers no moment between the two (its ``post_finalization_callback`` comes before the commit).
- a deletion that is killed leaves nothing that looks whole (``removal``). The manager deletes in place.
- nothing is overwritten. The manager first deletes any folder that has the new checkpoint's name, even a damaged
  checkpoint that a person should look at.
- a save that fails is reported when it fails. The manager raises at the next save, in the middle of the training loop,
  and by then its list lacks older checkpoints that still exist.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp

from jaxblock.errors import UserError, first_line
from jaxblock.io.files import write_json
from jaxblock.io.paths import PathLike, is_remote
from jaxblock.parallel import processes
from jaxblock.training.checkpoints import checksums, integrity, removal, retention
from jaxblock.training.checkpoints.integrity import META
from jaxblock.training.checkpoints.reader import CheckpointReader, state_items
from jaxblock.training.checkpoints.retention import Keep
from jaxblock.training.state import TrainState

HAD_CHECKPOINT = "had_checkpoint.json"
"""The file, in the run folder, that says that the run has had a whole checkpoint, and of which step the first one was."""


class CheckpointWriter(CheckpointReader):
    """Saves, reads and removes the checkpoints of one run folder, for the run itself.

    Attributes:
        folder: the folder that holds the checkpoints.
        failed: the step of the last save that failed; None if none has.
    """

    _orbax_class = ocp.AsyncCheckpointer

    def __init__(
        self,
        run: PathLike,
        keep: Keep,
        say: Callable[[str], None] = lambda text: None,
        scoring: Mapping[str, Any] | None = None,
    ) -> None:
        """Opens the checkpoints of a run folder; there may be none yet.

        Args:
            run: the run folder.
            keep: which checkpoints to keep.
            say: prints a line for the user when a save fails or a checkpoint is damaged; it may be called from a thread.
            scoring: how checkpoints are scored now (``retention.scored_by``); those scored otherwise are not compared with them.
        """
        super().__init__(run)
        self._keep, self._say, self._scoring_now = keep, say, scoring or {}
        self._thread: threading.Thread | None = None
        self._saving: tuple[int, float | None] | None = None  # step and score; the thread clears it
        self.failed: int | None = None

    def recover(self, *, begin_again: bool = False) -> int | None:
        """Finds the newest undamaged checkpoint for a run that continues; newer ones, all damaged, are set aside.

        Before that, it removes what a killed run has left. Every process of a group must call this.

        Args:
            begin_again: whether all checkpoints are set aside where each of them is damaged.

        Returns:
            The checkpoint's step; None if there is none to continue from.

        Raises:
            UserError: files may not be read; or the run had a checkpoint, and now has none that is undamaged.
        """
        if jax.process_index() == 0:
            removal.sweep(self._root)
        processes.wait("unfinished checkpoints are removed")  # before any process lists the checkpoints
        found, damaged = self._newest_undamaged()
        if found is None:
            self._leave_behind(damaged, begin_again=begin_again)
        for step, problem in damaged.items():
            if jax.process_index() == 0:
                fate = removal.set_aside(self._at(step))
                self._say(f"checkpoint {self.folder}/{step} is not used: {problem}; {fate}")
            processes.wait("a damaged checkpoint is out of the way")
            if self._at(step).exists():
                self._unusable.add(step)
        return found

    def _leave_behind(self, damaged: Mapping[int, str], *, begin_again: bool) -> None:
        """Raises UserError where a run had a checkpoint and cannot go on from any, unless it is to begin again."""
        had = self._root.parent / HAD_CHECKPOINT
        finished = [step for step in damaged if had.exists() or integrity.is_whole(self._at(step))]
        if begin_again:
            processes.wait("every process has looked for checkpoints")
            if jax.process_index() == 0:
                had.unlink(missing_ok=True)
        elif finished or had.exists():
            what = (
                f"/{finished[0]} is damaged ({damaged[finished[0]]}), and there is no other"
                if finished
                else " holds no"
            )
            raise UserError(
                f"the run cannot go on: {self.folder}{what} checkpoint. Put back what is missing; or set train.resume to "
                f"restart, which keeps damaged checkpoints in {removal.DAMAGED_FOLDER}/ and begins again"
            )

    def _newest_undamaged(self) -> tuple[int | None, dict[int, str]]:
        """Returns the step of the newest undamaged checkpoint, and what is wrong with each newer one, by its step."""
        damaged: dict[int, str] = {}
        for step in reversed(self._named_steps()):
            problem = integrity.find_damage(self._at(step))
            if problem is None:
                self._checked.add(step)
                if not checksums.has_lists(self._at(step)):
                    self._say(
                        f"checkpoint {self.folder}/{step} has no checksums: all of it can be read and it is used, but "
                        "whether every byte is as it was saved cannot be verified"
                    )
                return step, damaged
            damaged[step] = problem
        return None, damaged

    def save(self, state: TrainState, step: int, meta: dict[str, Any], score: float | None = None) -> None:
        """Begins to save, and returns when the state has been copied off the devices. A failure is only reported.

        Args:
            state: the state to save; one that holds NaN or infinity is refused.
            step: the state's step, as a host number.
            meta: plain values that are saved with the state, such as the fingerprints that a resume checks.
            score: the state's value by the metric that chooses the best checkpoint; higher is better.
        """
        self.wait()
        refusal = self._why_unwritable()
        problem = processes.first_problem(None if refusal is None else _explain(refusal))
        if problem is None and not all(map(bool, jax.device_get(_finite(state)))):
            problem = "the state holds NaN or infinity"
        if problem is not None:
            self._report_failure(step, problem)
            return
        items = {name: ocp.args.StandardSave(item) for name, item in state_items(state).items()}
        items[META] = ocp.args.JsonSave({**meta, "step": step, "score": score})
        try:
            if step in self.steps():
                return
            if self._at(step).exists():  # a damaged checkpoint that could not be moved
                self._report_failure(step, "a damaged checkpoint stands in its place")
                return
            self._orbax.save(self._at(step), args=ocp.args.Composite(**items))
        except Exception as error:  # file systems, storage clients and Orbax raise many kinds: training goes on
            self._abandon(step, error)
            return
        self._scores[step] = score, self._scoring_now
        self._saving = step, score
        self._thread = threading.Thread(target=self._finish, args=(step,), name=f"checkpoint {step}")
        self._thread.start()

    def improves(self, score: float | None) -> bool:
        """Tells whether a score is better than those of all checkpoints, including the one being saved."""
        saving = self._saving  # read before listing, once: the thread clears it when the checkpoint is whole
        scores = self._known_scores() | ({} if saving is None else {saving[0]: saving[1]})
        best = retention.best(scores)
        return score is not None and score == score and (best is None or score > (scores[best] or 0.0))

    def _scoring(self, of_checkpoints: list[Mapping[str, Any]]) -> Mapping[str, Any]:
        return self._scoring_now

    def wait(self) -> None:
        """Waits until a running save has finished or failed."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def close(self) -> None:
        """Waits for a running save and releases Orbax's threads."""
        self.wait()
        with contextlib.suppress(Exception):  # the error of a failed save, which has been reported
            super().close()

    def _check_undamaged(self, step: int, under: str) -> None:
        self.wait()
        super()._check_undamaged(step, under)

    def _finish(self, step: int) -> None:
        """Waits until the files are written, writes the checksums and removes old checkpoints; runs in the save's thread."""
        try:
            self._orbax.wait_until_finished()
            checksums.seal(self._at(step), jax.process_index(), jax.process_count())
        except Exception as error:
            self._abandon(step, error)
            return
        finally:
            self._saving = None
        if jax.process_index() == 0:
            with contextlib.suppress(Exception):  # the next save tries again
                if not (self._root.parent / HAD_CHECKPOINT).exists():
                    write_json(self._root.parent / HAD_CHECKPOINT, {"step": step}, overwrite=True)
            try:
                self._remove_superfluous()
            except Exception as error:
                self._say(f"old checkpoints in {self.folder} could not be deleted ({first_line(error)})")

    def _remove_superfluous(self) -> None:
        scores = self._known_scores()
        best = retention.best(scores) if self._keep.best != "none" else None
        for step in retention.superfluous(self._keep, scores, best):
            removal.delete(self._at(step))

    def _why_unwritable(self) -> OSError | None:
        """Tries to write a small file. Orbax would wait ten minutes for a folder that could not be made."""
        if is_remote(self.folder):
            return None
        probe = self._root / f".probe-{jax.process_index()}"
        try:
            self._root.mkdir(parents=True, exist_ok=True)
            try:
                probe.write_bytes(b"jaxblock")
            finally:
                probe.unlink(missing_ok=True)
        except OSError as error:
            return error
        return None

    def _abandon(self, step: int, error: Exception) -> None:
        """Removes what a failed save has written, and reports the failure."""
        with contextlib.suppress(Exception):
            self._orbax.wait_until_finished()  # clears the error that Orbax would raise again; it is reported below
        if jax.process_index() == 0:
            with contextlib.suppress(Exception):  # deleting may fail for the same reason as writing
                removal.discard_unfinished(self._at(step))
        self._report_failure(step, _explain(error))

    def _report_failure(self, step: int, cause: str) -> None:
        self.failed = step
        newest = None
        with contextlib.suppress(Exception):
            newest = max(self.steps(), default=None)
        kept = "there is none yet" if newest is None else f"the last whole one is of step {newest:,}"
        self._say(f"step {step:,}: no checkpoint was written in {self.folder}: {cause}; {kept}")


@jax.jit
def _finite(state: TrainState) -> list[jax.Array]:
    return [jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(state) if jnp.issubdtype(leaf.dtype, jnp.inexact)]


def _explain(error: Exception) -> str:
    """Says in a few words why a checkpoint could not be written."""
    text = str(error)
    if "RESOURCE_EXHAUSTED" in text or "No space left" in text or "disk quota" in text.lower():
        return "the disk is full"
    return "the file system is read-only" if "Read-only file system" in text else first_line(error)
