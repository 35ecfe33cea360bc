"""Draws the measurements of gradients: variance by way of estimating, direction along training, and the bound by block size."""

from __future__ import annotations

from typing import Any

import numpy as np
from matplotlib.figure import Figure

from jaxblock.reporting.plot_style import COLOURS, LINES, label_axes
from jaxblock.study.gradients.contexts import CONTEXTS
from jaxblock.study.gradients.tables import Measured, over_seeds, ratio_over_seeds, ratios

_DRAWN = ("prefix 0.15, suffix 1", "prefix 0.5, suffix 1", "prefix 0, suffix 0.5", "prefix 0, suffix 0", "classical")
"""The contexts that are drawn; the tables hold all."""


def draw_gradients(measured: Measured) -> Figure:
    """Draws three panels; what noise hides is left out. Bars are 95% intervals of ratios, else one standard error to each side."""
    figure = Figure(figsize=(12, 4.2), layout="constrained")
    variance, direction, bound = figure.subplots(1, 3)
    _variance(variance, measured)
    _direction(direction, measured)
    _bound(bound, measured)
    for axis in (variance, direction, bound):
        axis.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=3 if axis is variance else 2, fontsize=8)
    return figure


def _variance(axis: Any, measured: Measured) -> None:
    """Draws the variance of each estimator relative to the default's, with the intervals of the tables; hollow marks are `pairs`.

    The checkpoint is the first one, whose mean gradient is the longest and best known.
    """
    (arm, steps), of = next(iter(measured.items()))
    names = [name.split(", ") for name in of[0]["variance"]]
    laws = list(dict.fromkeys(law for law, _, _ in names))
    draws = list(dict.fromkeys(k for _, _, k in names))
    for law, blocks, k in names:
        pairs = ratios(of, f"{law}, {blocks}, {k}")
        found = ratio_over_seeds(pairs)
        estimate = pairs[0][0] if found is None and len(pairs) == 1 else found and found.estimate
        if not estimate or estimate <= 0:
            continue
        error = None if found is None else [[found.estimate - found.low], [found.high - found.estimate]]
        at = laws.index(law) + 0.22 * (draws.index(k) - 1) + (0.08 if blocks == "pairs" else 0)
        colour = COLOURS[draws.index(k)]
        label = k if law == laws[0] and blocks == "per_sequence" else None
        face = "none" if blocks == "pairs" else colour
        axis.errorbar(at, estimate, yerr=error, color=colour, marker="o", ms=4, mfc=face, lw=1, label=label)
    axis.axhline(1, color="#888888", lw=0.8)
    label_axes(
        axis,
        f"{arm}, step {steps:,}; hollow: pairs",
        "variance at equal compute\n(ratio, 95% interval over seeds)",
        log_y=True,
    )
    axis.set_xticks(range(len(laws)), laws, rotation=30, ha="right", fontsize=8)


def _direction(axis: Any, measured: Measured) -> None:
    """Draws the cosine with the ideal gradient: a line for each context, on it a mark for each checkpoint."""
    names = [context.name for context in CONTEXTS if context.name in _DRAWN]
    for at, ((arm, steps), of) in enumerate(measured.items()):
        rows = [over_seeds([one["direction"][name]["cosine"] for one in of]) for name in names]
        known = [(row, found.mean, np.nan_to_num(found.se)) for row, found in enumerate(rows) if found is not None]
        places, means, errors = np.array(known).reshape(-1, 3).T
        apart = 0.16 * (at - (len(measured) - 1) / 2)
        axis.errorbar(means, places + apart, xerr=errors, **_look(at), ls="", label=f"{arm}, step {steps:,}")
    axis.set_xlabel("cosine with the ideal gradient\n(± standard error), linear scale")
    axis.set_yticks(range(len(names)), names, fontsize=8)
    axis.set_ylim(len(names) - 0.5, -0.5)


def _look(at: int) -> dict[str, Any]:
    """Returns how the marks of a checkpoint look, by its number."""
    return {"color": COLOURS[at % len(COLOURS)], "marker": "o", "ms": 3, "lw": 1}


def _bound(axis: Any, measured: Measured) -> None:
    """Draws the difference between NELBO and -log p by block size, a line for each checkpoint."""
    ticks: list[int] = []
    for at, ((arm, steps), of) in enumerate(measured.items()):
        sizes = list(of[0]["tightness"])
        points = [(int(size), over_seeds([one["tightness"][size]["gap"] for one in of])) for size in sizes]
        known = [(size, found.mean, np.nan_to_num(found.se)) for size, found in points if found is not None]
        if known:
            x, y, error = zip(*known, strict=True)
            style = LINES[at // len(COLOURS) % len(LINES)]
            axis.errorbar(x, y, yerr=error, **_look(at), ls=style, label=f"{arm}, step {steps:,}")
            ticks = [*x]
    label_axes(axis, "block size", "NELBO + log p\n(nats per text token ± standard error)", log_x=True)
    axis.set_xscale("log", base=2)
    axis.set_xticks(ticks, map(str, ticks))
    axis.minorticks_off()
