"""Writes the report of a study, as Markdown and as one HTML page, and says how far the study has come."""

from __future__ import annotations

import html
import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from jaxblock.evaluation.statistics import Estimate, mean_se
from jaxblock.io.files import write_text
from jaxblock.io.folders import list_folder
from jaxblock.io.leases import Lease
from jaxblock.io.paths import PathLike, as_path
from jaxblock.study.analysis import Analysis, analyse, primary
from jaxblock.study.cells import Plan
from jaxblock.study.contrasts import Contrast, Curve
from jaxblock.study.figures import draw
from jaxblock.study.gradients.sizes import GRADIENTS
from jaxblock.study.gradients.tables import tables as gradients_tables
from jaxblock.study.hypotheses import Finding
from jaxblock.study.pace import pace_table
from jaxblock.study.relation import relation_table
from jaxblock.study.results import RESULTS, Result, check_contents, is_done
from jaxblock.study.scores import made_by, score_versions, trained_by, version_name
from jaxblock.study.spec import Study
from jaxblock.study.statistics import Interval
from jaxblock.study.tables import Row, Table, html_page, html_table, markdown_table, text_table

PICTURES = "pictures"
"""The folder, beside report.md, of the pictures that it shows, one SVG file for each experiment."""


class Part(NamedTuple):
    """Holds what a report shows of one experiment.

    Attributes:
        found: what was computed from the results.
        picture: the text of an SVG element.
        tables: the tables below the picture.
    """

    found: Analysis
    picture: str
    tables: list[Table]

    @property
    def picture_file(self) -> str:
        """The picture's file, relative to the report."""
        return f"{PICTURES}/{self.found.name}.svg"


def status(plan: Plan, results: Mapping[str, Result], folder: PathLike) -> str:
    """Returns how many cells of each arm are done, running and left, and about how long one process needs for the rest.

    Args:
        plan: what the study computes.
        results: what is known of its cells.
        folder: the study's folder, where the locks of running cells are.

    Raises:
        UserError: a result lacks something.
    """
    check_contents(plan, results)
    locks = list_folder(as_path(folder) / "claims")
    locked = {lock.name.removeprefix(".").removesuffix(".lock") for lock in locks if Lease(lock, "a cell").is_held()}
    arms = list(dict.fromkeys(cell.arm for cell in plan.cells))
    counts: dict[str, Counter[str]] = {arm: Counter() for arm in arms}
    seconds: dict[str, list[float]] = {arm: [] for arm in arms}
    for cell in plan.cells:
        result = results.get(cell.name)
        done = is_done(cell, result)
        counts[cell.arm]["done" if done else "running" if cell.name in locked else "left"] += 1
        if done and result is not None:
            seconds[cell.arm].append(sum(result["seconds"].values()))
    known = [one for found in seconds.values() for one in found]
    left = 0.0
    rows = []
    for arm, count in counts.items():
        mean = float(np.mean(seconds[arm] or known or [np.nan]))
        left += mean * (count["running"] + count["left"])
        rows.append(
            [arm, str(count["done"]), str(count["running"]), str(count["left"]), f"{mean:,.0f} s" if known else "?"]
        )
    whole = sum(count["done"] for count in counts.values())
    ending = (
        "all cells are done" if whole == len(plan.cells) else f"about {left / 3600:.1f} hours of one process are left"
    )
    if not known:
        ending = "no cell is done yet"
    return (
        text_table((["arm", "done", "running", "left", "a cell takes"], rows))
        + f"\n{whole} of {len(plan.cells)} cells; {ending}"
    )


def _how_read(study: Study) -> str:
    """Returns what the intervals and errors of a report are, each where the report has them."""
    kinds = {one.kind for one in study.experiments.values()}
    said = ""
    if kinds - {GRADIENTS}:
        said += (
            f" Scored on {study.scoring.problems} problems of the {study.scoring.split} split. Intervals are of 95%; those of a "
            "difference are for new seeds and new problems unless they are said to be over seeds."
        )
    if GRADIENTS in kinds:
        said += " Of gradients ± is a standard error: over the examples or batches of a single seed, over seeds where there are several."
    return said


def write_report(study: Study, plan: Plan, results: Mapping[str, Result], out: PathLike) -> None:
    """Writes report.md, its pictures and report.html, with everything that the results so far say about the experiments.

    Args:
        study: the study.
        plan: what it computes.
        results: the results of its cells.
        out: the folder of report.md, report.html and ``PICTURES``; files of an earlier report are replaced.

    Raises:
        UserError: a result lacks something, or results cannot be put together; nothing is then written.
    """
    check_contents(plan, results, bounded=study.scoring.nelbo_rows > 0)
    analyses = analyse(study, plan, dict(results))
    primaries = _primaries(analyses)
    done = sum(is_done(cell, results.get(cell.name)) for cell in plan.cells)
    intro = [f"{done} of {len(plan.cells)} cells are done." + _how_read(study)]
    parts = [Part(one, draw(one), _tables(one)) for one in analyses if one.seeds]
    waiting = [one.name for one in analyses if not one.seeds]
    if waiting:
        intro.append(f"No seed is complete yet for: {', '.join(waiting)}.")
    files = {one.picture_file: one.picture for one in parts}
    files["report.md"] = _markdown(study, intro, primaries, parts, results)
    files["report.html"] = _page(study, intro, primaries, parts, results)
    for file, text in files.items():
        write_text(as_path(out) / file, text, overwrite=True)


