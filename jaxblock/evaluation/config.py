"""Defines the `evaluate` section: how a checkpoint is scored."""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from typing import Literal, get_args

from jaxblock.settings import AT_LEAST_1, Section, SplitName, require, setting

GraderName = Literal["gsm8k_strict", "gsm8k_flexible", "math_boxed", "hendrycks_math", "exact"]


@dataclass(frozen=True)
class EvaluateConfig(Section, name="evaluate", on_resume="may_change"):
    """Says which records are scored, and how."""

    split: SplitName = setting("test", common=("evaluate",))
    """The prepared records that are scored."""
    problems: int | None = setting(None, AT_LEAST_1, common=("evaluate",))
    """The number of problems that are decoded, from the first one on; None for all."""
    grader: str = setting("gsm8k_strict", common=("evaluate",))
    """The grader, which extracts the answer from a response; its name is reported with every result. gsm8k_strict, gsm8k_flexible,
    math_boxed (compares as mathematics), hendrycks_math (compares as text), exact; or a function of your own, as file.py:function or
    package.module:function."""
    nelbo: bool = setting(True, common=("evaluate",))
    """Whether the NELBO is estimated too."""
    nelbo_samples: int | None = setting(None, AT_LEAST_1)
    """The number of masked sets drawn per block, stratified by their count; None for one set of each count. With 2^B - 1 or more,
    the number of all masked sets, every set is enumerated and the result is exact."""
    nelbo_rows: int | None = setting(256, AT_LEAST_1)
    """The number of records whose NELBO is estimated, from the first one on; None for all."""
    compare: str | None = setting(None, common=("evaluate",))
    """The problems.jsonl of an earlier evaluation of the same problems, for McNemar's paired test; None for no test."""

    def check(self) -> None:
        """Raises UserError where a field has a value that it does not accept, such as a grader that does not exist."""
        super().check()
        check_grader_name(self.grader)


def check_grader_name(name: str) -> None:
    """Raises UserError unless a name is a grader's or is written like a user's function; nothing is imported."""
    names = get_args(GraderName)
    place, _, function = name.rpartition(":")
    if name in names or (place and function.isidentifier()):
        return
    close = difflib.get_close_matches(name, names, n=1)
    require(
        False,
        f"evaluate.grader: there is no grader {name[:100]!r}{f'; did you mean {close[0]}?' if close else '.'} Choose one of "
        f"{', '.join(names)}, or a function: file.py:function or package.module:function",
    )
