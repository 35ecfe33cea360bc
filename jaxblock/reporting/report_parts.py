"""Draws the sections of a run's report that are text and tables: times, evaluations, samples and settings."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from jaxblock.diffusion.decoding.config import DecodeConfig
from jaxblock.reporting.run_files import Evaluation, RunFiles
from jaxblock.training.observe import goodput
from jaxblock.training.observe.samples import Sample


def pairs(facts: Sequence[tuple[str, str]]) -> str:
    """Returns the inside of a description list."""
    return "".join(f"<dt>{escape(name)}</dt><dd>{escape(text)}</dd>" for name, text in facts)


def share(score: Mapping[str, Any]) -> str:
    """Writes a score such as Pass@1 with its 95% interval, as ``82.8% [79.3%, 85.8%] (424 of 512)``."""
    try:
        counts = f"({score['correct']:,} of {score['n']:,})"
        return f"{score['correct'] / score['n']:.1%} [{score['low']:.1%}, {score['high']:.1%}] {counts}"
    except (KeyError, TypeError, ValueError, ZeroDivisionError):
        return "not a score"


def time_section(run: RunFiles) -> str:
    """Returns the section that says where the time went."""
    head = "<section><h2>Where the time went</h2>"
    if run.time is None:
        return f"{head}<p>no row of goodput yet</p></section>"
    seconds = {cause: float(run.time["seconds"].get(cause, 0.0)) for cause in goodput.CAUSES}
    whole = sum(seconds.values()) or 1.0
    bars, keys, at = [], [], 0.0
    for number, (cause, spent) in enumerate(seconds.items()):
        if spent <= 0:
            continue
        width = 100 * spent / whole
        bars.append(
            f'<rect class="swatch c{number}" x="{at:.3f}" y="0" width="{width:.3f}" height="10">'
            f"<title>{cause}: {spent:,.1f} s</title></rect>"
        )
        swatch = f'<svg viewBox="0 0 12 12" aria-hidden="true"><rect class="swatch c{number}" width="12" height="12" rx="2"/></svg>'
        keys.append(f'<span class="key">{swatch}{cause} {spent:,.1f} s ({width:.0f}%)</span>')
        at += width
    line = escape(goodput.describe(run.time))
    return (
        f"{head}<p>Up to step {run.time['step']:,}: {line}</p>"
        f'<svg class="time" viewBox="0 0 100 10" preserveAspectRatio="none" role="img" aria-label="{line}">{"".join(bars)}</svg>'
        f"<div>{''.join(keys)}</div></section>"
    )


def evaluations_section(evaluations: Sequence[Evaluation]) -> str:
    """Returns the section with a row for each evaluation; those of the run itself stand out."""
    head = "<section><h2>Evaluations</h2>"
    if not evaluations:
        return f"{head}<p>none was given or found beside the run (folders of <code>jaxblock evaluate --out</code>)</p></section>"
    of_run, of_score = (
        ("folder", "checkpoint", "step", "split"),
        ("Pass@1 [95% interval]", "grader", "NELBO per text token", "NFE"),
    )
    names = (*of_run, *of_score, "decoding", "against")
    rows = "".join(map(_evaluation_row, evaluations))
    titles = "".join(f'<th scope="col">{name}</th>' for name in names)
    return (
        f"{head}<p>NELBO in nats ± 1 standard error; NFE: forward passes a problem. Evaluations of this run are bold.</p>"
        f'<div class="scroll"><table><thead><tr>{titles}</tr></thead><tbody>{rows}</tbody></table></div></section>'
    )


def _evaluation_row(evaluation: Evaluation) -> str:
    if evaluation.problem:
        told = f'<td colspan="9" class="bad">{escape(evaluation.problem)}</td>'
        return f"<tr><td>{escape(evaluation.folder)}</td>{told}</tr>"
    found = evaluation.summary
    decode, bound, score = (_part(found, name) for name in ("decode", "nelbo_per_token", "pass_at_1"))
    mean, error = _number(bound, "mean", ".4f"), _number(bound, "se", ".4f")
    cells = [
        evaluation.folder,
        found["checkpoint"],
        _number(found, "step", ","),
        str(found.get("split", "")),
        share(score) if score else "",
        str(found.get("grader", "")),
        f"{mean} ± {error}" if mean else "",
        _number(found, "nfe", ".1f"),
        _decoding(decode, _part(found, "canvas")),
        _against(_part(found, "compared_with")),
    ]
    inside = "".join(f"<td{' class=path' * (at < 2)}>{escape(cell)}</td>" for at, cell in enumerate(cells))
    return f'<tr class="{"own" if evaluation.own else "other"}">{inside}</tr>'


def _part(found: Mapping[str, Any], name: str) -> dict[str, Any]:
    part = found.get(name)
    return part if isinstance(part, dict) else {}


def _number(found: Mapping[str, Any], name: str, form: str) -> str:
    """Writes a number; nothing where there is none."""
    value = found.get(name)
    return f"{value:{form}}" if isinstance(value, int | float) and not isinstance(value, bool) else ""


def _decoding(decode: Mapping[str, Any], canvas: Mapping[str, Any]) -> str:
    """Writes the decoder's rule, the response's length and blocks, and every setting that is not the default."""
    hidden = ("rule", "response_len", "block", "stop_ids", "fill_id", "batch_size")
    plain = dataclasses.asdict(DecodeConfig())
    blocks = [decode.get(name) or canvas.get(name) for name in ("response_len", "block")]
    changed = [
        f"{name} {value}" for name, value in decode.items() if name not in hidden and value != plain.get(name, value)
    ]
    shape = [f"{blocks[0]} positions in blocks of {blocks[1]}"] if all(blocks) else []
    return ", ".join(filter(None, [str(decode.get("rule", "")), *shape, *changed]))


def _against(test: Mapping[str, Any]) -> str:
    """Writes a paired test with an earlier evaluation."""
    if not test:
        return ""
    here, there, p = (
        _number(test, name, form) for name, form in (("only_b", ","), ("only_a", ","), ("p_value", ".2g"))
    )
    return f"{test.get('file', '')}: {here} right here alone, {there} right there alone (McNemar p = {p})"


def samples_section(run: RunFiles) -> str:
    """Returns the section with the answers to a few validation problems, the newest first."""
    head = "<section><h2>Samples</h2>"
    broken = f'<p class="bad">{run.not_samples:,} lines of samples.jsonl are no samples</p>' if run.not_samples else ""
    if not run.samples:
        return f"{head}<p>none: the run has no samples.jsonl, or nothing in it</p>{broken}</section>"
    problems: dict[tuple[str, str], list[Sample]] = {}
    for sample in run.samples:
        problems.setdefault((str(sample.get("index", "")), sample["prompt"]), []).append(sample)
    parts = []
    for at, ((index, prompt), samples) in enumerate(problems.items()):
        rows = "".join(map(_sample_row, sorted(samples, key=lambda sample: -sample["step"])))
        reference = samples[-1].get("reference")
        right = f'<h3>Reference</h3><p class="text">{escape(reference)}</p>' if isinstance(reference, str) else ""
        parts.append(
            f"<details{' open' if at == 0 else ''}><summary>problem {escape(index)}: {escape(_short(prompt))}</summary>"
            f'<h3>Prompt</h3><p class="text">{escape(prompt)}</p>{right}<div class="scroll"><table><thead><tr>'
            f'<th scope="col">step</th><th scope="col">graded</th><th scope="col">response</th></tr></thead>'
            f"<tbody>{rows}</tbody></table></div></details>"
        )
    return f"{head}{broken}{''.join(parts)}</section>"


def _sample_row(sample: Sample) -> str:
    verdict = (
        {True: "right", False: "wrong"}.get(sample["correct"], "") if isinstance(sample.get("correct"), bool) else ""
    )
    text = sample["response"]
    response = escape(text) if text.strip() else "(white space only)" if text else "(empty)"
    return f'<tr><td>{sample["step"]:,}</td><td class="{verdict}">{verdict}</td><td class="text">{response}</td></tr>'


def _short(text: str) -> str:
    """Returns the end of a text in one line, which of a prompt is the question."""
    line = " ".join(text.split())
    return line if len(line) <= 80 else f"…{line[-80:]}"


def config_section(changed: Sequence[tuple[str, str]], config: str) -> str:
    """Returns the section with the settings that are not the defaults, and the whole config."""
    rows = "".join(f'<tr><th scope="row">{escape(name)}</th><td>{escape(value)}</td></tr>' for name, value in changed)
    return (
        f"<section><h2>Settings</h2><details open><summary>{len(changed)} settings that are not the defaults</summary>"
        f"<table><tbody>{rows}</tbody></table></details><details><summary>config.yaml, whole</summary>"
        f'<pre class="text">{escape(config)}</pre></details></section>'
    )
