"""Defines the `evaluate` section: how a checkpoint is scored."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from jaxblock.settings import AT_LEAST_1, Section, SplitName, setting

GraderName = Literal["gsm8k_strict", "gsm8k_flexible", "math_boxed", "exact"]


@dataclass(frozen=True)
class EvaluateConfig(Section, name="evaluate", on_resume="may_change"):
    """Says which records are scored, and how."""

    split: SplitName = "test"
    """The prepared records that are scored."""
    problems: int | None = setting(None, AT_LEAST_1)
    """The number of problems that are decoded, from the first one on; None for all."""
    grader: GraderName = "gsm8k_strict"
    """The grader, which extracts the answer from a response; its name is reported with every result."""
    nelbo: bool = True
    """Whether the NELBO is estimated too."""
    nelbo_samples: int | None = setting(None, AT_LEAST_1)
    """The number of masked sets drawn per block, stratified by their count; None for one set of each count. With 2^B - 1 or more,
    the number of all masked sets, every set is enumerated and the result is exact."""
    nelbo_rows: int | None = setting(256, AT_LEAST_1)
    """The number of records whose NELBO is estimated, from the first one on; None for all."""
    compare: str | None = None
    """The problems.jsonl of an earlier evaluation of the same problems, for McNemar's paired test; None for no test."""
