"""Draws the curves of a training run, each on axes that the caller passes."""

from __future__ import annotations

from typing import Literal, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter

from jaxblock.training.observe import metrics
from jaxblock.training.observe.metrics import Metrics

COLOURS = ("#2f6db3", "#d9692b", "#3b9a5d", "#8a5fb0", "#b8476b", "#7a7a7a")
_WIDE = 30
"""The ratio of the largest value to a typical one above which an axis is logarithmic."""


class _Estimates(NamedTuple):
    """Holds estimates with intervals over steps, each of shape [n]."""

    steps: np.ndarray
    middle: np.ndarray
    low: np.ndarray
    high: np.ndarray


def draw_loss(axes: Axes, run: Metrics) -> None:
    """Draws training loss over steps: every logged value in a light colour, and their running mean in a strong one."""
    _label_axes(axes, "Training loss", "loss (nats, as normalised by the config)")
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
    _use_log_scale_if_wide(axes, values, np.median(values[-max(1, values.size // 10) :]))


def draw_nelbo(axes: Axes, run: Metrics, colour: str = COLOURS[0], label: str | None = None) -> None:
    """Draws held-out NELBO per text token over steps, plus and minus one standard error.

    Args:
        axes: the axes to draw on.
        run: the run's metrics.
        colour: the colour of the line.
        label: the legend entry where several runs share the axes; None for a single run.
    """
    _label_axes(axes, "Held-out NELBO (± 1 standard error)", "nats per text token")
    rows = [row for row in run.evals if metrics.series([row], "nelbo_per_token", "mean")[0].size]
    steps, mean = metrics.series(rows, "nelbo_per_token", "mean")
    error = np.array(
        [metrics.series([row], "nelbo_per_token", "se")[1].sum() for row in rows]
    )  # 0 without a standard error
    _draw_estimates(axes, _Estimates(steps, mean, mean - error, mean + error), colour, label, "{:.3g}")
    if steps.size:
        _use_log_scale_if_wide(axes, np.concatenate([mean - error, mean]), mean[-1])
    elif label is None:
        _say_empty(axes, "no held-out NELBO yet")


def draw_pass_at_1(axes: Axes, run: Metrics, colour: str = COLOURS[0], label: str | None = None) -> None:
    """Draws held-out Pass@1 over steps with its 95% interval; the arguments are those of ``draw_nelbo``."""
    rows = [r for r in run.evals if isinstance(r.get("pass_at_1"), dict) and r["pass_at_1"].get("n")]
    problems = {r["pass_at_1"]["n"] for r in rows}
    many = f", {min(problems):,} problems" if len(problems) == 1 and label is None else ""
    _label_axes(axes, f"Held-out Pass@1 (95% interval{many})", "share of problems solved")
    found = [(r["step"], p["correct"] / p["n"], p["low"], p["high"]) for r in rows for p in [r["pass_at_1"]]]
    estimates = _Estimates(*np.array(found, np.float64).reshape(-1, 4).T)
    axes.yaxis.set_major_formatter("{x:.0%}")
    _draw_estimates(axes, estimates, colour, label, "{:.0%}")
    if not rows and label is None:
        _say_empty(axes, "no Pass@1 yet")
    axes.set_ylim(-0.02, 1.02)


def draw_breakdown(axes: Axes, run: Metrics, key: Literal["loss_by_block", "loss_by_count"]) -> None:
    """Draws training loss by block index or by masked count, for the first and the last fifth of a run (a short run as one)."""
    by_block = key == "loss_by_block"
    what = "block index" if by_block else "masked count"
    x = "index of the active block (0 is the first)" if by_block else "masked tokens in the active block"
    _label_axes(axes, f"Training loss by {what}", "nats per masked token", x)
    rows = [row for row in run.train if row.get(key)]
    if not rows:
        return _say_empty(axes, f"no loss by {what} logged")
    if max(len(row[key]) for row in rows) < 2:
        return _say_empty(axes, f"there is only one {what}: its loss is the training loss")
    share = max(1, len(rows) // 5)
    parts = [("all steps", rows, COLOURS[0])]
    if len(rows) >= 10:
        parts = [("first fifth of the run", rows[:share], "#a9b4c2"), ("last fifth", rows[-share:], COLOURS[0])]
    drawn = []
    for label, part, colour in parts:
        means = metrics.pooled(part, key)
        drawn.append(means[np.isfinite(means)])
        axes.plot(np.arange(means.size) + (not by_block), means, "o-", markersize=4, color=colour, label=label)
    values = np.concatenate(drawn)
    if not values.size or not _use_log_scale_if_wide(axes, values, values.min()):
        axes.set_ylim(bottom=0)
    axes.legend()


def draw_optimizer(axes: Axes, run: Metrics) -> None:
    """Draws the gradient norm and, on a second axis, the learning rate over steps."""
    _label_axes(axes, "Gradient norm and learning rate", "gradient norm before clipping")
    steps, norm = metrics.series(run.train, "grad_norm")
    if not steps.size:
        return _say_empty(axes, "no gradient norms logged")
    marker = "o" if steps.size < 3 else None
    axes.plot(steps, norm, color=COLOURS[0], linewidth=1.0, marker=marker)
    if not _use_log_scale_if_wide(axes, norm, np.median(norm)):
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
    """Computes a centred running mean that narrows towards both ends, so that it neither lags nor drops points.

    Args:
        values: the values, shape [n].
        width: the number of values averaged in the middle.

    Returns:
        The means, shape [n].
    """
    total = np.concatenate([[0.0], np.cumsum(values)])
    at = np.arange(values.size)
    reach = np.minimum(width // 2, np.minimum(at, values.size - 1 - at))
    return (total[at + reach + 1] - total[at - reach]) / (2 * reach + 1)


def _draw_estimates(axes: Axes, estimates: _Estimates, colour: str, label: str | None, last: str) -> None:
    """Draws estimates as points with error bars.

    A single estimate that has a label is drawn as a horizontal line, with its interval as a band.

    Args:
        axes: the axes to draw on.
        estimates: the estimates; nothing is drawn where there are none.
        colour: the colour of points and line.
        label: the legend entry; None for none, and then the last estimate is written beside its point.
        last: the format of the text beside the last point.
    """
    steps, middle, low, high = estimates
    if not steps.size:
        return
    if label and steps.size == 1:
        axes.axhline(middle[0], color=colour, linestyle="--", linewidth=1.4, label=label)
        axes.axhspan(low[0], high[0], color=colour, alpha=0.10, linewidth=0)
        return
    axes.plot(steps, middle, "o-", markersize=4.5, color=colour, linewidth=1.6, label=label)
    around = np.maximum([middle - low, high - middle], 0)
    axes.errorbar(steps, middle, around, fmt="none", ecolor=colour, alpha=0.6, capsize=3, linewidth=1.2)
    if label is None:
        point, text = (steps[-1], middle[-1]), last.format(middle[-1])
        axes.annotate(text, point, (7, 0), textcoords="offset points", va="center", color=colour, fontsize=9)
        axes.margins(x=0.1)


def _label_axes(axes: Axes, title: str, y: str, x: str = "step (optimizer updates)") -> None:
    axes.set(title=title, xlabel=x, ylabel=y)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=7, integer=True))
    axes.xaxis.set_major_formatter("{x:,.0f}")


def _use_log_scale_if_wide(axes: Axes, values: np.ndarray, typical: float) -> bool:
    """Makes the y axis logarithmic if all values are positive and the largest is far above `typical`; returns whether it did."""
    if values.min() <= 0 or values.max() <= _WIDE * typical:
        return False
    axes.set_yscale("log")
    axes.set_ylabel(f"{axes.get_ylabel()}, logarithmic")
    low, high = axes.get_ylim()
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 300 * low else (1,), numticks=12))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter(NullFormatter())
    return True


def _say_empty(axes: Axes, text: str) -> None:
    axes.text(0.5, 0.5, text, transform=axes.transAxes, ha="center", va="center", color="#888888")
    axes.set_xticks([])
    axes.set_yticks([])
    axes.grid(False)
