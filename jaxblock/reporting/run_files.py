"""Reads what a run left behind, for its report: metrics, times, samples, and the evaluations beside it."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any, NamedTuple

from etils import epath

from jaxblock.errors import UserError
from jaxblock.io.files import read_json
from jaxblock.io.json_lines import read_jsonl_bytes
from jaxblock.io.json_text import parse_json
from jaxblock.io.paths import PathLike, absolute_path, as_path, explained, in_same_bucket
from jaxblock.training.observe import goodput
from jaxblock.training.observe.metrics import METRICS_FILE, Metrics, read_metrics, readable_rows
from jaxblock.training.observe.rows import Row
from jaxblock.training.observe.samples import SAMPLES_FILE, Sample

SUMMARY_FILE = "summary.json"
"""The file in which an evaluation's folder says what was found."""


class Evaluation(NamedTuple):
    """Holds what an evaluation found.

    Attributes:
        folder: its folder: as it was given, or as it is called from the folder that the run is in.
        summary: the content of its summary.json; {} where that cannot be read.
        problem: why it cannot be read; empty where it can.
        own: whether it scored this run.
    """

    folder: str
    summary: dict[str, Any]
    problem: str
    own: bool


class RunFiles(NamedTuple):
    """Holds what a run left behind.

    Attributes:
        metrics: its rows of metrics; none where it has no metrics yet.
        time: its last row of goodput; None without one.
        resumed: the steps from which it continued.
        samples: the answers to a few validation problems at each evaluation, in the file's order.
        not_samples: the number of lines of that file that are no samples.
        evaluations: the evaluations found in the run's folder and beside it, and those that were given.
    """

    metrics: Metrics
    time: Row | None
    resumed: list[int]
    samples: list[Sample]
    not_samples: int
    evaluations: list[Evaluation]


def read_run_files(run: PathLike, evaluations: Sequence[PathLike] = ()) -> RunFiles:
    """Reads a run's metrics and samples, and evaluations: those given, those in the run's folder, and those beside it.

    Args:
        run: the run folder.
        evaluations: folders with a summary.json.

    Raises:
        UserError: the metrics cannot be read, or a folder that was given holds no evaluation.
    """
    folder = as_path(run)
    path = folder / METRICS_FILE
    rows = readable_rows(path)
    samples, broken = _read_samples(folder / SAMPLES_FILE)
    return RunFiles(
        metrics=read_metrics(path) if rows else Metrics([], []),
        time=next((row for row in reversed(rows) if row["kind"] == goodput.KIND), None),
        resumed=[row["step"] for row in rows if row["kind"] == "resume"],
        samples=samples,
        not_samples=broken,
        evaluations=_read_evaluations(folder, [as_path(given) for given in evaluations]),
    )


def _read_samples(path: epath.Path) -> tuple[list[Sample], int]:
    """Returns the samples of a file, and how many of its lines are none; a file that is not there has none."""
    samples, broken = [], 0
    lines = read_jsonl_bytes(path).split(b"\n")
    for line in lines[:-1]:  # the last one is empty, or was cut off by a kill
        try:
            sample = parse_json(line)
        except ValueError:
            sample = None
        if isinstance(sample, dict) and _is_sample(sample):
            samples.append(sample)
        else:
            broken += 1
    return samples, broken


def _is_sample(row: Sample) -> bool:
    return type(row.get("step")) is int and all(isinstance(row.get(name), str) for name in ("prompt", "response"))


def _read_evaluations(run: epath.Path, given: Sequence[epath.Path]) -> list[Evaluation]:
    """Reads the evaluations in the run's folder, those in the folders beside it, and those that were given, each once."""
    for folder in given:
        if not (folder / SUMMARY_FILE).exists():
            raise UserError(f"{folder} holds no {SUMMARY_FILE}: give the folder that `jaxblock evaluate --out` made")
    place = absolute_path(run)
    found: list[epath.Path] = []
    with explained("look for evaluations beside", run):
        for parent in (one for one in (place, place.parent) if in_same_bucket(place, one)):
            found += sorted(child for child in parent.iterdir() if (child / SUMMARY_FILE).exists())
    named = {folder: os.fspath(folder.relative_to(place.parent)) for folder in found}
    named |= {folder: os.fspath(folder) for folder in given}
    each = {
        os.path.realpath(folder): folder for folder in [*found, *given]
    }  # a folder that was given and found is given
    return [_read_evaluation(folder, named[folder], run, needed=folder in given) for folder in each.values()]


def _read_evaluation(folder: epath.Path, name: str, run: epath.Path, *, needed: bool) -> Evaluation:
    """Reads an evaluation; one that was only found, and cannot be read, is kept with the reason."""
    try:
        summary = read_json(folder / SUMMARY_FILE)
        if not isinstance(summary, dict) or not isinstance(summary.get("checkpoint"), str):
            raise UserError(f"{folder / SUMMARY_FILE} is not the summary of an evaluation")
    except UserError as error:
        if needed:
            raise
        return Evaluation(name, {}, str(error), own=False)
    own = os.path.realpath(summary["checkpoint"]) == os.path.realpath(run)
    return Evaluation(name, summary, "", own)
