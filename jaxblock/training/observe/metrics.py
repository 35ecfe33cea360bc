"""Rows of metrics: what is in them, and the file that they are always written to (others: ``trackers``)."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from jaxblock.io.json_lines import Lines, read_jsonl_bytes
from jaxblock.io.paths import PathLike, as_path, explained
from jaxblock.training.step import StepMetrics
from jaxblock.types import Sum

FILE = "metrics.jsonl"
WAITING = "metrics"
"""In a checkpoint's plain values: rows up to it that could not be written yet when it was saved."""


class MetricsLog:
    """Appends rows to ``metrics.jsonl`` (in an object store: writes parts of it, `io.json_lines`); a resumed run appends to the
    rows up to its checkpoint."""

    def __init__(self, run: PathLike, step: int) -> None:
        """Opens the file. Rows of later steps than ``step``, which the run makes again, are taken out.

        Args:
            run: the run folder, which exists.
            step: the step the run goes on from; -1 if it begins.

        Raises:
            UserError: the folder cannot be written.
        """
        self.path = as_path(run) / FILE
        with explained("write metrics", self.path):
            self._lines = Lines(self.path, lambda line: json.loads(line)["step"] <= step)

    def write(self, row: dict[str, Any]) -> None:
        """Appends one row with at least ``step`` and ``kind``; a kill loses at most a cut last line (an object store:
        the rows of the last minute, which are after the checkpoint that the run goes on from: see ``flush``)."""
        self._lines.append(json.dumps(finite(row)))

    def flush(self) -> None:
        """Before a checkpoint: the rows before it are not made again."""
        self._lines.flush()

    def waiting(self) -> list[str]:
        """Rows, as lines, that could not be written yet: a checkpoint keeps them (``put_back``)."""
        return self._lines.waiting()

    def close(self) -> None:
        """Closes the file."""
        self._lines.close()


def put_back(run: PathLike, rows: Sequence[str]) -> None:
    """Writes rows that a checkpoint kept, before its run goes on; those that were written after all are left out.

    Args:
        run: the run folder.
        rows: lines, in order.

    Raises:
        UserError: they still cannot be written.
    """
    path = as_path(run) / FILE
    there = set(read_jsonl_bytes(path).splitlines()) if rows else set()
    missing = [row for row in rows if row.encode() not in there]
    if missing:
        lines = Lines(path, lambda line: True)
        for row in missing:
            lines.append(row)
        lines.close()


def summarise(window: list[StepMetrics]) -> dict[str, Any]:
    """The metrics of several steps as host values: sums are added and weights are added, then divided.

    Args:
        window: host copies of each step's metrics.

    Returns:
        ``loss``, ``grad_norm`` (of the last step), ``loss_by_block`` and ``loss_by_count`` as [sum, weight] pairs, without
        the steps that were skipped, whose count is ``skipped`` (all of them: NaN).
    """
    skipped = sum(bool(m.skipped) for m in window)
    window = [m for m in window if not m.skipped] or window

    def pooled(parts: list[Sum]) -> tuple[np.ndarray, np.ndarray]:
        both = np.asarray([[p.total for p in parts], [p.weight for p in parts]], np.float64).sum(1)
        return both[0, ...], both[1, ...]

    total, weight = pooled([m.losses.loss for m in window])
    by_block = pooled([m.losses.by_block for m in window])
    by_count = pooled([m.losses.by_count for m in window])
    return {
        "loss": float(total / weight),
        "grad_norm": float(window[-1].grad_norm),
        "loss_by_block": np.stack(by_block, -1).round(4).tolist(),
        "loss_by_count": np.stack(by_count, -1).round(4).tolist(),
        "skipped": skipped,
    }


def finite(value: Any) -> Any:
    """NaN and infinity have no JSON: they are written as text, so that every reader can parse the line."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value


def scalars(row: dict[str, Any], prefix: str = "") -> list[tuple[str, float]]:
    """The numbers of a row as (name, value), those of nested values as ``outer/inner``; lists and texts are left out.

    Args:
        row: of metrics.
        prefix: in front of each name.
    """
    found = []
    for key, value in row.items():
        if isinstance(value, dict):
            found += scalars(value, f"{prefix}{key}/")
        elif isinstance(value, int | float) and key not in ("step", "kind"):
            found.append((prefix + key, float(value)))
    return found
