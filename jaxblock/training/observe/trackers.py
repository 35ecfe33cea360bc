"""Sends rows of metrics to ``metrics.jsonl``, and to TensorBoard and Weights & Biases where the config asks for them.

A tracker that cannot be opened is an error before the run starts. A tracker that fails later is reported once, and training
goes on.
"""

from __future__ import annotations

import importlib.util
import os
import shlex
import sys
from collections.abc import Callable
from typing import Any, Protocol

from jaxblock.errors import UserError, first_line
from jaxblock.io.paths import is_remote
from jaxblock.training.config import TrainConfig
from jaxblock.training.observe.metrics import MetricsWriter
from jaxblock.training.observe.rows import Row
from jaxblock.training.observe.services import TensorBoard, WeightsAndBiases


class Tracker(Protocol):
    """Records rows of metrics somewhere."""

    def write(self, row: Row) -> None:
        """Records one row of metrics."""

    def flush(self) -> None:
        """Makes sure, before a checkpoint, that the rows so far are not lost if the process is killed."""

    def close(self) -> None:
        """Closes the tracker; what was written is kept."""


def check_trackers(train: TrainConfig) -> None:
    """Checks, before anything is loaded, that the configured trackers can be used.

    Raises:
        UserError: a package is missing, or a tracker cannot write where the run is.
    """
    asked = {"tensorboard": ("tensorboardX", train.tensorboard), "wandb": ("wandb", train.wandb != "off")}
    for name, (package, wanted) in asked.items():
        if wanted and importlib.util.find_spec(package) is None:
            raise UserError(f"train.{name} needs {package}: {_install_command(package)}")
    if is_remote(train.out) and (train.tensorboard or train.wandb == "offline"):
        name = "train.tensorboard" if train.tensorboard else "train.wandb offline"
        raise UserError(
            f"{name} writes to a local folder, and train.out is {train.out}: leave it off; the pictures in plots/ are "
            "drawn there too, and train.wandb online works"
        )


def _install_command(package: str) -> str:
    """Returns the command that installs a package in this environment; an environment made by uv has no pip."""
    python = shlex.quote(sys.executable)
    if importlib.util.find_spec("pip") is None:
        return f"uv pip install --python {python} {package}"
    return f"{python} -m pip install {package}"


class Trackers:
    """Sends each row to all trackers of a run. Only process 0 has this object."""

    def __init__(self, train: TrainConfig, tree: dict[str, Any], step: int, say: Callable[[str], None]) -> None:
        """Opens the trackers. Rows after ``step``, which the run makes again, are removed from ``metrics.jsonl``.

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
        self._trackers: dict[str, Tracker] = {os.fspath(self.path): self._lines}
        if train.tensorboard:
            self._trackers["TensorBoard"] = TensorBoard(train.out, step)
        if train.wandb != "off":
            self._trackers["W&B"] = WeightsAndBiases(train, tree)

    def write(self, row: Row) -> None:
        """Writes a row to each tracker."""
        if (name := os.fspath(self.path)) not in self._each(lambda tracker: tracker.write(row)):
            self._failing.discard(name)  # the file works again, so its next failure is reported too

    def flush(self) -> list[str]:
        """Flushes each tracker before a checkpoint.

        Returns:
            The rows of ``metrics.jsonl``, as lines, that could not be written: the checkpoint must keep them.
        """
        self._each(lambda tracker: tracker.flush())
        return self._lines.unwritten()

    def close(self) -> None:
        """Closes each tracker, so that nothing it holds is lost."""
        self._each(lambda tracker: tracker.close())

    def _each(self, act: Callable[[Tracker], None]) -> set[str]:
        """Calls ``act`` with every tracker, reports each one that fails once, and returns the names of those that failed."""
        failed = set()
        for name, tracker in self._trackers.items():
            try:
                act(tracker)
            except (
                UserError
            ) as error:  # metrics.jsonl raises it: rows are kept, and written when that is possible again
                failed.add(name)
                self._report(name, f"{error}; training goes on, and the rows wait")
            except Exception as error:  # the services' clients raise many kinds: training goes on
                failed.add(name)
                self._report(
                    name, f"{name}: metrics may be missing from here on ({first_line(error)}); training goes on"
                )
        return failed

    def _report(self, name: str, text: str) -> None:
        if name not in self._failing:
            self._failing.add(name)
            self._say(text)
