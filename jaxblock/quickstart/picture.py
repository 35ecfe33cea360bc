"""Draws what the quickstart found: Pass@1 and the likelihood bound of the start, after Blockwise SFT, and of the control."""

from __future__ import annotations

import pathlib
from collections.abc import Mapping, Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from jaxblock.io.files import read_json
from jaxblock.io.paths import PathLike
from jaxblock.reporting.plot_style import COLOURS, label_axes, save_png, styled


def save_picture(summaries: Mapping[str, pathlib.Path], out: PathLike) -> None:
    """Writes the picture of evaluations (`draw_scores`) as a PNG file, replacing an earlier one.

    Raises:
        UserError: a summary cannot be read, or the file cannot be written.
    """
    with styled():
        save_png(draw_scores(summaries), out)


def draw_scores(summaries: Mapping[str, pathlib.Path]) -> Figure:
    """Draws evaluations, one below the other: Pass@1 with its 95% interval, and the NELBO with its standard error.

    Args:
        summaries: the ``summary.json`` of each evaluation, by its label; files that do not exist are left out.

    Raises:
        UserError: a summary cannot be read.
    """
    found = {label: read_json(file) for label, file in summaries.items() if file.exists()}
    rates, bounds = ([one[key] for one in found.values()] for key in ("pass_at_1", "nelbo_per_token"))
    figure = Figure(figsize=(9.6, 1.3 + 0.45 * len(found)))
    left, right = figure.subplots(1, 2, sharey=True)
    _draw_points(left, [(one["correct"] / one["n"], one["low"], one["high"]) for one in rates], "{:.1%}")
    _draw_points(right, [(one["mean"], one["mean"] - one["se"], one["mean"] + one["se"]) for one in bounds], "{:.3g}")
    left.set_title(f"Pass@1 on {max(one['n'] for one in rates):,} held-out problems")
    right.set_title("NELBO (lower is better)")
    left.set_yticks(range(len(found)), list(found))
    left.invert_yaxis()
    for axes in (left, right):
        axes.margins(0.1, 0.25)
    label_axes(left, "share solved (95% interval)", "")
    label_axes(right, "nats per text token (± 1 standard error)", "", log_x=True)
    left.set_xlim(0, 1.06)
    left.xaxis.set_major_formatter(PercentFormatter(1.0, 0))
    left.set_ylabel("")
    right.set_ylabel("")
    return figure


def _draw_points(axes: Axes, values: Sequence[tuple[float, float, float]], form: str) -> None:
    """Draws a point with its interval for each (value, low, high), from top to bottom, and writes the value above it."""
    for row, ((value, low, high), colour) in enumerate(zip(values, COLOURS, strict=False)):
        around = [[value - low], [high - value]]
        axes.errorbar(value, row, xerr=around, fmt="o", color=colour, capsize=3, linewidth=1.4)
        axes.annotate(form.format(value), (value, row), (0, 7), textcoords="offset points", ha="center", color=colour)
