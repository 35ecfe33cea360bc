"""Collects the steps since the last line of metrics, whose results are still on the device."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from jaxblock.data.loader import Batch
from jaxblock.training.step import StepMetrics


@dataclass
class StepWindow:
    """Collects steps until the next line of metrics is due.

    Attributes:
        since: when the window began, in seconds of training (without evaluations, saves and compiling).
        metrics: what each step reports, on the device.
        records: the numbers of the records in this process's part of each step's batch.
        step: the number of the newest step.
        rows: the number of rows in this process's part of all batches.
        prompt_tokens: the number of prompt tokens in these rows.
        due: whether the next line of metrics is due.
    """

    since: float = 0.0
    metrics: list[StepMetrics] = field(default_factory=list)
    records: list[np.ndarray] = field(default_factory=list)
    step: int = 0
    rows: int = 0
    prompt_tokens: int = 0
    due: bool = False

    def add(self, step: int, metrics: StepMetrics, batch: Batch) -> None:
        """Adds a step that was just dispatched."""
        self.step = step
        self.metrics.append(metrics)
        self.records.append(batch.index)
        self.rows += len(batch.index)
        self.prompt_tokens += int(batch.prompt_len.sum())

    def clear(self, now: float) -> None:
        """Begins a new window at ``now``, in seconds of training."""
        self.since, self.metrics, self.records = now, [], []
        self.rows, self.prompt_tokens, self.due = 0, 0, False

    def idle(self) -> bool:
        """Tells, without waiting, whether the device has finished all dispatched steps."""
        return not self.metrics or bool(self.metrics[-1].grad_norm.is_ready())  # type: ignore[attr-defined]
