"""Checkpoints of a run, by Orbax in the background: parameters, optimizer state, step and config, saved together.

A checkpoint is whole when its checksums are there, which are written last. It is checked against them before it is
used; a damaged one is set aside, never deleted. One without any, from before there were checksums or of a process that was
killed just then, is used if Orbax committed it and all of it can be read. A save that fails stops nothing: the run is told and goes on.
The data's only state is the step, so a restore may change the number of devices or processes.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import tensorstore as ts
from etils import epath

from jaxblock.errors import UserError
from jaxblock.io.folders import move_folder
from jaxblock.io.paths import PathLike, as_path, is_remote
from jaxblock.parallel import processes
from jaxblock.training.checkpoints import checksums, retention
from jaxblock.training.checkpoints.retention import Keep
from jaxblock.training.state import TrainState
from jaxblock.types import Params

FOLDER = "checkpoints"
DAMAGED = "damaged"
"""Beside ``checkpoints``: what was found damaged, as it was."""
AVERAGE = "average"
_LEAVING = ".deleting"
_TOLD = 400  # bytes of what one process tells the others
_UNFINISHED = ".orbax-checkpoint-tmp"  # how Orbax names what it has not committed


class Checkpoints:
    """The checkpoints of one run folder. Saves run in the background; ``wait`` and ``close`` wait for them.

    Attributes:
        folder: where they are.
        failed: the step of the last save, if it failed.
    """

    def __init__(
        self, run: PathLike, keep: Keep | None = None, tell: Callable[[str], None] = lambda text: None
    ) -> None:
        """Opens the run's checkpoints.

        Args:
            run: the run folder.
            keep: which to keep; None keeps all (readers).
            tell: gets a line when a save fails or a checkpoint is found damaged; may be called from a thread.
        """
        folder = as_path(run) / FOLDER
        self.folder = os.fspath(folder if is_remote(run) else folder.absolute())
        self._root, self._keep, self._tell = as_path(self.folder), keep, tell
        self._orbax = ocp.AsyncCheckpointer(ocp.CompositeCheckpointHandler())
        self._thread: threading.Thread | None = None
        self._saving: int | None = None
        self.failed: int | None = None
        self._unusable: set[int] = set()
        self._checked: set[int] = set()
        self._scores: dict[int, float | None] = {}

    # Reading ---------------------------------------------------------------------------------------------------------

    def steps(self) -> list[int]:
        """The steps of all whole checkpoints, ascending."""
        return [step for step in self._folders() if step not in self._unusable and self._whole(step)]

    def latest(self) -> int | None:
        """The step of the newest whole checkpoint; None without one."""
        return max(self.steps(), default=None)

    def best(self) -> int | None:
        """The step of the best checkpoint by the metric that its run kept the best of; None without any."""
        return retention.best({step: self._score(step) for step in self.steps()})

    def recover(self) -> int | None:
        """The newest checkpoint that is whole and undamaged; newer ones that are not are set aside.

        For the run that goes on, before it saves: it also sweeps up what a killed one left. Every process must call.

        Raises:
            UserError: files may not be read.
        """
        if jax.process_index() == 0:
            self._sweep()
        processes.wait("what was unfinished is gone")  # before anybody lists what there is
        for step in reversed(self._folders()):
            problem = _told_by_any(self._damage(step))
            if problem is None:
                self._checked.add(step)
                if checksums.unlisted(self._at(step)):
                    self._tell(
                        f"checkpoint {self.folder}/{step} has no checksums: all of it can be read and it is used, but "
                        "whether every byte is as it was saved cannot be verified"
                    )
                return step
            if jax.process_index() == 0:
                self._set_aside(step, problem)
            processes.wait("a damaged checkpoint is out of the way")
            if self._at(step).exists():
                self._unusable.add(step)
        return None

    def restore(self, step: int, like: TrainState) -> TrainState:
        """Reads a whole state onto ``like``'s shardings.

        Args:
            step: which checkpoint.
            like: shapes, types and shardings (arrays will do).

        Raises:
            UserError: it is damaged, or does not fit the state that this config describes.
        """
        self._check(step)
        wanted = jax.tree.map(ocp.utils.to_shape_dtype_struct, like)
        average = {} if like.average is None else {AVERAGE: ocp.args.StandardRestore(wanted.average)}
        args = ocp.args.Composite(
            **average,
            params=ocp.args.StandardRestore(wanted.params),
            optimizer=ocp.args.StandardRestore(wanted.opt_state),
        )
        try:
            found = self._orbax.restore(self._at(step), args=args)
        except (ValueError, KeyError, TypeError, FileNotFoundError) as error:
            raise UserError(f"{self.folder}/{step} does not fit this config ({_first_line(error)})") from error
        counter = jax.device_put(jnp.int32(step), like.step.sharding)
        return TrainState(found.params, found.optimizer, counter, found[AVERAGE] if average else None)

    def restore_params(self, step: int, like: Params, *, average: bool = False) -> Params:
        """Reads the parameters alone, or their moving average.

        Raises:
            UserError: the checkpoint is damaged, or tensors are missing or of another shape.
        """
        item = AVERAGE if average else "params"
        self._check(step, item + "/")
        try:
            found = self._orbax.restore(
                self._at(step), args=ocp.args.Composite(**{item: ocp.args.StandardRestore(like)})
            )
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
            found = self._orbax.restore(self._at(step), args=ocp.args.Composite(meta=ocp.args.JsonRestore()))
        except (ValueError, KeyError, TypeError, OSError) as error:
            raise UserError(
                f"{self.folder}/{step} is damaged: its meta cannot be read ({_first_line(error)}). Use another one: "
                f"{_listed(self.steps(), but=step)}"
            ) from error
        meta: dict[str, Any] = found.meta
        return meta

    # Writing ---------------------------------------------------------------------------------------------------------

    def save(self, state: TrainState, step: int, meta: dict[str, Any], score: float | None = None) -> None:
        """Begins to save; returns when the state has been copied off the device. Failures are told, not raised.

        Args:
            state: what to save; one that holds NaN or infinity is refused.
            step: its step, as a host number.
            meta: plain values that go with it (fingerprints that a resume checks).
            score: of the metric that the best checkpoint is chosen by; higher is better.
        """
        self.wait()
        refused = self._refused()
        problem = _told_by_any(None if refused is None else _cause(refused))
        if problem is not None:
            self._failed(step, problem)
            return
        if not all(map(bool, jax.device_get(_finite(state)))):
            self._failed(step, "the state holds NaN or infinity")
            return
        average = {} if state.average is None else {AVERAGE: ocp.args.StandardSave(state.average)}
        args = ocp.args.Composite(
            **average,
            params=ocp.args.StandardSave(state.params),
            optimizer=ocp.args.StandardSave(state.opt_state),
            meta=ocp.args.JsonSave({**meta, "step": step, "score": score}),
        )
        try:
            if step in self.steps():
                return
            self._orbax.save(self._at(step), args=args)
        except Exception as error:  # whatever a file system, a client or Orbax may raise: training goes on
            self._failed(step, error)
            return
        self._scores[step] = score
        self._saving = step
        self._thread = threading.Thread(target=self._commit, args=(step,), name=f"checkpoint {step}")
        self._thread.start()

    def improves(self, score: float | None) -> bool:
        """Whether a score is better than that of every checkpoint there is, one being written included."""
        known = {step: self._score(step) for step in self.steps()}
        if self._saving is not None:
            known[self._saving] = self._scores[self._saving]
        at = retention.best(known)
        return score is not None and score == score and (at is None or score > (known[at] or 0.0))

    def wait(self) -> None:
        """Waits for a save under way."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def close(self) -> None:
        """Waits for a save under way and lets go of threads."""
        self.wait()
        with contextlib.suppress(Exception):  # of a save that failed, which has been told
            self._orbax.close()

    # -----------------------------------------------------------------------------------------------------------------

    def _commit(self, step: int) -> None:
        """The background's part of a save: wait for the files, seal them, let superfluous checkpoints go."""
        try:
            self._orbax.wait_until_finished()
            checksums.seal(self._at(step), jax.process_index(), jax.process_count())
        except Exception as error:
            self._failed(step, error)
            return
        finally:
            self._saving = None
        if jax.process_index() == 0 and self._keep is not None:
            try:
                self._prune(self._keep)
            except Exception as error:
                self._tell(f"old checkpoints in {self.folder} could not be deleted ({_first_line(error)})")

    def _refused(self) -> Exception | None:
        """Why nothing can be written here. Orbax would wait ten minutes for a folder that could not be made."""
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

    def _failed(self, step: int, cause: Exception | str) -> None:
        self.failed = step
        with contextlib.suppress(Exception):
            self._orbax.wait_until_finished()  # an error that was kept for later is this one
        if jax.process_index() == 0 and self._keep is not None:
            with contextlib.suppress(Exception):  # what cannot be written can perhaps not be deleted either
                self._discard(step)
        newest = None
        with contextlib.suppress(Exception):
            newest = self.latest()
        kept = "there is none yet" if newest is None else f"the last whole one is of step {newest:,}"
        self._tell(f"step {step:,}: no checkpoint was written in {self.folder}: {_cause(cause)}; {kept}")

    def _prune(self, keep: Keep) -> None:
        steps = self.steps()
        best = retention.best({step: self._score(step) for step in steps}) if keep.best != "none" else None
        for step in retention.superfluous(keep, steps, best):
            self._delete(self._at(step))

    def _delete(self, folder: epath.Path) -> None:
        """A kill in the middle leaves nothing that looks whole."""
        if not is_remote(self.folder):
            gone = folder.parent / (folder.name + _LEAVING)
            os.rename(folder, gone)
            gone.rmtree()
            return
        # In an object store nothing is renamed: a note beside it says that it goes.
        leaving = folder.parent / (folder.name + _LEAVING)
        leaving.mkdir(parents=True, exist_ok=True)
        (leaving / "begun").write_text(folder.name)
        checksums.unseal(folder)
        folder.rmtree()
        leaving.rmtree()

    def _discard(self, step: int) -> None:
        """Removes what a failed save of ours has written; never what is whole."""
        unfinished = self._root / f"{step}{_UNFINISHED}"
        if unfinished.exists():
            unfinished.rmtree()
        if self._at(step).exists() and not checksums.sealed(self._at(step)):
            self._delete(self._at(step))

    def _sweep(self) -> None:
        """Removes what was not committed, or being deleted, when a run was killed."""
        with contextlib.suppress(OSError):
            for entry in list(self._root.iterdir()) if self._root.exists() else []:
                if entry.name.endswith(_LEAVING) and is_remote(self.folder):
                    going = self._root / entry.name.removesuffix(_LEAVING)
                    if going.exists():
                        going.rmtree()
                if entry.name.endswith(_LEAVING) or _UNFINISHED in entry.name:
                    entry.rmtree()

    def _set_aside(self, step: int, problem: str) -> None:
        where = self._root.parent / DAMAGED
        number = 1
        while (target := where / (f"{step}" if number == 1 else f"{step}-{number}")).exists():
            number += 1
        try:
            where.mkdir(parents=True, exist_ok=True)
            move_folder(self._at(step), target)
            fate = f"moved to {os.fspath(target)}"
        except (OSError, UserError) as error:
            fate = f"left where it is ({_first_line(error)})"
        self._tell(f"checkpoint {self.folder}/{step} is not used: {problem}; {fate}")

    def _check(self, step: int, under: str = "") -> None:
        self.wait()
        if step in self._checked:
            return
        problem = _told_by_any(self._damage(step, under))
        if problem is not None:
            raise UserError(
                f"checkpoint {self.folder}/{step} is damaged: {problem}. Use another one: "
                f"{_listed(self.steps(), but=step)}"
            )

    def _whole(self, step: int) -> bool:
        return checksums.sealed(self._at(step)) or (checksums.unlisted(self._at(step)) and self._committed(step))

    def _committed(self, step: int) -> bool:
        """Whether Orbax finished it, and nobody began to delete it."""
        leaving = self._root / (str(step) + _LEAVING)
        return not leaving.exists() and bool(ocp.utils.is_checkpoint_finalized(self._at(step)))

    def _unreadable(self, step: int) -> str | None:
        """What is wrong with a checkpoint that has no checksums, as far as reading all of it tells."""
        if not self._committed(step):
            return "it was never finished"
        try:
            meta = self.meta(step)
            average = [AVERAGE] if (self._at(step) / AVERAGE).exists() else []
            for item in ("params", "optimizer", *average):
                _read_all(self._at(step) / item)
        except Exception as error:  # whatever Orbax and TensorStore raise at what they cannot read
            return f"it has no checksums and cannot be read ({_first_line(error)})"
        return None if meta.get("step", step) == step else f"it has no checksums and is of step {meta['step']}"

    def _damage(self, step: int, under: str = "") -> str | None:
        if checksums.unlisted(self._at(step)):
            return self._unreadable(step)
        try:
            return checksums.damage(self._at(step), under, jax.process_index(), jax.process_count())
        except PermissionError as error:
            raise UserError(f"cannot read {self.folder}/{step}: permission denied") from error

    def _score(self, step: int) -> float | None:
        if step not in self._scores:
            try:
                self._scores[step] = self.meta(step).get("score")
            except UserError:
                self._scores[step] = None
        return self._scores[step]

    def _at(self, step: int) -> epath.Path:
        return self._root / str(step)

    def _folders(self) -> list[int]:
        """All that are named as a step, whole or not, ascending."""
        names = [entry.name for entry in self._root.iterdir()] if self._root.exists() else []
        return sorted(int(name) for name in names if name.isdigit())


