"""Writes and reads the results of a study: a small JSON file for each cell, which is all that reports are made from."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from etils import epath

from jaxblock.errors import UserError, shown
from jaxblock.io.files import read_json, write_json, write_text
from jaxblock.io.folders import list_folder
from jaxblock.io.paths import PathLike, as_path
from jaxblock.study.cells import Cell, Plan, Point, fingerprint, how_scored
from jaxblock.study.gradients.sizes import GRADIENTS
from jaxblock.study.spec import Study
from jaxblock.study.study_file import read_study

Result = dict[str, Any]
"""What is known of a cell: its name, arm and seed, its settings and versions, and its scores by point.

``versions`` are those that began to train it; ``continued_with`` lists others that went on. A score has ``versions`` of its own
where they differ from the cell's, and the training ``loss`` before it. Earlier versions of jaxblock wrote neither.
"""

SPEC, CELLS, RESULTS = "study.yaml", "cells.json", "results"
"""The names of the study's description, of the file that says what it computes, and of the folder of results."""


def write_plan(folder: PathLike, spec_text: str, plan: Plan, fingerprints: Mapping[str, str]) -> None:
    """Writes a study's description and what it computes into its folder, where reports find them."""
    listed = [
        {
            "arm": cell.arm,
            "seed": cell.seed,
            "steps": cell.steps,
            "points": [str(point) for point in cell.points],
            "start": cell.start,
            "fingerprint": fingerprints[cell.name],
        }
        for cell in plan.cells
    ]
    root = as_path(folder)
    lines = ",\n".join(f"  {json.dumps(one)}" for one in listed)
    text = f'{{\n "steps": {json.dumps(plan.steps)},\n "cells": [\n{lines}\n ]\n}}\n'
    write_text(root / SPEC, spec_text, overwrite=True)
    write_text(root / CELLS, text, overwrite=True)


def read_plan(folder: PathLike) -> tuple[Study, Plan]:
    """Reads a study's description and what it computes from its folder.

    Raises:
        UserError: the folder holds no study.
    """
    root = as_path(folder)
    if not (root / CELLS).exists():
        raise UserError(
            f"{folder} holds no study ({CELLS} is missing): make one with `jaxblock study run FILE --out {folder}`"
        )
    found = read_json(root / CELLS)
    cells = [
        Cell(one["arm"], one["seed"], one["steps"], tuple(_point(text) for text in one["points"]), one["start"])
        for one in found["cells"]
    ]
    steps = {name: {arm: tuple(at) for arm, at in arms.items()} for name, arms in found["steps"].items()}
    return read_study(root / SPEC), Plan(cells, steps)


def _point(text: str) -> Point:
    steps, _, decoding = text.partition("/")
    return Point(int(steps), decoding)


def read_results(folder: PathLike) -> dict[str, Result]:
    """Reads the results in a study's folder by the names of their cells.

    Raises:
        UserError: a file is not the result of a cell.
    """
    files = [file for file in list_folder(as_path(folder) / RESULTS) if file.name.endswith(".json")]
    return {file.name.removesuffix(".json"): read_result(file) for file in files}


def read_result(file: PathLike) -> Result:
    """Reads the result of a cell, and checks that it has steps and scores; `check_contents` checks the rest.

    Raises:
        UserError: the file is not JSON, or not the result of a cell.
    """
    found = read_json(file)
    if not isinstance(found, dict):
        raise UserError(f"{file}: the result of a cell is a JSON object, not {shown(found)}: {_MEND}")
    _field(found, "steps", int, str(file))
    _field(found, "scores", dict, str(file))
    return found


_MEND = "copy the file again from where it was computed, or move it away and run the study again"
_KINDS: dict[Any, str] = {
    str: "a text",
    int: "a whole number",
    (int, float): "a number",
    dict: "an object",
    list: "a list",
}
_MEASURED = ("sizes", "variance", "decomposition", "direction", "tightness")
"""What a measurement of gradients has."""


def _field(found: Mapping[str, Any], key: str, kind: Any, where: str) -> Any:
    """Returns a field of an object in a file; raises UserError where it is missing or of another kind."""
    value = found.get(key)
    if not isinstance(value, kind) or isinstance(value, bool):
        wrong = f"{key} is {shown(value)}, not {_KINDS[kind]}" if key in found else f"{key} is missing"
        raise UserError(f"{where}: {wrong}: {_MEND}")
    return value


def check_contents(plan: Plan, results: Mapping[str, Result], bounded: bool = False) -> None:
    """Checks that results hold what a report shows of them, before anything is written.

    Args:
        plan: what the study computes.
        results: the results, also of cells that the plan does not have.
        bounded: whether every score of an evaluation has the NELBO.

    Raises:
        UserError: a field is missing, of another kind, or not possible.
    """
    for name, result in results.items():
        file = f"{RESULTS}/{name}.json"
        for key in ("seconds", "versions", "settings"):
            _field(result, key, dict, file)
        for part in result["seconds"]:
            _field(result["seconds"], part, (int, float), f"{file}, seconds")
        if not all(
            isinstance(one, dict) for one in _field({"continued_with": [], **result}, "continued_with", list, file)
        ):
            raise UserError(f"{file}: continued_with has an item that is not an object: {_MEND}")
    for cell in plan.cells:
        scores = results[cell.name]["scores"] if cell.name in results else {}
        for point in cell.points:
            if str(point) in scores:
                file = f"{RESULTS}/{cell.name}.json"
                score = _field(scores, str(point), dict, f"{file}, scores")
                _check_score(score, point, f"{file}, point {point}", bounded)


