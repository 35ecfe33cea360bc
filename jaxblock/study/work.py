"""Runs one cell of a study: trains it and scores its checkpoints, through the same verbs that people use."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

from jaxblock.config.config import Config
from jaxblock.data.store.manifest import read_manifest
from jaxblock.errors import UserError
from jaxblock.io.paths import as_path
from jaxblock.study.cells import Cell, Plan, Point, fingerprint, how_scored, not_default, run_config, scored_config
from jaxblock.study.gradients.measure import measure_checkpoint
from jaxblock.study.gradients.sizes import GRADIENTS
from jaxblock.study.results import RESULTS, Result, check_contents, missing_points, read_result, write_result
from jaxblock.study.scores import score_of, shortened, trained_by, training_loss
from jaxblock.study.spec import Study
from jaxblock.training.versions import running_versions


class Verbs(NamedTuple):
    """Holds the verbs that a study calls; each raises UserError, or returns an exit code.

    Attributes:
        prepare: prepares the data of a config.
        train: trains the run of a config.
        evaluate: scores a run: (config, its folder, the step of the checkpoint, the folder to make).
    """

    prepare: Callable[[Config], int]
    train: Callable[[Config], int]
    evaluate: Callable[[Config, str, int, str], int]


def run_cell(
    study: Study,
    cell: Cell,
    folder: str,
    verbs: Verbs,
    say: Callable[[str], object],
    check: Callable[[], None] = lambda: None,
) -> int:
    """Trains a cell's run and scores it at its points; what is done already is not done again.

    The result is written before training, after it, also where that is told to stop, and after each score, so that a cell that is
    stopped goes on where it was, and a result names the versions that began to train it.

    Args:
        study: the study.
        cell: the cell; the run of the cell that it starts from must be complete.
        folder: the study's folder.
        verbs: the verbs.
        say: prints a line.
        check: raises UserError where another process has taken the cell over; nothing is written then.

    Returns:
        The exit code: 0, or that of a run that was told to stop.

    Raises:
        UserError: a verb failed.
    """
    known = _known(folder, cell)
    # Where the run is longer already, as another version of the study's file wanted it, its checkpoints are the same.
    config = run_config(study, replace(cell, steps=max(cell.steps, known["steps"] if known else 0)), folder)
    begin, versions = time.perf_counter(), _versions()
    result = known or _new_result(study, cell, config, versions)
    if result["steps"] < config.train.steps:
        if versions not in trained_by(result):
            result.setdefault("continued_with", []).append(versions)
        write_result(folder, cell.name, result)
    code = verbs.train(config)
    check()
    _add_seconds(result, "training", begin)
    result["steps"] = result["steps"] if code else config.train.steps
    write_result(folder, cell.name, result)
    if code:
        return code
    for point in missing_points(cell, result):
        say(f"{cell.name}: scoring {point}")
        begin = time.perf_counter()
        if point.decoding == GRADIENTS:
            score = shortened(measure_checkpoint(config.train.out, point.steps, config, study.gradients))
        else:
            check()  # before the folder of a score is removed, which may be another process's by now
            score = _score(study, cell, config, folder, point, verbs)
        score["how"] = how_scored(study, cell.arm, point.decoding)
        if (loss := training_loss(config.train, point.steps)) is not None:
            score["loss"] = loss
        if versions != result["versions"]:
            score["versions"] = versions
        check()
        result["scores"][str(point)] = score
        _add_seconds(result, "scoring", begin)
        write_result(folder, cell.name, result)
    return 0


def _known(folder: str, cell: Cell) -> Result | None:
    """Returns the result of a cell so far; None where there is none. Raises UserError where it lacks something."""
    file = as_path(folder) / RESULTS / f"{cell.name}.json"
    if not file.exists():
        return None
    found = read_result(file)
    check_contents(Plan([cell], {}), {cell.name: found})
    return found


def _versions() -> dict[str, str]:
    """Returns the versions that are running, and the devices."""
    import jax

    return {**running_versions(), "device": f"{jax.device_count()} x {jax.devices()[0].device_kind}"}


def _add_seconds(result: Result, part: str, begin: float) -> None:
    """Adds the time since ``begin`` (``time.perf_counter``) to what a part of the work has taken."""
    result["seconds"][part] = round(result["seconds"].get(part, 0.0) + time.perf_counter() - begin, 1)


def _new_result(study: Study, cell: Cell, config: Config, versions: dict[str, str]) -> Result:
    """Returns the result of a cell without scores, which says how it is computed."""
    return {
        "cell": cell.name,
        "arm": cell.arm,
        "seed": cell.seed,
        "steps": 0,
        "start": cell.start,
        "fingerprint": fingerprint(study, cell),
        "records": read_manifest(config.data.prepared).inputs["train"]["sha256"][:16],
        "settings": {one.section_name: found for one in config.sections() if (found := not_default(one))},
        "versions": versions,
        "seconds": {},
        "scores": {},
    }


def _score(study: Study, cell: Cell, config: Config, folder: str, point: Point, verbs: Verbs) -> Result:
    """Scores one checkpoint of a cell by one way of decoding, and returns what the result keeps of it."""
    settings = scored_config(study, cell.arm, point.decoding, folder)
    out = as_path(folder) / "work" / f"{cell.name}-{point.steps}-{point.decoding}"
    if out.exists():
        shutil.rmtree(out)  # of a cell that was stopped
    code = verbs.evaluate(settings, config.train.out, point.steps, str(out))
    if code:
        raise UserError(f"{cell.name}: the evaluation of {point} ended with code {code}")
    score = score_of(out)
    shutil.rmtree(out)
    return score
