"""Draws the measurements of gradients: variance by way of estimating, direction along training, and the bound by block size."""

from __future__ import annotations

from typing import Any

import numpy as np
from matplotlib.figure import Figure

from jaxblock.reporting.plot_style import COLOURS, LINES
from jaxblock.study.gradients.contexts import CONTEXTS
from jaxblock.study.gradients.tables import Measured, over_seeds

_STYLE_NAMES = ("solid", "dashed", "dotted", "dash-dotted")
_APART = 1.15
"""The ratio of two checkpoints' steps from which on both have a label."""
_DRAWN = ("prefix 0.15, suffix 1", "prefix 0.5, suffix 1", "prefix 0, suffix 0.5", "prefix 0, suffix 0", "classical")
"""The contexts that are drawn; the tables hold all."""


def draw_gradients(measured: Measured) -> Figure:
    """Draws three panels; what noise hides is left out."""
    figure = Figure(figsize=(12, 4), layout="constrained")
    variance, direction, bound = figure.subplots(1, 3)
    _variance(variance, measured)
    _direction(direction, measured)
    _bound(bound, measured)
    for axis in (variance, direction, bound):
        axis.spines[["top", "right"]].set_visible(False)
        if axis.get_legend_handles_labels()[0]:
            axis.legend(frameon=False, fontsize=7)
    return figure


def _variance(axis: Any, measured: Measured) -> None:
    """Draws the variance of each estimator at the last checkpoint, relative to the default's; hollow marks are `pairs`."""
    (arm, steps), of = list(measured.items())[-1]
    names = [name.split(", ") for name in of[0]["variance"]]
    laws = list(dict.fromkeys(law for law, _, _ in names))
    draws = list(dict.fromkeys(k for _, _, k in names))
    for law, blocks, k in names:
        found = over_seeds([one["variance"][f"{law}, {blocks}, {k}"]["all"]["ratio"] for one in of])
        if found is None:
            continue
        at = laws.index(law) + 0.22 * (draws.index(k) - 1) + (0.08 if blocks == "pairs" else 0)
        colour = COLOURS[draws.index(k)]
        label = k if law == laws[0] and blocks == "per_sequence" else None
        face = "none" if blocks == "pairs" else colour
        axis.errorbar(
            at, found.mean, yerr=np.nan_to_num(found.se), color=colour, marker="o", ms=4, mfc=face, lw=1, label=label
        )
    axis.axhline(1, color="#888888", lw=0.8)
    axis.set_xticks(range(len(laws)), laws, rotation=30, ha="right", fontsize=7)
    axis.set_ylabel("variance at equal compute (ratio)")
    axis.set_title(f"{arm}, step {steps:,}; hollow: pairs", fontsize=8)


def _direction(axis: Any, measured: Measured) -> None:
    """Draws the cosine with the ideal gradient along training, a line for each context and arm."""
    arms = list(dict.fromkeys(arm for arm, _ in measured))
    names = [context.name for context in CONTEXTS if context.name in _DRAWN]
    for at, name in enumerate(names):
        for which, arm in enumerate(arms):
            points = [
                (steps, over_seeds([one["direction"][name]["cosine"] for one in of]))
                for (its_arm, steps), of in measured.items()
                if its_arm == arm
            ]
            known = [(steps, found.mean, np.nan_to_num(found.se)) for steps, found in points if found is not None]
            if known:
                x, y, error = zip(*known, strict=True)
                style, label = LINES[which % len(LINES)], name if which == 0 else None
                axis.errorbar(x, y, yerr=error, color=COLOURS[at], ls=style, marker="o", ms=3, lw=1, label=label)
    steps = sorted({steps for _, steps in measured})
    axis.set_xscale("log")
    apart = [at for at, after in zip(steps, [*steps[1:], np.inf], strict=True) if after > _APART * at]
    axis.set_xticks(apart, [f"{at:,}" for at in apart])
    axis.minorticks_off()
    styles = [f"{arm} {_STYLE_NAMES[which % len(LINES)]}" for which, arm in enumerate(arms)]
    axis.set_xlabel("training steps (log)" + ("; " + ", ".join(styles) if arms[1:] else ""))
    axis.set_ylabel("cosine with the ideal gradient")


def _bound(axis: Any, measured: Measured) -> None:
    """Draws the difference between NELBO and -log p by block size, a line for each checkpoint."""
    axis.set_xscale("log", base=2)
    for at, ((arm, steps), of) in enumerate(measured.items()):
        sizes = list(of[0]["tightness"])
        points = [(int(size), over_seeds([one["tightness"][size]["gap"] for one in of])) for size in sizes]
        known = [(size, found.mean, np.nan_to_num(found.se)) for size, found in points if found is not None]
        if known:
            x, y, error = zip(*known, strict=True)
            colour, style = COLOURS[at % len(COLOURS)], LINES[at // len(COLOURS) % len(LINES)]
            axis.errorbar(
                x, y, yerr=error, color=colour, ls=style, marker="o", ms=3, lw=1, label=f"{arm}, step {steps:,}"
            )
            axis.set_xticks(x, map(str, x))
    axis.minorticks_off()
    axis.set_xlabel("block size (log)")
    axis.set_ylabel("NELBO + log p (nats per text token)")
