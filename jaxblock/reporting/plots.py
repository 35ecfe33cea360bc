"""Pictures of training runs, drawn from their ``metrics.jsonl``."""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Mapping
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter, PercentFormatter

from jaxblock.io.files import write_bytes
from jaxblock.io.paths import PathLike, as_path
from jaxblock.training.observe import metrics
from jaxblock.training.observe.metrics import Metrics

COLOURS = ("#2f6db3", "#d9692b", "#3b9a5d", "#8a5fb0", "#b8476b", "#7a7a7a")
_WIDE = 30
"""A logarithmic axis when what is large is so many times what matters at the end."""
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
}


def plot_run(metrics_path: PathLike, out: PathLike) -> list[str]:
    """Draws a run: ``loss.png``, ``nelbo.png``, ``pass_at_1.png``, and ``curves.png`` with everything on one page.

    Args:
        metrics_path: the run's ``metrics.jsonl``; few or no points are drawn as such.
        out: folder for the pictures, made if absent.

    Returns:
        The paths written.

    Raises:
        UserError: the metrics cannot be read or the pictures not written.
    """
    run, folder = metrics.read_metrics(metrics_path), as_path(out)
    single: dict[str, Callable[[Axes, Metrics], None]] = {
        "loss.png": draw_loss,
        "nelbo.png": draw_nelbo,
        "pass_at_1.png": draw_pass_at_1,
    }
    written = []
    with matplotlib.rc_context(_STYLE):
        for name, draw in single.items():
            figure = Figure(figsize=(6.4, 4.0), layout=_roomy())
            draw(figure.subplots(), run)
            written.append(_save(figure, folder / name))
        figure = Figure(figsize=(15, 7.8), layout=_roomy())
        (a, b, c), (d, e, f) = figure.subplots(2, 3)
        for axes, draw in zip((a, b, c), single.values(), strict=True):
            draw(axes, run)
        draw_breakdown(d, run, "loss_by_block")
        draw_breakdown(e, run, "loss_by_count")
        draw_optimizer(f, run)
        written.append(_save(figure, folder / "curves.png"))
    return written


def plot_comparison(runs: Mapping[str, PathLike], path: PathLike) -> str:
    """Draws held-out NELBO and Pass@1 of several runs on common axes.

    A run with a single evaluation (a starting point) is drawn as a level line across the picture. Training losses are
    left out: those of different objectives do not compare.

    Args:
        runs: label -> ``metrics.jsonl``, in the order of the legend.
        path: the PNG to write.

    Returns:
        ``path``.

    Raises:
        UserError: some metrics cannot be read.
    """
    loaded = {label: metrics.read_metrics(file) for label, file in runs.items()}
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(11, 4.2), layout=_roomy())
        for axes, draw in zip(figure.subplots(1, 2), (draw_nelbo, draw_pass_at_1), strict=True):
            for number, (label, run) in enumerate(loaded.items()):
                draw(axes, run, COLOURS[number % len(COLOURS)], label)
            if axes.get_legend_handles_labels()[0]:
                axes.legend()
        return _save(figure, path)


