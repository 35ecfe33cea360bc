"""Draws pictures of training runs from their ``metrics.jsonl``."""

from __future__ import annotations

import io
import os
from collections.abc import Callable
from functools import partial
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from jaxblock.errors import printable
from jaxblock.io.files import write_bytes
from jaxblock.io.paths import PathLike, as_path
from jaxblock.reporting.curves import draw_breakdown, draw_loss, draw_nelbo, draw_optimizer, draw_pass_at_1
from jaxblock.training.observe.metrics import Metrics, read_metrics

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
    "grid.color": "#e6e6e6",
    "legend.frameon": False,
    "legend.fontsize": 9,
    "xtick.color": "#555555",
    "ytick.color": "#555555",
    "figure.titlesize": 11,
    "figure.constrained_layout.use": True,
    "figure.constrained_layout.w_pad": 0.12,
    "figure.constrained_layout.h_pad": 0.1,
}
_CURVES: dict[str, Callable[[Axes, Metrics], None]] = {
    "loss": draw_loss,
    "nelbo": draw_nelbo,
    "pass_at_1": draw_pass_at_1,
    "loss_by_block": partial(draw_breakdown, key="loss_by_block"),
    "loss_by_count": partial(draw_breakdown, key="loss_by_count"),
    "optimizer": draw_optimizer,
}


def plot_run(metrics_path: PathLike, out: PathLike) -> list[str]:
    """Draws a run: ``loss.png``, ``nelbo.png``, ``pass_at_1.png``, and ``curves.png`` with everything on one page.

    Each picture is titled with the name of the run's folder.

    Args:
        metrics_path: the run's ``metrics.jsonl``; a run with few or no rows is drawn too.
        out: the folder to write the pictures to, which is made if absent.

    Returns:
        The paths of the pictures.

    Raises:
        UserError: the metrics cannot be read or the pictures cannot be written.
    """
    run, folder = read_metrics(metrics_path), as_path(out)
    name_of_run = printable(as_path(metrics_path).parent.name).replace("$", r"\$")  # a dollar would begin a formula
    written = []
    with matplotlib.rc_context(_STYLE):
        for name in ("loss", "nelbo", "pass_at_1"):
            figure = Figure(figsize=(6.4, 4.2))
            figure.suptitle(name_of_run)
            _CURVES[name](figure.subplots(), run)
            written.append(_save_png(figure, folder / f"{name}.png"))
        figure = Figure(figsize=(15, 8.1))
        figure.suptitle(name_of_run)
        for axes, draw in zip(figure.subplots(2, 3).flat, _CURVES.values(), strict=True):
            draw(axes, run)
        written.append(_save_png(figure, folder / "curves.png"))
    return written


def _save_png(figure: Figure, path: PathLike) -> str:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": "jaxblock"})
    write_bytes(path, buffer.getvalue(), overwrite=True)
    return os.fspath(path)
