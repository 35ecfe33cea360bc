"""Draws a panel of a training run on axes that the caller passes."""

from __future__ import annotations

from textwrap import fill

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator, PercentFormatter

from jaxblock.reporting.panels import Line, Panel
from jaxblock.reporting.plot_style import COLOURS, PALE, label_axes


def draw_panel(axes: Axes, panel: Panel) -> None:
    """Draws a panel; where it has too few points for a plot, their values are written instead."""
    axes.set_title(panel.title)
    if not panel.drawn:
        return _write(axes, panel.values() or [panel.empty])
    colours = iter(COLOURS)
    for line in panel.lines:
        _draw_line(axes, line, next(colours) if line.tone == "main" else PALE, panel.form)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=7, integer=True))
    axes.xaxis.set_major_formatter("{x:,.0f}")
    label_axes(axes, panel.x_label, panel.y_label, log_y=panel.log)
    if panel.form.endswith("%"):
        axes.yaxis.set_major_formatter(PercentFormatter(1.0, 0))
    elif not panel.log and axes.get_ylim()[1] >= 10_000:
        axes.yaxis.set_major_formatter("{x:,.0f}")
    low, high = panel.limits
    if low is not None:
        top = max(line.y.max() for line in panel.lines) if high is None else high
        room = 0.05 * (top - low)
        axes.set_ylim(low - (room if high is not None else 0.0), top + room or 1.0)
    if len(panel.lines) > 1:
        axes.legend()


def _draw_line(axes: Axes, line: Line, colour: str, form: str) -> None:
    """Draws a line, with its points' intervals as error bars; the last value of a line with intervals stands beside it."""
    width = 0.8 if line.tone == "pale" and not line.marked else 1.6
    marker = "o" if line.marked else None
    axes.plot(line.x, line.y, color=colour, linewidth=width, marker=marker, markersize=4.5, label=line.name)
    if line.low is not None and line.high is not None:
        around = np.maximum([line.y - line.low, line.high - line.y], 0)
        axes.errorbar(line.x, line.y, around, fmt="none", ecolor=colour, alpha=0.6, capsize=3, linewidth=1.2)
        point, text = (line.x[-1], line.y[-1]), f"{line.y[-1]:{form}}"
        axes.annotate(text, point, (7, 0), textcoords="offset points", va="center", color=colour, fontsize=9)
        axes.margins(x=0.1)


def _write(axes: Axes, lines: list[str]) -> None:
    text = "\n".join(fill(line, 44) for line in lines)
    axes.text(0.5, 0.5, text, transform=axes.transAxes, ha="center", va="center", color="#555555")
    axes.set_xticks([])
    axes.set_yticks([])
    axes.grid(False)
    axes.spines[:].set_visible(False)
