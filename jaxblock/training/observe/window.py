"""Holds the steps since the last line of metrics, none of whose results has been read off the device."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from jaxblock.data.loader import Batch
from jaxblock.training.step import StepMetrics


@dataclass
class StepWindow:
    """Collects steps until the next line of metrics is due.

    Attributes:
        since: the clock's seconds of training (without evaluations, saves and compiling) when the window began.
        metrics: what each step reports, on the device.
        records: the record numbers of each step's batch, this process's part of them.
        step: the number of the newest step.
        rows: how many rows the batches have together, this process's part of them.
        prompt_tokens: how many prompt tokens these rows have.
        due: whether a line of metrics is to be written.
    """

    since: float = 0.0
    metrics: list[StepMetrics] = field(default_factory=list)
    records: list[np.ndarray] = field(default_factory=list)
    step: int = 0
    rows: int = 0
    prompt_tokens: int = 0
    due: bool = False

    def add(self, step: int, metrics: StepMetrics, batch: Batch) -> None:
        """Adds a step that was dispatched."""
        self.step = step
        self.metrics.append(metrics)
        self.records.append(batch.index)
        self.rows += len(batch.index)
        self.prompt_tokens += int(batch.prompt_len.sum())

    def clear(self, now: float) -> None:
        """Begins a new window at ``now``, in the clock's seconds of training."""
        self.since, self.metrics, self.records = now, [], []
        self.rows, self.prompt_tokens, self.due = 0, 0, False

    def idle(self) -> bool:
        """Asks, without waiting, whether the device has done all that it was given."""
        return not self.metrics or bool(self.metrics[-1].grad_norm.is_ready())  # type: ignore[attr-defined]
