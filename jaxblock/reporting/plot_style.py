"""Holds the one style of all pictures, of runs and of benchmarks: colours that colour-blind people tell apart, and quiet axes."""

from __future__ import annotations

import contextlib
import io
import os
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.rcsetup import cycler
from matplotlib.ticker import LogLocator, NullFormatter

from jaxblock.io.files import write_bytes
from jaxblock.io.paths import PathLike

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#aa4499", "#8a6d00", "#555555")
"""The colours of lines, in the order in which they are used."""
LINES = ("-", "--", ":", "-.")
"""The styles of lines of one colour, in the order in which they are used."""
PALE = "#a9b4c2"
"""The colour of a line behind another."""

_STYLE: Any = {
    "font.size": 10,
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#888888",
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.prop_cycle": cycler(color=COLOURS),
    "grid.color": "#e6e6e6",
    "legend.frameon": False,
    "legend.fontsize": 9,
    "lines.linewidth": 1.6,
    "lines.markersize": 4.5,
    "xtick.color": "#555555",
    "ytick.color": "#555555",
    "figure.titlesize": 11,
    "figure.dpi": 110,
    "figure.constrained_layout.use": True,
    "figure.constrained_layout.w_pad": 0.12,
    "figure.constrained_layout.h_pad": 0.1,
}


def styled() -> contextlib.AbstractContextManager[None]:
    """Returns a context in which figures are made in this style; what is set elsewhere does not change."""
    return matplotlib.rc_context(_STYLE)


def save_png(figure: Figure, path: PathLike) -> str:
    """Writes a figure as a PNG file, replacing an earlier one; returns the path.

    Raises:
        UserError: the file cannot be written.
    """
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": "jaxblock"})
    write_bytes(path, buffer.getvalue(), overwrite=True)
    return os.fspath(path)


def label_axes(axes: Axes, x: str, y: str, *, log_x: bool = False, log_y: bool = False) -> None:
    """Names both axes, with their units, and says which scale each has; logarithmic axes get plain numbers.

    It must be called after the lines are drawn, whose range decides how many numbers there are.

    Args:
        axes: the axes.
        x: the name and unit of the horizontal axis.
        y: the name and unit of the vertical axis.
        log_x: whether the horizontal axis is logarithmic; a linear one is the rule, and is not said.
        log_y: whether the vertical axis is logarithmic.
    """
    axes.set_xlabel(f"{x}, log scale" if log_x else x)
    axes.set_ylabel(f"{y}, {'log' if log_y else 'linear'} scale")
    for log, axis, scale, limits in (
        (log_x, axes.xaxis, axes.set_xscale, axes.get_xlim),
        (log_y, axes.yaxis, axes.set_yscale, axes.get_ylim),
    ):
        if log:
            scale("log")
            low, high = limits()
            axis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 300 * low else (1,), numticks=12))
            axis.set_major_formatter("{x:g}")
            axis.set_minor_formatter(NullFormatter())
