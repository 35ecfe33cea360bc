"""Draws the report of a training run as one HTML page: curves, times, evaluations, samples and settings."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape
from typing import Any, NamedTuple

import numpy as np

from jaxblock.reporting import report_parts
from jaxblock.reporting.page import html_document
from jaxblock.reporting.panels import PANELS, Line, Panel
from jaxblock.reporting.run_files import RunFiles
from jaxblock.training.observe import metrics

_MOST_POINTS = 600
"""The points of a line above which neighbours are drawn as their mean and range."""


class About(NamedTuple):
    """Says what a run is.

    Attributes:
        name: the name of its folder.
        folder: the folder.
        facts: what it trains, on what and how: (name, text) pairs.
        changed: its settings that are not the defaults: (name, value) pairs.
        config: the text of its config.yaml.
    """

    name: str
    folder: str
    facts: Sequence[tuple[str, str]]
    changed: Sequence[tuple[str, str]]
    config: str


def report_page(about: About, run: RunFiles) -> str:
    """Draws a run's report.

    Args:
        about: what the run is.
        run: what it left behind.

    Returns:
        A whole HTML document that needs no network; all text in it is escaped.
    """
    panels = {name: make(run.metrics) for name, make in PANELS.items()}
    figures = "".join(_figure(name, panel) for name, panel in panels.items())
    facts = [*about.facts, *_results(run)]
    body = "\n".join([
        f'<header class="top"><div><h1>Run {escape(about.name)}</h1><p>{escape(about.folder)}</p></div>'
        '<button id="theme" type="button">Colours</button></header>',
        f'<section><h2>Summary</h2><dl class="facts">{report_parts.pairs(facts)}</dl></section>',
        f'<section><h2>Curves</h2><div class="charts">{figures}</div>'
        '<noscript><p class="bad">The curves are drawn by a script: allow scripts to see them.</p></noscript>'
        '<p id="said" aria-live="polite"></p></section>',
        report_parts.time_section(run),
        report_parts.evaluations_section(run.evaluations),
        report_parts.samples_section(run),
        report_parts.config_section(about.changed, about.config),
    ])  # fmt: skip
    data = {"panels": [{"key": name, **_data(panel)} for name, panel in panels.items() if panel.drawn]}
    styles, scripts = ["controls.css", "report.css"], ["theme.js", "tip.js", "report.js"]
    return html_document(f"Run {about.name}", body, styles=styles, scripts=scripts, data=data)


def _figure(name: str, panel: Panel) -> str:
    """Returns the place of a panel; what is not drawn is written there."""
    said = "".join(f"<p>{escape(line)}</p>" for line in panel.values() or [panel.empty])
    inside = "" if panel.drawn else f'<div class="values">{said}</div>'
    return f'<figure id="panel-{name}"><figcaption><span>{escape(panel.title)}</span></figcaption>{inside}</figure>'


def _data(panel: Panel) -> dict[str, Any]:
    """Returns what the page's script draws of a panel."""
    lines = []
    for line in map(thinned, panel.lines):
        ends = {} if line.low is None or line.high is None else {"low": _plain(line.low), "high": _plain(line.high)}
        points = {"x": _plain(line.x), "y": _plain(line.y), **ends}
        lines.append({"name": line.name, "tone": line.tone, "marked": line.marked, **points})
    return {
        "title": panel.title,
        "x": panel.x_label,
        "y": panel.y_label,
        "place": panel.place,
        "log": panel.log,
        "percent": panel.form.endswith("%"),
        "limits": list(panel.limits),
        "lines": lines,
    }


def thinned(line: Line) -> Line:
    """Returns a line of at most 600 points: neighbours of a longer one become their mean, with their range around it."""
    size = line.x.size
    if size <= _MOST_POINTS:
        return line
    each = math.ceil(size / _MOST_POINTS)
    starts = np.arange(0, size, each)
    counts = np.diff([*starts, size])
    low, high = (line.y if ends is None else ends for ends in (line.low, line.high))
    return Line(
        f"{line.name} (mean and range of {each})",
        line.x[starts + counts - 1],
        np.add.reduceat(line.y, starts) / counts,
        np.minimum.reduceat(low, starts),
        np.maximum.reduceat(high, starts),
        line.tone,
    )


def _plain(values: np.ndarray) -> list[float]:
    """Returns numbers with seven digits, which is more than a page shows."""
    return [float(f"{value:.7g}") for value in values]


def _results(run: RunFiles) -> list[tuple[str, str]]:
    """Returns what came out, as (name, text) pairs."""
    facts = []
    steps, loss = metrics.series(run.metrics.train, "loss")
    if steps.size:
        facts.append(("training loss", f"{loss[-1]:.4g} nats at step {steps[-1]:,.0f}"))
    steps, nelbo = metrics.series(run.metrics.evals, "nelbo_per_token", "mean")
    if steps.size:
        best = int(nelbo.argmin())
        last = f"{nelbo[-1]:.4g} nats per text token at step {steps[-1]:,.0f}"
        facts.append(("held-out NELBO", f"{last}; lowest {nelbo[best]:.4g} at step {steps[best]:,.0f}"))
    scores = [row for row in run.metrics.evals if row.get("pass_at_1")]
    if scores:
        last_score = scores[-1]
        by = f", grader {last_score['grader']}" if "grader" in last_score else ""
        facts.append(
            ("held-out Pass@1", f"{report_parts.share(last_score['pass_at_1'])} at step {last_score['step']:,}{by}")
        )
    _, rate = metrics.series(run.metrics.train, "tokens_per_second")
    if rate.size:
        facts.append(("throughput", f"{np.median(rate):,.0f} visible positions per second (median)"))
    if run.resumed:
        facts.append(("continued", f"from step {', '.join(f'{step:,}' for step in run.resumed)}"))
    return facts
