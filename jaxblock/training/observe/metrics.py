"""Writes and reads a run's ``metrics.jsonl``: one row a line, with at least ``step`` and ``kind``."""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np

from jaxblock.errors import UserError, first_line
from jaxblock.io.files import read_bytes, write_bytes
from jaxblock.io.json_lines import JsonlWriter, read_jsonl_bytes
from jaxblock.io.paths import PathLike, as_path, explained
from jaxblock.training.observe.rows import Row, parse_row

METRICS_FILE = "metrics.jsonl"
"""The file's name in the run folder."""
BROKEN_FILE = "metrics-broken.txt"
"""The name of the file, beside the other, to which lines are moved that are not rows."""
UNWRITTEN_ROWS = "metrics"
"""The key of a checkpoint's plain values under which it keeps rows that could not be written to the file."""


class MetricsWriter:
    """Appends rows to ``metrics.jsonl``; in an object store, which cannot append, writes numbered parts of it."""

    def __init__(self, run: PathLike, step: int, say: Callable[[str], object] = lambda text: None) -> None:
        """Opens the file and removes the rows after ``step``, since the run makes them again.

        Lines that are not rows of metrics are moved to ``BROKEN_FILE``.

        Args:
            run: the run folder, which exists.
            step: the step that the run continues from; -1 for a new run.
            say: prints a line for the user where lines were moved.

        Raises:
            UserError: the folder cannot be written.
        """
        self.path = as_path(run) / METRICS_FILE
        with explained("write metrics", self.path):
            _set_broken_aside(run, say)
            self._lines = JsonlWriter(self.path, lambda line: any(row["step"] <= step for row in _rows([line])))

    def write(self, row: Row) -> None:
        """Appends one row to the file of metrics.

        If the process is killed, a local file loses at most this line. An object store loses the rows of the last
        minute, all of them newer than the last checkpoint, because ``flush`` comes before every save.

        Raises:
            UserError: the file cannot be written now; the row is kept, and written with the next one.
        """
        self._lines.append(json.dumps(as_json(row)))

    def flush(self) -> None:
        """Writes the rows that are still in memory; called before a checkpoint is saved."""
        self._lines.flush()

    def unwritten(self) -> list[str]:
        """Returns the rows, as lines, that could not be written yet; a checkpoint keeps them for ``restore_rows``."""
        return self._lines.waiting()

    def close(self) -> None:
        """Writes the rows that are still in memory and closes the file."""
        self._lines.close()


def _set_broken_aside(run: PathLike, say: Callable[[str], object]) -> None:
    """Copies the whole lines of the metrics file that are not rows to ``BROKEN_FILE``, before they are removed from it."""
    path, aside = as_path(run) / METRICS_FILE, as_path(run) / BROKEN_FILE
    broken: list[bytes] = []
    first = ""
    for number, line in enumerate(read_jsonl_bytes(path).split(b"\n")[:-1], 1):
        try:
            parse_row(line)
        except ValueError as error:
            first = first or f"{path}:{number} is not a row of metrics ({first_line(error)})"
            broken.append(line + b"\n")
    if broken:
        before = read_bytes(aside) if aside.exists() else b""
        if not before.endswith(b"".join(broken)):  # else a kill came before the lines were removed
            write_bytes(aside, before + b"".join(broken), overwrite=True)
        others = f", nor are {len(broken) - 1} other lines" if len(broken) > 1 else ""
        say(f"{first}{others}: moved to {aside}")


def restore_rows(run: PathLike, rows: Sequence[str]) -> None:
    """Appends the rows that a checkpoint kept and that the file lacks. It must be called before the run continues.

    Args:
        run: the run folder.
        rows: the kept rows as lines, in order.

    Raises:
        UserError: the rows still cannot be written.
    """
    path = as_path(run) / METRICS_FILE
    present = set(read_jsonl_bytes(path).splitlines()) if rows else set()
    missing = [row for row in rows if row.encode() not in present]
    if missing:
        lines = JsonlWriter(path, lambda line: True)
        for row in missing:
            lines.append(row)
        lines.close()


