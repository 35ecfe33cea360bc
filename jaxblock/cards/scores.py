"""Finds the evaluations of the weights that are exported, and writes them for a model card, with their intervals."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from huggingface_hub import EvalResult

from jaxblock.cards.run import shown_source
from jaxblock.errors import UserError, first_line
from jaxblock.io.files import read_json
from jaxblock.io.folders import list_folder
from jaxblock.io.paths import PathLike, absolute_path, as_path, in_same_bucket
from jaxblock.training.checkpoints.run_folder import Run
from jaxblock.training.observe.metrics import METRICS_FILE, read_metrics

SUMMARY = "summary.json"
"""The file in an evaluation's folder with all that it found."""


class Evaluation(NamedTuple):
    """Holds an evaluation that ``jaxblock evaluate`` wrote.

    Attributes:
        folder: its folder.
        summary: the content of its summary.json.
    """

    folder: str
    summary: Mapping[str, Any]


def read_evaluation(folder: PathLike, weights: str | None) -> Evaluation:
    """Reads an evaluation that the user names.

    Args:
        folder: the folder that ``evaluate`` wrote.
        weights: the fingerprint of the weights that are exported (``base_identity.weights_fingerprint``); None where they
            cannot be told from others.

    Raises:
        UserError: the folder holds no evaluation, or one of other weights.
    """
    name = os.fspath(folder)
    if not (as_path(folder) / SUMMARY).is_file():
        raise UserError(f"{name} holds no {SUMMARY}: give the folder that `jaxblock evaluate --out` wrote")
    found = Evaluation(name, _checked(read_json(as_path(folder) / SUMMARY), f"{name}/{SUMMARY}"))
    if weights is None or found.summary.get("weights") != weights:
        known = "weights" in found.summary
        why = f"is of other weights ({found.summary['checkpoint']})" if known else "does not say of which weights it is"
        raise UserError(
            f"{name}/{SUMMARY} {why}: evaluate the checkpoint that is exported, or leave this evaluation out"
        )
    return found


def find_evaluations(run: PathLike, weights: str | None) -> list[Evaluation]:
    """Finds the evaluations of these weights in the folders in a run's folder, beside it, and in a folder ``scores`` beside its parent.

    Args:
        run: the run folder.
        weights: the fingerprint of the weights that are exported.

    Returns:
        The evaluations, by the names of their folders. Those of other weights, or damaged ones, are left out.
    """
    place = absolute_path(run)
    found = []
    places = (place, place.parent, place.parent.parent / "scores")
    for parent in (one for one in places if in_same_bucket(place, one)):
        for folder in list_folder(parent):
            if (folder / SUMMARY).is_file():
                try:
                    found.append(read_evaluation(folder, weights))
                except UserError:
                    continue
    return found


def _checked(summary: Any, where: str) -> Mapping[str, Any]:
    """Returns a summary with all that a card reads of it; raises UserError where it is none."""
    try:
        texts = [summary[name] for name in ("checkpoint", "split", "grader")]
        numbers: list[Any] = []
        if "pass_at_1" in summary:
            numbers += [summary["pass_at_1"][name] for name in ("rate", "low", "high", "n", "correct")]
        if "nelbo_per_token" in summary:
            numbers += [summary["nelbo_per_token"]["mean"], summary["nelbo_per_token"]["n"]]
    except (KeyError, TypeError, IndexError) as error:
        raise UserError(
            f"{where} is no summary of `jaxblock evaluate` ({type(error).__name__}: {first_line(error)})"
        ) from error
    if not all(isinstance(text, str) for text in texts) or not all(type(number) in (int, float) for number in numbers):
        raise UserError(f"{where} is no summary of `jaxblock evaluate`: a score is no number")
    return summary


def scores_text(evaluations: Sequence[Evaluation], run: Run | None, step: int | None) -> str:
    """Returns the section Scores: a table of all evaluations, and the one that the run made of the validation records at its step."""
    rows = [line for found in evaluations for line in _lines(found.summary)]
    if run is not None and step is not None:
        rows += _while_training(run, step)
    if not rows:
        return "None were measured of these weights."
    head = ["| records | measured | value | how |", "|---|---|---|---|"]
    note = (
        "Intervals are 95% (Wilson); ± is one standard error. Scores are of the weights before this export, in the type and the "
        "form in which they were trained."
    )
    return "\n".join([*head, *rows, "", note])


def _lines(summary: Mapping[str, Any]) -> Iterable[str]:
    source = f"`{shown_source(summary['source'])}`, " if summary.get("source") else ""
    records = f"{source}{summary['split']}"
    decode = summary.get("decode")
    how = f"rule `{decode['rule']}`" if isinstance(decode, Mapping) and isinstance(decode.get("rule"), str) else ""
    if "pass_at_1" in summary:
        nfe = summary.get("nfe")
        spent = f"{how}, {nfe:.1f} forward passes a problem" if isinstance(nfe, int | float) else how
        yield _pass_line(records, summary["pass_at_1"], summary["grader"], spent)
    if "nelbo_per_token" in summary:
        exact = "every masked set" if summary.get("nelbo_exact") else "Monte Carlo over masked sets"
        yield _nelbo_line(records, summary["nelbo_per_token"], exact)


def _while_training(run: Run, step: int) -> Iterable[str]:
    """Yields the lines of the evaluation that the run made at a step; none where its metrics cannot be read."""
    try:
        rows = [row for row in read_metrics(run.folder / METRICS_FILE).evals if row["step"] == step]
    except UserError:
        return
    for row in rows[-1:]:
        if "pass_at_1" in row and row["pass_at_1"]["n"]:
            score = {"rate": row["pass_at_1"]["correct"] / row["pass_at_1"]["n"], **row["pass_at_1"]}
            yield _pass_line(
                "validation", score, str(row.get("grader", "not recorded")), f"while training, at step {step:,}"
            )
        mean = row.get("nelbo_per_token", {}).get("mean")
        if isinstance(mean, int | float):
            yield _nelbo_line("validation", row["nelbo_per_token"], f"while training, at step {step:,}")


def _pass_line(records: str, score: Mapping[str, Any], grader: str, how: str) -> str:
    value = f"{score['rate']:.1%} [{score['low']:.1%}, {score['high']:.1%}] ({score['correct']:,} of {score['n']:,})"
    return f"| {records} | Pass@1, grader `{grader}` | {value} | {how} |"


def _nelbo_line(records: str, bound: Mapping[str, Any], how: str) -> str:
    error = bound.get("se")
    known = isinstance(error, int | float) and math.isfinite(error)
    return (
        f"| {records} | NELBO per text token | {bound['mean']:.4g}{f' ± {error:.2g}' if known else ''} nats | {how} |"
    )


def results(evaluations: Sequence[Evaluation]) -> list[EvalResult]:
    """Returns the Pass@1 of each evaluation for the header of a card, where the hub looks for scores."""
    found = []
    for _, summary in evaluations:
        if "pass_at_1" not in summary:
            continue
        score = summary["pass_at_1"]
        source = shown_source(summary.get("source"))
        found.append(
            EvalResult(
                task_type="text-generation",
                dataset_type=source,
                dataset_name=source,
                dataset_split=summary["split"],
                metric_type="pass@1",
                metric_name=f"Pass@1 ({summary['grader']})",
                metric_value=score["rate"],
                metric_args={"problems": score["n"], "interval_95": [score["low"], score["high"]]},
            )
        )
    return found
