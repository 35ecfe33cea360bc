"""Chooses the checkpoints to keep: the newest few, those of chosen steps, and the best by a metric."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

from jaxblock.training.config import BestBy

GRADER_VERSION = "grader_version"
"""The name under which a checkpoint says by which version of the grader it was scored."""


class Keep(NamedTuple):
    """Describes which checkpoints to keep.

    Attributes:
        last: the number of newest checkpoints to keep.
        every: also keep those whose step is a multiple of this; 0 for none.
        best: also keep the best one by this metric.
        steps: also keep those of these steps.
    """

    last: int
    every: int = 0
    best: BestBy = "none"
    steps: tuple[int, ...] = ()


def comparable_score(metric: BestBy, evaluation: Mapping[str, Any]) -> float | None:
    """Returns an evaluation's value by a metric, higher for better; None where the metric was not measured.

    Args:
        metric: the metric that chooses the best checkpoint.
        evaluation: the evaluation's row of metrics.
    """
    if metric == "nelbo" and "nelbo_per_token" in evaluation:
        return -float(evaluation["nelbo_per_token"]["mean"])
    if metric == "pass_at_1" and "pass_at_1" in evaluation:
        return float(evaluation["pass_at_1"]["correct"]) / float(evaluation["pass_at_1"]["n"])
    return None


def scored_by(config: Mapping[str, Any], known: Mapping[str, Any] = MappingProxyType({})) -> dict[str, Any]:
    """Returns what decides how checkpoints are scored: the metric, and the settings that it depends on.

    Args:
        config: the run's settings, as plain values by section and field.
        known: the version of the grader as ``grader_version`` (None for one without versions); nothing where it is not known.
    """
    train, evaluate = config["train"], config["evaluate"]
    found = {"metric": train.get("keep_best")}
    if found["metric"] == "nelbo":
        return found | {"rows": train.get("eval_nelbo_rows"), "samples": evaluate.get("nelbo_samples")}
    decode = {f"decode.{name}": value for name, value in config["decode"].items() if name != "batch_size"}
    version = {name: known[name] for name in (GRADER_VERSION,) if name in known}
    return found | {"problems": train.get("eval_problems"), "grader": evaluate.get("grader")} | version | decode


def same_scoring(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Tells whether scores by two settings (``scored_by``) can be compared; a field that a version lacks is not looked at."""
    return all(one[name] == other[name] for name in one.keys() & other.keys())


def best(scores: Mapping[int, float | None]) -> int | None:
    """Returns the step with the highest score, the earliest of equal ones; None if no score is a number."""
    numbers = {step: value for step, value in scores.items() if value is not None and value == value}
    return min(numbers, key=lambda step: (-numbers[step], step), default=None)


def superfluous(keep: Keep, steps: Iterable[int], best_step: int | None) -> list[int]:
    """Returns the steps of the whole checkpoints that may be deleted, never the newest one.

    Orbax has such policies too, but they need records with the time of each save, which we do not have.

    Args:
        keep: which checkpoints to keep.
        steps: the steps of all whole checkpoints.
        best_step: the step of the best checkpoint; None where the best is not kept.
    """
    ordered = sorted(steps)
    newest = set(ordered[-max(keep.last, 1) :])
    return [
        step
        for step in ordered
        if step not in newest
        and step != best_step
        and step not in keep.steps
        and not (keep.every and step % keep.every == 0)
    ]
