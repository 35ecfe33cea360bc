"""Summarises the metrics of the steps since the last row as one row."""

from __future__ import annotations

from typing import Any

import numpy as np

from jaxblock.training.step import StepMetrics
from jaxblock.types import Sum


def summarise(steps: list[StepMetrics]) -> dict[str, Any]:
    """Returns the mean loss of several steps and its breakdowns; each mean is the sum of the losses over the sum of weights.

    Args:
        steps: the metrics of each step, copied to the host.

    Returns:
        ``loss``, ``grad_norm`` (of the last step), ``loss_by_block`` and ``loss_by_count`` as [sum, weight] pairs, and
        ``skipped``, the number of skipped steps. Skipped steps count in nothing else, unless all of them were skipped:
        then the loss is what they report, NaN or infinity.
    """
    used = [step for step in steps if not step.skipped]
    counted = used or steps

    def added(parts: list[Sum]) -> tuple[np.ndarray, np.ndarray]:
        both = np.asarray([[part.total for part in parts], [part.weight for part in parts]], np.float64).sum(1)
        return both[0, ...], both[1, ...]

    total, weight = added([step.losses.loss for step in counted])
    by_block = added([step.losses.by_block for step in counted])
    by_count = added([step.losses.by_count for step in counted])
    return {
        "loss": float(total / weight),
        "grad_norm": float(counted[-1].grad_norm),
        "loss_by_block": np.stack(by_block, -1).round(4).tolist(),
        "loss_by_count": np.stack(by_count, -1).round(4).tolist(),
        "skipped": len(steps) - len(used),
    }