def _tables(one: Analysis) -> list[Table]:
    """Returns the tables of an experiment: what each arm scored, and the comparisons; or what its kind has instead."""
    if one.measured:
        return gradients_tables(one.measured)
    if one.relation is not None:
        return [relation_table(one.relation)]
    tables: list[Table] = [_scores(one)]
    if one.paces:
        tables.append(pace_table(one.paces))
    rows: list[Row] = []
    for contrast in one.contrasts:
        for at, budget in enumerate(one.budgets):
            rows.append([contrast.says, f"{budget:,}", *_compared(contrast, at)])
    if one.experiment.kind == "curve" and len(one.seeds) > 1:
        tables.append(_by_seed(one))
    if rows:
        tables.append(
            (["difference", "budget", "Pass@1, percentage points", "over seeds alone", "NELBO, over seeds"], rows)
        )
    return tables


def _scores(one: Analysis) -> Table:
    """Returns the table of what each arm scored, with its training loss where that is known of all."""
    pace, losses = one.experiment.kind == "pace", one.has_losses
    header = ["arm", "decoding", "budget", "steps", "Pass@1, mean of seeds", "NELBO per token", "forward passes"]
    header += ["tokens per forward"] * pace + ["training loss per masked token"] * losses
    rows: list[Row] = []
    for curve in one.curves.values():
        for at, budget in enumerate(one.budgets):
            row = [curve.arm, curve.decoding, f"{budget:,}", f"{curve.steps[at]:,}", *_scored(curve, at)]
            row += [f"{curve.pace[at].mean():.2f}"] * pace + [_with_error(mean_se(curve.loss[at]), 4)] * losses
            rows.append(row)
    return header, rows


def _by_seed(one: Analysis) -> Table:
    """Returns the table of Pass@1 of each seed at the last budget."""
    curves = list(one.curves.values())
    header = [f"seed, at {one.budgets[-1]:,}", *(f"{curve.arm}, {curve.decoding}" for curve in curves)]
    rates = [100 * curve.solved[-1].mean(-1) for curve in curves]
    return header, [[str(seed), *(f"{rate[at]:.1f}%" for rate in rates)] for at, seed in enumerate(one.seeds)]


def _scored(curve: Curve, at: int) -> list[str]:
    """Formats what an arm scored at a budget, each with its standard error over seeds."""
    rate, nelbo = mean_se(100 * curve.solved[at].mean(-1)), mean_se(curve.nelbo[at])
    return [_with_error(rate, 1, "%"), _with_error(nelbo, 4), f"{curve.nfe[at].mean():.1f}"]


def _with_error(found: Estimate, digits: int, unit: str = "") -> str:
    """Formats a mean with its standard error, if that is known; empty where the mean is not."""
    error = "" if np.isnan(found.se) else f" ± {found.se:.{digits}f}"
    return "" if np.isnan(found.mean) else f"{found.mean:.{digits}f}{unit}{error}"


def _compared(contrast: Contrast, at: int) -> list[str]:
    nelbo = _ends(contrast.nelbo[at], 1.0, 4) if contrast.nelbo else ""
    return [_ends(contrast.crossed[at], 100.0, 1), _ends(contrast.over_seeds[at], 100.0, 1), nelbo]


def _ends(found: Interval, scale: float, digits: int) -> str:
    mean, low, high = (f"{scale * value:+.{digits}f}" for value in found[:3])
    return f"{mean} [{low}, {high}]"


def _said(one: Analysis) -> Iterator[str]:
    """Yields the sentences under an experiment's heading."""
    kind = "primary" if one.experiment.primary else "exploratory: intervals only, nothing is claimed"
    yield f"{len(one.seeds)} seed{'' if len(one.seeds) == 1 else 's'} ({kind})."
    if len(one.versions) > 1:
        made = "; ".join(f"{count} by {name}" for name, count in sorted(one.versions.items()))
        yield (
            f"Warning: its cells were trained or scored by different versions, so that a difference may be one between these: {made}."
        )
    for contrast in one.contrasts:
        if contrast.crossing is not None:
            yield f"{contrast.says}: {contrast.crossing.text('steps of ' + (one.experiment.reference or one.experiment.arms[0]))}."