def draw_loss(axes: Axes, run: Metrics) -> None:
    """Draws training loss over steps: every logged value faint, a running mean strong.

    Args:
        axes: where to.
        run: the rows.
    """
    _dress(axes, "Training loss", "loss (nats, as normalised by the config)")
    steps, values = metrics.series(run.train, "loss")
    if not steps.size:
        return _say_empty(axes, "no training steps logged")
    if steps.size < 20:
        axes.plot(steps, values, color=COLOURS[0], marker="o", markersize=4)
    else:
        width = max(5, steps.size // 25)
        axes.plot(steps, values, color=COLOURS[0], alpha=0.25, linewidth=0.8, label="logged steps")
        axes.plot(steps, smoothed(values, width), color=COLOURS[0], linewidth=1.8, label=f"mean of {width}")
        axes.legend()
    if values.min() > 0 and values.max() > _WIDE * np.median(values[-max(1, values.size // 10) :]):
        _logarithmic(axes)


def draw_nelbo(axes: Axes, run: Metrics, colour: str = COLOURS[0], label: str | None = None) -> None:
    """Draws held-out NELBO per text token over steps, with one standard error either way.

    Args:
        axes: where to.
        run: the rows.
        colour: line colour.
        label: legend entry.
    """
    _dress(axes, "Held-out NELBO (± 1 standard error)", "nats per text token")
    rows = [r for r in run.evals if metrics.series([r], "nelbo_per_token", "mean")[0].size]
    steps, mean = metrics.series(rows, "nelbo_per_token", "mean")
    errors = [metrics.series([r], "nelbo_per_token", "se")[1] for r in rows]
    se = np.array([e[0] if e.size else 0.0 for e in errors])
    _interval(axes, steps, mean, mean - se, mean + se, colour, label, "no held-out NELBO yet")
    if mean.size and (mean - se).min() > 0 and mean.max() > _WIDE * mean[-1]:
        _logarithmic(axes)


def draw_pass_at_1(axes: Axes, run: Metrics, colour: str = COLOURS[0], label: str | None = None) -> None:
    """Draws held-out Pass@1 over steps with its interval.

    Args:
        axes: where to.
        run: the rows.
        colour: line colour.
        label: legend entry.
    """
    rows = [r for r in run.evals if isinstance(r.get("pass_at_1"), dict) and r["pass_at_1"].get("n")]
    problems = sorted({r["pass_at_1"]["n"] for r in rows})
    many = f", {problems[0]:,} problems" if len(problems) == 1 and label is None else ""
    _dress(axes, f"Held-out Pass@1 (95% interval{many})", "share of problems solved")
    steps = np.array([r["step"] for r in rows], np.float64)
    low, high, rate = (
        np.array([value(r["pass_at_1"]) for r in rows], np.float64)
        for value in (lambda p: p["low"], lambda p: p["high"], lambda p: p["correct"] / p["n"])
    )
    axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    _interval(axes, steps, rate, low, high, colour, label, "no Pass@1 yet")
    axes.set_ylim(-0.02, 1.02)


def draw_breakdown(axes: Axes, run: Metrics, key: str) -> None:
    """Draws loss by block index or by masked count, early in training against late.

    Args:
        axes: where to.
        run: the rows.
        key: ``loss_by_block`` or ``loss_by_count``.
    """
    by_block = key == "loss_by_block"
    what = "block index" if by_block else "masked count"
    x = "index of the active block (0 is the first)" if by_block else "masked tokens in the active block"
    _dress(axes, f"Training loss by {what}", "nats per masked token", x)
    rows = [row for row in run.train if row.get(key)]
    if not rows:
        return _say_empty(axes, f"no loss by {what} logged")
    share = max(1, len(rows) // 5)
    parts = [("all steps", rows, COLOURS[0])]
    if len(rows) >= 10:
        parts = [("first fifth of the run", rows[:share], "#a9b4c2"), ("last fifth", rows[-share:], COLOURS[0])]
    seen = np.array([])
    for label, part, colour in parts:
        means = metrics.pooled(part, key)
        seen = np.append(seen, means[np.isfinite(means)])
        axes.plot(np.arange(means.size) + (not by_block), means, "o-", markersize=4, color=colour, label=label)
    if seen.size and seen.min() > 0 and seen.max() > _WIDE * seen.min():
        _logarithmic(axes)
    else:
        axes.set_ylim(bottom=0)
    axes.legend()


def draw_optimizer(axes: Axes, run: Metrics) -> None:
    """Draws gradient norm and, on a second axis, learning rate over steps.

    Args:
        axes: where to.
        run: the rows.
    """
    _dress(axes, "Gradient norm and learning rate", "gradient norm before clipping")
    steps, norm = metrics.series(run.train, "grad_norm")
    if not steps.size:
        return _say_empty(axes, "no gradient norms logged")
    marker = "o" if steps.size < 3 else None
    axes.plot(steps, norm, color=COLOURS[0], linewidth=1.0, marker=marker)
    if norm.min() > 0 and norm.max() > _WIDE * np.median(norm):
        _logarithmic(axes)
    else:
        axes.set_ylim(bottom=0)
    axes.yaxis.label.set_color(COLOURS[0])
    steps, rate = metrics.series(run.train, "lr")
    if steps.size:
        right = axes.twinx()
        right.plot(steps, rate, color=COLOURS[1], linewidth=1.6, marker=marker)
        right.set_ylabel("learning rate", color=COLOURS[1])
        right.set_ylim(bottom=0)
        right.grid(False)
        right.ticklabel_format(axis="y", style="sci", scilimits=(-2, 2))


def smoothed(values: np.ndarray, width: int) -> np.ndarray:
    """A centred running mean that narrows towards both ends, so that it neither lags nor drops points.

    Args:
        values: shape [n].
        width: points averaged in the middle.

    Returns:
        Means, shape [n].
    """
    total = np.concatenate([[0.0], np.cumsum(values)])
    at = np.arange(values.size)
    reach = np.minimum(width // 2, np.minimum(at, values.size - 1 - at))
    return (total[at + reach + 1] - total[at - reach]) / (2 * reach + 1)


def _interval(
    axes: Axes,
    steps: np.ndarray,
    middle: np.ndarray,
    low: np.ndarray,
    high: np.ndarray,
    colour: str,
    label: str | None,
    empty: str,
) -> None:
    """A line of points with bars; or, for one point of a labelled run, a level line with its band."""
    if not steps.size:
        return None if label else _say_empty(axes, empty)
    if label and steps.size == 1:
        axes.axhline(middle[0], color=colour, linestyle="--", linewidth=1.4, label=label)
        axes.axhspan(low[0], high[0], color=colour, alpha=0.10, linewidth=0)
        return None
    axes.plot(steps, middle, "o-", markersize=4.5, color=colour, linewidth=1.6, label=label)
    around = np.stack([np.maximum(middle - low, 0), np.maximum(high - middle, 0)])
    axes.errorbar(steps, middle, around, fmt="none", ecolor=colour, alpha=0.6, capsize=3, linewidth=1.2)
    if label is None:
        axes.annotate(
            f"{middle[-1]:.0%}" if "Pass@1" in axes.get_title(loc="left") else f"{middle[-1]:.3g}",
            (steps[-1], middle[-1]),
            xytext=(7, 0),
            textcoords="offset points",
            va="center",
            color=colour,
            fontsize=9,
        )
        axes.margins(x=0.1)
    return None


def _dress(axes: Axes, title: str, y: str, x: str = "step (optimizer updates)") -> None:
    axes.set_title(title)
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=7, integer=True))
    if x.startswith("step"):
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))


def _logarithmic(axes: Axes) -> None:
    axes.set_yscale("log")
    low, high = axes.get_ylim()
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 300 * low else (1,), numticks=12))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())


def _roomy() -> ConstrainedLayoutEngine:
    return ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.1)


def _say_empty(axes: Axes, text: str) -> None:
    axes.text(0.5, 0.5, text, transform=axes.transAxes, ha="center", va="center", color="#888888")
    axes.set_xticks([])
    axes.set_yticks([])
    axes.grid(False)


def _save(figure: Figure, path: PathLike) -> str:
    buffer = io.BytesIO()
    FigureCanvasAgg(figure).print_png(buffer, metadata={"Software": "jaxblock"})
    write_bytes(path, buffer.getvalue(), overwrite=True)
    return os.fspath(path)
