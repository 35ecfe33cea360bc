"""Says what is plotted of a training run, without drawing it: pictures (``curves``) and pages (``report``) draw the same panels."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Literal, NamedTuple

import numpy as np

from jaxblock.training.observe import metrics
from jaxblock.training.observe.metrics import Metrics

FEWEST = 3
"""The fewest points that are drawn; of fewer, the values are written."""
_WIDE = 30
"""The ratio of the largest value to a typical one above which an axis is logarithmic."""

Tone = Literal["main", "pale", "band"]
"""How a line is drawn: strongly, pale behind another, or pale with its range as a band."""


class Line(NamedTuple):
    """Holds one line of a panel.

    Attributes:
        name: its entry in the legend.
        x: the places of the points, ascending, float64 [n].
        y: their values [n].
        low: the lower ends of the points' intervals [n]; None without intervals.
        high: the upper ends.
        tone: how the line is drawn.
        marked: whether each point has a mark.
    """

    name: str
    x: np.ndarray
    y: np.ndarray
    low: np.ndarray | None = None
    high: np.ndarray | None = None
    tone: Tone = "main"
    marked: bool = False


class Panel(NamedTuple):
    """Holds what is drawn on one pair of axes.

    Attributes:
        title: the heading.
        x_label: the name and unit of the horizontal axis.
        y_label: the name and unit of the vertical axis, without its scale.
        lines: the lines; those with values only.
        log: whether the vertical axis is logarithmic.
        empty: what to say where there is nothing to draw.
        form: how a value is written, such as ``.3g``.
        limits: the lowest and the highest value of the axis; None for that of the values.
    """

    title: str
    x_label: str
    y_label: str
    lines: list[Line]
    log: bool
    empty: str
    form: str = ".3g"
    limits: tuple[float | None, float | None] = (None, None)

    @property
    def drawn(self) -> bool:
        """Whether there are enough points for a plot."""
        return any(line.x.size >= FEWEST for line in self.lines)

    @property
    def scale(self) -> str:
        """Names the scale of the vertical axis."""
        return "log scale" if self.log else "linear scale"

    @property
    def place(self) -> str:
        """Names what the horizontal axis counts, such as ``step``."""
        return self.x_label.split(" (")[0].split(" in ")[0]

    def values(self) -> list[str]:
        """Writes the points of a panel with too few of them to draw, such as ``step 7,000: 0.33 [0.21, 0.45]``."""
        said = []
        for line in self.lines:
            for at, (x, y) in enumerate(zip(line.x, line.y, strict=True)):
                around = ""
                if line.low is not None and line.high is not None:
                    around = f" [{line.low[at]:{self.form}}, {line.high[at]:{self.form}}]"
                name = f"{line.name}, " if len(self.lines) > 1 else ""
                said.append(f"{name}{self.place} {x:,.0f}: {y:{self.form}}{around}")
        return said


def loss_panel(run: Metrics) -> Panel:
    """Returns training loss over steps: every logged value, and the running mean where there are many."""
    steps, values = metrics.series(run.train, "loss")
    width = max(5, steps.size // 25)
    logged = Line("logged steps", steps, values, tone="pale")
    lines = [logged._replace(tone="main", marked=True)]
    if steps.size >= 20:
        lines = [logged, Line(f"mean of {width} logged steps", steps, smoothed(values, width))]
    typical = np.median(values[-max(1, values.size // 10) :]) if values.size else 0.0
    title = "Training loss (as the config normalises it)"
    return _over_steps(title, "loss in nats", lines, "no training steps logged", typical)


def nelbo_panel(run: Metrics) -> Panel:
    """Returns held-out NELBO per text token over steps, plus and minus one standard error."""
    rows = [row for row in run.evals if metrics.series([row], "nelbo_per_token", "mean")[0].size]
    steps, mean = metrics.series(rows, "nelbo_per_token", "mean")
    # 0 where a row has no standard error.
    error = np.array([metrics.series([row], "nelbo_per_token", "se")[1].sum() for row in rows])
    lines = [Line("NELBO", steps, mean, mean - error, mean + error, marked=True)]
    title, typical = "Held-out NELBO (± 1 standard error)", mean[-1] if mean.size else 0.0
    return _over_steps(title, "nats per text token", lines, "no held-out NELBO yet", typical)


def pass_at_1_panel(run: Metrics) -> Panel:
    """Returns held-out Pass@1 over steps with its 95% interval."""
    rows = [r for r in run.evals if isinstance(r.get("pass_at_1"), dict) and r["pass_at_1"].get("n")]
    problems = {r["pass_at_1"]["n"] for r in rows}
    many = f", {min(problems):,} problems" if len(problems) == 1 else ""
    found = [(r["step"], p["correct"] / p["n"], p["low"], p["high"]) for r in rows for p in [r["pass_at_1"]]]
    steps, rates, low, high = np.array(found, np.float64).reshape(-1, 4).T
    lines = [Line("Pass@1", steps, rates, low, high, marked=True)]
    title = f"Held-out Pass@1 (95% interval{many})"
    panel = _over_steps(title, "share of problems solved", lines, "no Pass@1 yet", None)
    return panel._replace(form=".1%", limits=(0.0, 1.0))


def breakdown_panel(run: Metrics, key: Literal["loss_by_block", "loss_by_count"]) -> Panel:
    """Returns training loss by block index or by masked count, for the first and the last fifth of a run (a short run as one)."""
    by_block = key == "loss_by_block"
    what = "block index" if by_block else "masked count"
    x_label = "block (index of the active one; 0 is the first)" if by_block else "masked tokens in the active block"
    rows = [row for row in run.train if row.get(key)]
    share, empty = max(1, len(rows) // 5), f"no loss by {what} logged"
    parts: list[tuple[str, list, Tone]] = [("all steps", rows, "main")]
    if len(rows) >= 10:
        parts = [("first fifth of the run", rows[:share], "pale"), ("last fifth", rows[-share:], "main")]
    if rows and max(len(row[key]) for row in rows) < 2:
        parts, empty = [], f"there is only one {what}: its loss is the training loss"
    lines = []
    for name, part, tone in parts:
        means = metrics.pooled(part, key)
        there = np.isfinite(means)
        lines.append(Line(name, (np.arange(means.size) + (not by_block))[there], means[there], tone=tone, marked=True))
    lines = [line._replace(x=line.x.astype(np.float64)) for line in lines if line.x.size]
    values = np.concatenate([line.y for line in lines]) if lines else np.zeros(0)
    log = _is_wide(values, values.min() if values.size else 0.0)
    title = f"Training loss by {what}"
    return Panel(title, x_label, "nats per masked token", lines, log, empty, limits=(None if log else 0.0, None))


def train_panel(run: Metrics, key: str, title: str, y_label: str) -> Panel:
    """Returns a number of the training rows over steps.

    Args:
        run: the run's metrics.
        key: the number's name in a row.
        title: the heading.
        y_label: the name and unit of the vertical axis.
    """
    steps, values = metrics.series(run.train, key)
    line = Line(title, steps, values, marked=steps.size < 20)
    typical = np.median(values) if values.size else None
    panel = _over_steps(title, y_label, [line], f"no {title.lower()} logged", typical)
    return panel if panel.log else panel._replace(limits=(0.0, None))


PANELS: dict[str, Callable[[Metrics], Panel]] = {
    "loss": loss_panel,
    "nelbo": nelbo_panel,
    "pass_at_1": pass_at_1_panel,
    "loss_by_block": partial(breakdown_panel, key="loss_by_block"),
    "loss_by_count": partial(breakdown_panel, key="loss_by_count"),
    "grad_norm": partial(train_panel, key="grad_norm", title="Gradient norm", y_label="norm before clipping"),
    "lr": partial(train_panel, key="lr", title="Learning rate", y_label="learning rate"),
    "tokens_per_second": partial(
        train_panel, key="tokens_per_second", title="Throughput", y_label="visible positions per second"
    ),
}
"""Every panel of a run by its name."""


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


def _over_steps(title: str, y_label: str, lines: list[Line], empty: str, typical: float | None) -> Panel:
    """Returns a panel over training steps; ``typical`` is a usual value, against which the largest is wide; None for a linear axis."""
    lines = [line for line in lines if line.x.size]
    ends = [end for line in lines for end in (line.y, line.low) if end is not None]
    log = bool(ends) and typical is not None and _is_wide(np.concatenate(ends), typical)
    return Panel(title, "step (optimizer updates)", y_label, lines, log, empty)


def _is_wide(values: np.ndarray, typical: float) -> bool:
    """Tells whether all values are positive and the largest is far above a typical one, so that an axis is logarithmic."""
    return bool(values.size) and bool(values.min() > 0 and values.max() > _WIDE * typical)
