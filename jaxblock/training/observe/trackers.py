"""Where rows of metrics go: ``metrics.jsonl`` always, TensorBoard and Weights & Biases where the config asks for them.

A tracker that cannot begin is an error before the run starts. One that fails later is told of once, and stops nothing.
"""

from __future__ import annotations

import importlib.util
import os
import secrets
import shlex
import sys
import tempfile
from collections.abc import Callable
from typing import Any, Protocol

from jaxblock.config.config import Config
from jaxblock.errors import UserError
from jaxblock.io.files import read_json, write_json
from jaxblock.io.paths import PathLike, as_path, is_remote
from jaxblock.training.config import TrainConfig
from jaxblock.training.observe.metrics import MetricsLog, scalars

WANDB_ID = "wandb.json"
"""In the run folder: the id by which a resumed run goes on with its page."""

Row = dict[str, Any]


class Tracker(Protocol):
    """Takes rows that have at least ``step`` and ``kind``."""

    def write(self, row: Row) -> None:
        """Notes one row."""

    def flush(self) -> None:
        """Before a checkpoint: what was written must not be lost with the process."""

    def close(self) -> None:
        """Ends it; what was written is kept."""


def check(train: TrainConfig) -> None:
    """Looks whether what the config asks for can be had, before anything is loaded.

    Raises:
        UserError: a package is missing, or the tracker cannot write where the run is.
    """
    asked = {"tensorboard": ("tensorboardX", train.tensorboard), "wandb": ("wandb", train.wandb != "off")}
    for name, (package, wanted) in asked.items():
        if wanted and importlib.util.find_spec(package) is None:
            raise UserError(f"train.{name} needs {package}: {_installing(package)}")
    if is_remote(train.out) and (train.tensorboard or train.wandb == "offline"):
        name = "train.tensorboard" if train.tensorboard else "train.wandb offline"
        raise UserError(
            f"{name} writes to a local folder, and train.out is {train.out}: leave it off; the pictures in plots/ are "
            "drawn there too, and train.wandb online works"
        )


def _installing(package: str) -> str:
    """The command that adds a package to this environment. One that uv made has no pip, and another's pip would miss it."""
    python = shlex.quote(sys.executable)
    if importlib.util.find_spec("pip") is None:
        return f"uv pip install --python {python} {package}"
    return f"{python} -m pip install {package}"


class TensorBoard:
    """Event files in ``tensorboard/`` of the run folder; every number of a row is a scalar ``kind/name``."""

    def __init__(self, run: PathLike, step: int) -> None:
        """Opens the files.

        Args:
            run: the run folder, local.
            step: the run goes on from; what was written for later steps is hidden. -1 if it begins.
        """
        from tensorboardX import SummaryWriter

        self._events = SummaryWriter(os.path.join(os.fspath(run), "tensorboard"), purge_step=step + 1)

    def write(self, row: Row) -> None:
        """Adds the row's numbers."""
        for name, value in scalars(row):
            self._events.add_scalar(f"{row['kind']}/{name}", value, row["step"])

    def flush(self) -> None:
        """Writes what waits."""
        self._events.flush()

    def close(self) -> None:
        """Closes the files."""
        self._events.close()


class WeightsAndBiases:
    """A run of Weights & Biases with the run folder's name; a resumed run goes on with the same page.

    Rows carry their ``step`` as a value, and charts are drawn over it: W&B's own counter cannot go back, as a run does
    that was killed after its last checkpoint. Offline, files are written to ``wandb/`` of the run folder, for ``wandb sync``.
    """

    def __init__(self, config: Config, tree: dict[str, Any]) -> None:
        """Begins, or goes on.

        Args:
            config: of the run; ``train.wandb`` is ``online`` or ``offline``.
            tree: the config as plain values, for the page.

        Raises:
            UserError: W&B refuses, as it does without being logged in.
        """
        import wandb

        train = config.train
        remote = is_remote(train.out)
        online = train.wandb == "online"
        try:
            self._run = wandb.init(
                project=train.wandb_project,
                name=os.path.basename(os.fspath(train.out).rstrip("/")),
                id=_wandb_id(train.out),
                dir=tempfile.gettempdir() if remote else os.fspath(train.out),
                mode="online" if online else "offline",
                resume="allow" if online else None,
                config=tree,
                settings=wandb.Settings(console="off", silent=True),
            )
        except Exception as error:  # wandb.Error, and others where the network fails
            raise UserError(
                f"train.wandb {train.wandb}: W&B did not begin ({_first_line(error)}); run `wandb login` or set WANDB_API_KEY "
                f"(launch/tpu.sh run --env WANDB_API_KEY), or set train.wandb to {'off' if remote else 'offline'}"
            ) from error
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")

    def write(self, row: Row) -> None:
        """Logs the row's numbers as ``kind/name``."""
        self._run.log({"step": row["step"], **{f"{row['kind']}/{name}": value for name, value in scalars(row)}})

    def flush(self) -> None:
        """W&B's own process writes as it goes."""

    def close(self) -> None:
        """Ends the page. Offline, W&B's own process writes the last of it just after; it is there when this process ends."""
        self._run.finish()


def _wandb_id(run: PathLike) -> str:
    path = as_path(run) / WANDB_ID
    if not path.exists():
        write_json(path, {"id": secrets.token_hex(4)})
    return str(read_json(path)["id"])


class Trackers:
    """All trackers of a run as one. The run's only writer has it."""

    def __init__(self, config: Config, tree: dict[str, Any], step: int, say: Callable[[str], None]) -> None:
        """Opens them. Rows of later steps than ``step``, which the run makes again, are taken out of ``metrics.jsonl``.

        Args:
            config: resolved and valid.
            tree: the config as plain values.
            step: the step the run goes on from; -1 if it begins.
            say: told of a tracker that fails.

        Raises:
            UserError: one cannot begin.
        """
        run, train = config.train.out, config.train
        self._lines = MetricsLog(run, step)
        self.path = self._lines.path
        self._say = say
        self._failed: set[str] = set()
        self._trackers: dict[str, Tracker] = {os.fspath(self.path): self._lines}
        if train.tensorboard:
            self._trackers["TensorBoard"] = TensorBoard(run, step)
        if train.wandb != "off":
            self._trackers["W&B"] = WeightsAndBiases(config, tree)

    def write(self, row: Row) -> None:
        """Gives a row to each."""
        self._each("write", row)

    def flush(self) -> list[str]:
        """Before a checkpoint. Returns the rows of ``metrics.jsonl`` that could not be written: it must keep them."""
        self._each("flush")
        return self._lines.waiting()

    def close(self) -> None:
        """Ends each."""
        self._each("close")

    def _each(self, what: str, *arguments: Any) -> None:
        for name, tracker in self._trackers.items():
            try:
                getattr(tracker, what)(*arguments)
            except UserError as error:  # the JSON lines: they are kept, and written when there is room again
                self._tell(name, f"{error}; training goes on, and the rows wait")
            except Exception as error:
                self._tell(
                    name, f"{name}: metrics may be missing from here on ({_first_line(error)}); training goes on"
                )
            else:
                if what == "write" and tracker is self._lines:
                    self._failed.discard(name)

    def _tell(self, name: str, text: str) -> None:
        if name not in self._failed:
            self._failed.add(name)
            self._say(text)


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:300]
