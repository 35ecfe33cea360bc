"""Which checkpoints stay: the newest few, one of every so many steps for good, and the best by a metric."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from jaxblock.training.config import BestBy


class Keep(NamedTuple):
    """What to keep.

    Attributes:
        last: how many of the newest.
        every: those of every so many steps besides; 0 for none.
        best: the best by this metric besides.
    """

    last: int
    every: int = 0
    best: BestBy = "none"


def score(metric: BestBy, evaluation: Mapping[str, Any]) -> float | None:
    """An evaluation's worth by a metric: higher is better; None where it was not measured.

    Args:
        metric: which.
        evaluation: the evaluation's row of metrics.
    """
    if metric == "nelbo" and "nelbo_per_token" in evaluation:
        return -float(evaluation["nelbo_per_token"]["mean"])
    if metric == "pass_at_1" and "pass_at_1" in evaluation:
        return float(evaluation["pass_at_1"]["correct"]) / float(evaluation["pass_at_1"]["n"])
    return None


def best(scores: Mapping[int, float | None]) -> int | None:
    """The step with the highest score, the earliest of equals; None without any that is a number."""
    numbers = {step: value for step, value in scores.items() if value is not None and value == value}
    return min(numbers, key=lambda step: (-numbers[step], step), default=None)


def superfluous(keep: Keep, steps: Iterable[int], best_step: int | None) -> list[int]:
    """The steps of whole checkpoints that may go; the newest never does.

    Args:
        keep: the policy.
        steps: all whole checkpoints.
        best_step: the best of them; None where none is kept as such.
    """
    ordered = sorted(steps)
    newest = set(ordered[-max(keep.last, 1) :])
    return [
        step
        for step in ordered
        if step not in newest and step != best_step and not (keep.every and step % keep.every == 0)
    ]
