"""Writes and reads the results of a study: a small JSON file for each cell, which is all that reports are made from."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jaxblock.errors import UserError
from jaxblock.evaluation.problems import read_problems
from jaxblock.io.files import read_json, write_json, write_text
from jaxblock.io.folders import list_folder
from jaxblock.io.paths import PathLike, as_path
from jaxblock.study.cells import Cell, Plan, Point
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
    """Returns what a result keeps of an evaluation's folder: who solved what as a hexadecimal number, costs, and the NELBO."""
    root = as_path(evaluation)
    summary, problems = read_json(root / "summary.json"), read_problems(root / "problems.jsonl")
    bits = np.array([problem.correct for problem in problems.values()], np.uint8)
    score: Result = {
        "problems": len(bits),
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
