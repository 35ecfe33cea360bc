"""Writes the report of a study, as Markdown and as one HTML page, and says how far the study has come."""

from __future__ import annotations

import html
import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from jaxblock.evaluation.statistics import mean_se
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
from jaxblock.study.results import Result, is_done
from jaxblock.study.spec import Study
from jaxblock.study.statistics import Interval

Row = list[str]
Table = tuple[Row, list[Row]]
"""The header and the rows of a table."""

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
    """
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
        _text_table((["arm", "done", "running", "left", "a cell takes"], rows))
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
    """
    analyses = analyse(study, plan, dict(results))
    findings = primary(analyses)
    done = sum(is_done(cell, results.get(cell.name)) for cell in plan.cells)
    intro = [f"{done} of {len(plan.cells)} cells are done." + _how_read(study)]
    parts = [Part(one, draw(one), _tables(one)) for one in analyses if one.seeds]
    waiting = [one.name for one in analyses if not one.seeds]
    if waiting:
        intro.append(f"No seed is complete yet for: {', '.join(waiting)}.")
    for one in parts:
        write_text(as_path(out) / one.picture_file, one.picture, overwrite=True)
    write_text(as_path(out) / "report.md", _markdown(study, intro, findings, parts), overwrite=True)
    write_text(as_path(out) / "report.html", _page(study, intro, findings, parts, results), overwrite=True)


def _tables(one: Analysis) -> list[Table]:
    """Returns the tables of an experiment: what each arm scored, and the comparisons; or what its kind has instead."""
    if one.measured:
        return gradients_tables(one.measured)
    if one.relation is not None:
        return [relation_table(one.relation)]
    pace = one.experiment.kind == "pace"
    scores: list[Row] = []
    for curve in one.curves.values():
        for at, budget in enumerate(one.budgets):
            row = [curve.arm, curve.decoding, f"{budget:,}", f"{curve.steps[at]:,}", *_scored(curve, at)]
            scores.append([*row, f"{curve.pace[at].mean():.2f}"] if pace else row)
    header = ["arm", "decoding", "budget", "steps", "Pass@1, mean of seeds", "NELBO per token", "forward passes"]
    tables: list[Table] = [([*header, "tokens per forward"] if pace else header, scores)]
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


def _by_seed(one: Analysis) -> Table:
    """Returns the table of Pass@1 of each seed at the last budget."""
    curves = list(one.curves.values())
    header = [f"seed, at {one.budgets[-1]:,}", *(f"{curve.arm}, {curve.decoding}" for curve in curves)]
    rates = [100 * curve.solved[-1].mean(-1) for curve in curves]
    return header, [[str(seed), *(f"{rate[at]:.1f}%" for rate in rates)] for at, seed in enumerate(one.seeds)]


def _scored(curve: Curve, at: int) -> list[str]:
    """Formats what an arm scored at a budget, each with its standard error over seeds."""
    rate, nelbo = mean_se(100 * curve.solved[at].mean(-1)), mean_se(curve.nelbo[at])
    spread = lambda se, digits: "" if np.isnan(se) else f" ± {se:.{digits}f}"  # noqa: E731
    bound = "" if np.isnan(nelbo.mean) else f"{nelbo.mean:.4f}{spread(nelbo.se, 4)}"
    return [f"{rate.mean:.1f}%{spread(rate.se, 1)}", bound, f"{curve.nfe[at].mean():.1f}"]


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
    for contrast in one.contrasts:
        if contrast.crossing is not None:
            yield f"{contrast.says}: {contrast.crossing.text('steps of ' + (one.experiment.reference or one.experiment.arms[0]))}."


def _findings(findings: Mapping[str, Finding]) -> Table:
    """Returns the table of the primary hypotheses."""
    rows = [
        [
            name,
            _ends(found.interval, 100.0, 1),
            _ends(found.over_seeds, 100.0, 1),
            f"{found.p:.4f}",
            f"{found.p_adjusted:.4f}",
            "a difference" if found.found else "no difference shown",
        ]
        for name, found in findings.items()
    ]
    return [
        "hypothesis",
        "difference in Pass@1, percentage points",
        "over seeds alone",
        "p",
        "p, corrected (Holm)",
        "says",
    ], rows


def _markdown(study: Study, intro: list[str], findings: Mapping[str, Finding], parts: list[Part]) -> str:
    lines = [f"# {study.title}", "", *_apart(intro)]
    if findings:
        lines += ["## Primary hypotheses", "", _markdown_table(_findings(findings)), ""]
    for one in parts:
        lines += [f"## {one.found.experiment.title}", "", *_apart(_said(one.found))]
        lines += [f"![{one.found.experiment.title}]({one.picture_file})", "", *_apart(map(_markdown_table, one.tables))]
    return "\n".join(lines).rstrip() + "\n"


def _apart(texts: Iterator[str] | Sequence[str]) -> list[str]:
    """Returns texts with an empty line after each."""
    return [line for text in texts for line in (text, "")]


def _markdown_table(table: Table) -> str:
    header, rows = table
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _text_table(table: Table) -> str:
    header, rows = table
    widths = [max(len(row[at]) for row in [header, *rows]) for at in range(len(header))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in [header, *rows]
    )


_CSS = """
:root { color-scheme: light dark; }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 72rem; margin: 2rem auto; padding: 0 1rem; }
table { border-collapse: collapse; margin: 1rem 0; font-variant-numeric: tabular-nums; display: block; overflow-x: auto; }
th, td { padding: .2rem .7rem; text-align: left; border-bottom: 1px solid #8884; white-space: nowrap; }
figure { margin: 1rem 0; background: #fff; border-radius: 4px; padding: .5rem; overflow-x: auto; }
pre { overflow-x: auto; font-size: 13px; }
"""


def _page(
    study: Study,
    intro: list[str],
    findings: Mapping[str, Finding],
    parts: list[Part],
    results: Mapping[str, Result],
) -> str:
    """Returns the HTML page, which needs no other file: tables, pictures, and each cell's settings and versions."""
    escape: Callable[[str], str] = html.escape
    body = [f"<h1>{escape(study.title)}</h1>", *(f"<p>{escape(text)}</p>" for text in intro)]
    if findings:
        body += ["<h2>Primary hypotheses</h2>", _html_table(_findings(findings))]
    for one in parts:
        body.append(f"<h2>{escape(one.found.experiment.title)}</h2>")
        body += [f"<p>{escape(text)}</p>" for text in _said(one.found)]
        body.append(f"<figure>{one.picture}</figure>")
        body += map(_html_table, one.tables)
    body.append("<h2>Cells</h2>")
    for name, result in results.items():
        about = {key: result[key] for key in ("seconds", "versions", "settings")}
        body.append(
            f"<details><summary>{escape(name)}</summary><pre>{escape(json.dumps(about, indent=1))}</pre></details>"
        )
    head = (
        f'<meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>{escape(study.title)}</title>'
    )
    return (
        f'<!doctype html>\n<html lang="en">\n<head>{head}<style>{_CSS}</style></head>\n<body>\n'
        + "\n".join(body)
        + "\n</body>\n</html>\n"
    )


def _html_table(table: Table) -> str:
    header, rows = table
    lines = [f"<tr>{''.join(f'<td>{html.escape(cell)}</td>' for cell in row)}</tr>" for row in rows]
    names = "".join(f'<th scope="col">{html.escape(cell)}</th>' for cell in header)
    return f"<table><thead><tr>{names}</tr></thead><tbody>{''.join(lines)}</tbody></table>"
