"""The `evaluate` section: how a checkpoint is scored."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class EvaluateConfig:
    """Scoring."""

    split: Literal["test", "validation", "train"] = "test"
    """Which prepared records to score."""
    problems: int | None = None
    """Score only the first so many; None for all."""
    grader: Literal["gsm8k_strict", "gsm8k_flexible", "math_boxed", "exact"] = "gsm8k_strict"
    """How an answer is read off a response (named with every number)."""
    nelbo: bool = True
    """Also estimate the NELBO."""
    nelbo_samples: int | None = None
    """Masked sets per block, stratified by count; None for one of each count. Exact by enumeration where 2^B - 1 is not more."""
    nelbo_rows: int | None = 256
    """Rows of the NELBO estimate; None for all."""
    compare: str | None = None
    """A per-problem file of an earlier evaluation on the same problems: adds McNemar's paired test."""
