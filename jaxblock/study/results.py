"""Writes and reads the results of a study: a small JSON file for each cell, which is all that reports are made from."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath

from jaxblock.errors import UserError
from jaxblock.evaluation.problems import read_problems, texts_hash
from jaxblock.io.files import read_json, write_json, write_text
from jaxblock.io.folders import list_folder
from jaxblock.io.paths import PathLike, as_path
from jaxblock.study.cells import Cell, Plan, Point, fingerprint, how_scored
from jaxblock.study.spec import Study, read_study

Result = dict[str, Any]
"""What is known of a cell: its name, arm and seed, its settings and versions, and its scores by point."""

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
    """Reads the results in a study's folder by the names of their cells."""
    files = [file for file in list_folder(as_path(folder) / RESULTS) if file.name.endswith(".json")]
    return {file.name.removesuffix(".json"): read_json(file) for file in files}


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
        UserError: a cell was trained or scored with other settings, as by a process that runs another version of the file; or cells
            of one task were trained or scored on other texts, as by another version of what generates them.
    """
    root, file = as_path(folder), spec or as_path(folder) / SPEC
    cells = {cell.name: cell for cell in plan.cells}
    for name in results.keys() & cells.keys():
        result, cell = results[name], cells[name]
        if result["fingerprint"] != fingerprint(study, cell):
            raise UserError(
                f"{root / RESULTS / name}.json is the result of a cell with other settings than {file} gives it: use another "
                "--out, or move the results of that arm away"
            )
        for point in cell.points:
            score = result["scores"].get(str(point))
            if score is not None and score["how"] != how_scored(study, cell.arm, point.decoding):
                raise UserError(
                    f"{root / RESULTS / name}.json has a score {point} on other problems or with other settings than {file} "
                    "gives it: use another --out, or another name for that way of decoding"
                )

    _check_texts(study, {name: results[name] for name in cells if name in results}, root / RESULTS)


def _check_texts(study: Study, results: Mapping[str, Result], folder: epath.Path) -> None:
    """Raises UserError where results of one task come from other texts; results of earlier versions do not say from which."""
    seen: dict[tuple[str, str], tuple[str, str]] = {}
    for name, result in results.items():
        mine = study.arms[result["arm"]].task
        texts = [(f"was trained on records of task {mine}", "train", mine, result.get("records"))]
        for point, score in result["scores"].items():
            decoding = study.decodings.get(point.partition("/")[2])
            task = (decoding.task if decoding else None) or mine
            texts.append((f"has a score {point} on problems of task {task}", "score", task, score.get("texts")))
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


def score_of(evaluation: PathLike) -> Result:
    """Returns what a result keeps of an evaluation's folder.

    Which problems were solved (``correct``, a hexadecimal number) and a hash of their texts, costs, and the NELBO.
    """
    root = as_path(evaluation)
    summary, problems = read_json(root / "summary.json"), read_problems(root / "problems.jsonl")
    bits = np.array([problem.correct for problem in problems.values()], np.uint8)
    score: Result = {
        "problems": len(bits),
        "texts": texts_hash(problems.values()),
        "correct": np.packbits(bits).tobytes().hex(),
        **{key: shortened(summary[key]) for key in ("nfe", "tokens_per_forward", "decode_seconds", "stopped")},
    }
    for key in ("nelbo_per_token", "nelbo_per_sequence", "nelbo_by_block"):
        if key in summary:
            score[key] = shortened(summary[key])
    return score


def shortened(value: Any) -> Any:
    """Returns a number with 6 significant digits, and what is made of numbers likewise."""
    if isinstance(value, float):
        return float(f"{value:.6g}")
    if isinstance(value, Mapping):
        return {key: shortened(item) for key, item in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [shortened(item) for item in value]
    return value


def solved(score: Result) -> np.ndarray:
    """Returns which problems were solved: bool [problems]."""
    bits = np.unpackbits(np.frombuffer(bytes.fromhex(score["correct"]), np.uint8))
    return bits[: score["problems"]].astype(bool)