def as_json(value: Any) -> Any:
    """Replaces NaN and infinity, which JSON does not have, by strings, so that every JSON reader can parse the line."""
    if isinstance(value, dict):
        return {key: as_json(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [as_json(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value


class Metrics(NamedTuple):
    """Holds the rows of a run that are plotted, ordered by step.

    Attributes:
        train: the rows of training steps (``loss``, ``lr``, ``grad_norm``, ``tokens_per_second``, ``loss_by_block``,
            ``loss_by_count``; the last two hold a [sum, weight] pair per block index, and per masked count from 1).
        evals: the rows of evaluations (``nelbo_per_token``: mean and se; ``pass_at_1``: correct, n, low, high).
    """

    train: list[Row]
    evals: list[Row]


def read_metrics(path: PathLike) -> Metrics:
    """Reads a metrics file: a single file, or the parts of it that an object store holds.

    A run that was interrupted and resumed repeats the steps after its last checkpoint: what was written of them before is
    left out. An incomplete last line, which a killed process leaves, is ignored, and so are rows of other kinds.

    Args:
        path: the file, such as ``RUN/metrics.jsonl``.

    Raises:
        UserError: the file cannot be read, or a line is not a row of metrics.
    """
    try:
        text = (read_jsonl_bytes(path) or read_bytes(path)).decode("utf-8")
    except (UserError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot read the metrics ({error}); is this the folder of a training run?") from error
    lines = text.split("\n")
    kept: dict[str, list[Row]] = {"train": [], "eval": []}
    for number, line in enumerate(lines, 1):
        try:
            row = parse_row(line)
        except ValueError as error:
            if not line.strip() or number == len(lines):
                continue
            raise UserError(f"{path}:{number}: {error}; repair or delete the line") from error
        if row["kind"] == "resume":
            kept = {kind: [old for old in rows if old["step"] <= row["step"]] for kind, rows in kept.items()}
            continue
        rows = kept.get(row["kind"], [])
        while rows and rows[-1]["step"] >= row["step"]:
            rows.pop()
        rows.append(row)
    return Metrics(kept["train"], kept["eval"])


def readable_rows(path: PathLike) -> list[Row]:
    """Returns the file's rows of every kind, in the order they were written; lines that are not rows are left out.

    Args:
        path: the file, such as ``RUN/metrics.jsonl``; a missing file has no rows.

    Raises:
        UserError: the file cannot be read.
    """
    return _rows(read_jsonl_bytes(path).splitlines())


def _rows(lines: Iterable[bytes]) -> list[Row]:
    """Parses those lines that are rows."""
    rows = []
    for line in lines:
        with contextlib.suppress(ValueError):
            rows.append(parse_row(line))
    return rows


def series(rows: Iterable[Row], *path: str) -> tuple[np.ndarray, np.ndarray]:
    """Returns one metric over the steps.

    Args:
        rows: the rows of one kind.
        *path: the keys that lead to the value, such as ``"nelbo_per_token", "mean"``.

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
    """Returns the means of a breakdown over several rows: the sums and the weights are each added, then divided.

    Args:
        rows: the training rows.
        key: ``loss_by_block`` or ``loss_by_count``.

    Returns:
        Means, float64 [entries]; NaN where an entry never had weight. Empty if no row has the breakdown.
    """
    breakdowns = [np.asarray(row[key], np.float64).reshape(-1, 2) for row in rows if row.get(key)]
    total = np.zeros((max(map(len, breakdowns), default=0), 2))
    for pairs in breakdowns:
        total[: len(pairs)] += pairs
    return np.divide(total[:, 0], total[:, 1], out=np.full(len(total), np.nan), where=total[:, 1] > 0)