def _check_score(score: Result, point: Point, where: str, bounded: bool) -> None:
    """Raises UserError where a score lacks something that a report shows."""
    _field({"versions": {}, **score}, "versions", dict, where)
    loss = _field({"loss": [0.0, 1.0], **score}, "loss", list, where)
    if len(loss) != 2 or not all(isinstance(part, int | float) for part in loss) or not loss[1]:
        raise UserError(f"{where}: loss is {shown(loss)}, not the sum and the number of tokens: {_MEND}")
    if point.decoding == GRADIENTS:
        for key in _MEASURED:
            _field(score, key, dict, where)
        return
    for key in ("nfe", "tokens_per_forward"):
        _field(score, key, (int, float), where)
    if bounded or "nelbo_per_token" in score:
        _field(_field(score, "nelbo_per_token", dict, where), "mean", (int, float), f"{where}, nelbo_per_token")
    problems, correct = _field(score, "problems", int, where), _field(score, "correct", str, where)
    digits = 2 * -(-problems // 8)
    if problems < 1 or len(correct) != digits or not re.fullmatch("[0-9a-f]*", correct):
        raise UserError(
            f"{where}: correct has a bit for each of its {problems} problems, {digits} hexadecimal digits, but it is "
            f"{shown(correct)}: {_MEND}"
        )


def check_results(
    study: Study, plan: Plan, results: Mapping[str, Result], folder: PathLike, spec: PathLike | None = None
) -> None:
    """Checks that results are those of a study's cells; those of cells that it does not have are left alone.

    Args:
        study: the study.
        plan: what it computes.
        results: the results in its folder.
        folder: the folder, for messages.
        spec: the file that describes the study; None for the copy in its folder.

    Raises:
        UserError: a cell was trained or scored with other settings, as by a process that runs another version of the file; cells of
            one task were trained or scored on other texts, as by another version of what generates them; or a result does not say
            with which.
    """
    root, file = as_path(folder), spec or as_path(folder) / SPEC
    cells = {cell.name: cell for cell in plan.cells}
    for name, cell in cells.items():
        if name not in results:
            continue
        result, place = results[name], f"{root / RESULTS / name}.json"
        if _field(result, "arm", str, place) != cell.arm:
            raise UserError(
                f"{place}: arm is {shown(result['arm'])}, but the cell of this name is of arm {cell.arm}: {_MEND}"
            )
        if _field(result, "fingerprint", str, place) != fingerprint(study, cell):
            raise UserError(
                f"{root / RESULTS / name}.json is the result of a cell with other settings than {file} gives it: use another "
                "--out, or move the results of that arm away"
            )
        for point in result["scores"]:
            _field(result["scores"], point, dict, f"{place}, scores")
        for point in cell.points:
            score = result["scores"].get(str(point))
            if score is None:
                continue
            if _field(score, "how", str, f"{place}, point {point}") != how_scored(study, cell.arm, point.decoding):
                raise UserError(
                    f"{root / RESULTS / name}.json has a score {point} on other problems or with other settings than {file} "
                    "gives it: use another --out, or another name for that way of decoding"
                )

    _check_texts(study, {name: results[name] for name in cells if name in results}, root / RESULTS)


def _check_texts(study: Study, results: Mapping[str, Result], folder: epath.Path) -> None:
    """Raises UserError where results of one task come from other texts, or scores of one way of decoding from two versions of a grader.

    Results of earlier versions do not say from which.
    """
    seen: dict[tuple[str, str], tuple[str, str]] = {}
    for name, result in results.items():
        mine = study.arms[result["arm"]].task
        texts = [(f"was trained on records of task {mine}", "train", mine, result.get("records"))]
        for point, score in result["scores"].items():
            decoding = study.decodings.get(point.partition("/")[2])
            task = (decoding.task if decoding else None) or mine
            texts.append((f"has a score {point} on problems of task {task}", "score", task, score.get("texts")))
            way = point.partition("/")[2]
            texts.append((f"has a score {point} by versions of a grader", "grader", way, score.get("grader_version")))
        for says, kind, task, found in texts:
            first, of = seen.setdefault((kind, task), (found, name)) if found else ("", "")
            if found and found != first:
                raise UserError(
                    f"{folder / name}.json {says} that are not those of {of}.json: what generates or reads them has changed in "
                    "between. Move the older results away, or use another --out"
                )


def write_result(folder: PathLike, name: str, result: Result) -> None:
    """Writes the result of a cell, replacing what was known of it before."""
    write_json(as_path(folder) / RESULTS / f"{name}.json", result, overwrite=True)


def missing_points(cell: Cell, result: Result | None) -> list[Point]:
    """Returns the points at which a cell has not been scored."""
    scores = {} if result is None else result["scores"]
    return [point for point in cell.points if str(point) not in scores]


def is_done(cell: Cell, result: Result | None) -> bool:
    """Tells whether a cell's run has ended and all its scores are there."""
    return result is not None and result["steps"] >= cell.steps and not missing_points(cell, result)
