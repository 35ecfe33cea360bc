"""Collects the steps since the last line of metrics, and summarises what they report as one line."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from jaxblock.data.loader import Batch
from jaxblock.training.step import StepMetrics
from jaxblock.types import Sum


@dataclass
class StepWindow:
    """Collects steps until the next line of metrics is due; their results stay on the device until then.

    Attributes:
        since: when the window began, in seconds of training (without evaluations, saves and compiling).
        metrics: what each step reports, on the device.
        records: the numbers of the records in this process's part of each step's batch.
        step: the number of the newest step.
        rows: the number of rows in this process's part of all batches.
        due: whether the next line of metrics is due.
    """

    since: float = 0.0
    metrics: list[StepMetrics] = field(default_factory=list)
    records: list[np.ndarray] = field(default_factory=list)
    step: int = 0
    rows: int = 0
    due: bool = False

    def add(self, step: int, metrics: StepMetrics, batch: Batch) -> None:
        """Adds a step that was just dispatched."""
        self.step = step
        self.metrics.append(metrics)
        self.records.append(batch.index)
        self.rows += len(batch.index)

    def clear(self, now: float) -> None:
        """Begins a new window at ``now``, in seconds of training."""
        self.since, self.metrics, self.records = now, [], []
        self.rows, self.due = 0, False

    def idle(self) -> bool:
        """Tells, without waiting, whether the device has finished all dispatched steps."""
        return not self.metrics or bool(self.metrics[-1].grad_norm.is_ready())  # type: ignore[attr-defined]


def summarise(steps: list[StepMetrics]) -> dict[str, Any]:
    """Returns the mean loss of several steps and its breakdowns; each mean is the sum of the losses over the sum of weights.

    Args:
        steps: the metrics of each step, copied to the host.

    Returns:
        ``loss``, ``grad_norm`` (of the last step), ``loss_by_block`` and ``loss_by_count`` as [sum, weight] pairs,
        ``skipped``, the number of skipped steps, and ``computed_per_needed``, the positions that all steps computed for each
        one that was needed. Skipped steps count in nothing else, unless all of them were skipped: then the loss is what they
        report, NaN or infinity.
    """
    used = [step for step in steps if not step.skipped]
    counted = used or steps

    def added(parts: list[Sum]) -> tuple[np.ndarray, np.ndarray]:
        both = np.asarray([[part.total for part in parts], [part.weight for part in parts]], np.float64).sum(1)
        return both[0, ...], both[1, ...]

    total, weight = added([step.losses.loss for step in counted])
    by_block = added([step.losses.by_block for step in counted])
    by_count = added([step.losses.by_count for step in counted])
    computed, needed = added([step.losses.positions for step in steps])
    return {
        "loss": float(total / weight),
        "grad_norm": float(counted[-1].grad_norm),
        "loss_by_block": np.stack(by_block, -1).round(4).tolist(),
        "loss_by_count": np.stack(by_count, -1).round(4).tolist(),
        "skipped": len(steps) - len(used),
        "computed_per_needed": round(float(computed / needed), 4),
    }
