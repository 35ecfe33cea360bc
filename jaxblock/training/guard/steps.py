"""Counts the steps that were skipped because their loss or gradient was not finite, and stops after too many in a row.

The compiled step itself leaves parameters and optimizer state unchanged: it selects the old value of every element where
it would write the new one (``optim.gating``). So nothing is copied, and the host need not look at every step.
"""

from __future__ import annotations

import numpy as np

from jaxblock.errors import UserError
from jaxblock.parallel import processes
from jaxblock.training.step import StepMetrics

_MOST_NAMED = 10


class SkippedSteps:
    """Counts skipped steps on the host, and stops the run when there are too many in a row.

    Attributes:
        total: the number of steps skipped so far, including those before a resume.
    """

    def __init__(self, limit: int, total: int = 0) -> None:
        """Starts the count of skipped steps.

        Args:
            limit: the number of skipped steps in a row that stops the run; 0 for no limit.
            total: the number of steps that earlier processes skipped.
        """
        self._limit = limit
        self.total = total
        self._in_a_row: list[tuple[int, StepMetrics, np.ndarray]] = []

    def check(self, steps: list[StepMetrics], before: int, records: list[np.ndarray]) -> str | None:
        """Counts the skipped steps in some metrics. Every process of a group must call this, with the same metrics.

        Args:
            steps: the metrics of each step, copied to the host.
            before: the number of the step before the first of them.
            records: the record numbers of each step's batch, this process's part of them.

        Returns:
            A line that names the skipped steps and the records of all processes; None if no step was skipped.

        Raises:
            UserError: too many steps in a row were skipped; names the steps and the records.
        """
        skipped = []
        for number, (metrics, batch) in enumerate(zip(steps, records, strict=True), before + 1):
            if not bool(metrics.skipped):
                self._in_a_row = []
                continue
            self.total += 1
            skipped.append((number, batch))
            self._in_a_row.append((number, metrics, batch))
            if self._limit and len(self._in_a_row) >= self._limit:
                self._stop()
        if not skipped:
            return None
        named = "; ".join(f"{number:,} (train records {_of_all(batch)})" for number, batch in skipped[:_MOST_NAMED])
        more = f"; and {len(skipped) - _MOST_NAMED} more" if len(skipped) > _MOST_NAMED else ""
        return f"skipped step {named}{more}: the loss or the gradient was not finite, and nothing was updated"

    def _stop(self) -> None:
        lines = [
            f"step {number}: the loss is {float(metrics.losses.loss.total)}, the gradient's norm "
            f"{float(metrics.grad_norm)} (train records {_of_all(batch)})"
            for number, metrics, batch in self._in_a_row
        ]
        raise UserError(
            f"{len(lines)} steps in a row (train.max_skipped) could not be used:\n  " + "\n  ".join(lines) + "\n"
            "Nothing was updated by them. Look at these records, lower optimizer.lr in a new run, or run the same command "
            "with --train.debug to find the layer"
        )


def _of_all(records: np.ndarray) -> str:
    """Lists the numbers of a batch's records, including those of the other processes."""
    return ", ".join(map(str, processes.gather_values(records).tolist()))
