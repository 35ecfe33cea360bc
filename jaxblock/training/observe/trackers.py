"""Sends metrics and samples to files of the run folder, and to TensorBoard and Weights & Biases where the config asks for it.

A tracker that cannot be opened is an error before the run starts. A tracker that fails later is reported once, and training
goes on.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, TypeVar

from jaxblock.errors import UserError, first_line, install_command
from jaxblock.io.paths import is_remote
from jaxblock.training.config import TrainConfig
from jaxblock.training.observe.metrics import MetricsWriter
from jaxblock.training.observe.rows import Row
from jaxblock.training.observe.samples import Sample, SamplesWriter
from jaxblock.training.observe.services import TensorBoard, WeightsAndBiases


class Tracker(Protocol):
    """Records something of a run somewhere."""

    def flush(self) -> None:
        """Makes sure, before a checkpoint, that what was recorded is not lost if the process is killed."""

    def close(self) -> None:
        """Closes the tracker; what was written is kept."""


class MetricsTracker(Tracker, Protocol):
    """Records rows of metrics."""

    def write(self, row: Row) -> None:
        """Records one row of metrics."""


class SamplesTracker(Tracker, Protocol):
    """Records the answers to a few problems."""

    def write_samples(self, samples: Sequence[Sample]) -> None:
        """Records the samples of one evaluation: at least one, all of the same step."""


AnyTracker = TypeVar("AnyTracker")


def check_trackers(train: TrainConfig) -> None:
    """Checks, before anything is loaded, that the configured trackers can be used.

    Raises:
        UserError: a package is missing, or a tracker cannot write where the run is.
    """
    asked = {"tensorboard": ("tensorboardX", train.tensorboard), "wandb": ("wandb", train.wandb != "off")}
    for name, (package, wanted) in asked.items():
        if wanted and importlib.util.find_spec(package) is None:
            raise UserError(f"train.{name} needs {package}: {install_command(package)}")
    if is_remote(train.out) and (train.tensorboard or train.wandb == "offline"):
        name = "train.tensorboard" if train.tensorboard else "train.wandb offline"
        raise UserError(
            f"{name} writes to a local folder, and train.out is {train.out}: leave it off; the pictures in plots/ are "
            "drawn there too, and train.wandb online works"
        )


class Trackers:
    """Sends each row and each evaluation's samples to all trackers of a run. Only process 0 has this object."""

    def __init__(self, train: TrainConfig, tree: dict[str, Any], step: int, say: Callable[[str], None]) -> None:
        """Opens the trackers. What files hold of the steps after ``step``, which the run makes again, is removed.

        Args:
            train: the ``train`` section.
            tree: the whole config as plain values.
            step: the step that the run continues from; -1 for a new run.
            say: prints a line for the user when a tracker fails.

        Raises:
            UserError: a tracker cannot be opened.
        """
        self._lines = MetricsWriter(train.out, step, say)
        self.path = self._lines.path
        self._say = say
        self._failing: set[str] = set()
        services: dict[str, TensorBoard | WeightsAndBiases] = {}
        with contextlib.ExitStack() as failing:
            if train.tensorboard:
                services["TensorBoard"] = failing.enter_context(contextlib.closing(TensorBoard(train.out, step)))
            if train.wandb != "off":
                services["W&B"] = failing.enter_context(contextlib.closing(WeightsAndBiases(train, tree)))
            self._metrics: dict[str, MetricsTracker] = {os.fspath(self.path): self._lines, **services}
            self._samples: dict[str, SamplesTracker] = {**services}
            if train.sample_count:
                samples = SamplesWriter(train.out, step)
                self._samples[os.fspath(samples.path)] = samples
            failing.pop_all()  # all are open: `close` closes them
        self._all: dict[str, Tracker] = {**self._metrics, **self._samples}
        self._files = self._all.keys() - services.keys()

    def write(self, row: Row) -> None:
        """Writes a row of metrics to each tracker."""
        self._work_again(self._each(self._metrics, lambda tracker: tracker.write(row)))

    def write_samples(self, samples: Sequence[Sample]) -> None:
        """Writes the samples of one evaluation to each tracker."""
        if samples:
            self._work_again(self._each(self._samples, lambda tracker: tracker.write_samples(samples)))

    def flush(self) -> list[str]:
        """Flushes each tracker before a checkpoint.

        Returns:
            The rows of ``metrics.jsonl``, as lines, that could not be written: the checkpoint must keep them.
        """
        self._each(self._all, lambda tracker: tracker.flush())
        return self._lines.unwritten()

    def close(self) -> None:
        """Closes each tracker, so that nothing it holds is lost."""
        self._each(self._all, lambda tracker: tracker.close())

    def _each(self, trackers: Mapping[str, AnyTracker], act: Callable[[AnyTracker], None]) -> set[str]:
        """Calls ``act`` with each of the trackers, reports each one that fails once, and returns the names of those that did not."""
        fine = set()
        for name, tracker in trackers.items():
            try:
                act(tracker)
            except UserError as error:  # files raise it: lines are kept, and written when that is possible again
                self._report(name, f"{error}; training goes on, and the rows wait")
            except Exception as error:  # the services' clients raise many kinds: training goes on
                self._report(
                    name, f"{name}: metrics may be missing from here on ({first_line(error)}); training goes on"
                )
            else:
                fine.add(name)
        return fine

    def _work_again(self, written: set[str]) -> None:
        """Notes files that could be written, so that the next failure of one that had failed is reported too."""
        self._failing -= self._files & written

    def _report(self, name: str, text: str) -> None:
        if name not in self._failing:
            self._failing.add(name)
            self._say(text)
