"""Draws the pictures of a study's report as SVG: curves over the budgets, differences to the control, grids, and gradients."""

from __future__ import annotations

import io
import itertools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

from jaxblock.reporting.panels import FEWEST
from jaxblock.reporting.plot_style import COLOURS, LINES, label_axes, styled
from jaxblock.study.gradients.panels import draw_gradients
from jaxblock.study.gradients.sizes import GRADIENTS
from jaxblock.study.panels import FEWEST_SEEDS, draw_bars, draw_pace, draw_relation
from jaxblock.study.statistics import t_interval

if TYPE_CHECKING:
    from jaxblock.study.analysis import Analysis

_UNITS = {
    "steps": "training steps",
    "flops": "training FLOPs,\nin steps of {0}",
    "masked_tokens": "masked tokens with loss,\nin steps of {0}",
    "block_positions": "positions of active blocks,\nin steps of {0}",
}

_LOG_FROM = 8
"""The ratio of the largest to the smallest budget from which on their axis is logarithmic."""
_MOST_BANDS = 4
"""The most curves that are drawn with bands: of more these would cover one another, and the lines of the seeds say enough."""
_APART = 0.07
"""The distance of neighbouring error bars: in doublings of the budget, or in shares of the distance of two budgets."""
_LABEL_WIDTH = 0.17
"""The width of a budget's label, as a share of the axis."""


def draw(analysis: Analysis) -> str:
    """Returns the picture of an experiment as the text of an SVG element."""
    import matplotlib as mpl

    with styled(), mpl.rc_context({"svg.hashsalt": "jaxblock", "font.size": 9.0}):
        figure = _figure(analysis)
        FigureCanvasSVG(figure)
        text = io.StringIO()
        figure.savefig(text, format="svg", metadata={"Date": None, "Creator": None})
    svg = text.getvalue()
    return svg[svg.index("<svg") :]


def _figure(analysis: Analysis) -> Figure:
    """Draws what the kind of the experiment shows."""
    if analysis.experiment.kind == GRADIENTS:
        return draw_gradients(analysis.measured)
    if analysis.relation is not None:
        return draw_relation(analysis.relation)
    curves = list(analysis.curves.values())
    if analysis.experiment.kind == "pace":
        return draw_pace(curves, analysis.experiment.arms)
    if analysis.experiment.kind == "grid":
        return _grid(analysis)
    if len(analysis.budgets) < FEWEST:
        return draw_bars(curves, analysis.contrasts, analysis.budgets, len(analysis.experiment.decodings) > 1)
    return _curves(analysis)


