"""Steps that count for nothing: where the loss or a gradient is not finite, parameters and optimizer state stay.

The choice is made inside the compiled step, element by element where a tensor is written: nothing is copied, and the
host need not look.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from jaxblock.errors import UserError
from jaxblock.parallel import processes

if TYPE_CHECKING:
    from jaxblock.training.step import StepMetrics


class Skips:
    """Counts skipped steps on the host, and stops the run when there are too many in a row.

    Attributes:
        total: steps skipped so far, those before a resume included.
    """

    def __init__(self, limit: int, total: int = 0) -> None:
        """Begins with an empty row.

        Args:
            limit: so many in a row are too many; 0 for no limit.
            total: skipped before.
        """
        self._limit = limit
        self.total = total
        self._row: list[tuple[int, StepMetrics, np.ndarray]] = []

    def look(self, found: list[StepMetrics], before: int, indices: list[np.ndarray]) -> str | None:
        """Looks at some steps' metrics. In a process group every process must, with the same metrics.

        Args:
            found: on the host.
            before: the step before the first of them.
            indices: the record numbers of each step's batch (this process's part).

        Returns:
            What to tell about skipped steps, with the records of all processes; None without any.

        Raises:
            UserError: too many in a row; names the steps and the records.
        """
        skipped = []
        for step, (metrics, index) in enumerate(zip(found, indices, strict=True), before + 1):
            if not bool(metrics.skipped):
                self._row = []
                continue
            self.total += 1
            skipped.append((step, index))
            self._row.append((step, metrics, index))
            if self._limit and len(self._row) >= self._limit:
                self._stop()
        if not skipped:
            return None
        steps = "; ".join(f"{step:,} (train records {_records(index)})" for step, index in skipped[:10])
        more = f"; and {len(skipped) - 10} more" if len(skipped) > 10 else ""
        return f"skipped step {steps}{more}: the loss or the gradient was not finite, and nothing was updated"

    def _stop(self) -> None:
        lines = [
            f"step {step}: the loss is {float(m.losses.loss.total)}, the gradient's norm {float(m.grad_norm)} "
            f"(train records {_records(index)})"
            for step, m, index in self._row
        ]
        raise UserError(
            f"{len(lines)} steps in a row (train.max_skipped) could not be used:\n  " + "\n  ".join(lines) + "\n"
            "Nothing was updated by them. Look at these records, lower optimizer.lr in a new run, or run the same command "
            "with --train.debug to find the layer"
        )


def _records(index: np.ndarray) -> str:
    """The numbers of a batch's records, those of other processes too."""
    return ", ".join(map(str, processes.gathered(index).tolist()))
