"""Draws the pictures of experiments without a curve: bars at one budget, the pace of decoding, and NELBO against Pass@1."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from jaxblock.reporting.plot_style import COLOURS, label_axes
from jaxblock.study.contrasts import Contrast, Curve
from jaxblock.study.relation import Relation
from jaxblock.study.statistics import t_interval

_MARKERS = "osD^vP"
FEWEST_SEEDS = 3
"""The number of seeds from which on pictures show intervals: those of two are 12.7 standard errors to each side, and hide all else."""


def draw_bars(
    curves: Sequence[Curve], contrasts: Sequence[Contrast], budgets: Sequence[int], with_decoding: bool
) -> Figure:
    """Draws Pass@1, the NELBO, and the differences in Pass@1 (if any) at few budgets, a line for each arm or difference.

    Args:
        curves: the scores.
        contrasts: the differences.
        budgets: the budgets; lines are named by them where there are several.
        with_decoding: whether lines are named by the way of decoding too.
    """

    def named(name: str, at: int) -> str:
        return f"{name}, {budgets[at]:,}" if len(budgets) > 1 else name

    scores = [(one, at) for at in range(len(budgets)) for one in curves]
    differences = [(contrast, at) for at in range(len(budgets)) for contrast in contrasts]
    names = [named(f"{one.arm}, {one.decoding}" if with_decoding else one.arm, at) for one, at in scores]
    panels = 3 if contrasts else 2
    rows = max(len(scores), len(differences))
    figure = Figure(figsize=(4 * panels, 1.2 + 0.24 * rows), layout="constrained")
    axes = figure.subplots(1, panels)
    for row, (one, at) in enumerate(scores):
        _line(axes[0], row, 100 * one.solved[at].mean(-1))
        _line(axes[1], row, one.nelbo[at])
    for row, (contrast, at) in enumerate(differences):
        found = contrast.crossed[at]
        ends = [[100 * (found.estimate - found.low)], [100 * (found.high - found.estimate)]]
        seeds = 100 * contrast.difference[at].mean(-1)
        enough = seeds.size >= FEWEST_SEEDS
        if not enough:
            axes[2].plot(seeds, [row] * seeds.size, ls="", marker="|", ms=6, color=COLOURS[0], alpha=0.5)
        axes[2].errorbar(
            100 * found.estimate,
            row,
            xerr=ends if enough else None,
            color=COLOURS[0],
            marker="o",
            ms=3,
            capsize=2,
            lw=1,
        )
    if contrasts:
        axes[2].axvline(0, color="#888888", lw=0.8)
    says = [named(contrast.says, at) for contrast, at in differences]
    for axis, shown, of in zip(axes, (names, [""] * len(names), says)[:panels], _QUANTITIES[:panels], strict=True):
        axis.set_yticks(range(len(shown)), shown, fontsize=8)
        axis.set_ylim(max(len(shown), 1) - 0.5, -0.5)
        axis.set_xlabel(f"{of}, linear scale")
    return figure


_QUANTITIES = ("Pass@1 (%)", "NELBO (nats per text token)", "difference in Pass@1 (points)")


def _line(axis: Any, at: int, values: np.ndarray) -> None:
    """Draws the mean over seeds with its 95% t interval (of enough seeds), and every seed as a small mark."""
    if np.isnan(values).any():
        return
    axis.plot(values, np.full(values.size, at), ls="", marker="|", ms=6, color=COLOURS[0], alpha=0.5)
    if values.size >= FEWEST_SEEDS:
        found = t_interval(values)
        axis.plot(found[1:3], [at, at], color=COLOURS[0], lw=1)
    axis.plot(values.mean(), at, marker="o", ms=4, color=COLOURS[0])


def draw_pace(curves: Sequence[Curve], arms: Sequence[str]) -> Figure:
    """Draws Pass@1 against tokens per forward pass, a line for each arm with a point for each way of decoding.

    Args:
        curves: the scores at one budget.
        arms: the arms, in their order.
    """
    figure = Figure(figsize=(6.5, 4), layout="constrained")
    axis = figure.subplots()
    for at, arm in enumerate(arms):
        mine = [one for one in curves if one.arm == arm]
        pace, rate = ([float(np.mean(of(one))) for one in mine] for of in (lambda c: c.pace, lambda c: 100 * c.solved))
        axis.plot(pace, rate, color=COLOURS[at % len(COLOURS)], marker=_MARKERS[at % len(_MARKERS)], ms=4, label=arm)
        for one, x, y in zip(mine, pace, rate, strict=True):
            axis.annotate(one.decoding, (x, y), xytext=(3, 3), textcoords="offset points", fontsize=7, color="#555555")
    label_axes(axis, "text tokens per forward pass", "Pass@1 (%)")
    axis.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=4)
    return figure


def draw_relation(relation: Relation) -> Figure:
    """Draws Pass@1 against the NELBO, a mark for each score; the marks of an arm look alike."""
    figure = Figure(figsize=(8, 4.2), layout="constrained")
    axis = figure.subplots()
    for at, arm in enumerate(dict.fromkeys(score.arm for score in relation.scores)):
        mine = [score for score in relation.scores if score.arm == arm]
        look: dict[str, Any] = {
            "color": COLOURS[at % len(COLOURS)],
            "marker": _MARKERS[at // len(COLOURS) % len(_MARKERS)],
        }
        axis.plot(
            [one.nelbo for one in mine], [100 * one.rate for one in mine], ls="", ms=4, alpha=0.8, label=arm, **look
        )
    label_axes(axis, "NELBO (nats per text token)", "Pass@1 (%)", log_x=True)
    axis.legend(fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5))
    return figure