def _curves(analysis: Analysis) -> Figure:
    """Draws along the budgets: Pass@1, the NELBO, where there is one the difference to the control, and the loss where it is known."""
    one = analysis.experiment
    panels = 2 + bool(analysis.contrasts) + analysis.has_losses
    figure = Figure(figsize=(10 / 3 * panels, 3.5), layout="constrained")
    axes = figure.subplots(1, panels)
    log, bands = one.budgets[-1] >= _LOG_FROM * one.budgets[0], len(analysis.curves) <= _MOST_BANDS
    for (at, arm), (way, decoding) in itertools.product(enumerate(one.arms), enumerate(one.decodings)):
        curve, label = analysis.curves[arm, decoding], f"{arm}, {decoding}" if one.decodings[1:] else arm
        look = _look(at, way)
        _with_intervals(axes[0], one.budgets, 100 * curve.solved.mean(-1), label, look, bands)
        _with_intervals(axes[1], one.budgets, curve.nelbo, label, look, bands)
        if analysis.has_losses:
            _with_intervals(axes[-1], one.budgets, curve.loss, label, look, bands)
    # The first contrasts are those of arms, way by way; those of ways of decoding follow. They look as their arm does.
    others = len(one.arms) - 1
    shown_contrasts = analysis.contrasts[: others * len(one.decodings)]
    places = _side_by_side(np.array(one.budgets, np.float64), len(shown_contrasts), log)
    for number, contrast in enumerate(shown_contrasts):
        way, at = divmod(number, others)
        mean = [100 * found.estimate for found in contrast.crossed]
        bars = np.array([[100 * (f.estimate - f.low), 100 * (f.high - f.estimate)] for f in contrast.crossed]).T
        shown = bars if contrast.difference.shape[1] >= FEWEST_SEEDS else None
        axes[2].errorbar(places[number], mean, yerr=shown, **_look(at, way), marker="o", ms=3, capsize=2, lw=1)
    if analysis.contrasts:
        axes[2].axhline(0, color="#888888", lw=0.8)
    names = ["Pass@1 (%)", "NELBO (nats per text token)"]
    names += [f"Pass@1 minus that of {one.arms[-1]}\n(points)"] * bool(analysis.contrasts)
    names += ["loss (nats per masked token)"] * analysis.has_losses
    for axis, name in zip(axes, names, strict=True):
        label_axes(axis, _UNITS[one.unit].format(one.reference or one.arms[0]), name, log_x=log)
        if log:
            axis.set_xscale("log", base=2)
        axis.set_xticks(one.budgets, _labels(np.log(one.budgets) if log else np.array(one.budgets), one.budgets))
        axis.minorticks_off()
    if len(analysis.curves) > 1:
        handles, labels = axes[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside upper center", ncols=min(len(labels), 4))
    return figure


def _look(arm: int, way: int) -> dict[str, Any]:
    """Returns the colour of an arm's lines and their style by a way of decoding, by their numbers."""
    return {"color": COLOURS[arm % len(COLOURS)], "ls": LINES[way % len(LINES)]}


def _labels(places: np.ndarray, budgets: Sequence[int]) -> list[str]:
    """Returns the budgets as labels of an axis, from the last on; those that would touch the label before are empty."""
    labels, right = [], np.inf
    for place, budget in zip(places[::-1], budgets[::-1], strict=True):
        apart = right - place >= _LABEL_WIDTH * np.ptp(places)
        labels.append(f"{budget:,}" if apart else "")
        right = place if apart else right
    return labels[::-1]


def _side_by_side(budgets: np.ndarray, count: int, log: bool) -> list[np.ndarray]:
    """Returns where on the axis each of ``count`` lines has its marks, so that their error bars do not cover one another."""
    steps = np.arange(count) - (count - 1) / 2
    if log:
        return [budgets * 2 ** (_APART * step) for step in steps]
    return [budgets + _APART * step * np.ptp(budgets) / len(budgets) for step in steps]


def _with_intervals(
    axis: Any, budgets: tuple[int, ...], values: np.ndarray, label: str, look: dict[str, Any], band: bool
) -> None:
    """Draws the mean over seeds [budgets, seeds], a band for its 95% t interval (of enough seeds), and every seed as a thin line."""
    axis.plot(budgets, values, **look, lw=0.5, alpha=0.35)
    axis.plot(budgets, values.mean(-1), **look, marker="o", ms=3, lw=1.5, label=label)
    if band and values.shape[-1] >= FEWEST_SEEDS and not np.isnan(values).any():
        ends = np.array([t_interval(at)[1:3] for at in values]).T
        axis.fill_between(budgets, *ends, color=look["color"], alpha=0.15, lw=0)


def _grid(analysis: Analysis) -> Figure:
    """Draws the mean Pass@1 of each arm by each way of decoding; the matching pairs are framed."""
    one = analysis.experiment
    rates = np.array([[100 * analysis.curves[arm, d].solved.mean() for d in one.decodings] for arm in one.arms])
    figure = Figure(figsize=(5, 4), layout="constrained")
    axis = figure.subplots()
    axis.grid(False)
    image = axis.imshow(rates, cmap="viridis")
    figure.colorbar(image, label="Pass@1 (%)")
    for i in range(len(one.arms)):
        for j in range(len(one.decodings)):
            dark = rates[i, j] < rates.min() + 0.6 * np.ptp(rates)
            weight = "bold" if i == j else "normal"
            axis.text(j, i, f"{rates[i, j]:.1f}", ha="center", va="center", color="w" if dark else "k", weight=weight)
    axis.set_xticks(range(len(one.decodings)), one.decodings)
    axis.set_yticks(range(len(one.arms)), one.arms)
    axis.set_xlabel("decoded with")
    axis.set_ylabel("trained with")
    return figure
