"""Formats what the quickstart found: the time and memory of its phases, and its scores."""

from __future__ import annotations

import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any


def format_phases(phases: Sequence[dict[str, Any]]) -> str:
    """Formats the phases of `read_phases` as a table, with the time of all of them in the last line."""
    width = max([len(entry["phase"]) for entry in phases] + [5])
    lines = [f"{'phase':<{width}}  {'wall time':>9}  {'peak memory':>11}"]
    for entry in phases:
        lines.append(f"{entry['phase']:<{width}}  {_clock(entry['seconds'])}  {entry['peak_bytes'] / 2**30:>7.2f} GiB")
    lines.append(f"{'all':<{width}}  {_clock(sum(entry['seconds'] for entry in phases))}")
    return "\n".join(lines)


def format_scores(summaries: Mapping[str, pathlib.Path]) -> str:
    """Formats evaluations, one after the other.

    Args:
        summaries: the ``summary.json`` of each evaluation, by its label; files that do not exist are left out.
    """
    there = {label: file for label, file in summaries.items() if file.exists()}
    width = max([len(label) for label in summaries] + [0]) + 1
    return "\n".join(
        f"{label + ':':<{width}}  {format_score(json.loads(file.read_text(encoding='utf-8')))}"
        for label, file in there.items()
    )


def format_score(summary: dict[str, Any]) -> str:
    """Formats one evaluation in a line or two: Pass@1 with its 95% interval, the NELBO, and the paired test if it has one."""
    rate = summary["pass_at_1"]
    share = rate["correct"] / rate["n"]
    text = f"Pass@1 {share:.1%} [{rate['low']:.1%}, {rate['high']:.1%}] ({rate['correct']} of {rate['n']})"
    if bound := summary.get("nelbo_per_token"):
        text += f", NELBO {bound['mean']:.3g} (standard error {bound['se']:.2g}) nats per text token"
    if test := summary.get("compared_with"):
        name = pathlib.Path(test["file"]).parent.name
        text += f"\n  against {name}: right here alone {test['only_b']}, right there alone {test['only_a']}"
        text += f" (McNemar, exact: p = {test['p_value']:.2g})"
    return text


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes:>5}m{rest:02}s"
