"""The `evaluate` section: how a checkpoint is scored."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from jaxblock.settings import AT_LEAST_1, Section, SplitName, setting

GraderName = Literal["gsm8k_strict", "gsm8k_flexible", "math_boxed", "exact"]


@dataclass(frozen=True)
class EvaluateConfig(Section, name="evaluate", on_resume="may_change"):
    """What is scored, and how."""

    split: SplitName = "test"
    """The prepared records that are scored."""
    problems: int | None = setting(None, AT_LEAST_1)
    """The number of problems that are decoded, the first ones; None for all."""
    grader: GraderName = "gsm8k_strict"
    """How an answer is read off a response; its name stands beside every result."""
    nelbo: bool = True
    """Whether the NELBO is estimated too."""
    nelbo_samples: int | None = setting(None, AT_LEAST_1)
    """Masked sets drawn per block, stratified by count; None for one of each count. Where 2^B - 1 is not more, the result is exact."""
    nelbo_rows: int | None = setting(256, AT_LEAST_1)
    """The number of records whose NELBO is estimated, the first ones; None for all."""
    compare: str | None = None
    """The problems.jsonl of an earlier evaluation of the same problems, for McNemar's paired test; None for no test."""