@jax.jit
def _finite(state: TrainState) -> list[jax.Array]:
    return [jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(state) if jnp.issubdtype(leaf.dtype, jnp.inexact)]


def _told_by_any(problem: str | None) -> str | None:
    """What the first process that has a problem says of it; None where none has. Every process must ask.

    Each checks its share of the files, but process 0 alone is heard.
    """
    if jax.process_count() == 1:
        return problem
    text = np.frombuffer((problem or "").encode()[:_TOLD], np.uint8)
    everywhere = processes.gathered(np.pad(text, (0, _TOLD - len(text)))).reshape(-1, _TOLD).astype(np.uint8)
    said = (row.tobytes().rstrip(b"\0").decode(errors="ignore") for row in everywhere)
    return next(filter(None, said), None)


def _read_all(item: epath.Path) -> None:
    """Reads every stored piece of an item, one after the other.

    Raises:
        ValueError: there are none, or one cannot be read.
    """
    if not (item / "_METADATA").exists():
        raise ValueError(f"{item.name}/_METADATA is missing")
    path = os.fspath(item)
    base = path.rstrip("/") + "/" if is_remote(item) else f"file://{path}/"
    stored = ts.KvStore.open({"driver": "ocdbt", "base": base}).result()
    keys = stored.list().result()
    if not keys:
        raise ValueError(f"{item.name} holds no arrays")
    for key in keys:
        stored.read(key).result()


def _listed(steps: list[int], but: int) -> str:
    others = [str(step) for step in steps if step != but]
    return f"--step {' or '.join(others)}" if others else "there is no other"


def _cause(error: Exception | str) -> str:
    if isinstance(error, str):
        return error
    text = str(error)
    if "RESOURCE_EXHAUSTED" in text or "No space left" in text or "disk quota" in text.lower():
        return "the disk is full"
    return "the file system is read-only" if "Read-only file system" in text else _first_line(error)


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:300]
