"""Sends metrics and samples to TensorBoard and to Weights & Biases. Both libraries are imported only where they are used."""

from __future__ import annotations

import os
import secrets
import tempfile
from collections.abc import Sequence
from typing import Any

from jaxblock.errors import UserError, first_line
from jaxblock.io.files import read_json, write_json
from jaxblock.io.paths import PathLike, as_path, is_remote
from jaxblock.training.config import TrainConfig
from jaxblock.training.observe.rows import Row
from jaxblock.training.observe.samples import Sample, as_markdown

WANDB_ID = "wandb.json"
"""The file in the run folder with the id of the W&B run, so that a resumed run continues the same page."""


class TensorBoard:
    """Writes event files to ``tensorboard/`` of the run folder; every number of a row becomes a scalar ``kind/name``, a sample a text."""

    def __init__(self, run: PathLike, step: int) -> None:
        """Opens TensorBoard's event files.

        Args:
            run: the run folder, on a local disk.
            step: the step that the run continues from, -1 for a new run; events of later steps are hidden.
        """
        from tensorboardX import SummaryWriter

        self._events = SummaryWriter(os.path.join(os.fspath(run), "tensorboard"), purge_step=step + 1)

    def write(self, row: Row) -> None:
        """Adds the row's numbers."""
        for name, value in scalars(row):
            self._events.add_scalar(f"{row['kind']}/{name}", value, row["step"])

    def write_samples(self, samples: Sequence[Sample]) -> None:
        """Adds each sample to the text panel ``samples/problem I``, which shows it step by step."""
        for sample in samples:
            self._events.add_text(f"samples/problem {sample['index']}", as_markdown(sample), sample["step"])

    def flush(self) -> None:
        """Writes the events that are still in memory."""
        self._events.flush()

    def close(self) -> None:
        """Closes TensorBoard's event files."""
        self._events.close()


class WeightsAndBiases:
    """Writes to a W&B run with the run folder's name; a resumed run continues the same page.

    Rows contain their ``step`` as a value, and charts use it as their x axis: W&B's own step counter cannot go back, which
    a run does when it resumes from its last checkpoint. Offline, files are written to ``wandb/`` of the run folder, for ``wandb sync``.
    """

    def __init__(self, train: TrainConfig, tree: dict[str, Any]) -> None:
        """Begins the W&B run, or continues it.

        Args:
            train: the ``train`` section; its ``wandb`` is ``online`` or ``offline``.
            tree: the whole config as plain values, for the page.

        Raises:
            UserError: W&B cannot begin the run, for example because the user is not logged in.
        """
        import wandb

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
        except Exception as error:  # wandb raises wandb.Error, and other errors where the network fails
            raise UserError(
                f"train.wandb {train.wandb}: W&B did not begin ({first_line(error)}); run `wandb login` or set WANDB_API_KEY "
                f"(launch/tpu.sh run --env WANDB_API_KEY), or set train.wandb to {'off' if remote else 'offline'}"
            ) from error
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")

    def write(self, row: Row) -> None:
        """Logs the row's numbers as ``kind/name``."""
        self._run.log({"step": row["step"], **{f"{row['kind']}/{name}": value for name, value in scalars(row)}})

    def write_samples(self, samples: Sequence[Sample]) -> None:
        """Logs the samples of one evaluation as the table ``samples``."""
        import wandb

        columns: list[str | int] = ["step", "index", "prompt", "response", "reference", "correct"]
        table = wandb.Table(columns=columns, data=[[sample[str(name)] for name in columns] for sample in samples])
        self._run.log({"step": samples[0]["step"], "samples": table})

    def flush(self) -> None:
        """Does nothing: W&B's own process writes rows as they arrive."""

    def close(self) -> None:
        """Ends the W&B run. Offline, W&B's own process writes the last rows just after this, before the process ends."""
        self._run.finish()


def _wandb_id(run: PathLike) -> str:
    path = as_path(run) / WANDB_ID
    if not path.exists():
        write_json(path, {"id": secrets.token_hex(4)})
    return str(read_json(path)["id"])


def scalars(row: Row, prefix: str = "") -> list[tuple[str, float]]:
    """Returns the numbers of a row as (name, value), nested ones as ``outer/inner``; lists and strings are left out.

    Args:
        row: a row of metrics, or a nested value of one.
        prefix: text in front of each name.
    """
    found = []
    for key, value in row.items():
        if isinstance(value, dict):
            found += scalars(value, f"{prefix}{key}/")
        elif isinstance(value, int | float) and key not in ("step", "kind"):
            found.append((prefix + key, float(value)))
    return found
