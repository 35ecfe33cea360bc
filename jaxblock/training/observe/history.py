"""Reads a run's ``metrics.jsonl`` back: rows of ``{"step": int, "kind": "train" | "eval", ...}``."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np

from jaxblock.errors import UserError
from jaxblock.io.files import read_bytes
from jaxblock.io.json_lines import read_jsonl_bytes
from jaxblock.io.paths import PathLike

Row = dict[str, Any]


class Metrics(NamedTuple):
    """A run's rows, by rising step.

    Attributes:
        train: rows of training steps (``loss``, ``lr``, ``grad_norm``, ``tokens_per_second``, ``loss_by_block``,
            ``loss_by_count``; the last two hold a [sum, weight] pair per block index, and per masked count from 1).
        evals: rows of evaluations (``nelbo_per_token``: mean and se; ``pass_at_1``: correct, n, low, high).
    """

    train: list[Row]
    evals: list[Row]


def read(path: PathLike) -> Metrics:
    """Reads a metrics file: one file, or the parts of it that an object store holds (``io.json_lines``).

    A run that was interrupted and resumed repeats the steps after its last checkpoint: the later rows replace the
    earlier ones. A last line without its line break was cut off by a kill and is left out.

    Args:
        path: the file.

    Returns:
        The rows.

    Raises:
        UserError: the file cannot be read, or a line is not such a row.
    """
    try:
        text = (read_jsonl_bytes(path) or read_bytes(path)).decode("utf-8")
    except (UserError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot read the metrics ({error}); is this the folder of a training run?") from error
    *lines, cut = text.split("\n")
    if cut:
        try:
            json.loads(cut)
            lines.append(cut)
        except json.JSONDecodeError:
            pass
    kept: dict[str, list[Row]] = {"train": [], "eval": []}
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        row = _parsed(line, f"{path}:{number}")
        rows = kept.get(row["kind"])
        if rows is None:
            continue  # kinds that are not plotted may come later
        while rows and rows[-1]["step"] >= row["step"]:
            rows.pop()
        rows.append(row)
    return Metrics(kept["train"], kept["eval"])


def _parsed(line: str, where: str) -> Row:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise UserError(f"{where}: not JSON ({error}); repair or delete the line") from error
    if not isinstance(row, dict) or not isinstance(row.get("step"), int) or not isinstance(row.get("kind"), str):
        raise UserError(f"{where}: expected an object with an integer 'step' and a text 'kind'")
    return row


def series(rows: Iterable[Row], *path: str) -> tuple[np.ndarray, np.ndarray]:
    """One metric over steps.

    Args:
        rows: rows of one kind.
        *path: keys to the value, such as ``"nelbo_per_token", "mean"``.

    Returns:
        Steps and values, both float64 [n]; rows without a finite value are left out.
    """
    steps, values = [], []
    for row in rows:
        value: Any = row
        for key in path:
            value = value.get(key) if isinstance(value, dict) else None
        if isinstance(value, int | float) and math.isfinite(value):
            steps.append(row["step"])
            values.append(value)
    return np.asarray(steps, np.float64), np.asarray(values, np.float64)


def pooled(rows: Sequence[Row], key: str) -> np.ndarray:
    """Means of a breakdown over several rows: sums are added and weights are added, then divided.

    Args:
        rows: training rows.
        key: ``loss_by_block`` or ``loss_by_count``.

    Returns:
        Means, float64 [entries]; NaN where an entry never had weight. Empty if no row has the breakdown.
    """
    tables = [np.asarray(row[key], np.float64).reshape(-1, 2) for row in rows if row.get(key)]
    total = np.zeros((max((len(t) for t in tables), default=0), 2))
    for table in tables:
        total[: len(table)] += table
    return np.divide(total[:, 0], total[:, 1], out=np.full(len(total), np.nan), where=total[:, 1] > 0)