def _primaries(analyses: Sequence[Analysis]) -> list[Table]:
    """Returns the table of the primary hypotheses, in a list that is empty where the study has none."""
    findings, rows = primary(list(analyses)), []
    asked = [one for one in analyses if one.experiment.primary]
    for one in asked:
        if one.name in findings:
            rows.append(_tested(one.name, findings[one.name], all(other.complete for other in asked)))
            continue
        ends = [(of[0].crossed[-1], of[0].over_seeds[-1]) for of in [one.contrasts] if of]
        shown = [f"{_ends(interval, 100.0, 1)}, provisional" for pair in ends for interval in pair] or ["", ""]
        says = f"incomplete: {len(one.seeds)} of {one.planned} seeds"
        rows.append(
            [one.name, *shown, "", "", "not tested: that needs two seeds and two arms" if one.complete else says]
        )
    header = ["hypothesis", "difference in Pass@1, percentage points", "over seeds alone"]
    return [([*header, "p", "p, corrected (Holm)", "says"], rows)] if rows else []


def _tested(name: str, found: Finding, all_complete: bool) -> Row:
    """Returns the row of a primary hypothesis that has all its seeds; while others lack some, one of them may still be found."""
    ends = [_ends(interval, 100.0, 1) for interval in (found.interval, found.over_seeds)]
    nothing = "no difference shown" if all_complete else "no difference shown while other hypotheses are incomplete"
    return [name, *ends, f"{found.p:.4f}", f"{found.p_adjusted:.4f}", "a difference" if found.found else nothing]


_MADE_BY = "What computed these results"


_ABOUT_CELLS = (
    "A score counts for the versions that trained its cell unless its result says otherwise; results of before December 2026 never do. "
    "Seconds leave out the time of a process that was killed, and of a score that was broken off."
)


def _made_by(results: Mapping[str, Result], place: str) -> Table:
    """Returns the table of how many cells each version trained, how many scores it computed, and one of these cells, at ``place``."""
    trained = Counter(version_name(one) for result in results.values() for one in trained_by(result))
    scored = Counter(
        version_name(score_versions(result, score))
        for result in results.values()
        for score in result["scores"].values()
    )
    cells = {name: cell for cell, result in list(results.items())[::-1] for name in made_by(result, result["scores"])}
    rows = [[name, str(trained[name]), str(scored[name]), place.format(cells[name])] for name in sorted(cells)]
    return ["commit and versions", "cells trained", "scores", "a cell"], rows


def _markdown(
    study: Study, intro: list[str], primaries: list[Table], parts: list[Part], results: Mapping[str, Result]
) -> str:
    lines = [f"# {study.title}", "", *_apart(intro)]
    if primaries:
        lines += ["## Primary hypotheses", "", *_apart(map(markdown_table, primaries))]
    for one in parts:
        lines += [f"## {one.found.experiment.title}", "", *_apart(_said(one.found))]
        lines += [f"![{one.found.experiment.title}]({one.picture_file})", "", *_apart(map(markdown_table, one.tables))]
    if results:
        lines += [f"## {_MADE_BY}", "", markdown_table(_made_by(results, f"[{{0}}]({RESULTS}/{{0}}.json)")), ""]
        lines += [f"The file of a cell has its settings, versions and seconds. {_ABOUT_CELLS}"]
    return "\n".join(lines).rstrip() + "\n"


def _apart(texts: Iterator[str] | Sequence[str]) -> list[str]:
    """Returns texts with an empty line after each."""
    return [line for text in texts for line in (text, "")]


def _page(
    study: Study,
    intro: list[str],
    primaries: list[Table],
    parts: list[Part],
    results: Mapping[str, Result],
) -> str:
    """Returns the HTML page, which needs no other file: tables, pictures, and each cell's settings and versions."""
    escape: Callable[[str], str] = html.escape
    body = [f"<h1>{escape(study.title)}</h1>", *(f"<p>{escape(text)}</p>" for text in intro)]
    if primaries:
        body += ["<h2>Primary hypotheses</h2>", *map(html_table, primaries)]
    for one in parts:
        body.append(f"<h2>{escape(one.found.experiment.title)}</h2>")
        body += [f"<p>{escape(text)}</p>" for text in _said(one.found)]
        body.append(f"<figure>{one.picture}</figure>")
        body += map(html_table, one.tables)
    if results:
        body += [f"<h2>{_MADE_BY}</h2>", html_table(_made_by(results, "{0}")), f"<h2>Cells</h2><p>{_ABOUT_CELLS}</p>"]
    for name, result in results.items():
        about: dict[str, Any] = {
            key: result[key] for key in ("seconds", "versions", "continued_with", "settings") if key in result
        }
        scored = {point: score["versions"] for point, score in result["scores"].items() if "versions" in score}
        if scored:
            about["versions of scores"] = scored
        body.append(
            f"<details><summary>{escape(name)}</summary><pre>{escape(json.dumps(about, indent=1))}</pre></details>"
        )
    return html_page(study.title, body)
