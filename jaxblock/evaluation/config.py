"""The `evaluate` section: how a checkpoint is scored."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from jaxblock.settings import AT_LEAST_1, Section, setting

GraderName = Literal["gsm8k_strict", "gsm8k_flexible", "math_boxed", "exact"]


@dataclass(frozen=True)
class EvaluateConfig(Section, name="evaluate", on_resume="may_change"):
    """Scoring."""

    split: Literal["test", "validation", "train"] = "test"
    """Which prepared records to score."""
    problems: int | None = setting(None, AT_LEAST_1)
    """Score only the first so many; None for all."""
    grader: GraderName = "gsm8k_strict"
    """How an answer is read off a response (named with every number)."""
    nelbo: bool = True
    """Also estimate the NELBO."""
    nelbo_samples: int | None = setting(None, AT_LEAST_1)
    """Masked sets per block, stratified by count; None for one of each count. Exact by enumeration where 2^B - 1 is not more."""
    nelbo_rows: int | None = setting(256, AT_LEAST_1)
    """Rows of the NELBO estimate; None for all."""
    compare: str | None = None
    """A per-problem file of an earlier evaluation on the same problems: adds McNemar's paired test."""
