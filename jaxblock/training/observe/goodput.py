"""Where a run's time goes, by cause: measured on the host, which never waits for the device to know.

The time of a process is split without rest:

start       from the call of ``train`` to the first thing that is done: data, weights, run folder, checkpoint
compile     tracing, lowering and compiling, whenever they happen (also for evaluations)
step        training; the host's own work beside it
data        the loop stood at the loader, and the device had nothing left to do when the batch came
evaluation  scoring and decoding validation records
save        the loop stood still for a checkpoint (most of a save runs beside the training)
lost        what earlier processes did after the checkpoint that this one goes on from: it is done again

A resumed run adds to what the run's ``metrics.jsonl`` says of the time before. Time between processes is nobody's.
"""

from __future__ import annotations

import contextlib
import json
import statistics
import threading
import time
from collections import deque
from collections.abc import Iterable, Iterator
from types import TracebackType
from typing import Any, Literal, NamedTuple, get_args

import jax.monitoring

from jaxblock.io.json_lines import read_jsonl_bytes
from jaxblock.io.paths import PathLike

Cause = Literal["start", "compile", "step", "data", "evaluation", "save", "lost"]
CAUSES: tuple[Cause, ...] = get_args(Cause)
KIND = "goodput"
_COMPILING = "/jax/core/compile/"


class Earlier(NamedTuple):
    """What the processes before this one left of their time.

    Attributes:
        seconds: by cause, up to the checkpoint that the run goes on from.
        lost_seconds: known to have been spent after it.
        lost_steps: done after it, of which only the number is known.
        step_seconds: what a step took; None where it was not written.
    """

    seconds: dict[str, float]
    lost_seconds: float = 0.0
    lost_steps: int = 0
    step_seconds: float | None = None


def earlier(metrics: PathLike, step: int) -> Earlier:
    """Reads what earlier processes wrote, before the rows after ``step`` are taken out.

    Args:
        metrics: the run's ``metrics.jsonl``.
        step: the run goes on from; -1 if it begins again.

    Returns:
        Their time; nothing where there is no such file. Lines that cannot be read are left out.

    Raises:
        UserError: the file cannot be read.
    """
    rows = list(_rows(read_jsonl_bytes(metrics).splitlines()))
    told = [row for row in rows if row["kind"] == KIND]
    kept = next((row for row in reversed(told) if row["step"] <= step), None)
    seconds: dict[str, float] = {}
    if kept is not None:
        seconds = {cause: float(kept["seconds"].get(cause, 0.0)) for cause in CAUSES}
    after = [row for row in told if row["step"] > step]
    lost = max(0.0, sum(after[-1]["seconds"].values()) - sum(seconds.values())) if after else 0.0
    known = after[-1]["step"] if after else max(step, 0)
    steps = max((row["step"] for row in rows), default=0) - known
    pace = next((row["step_seconds"] for row in reversed(told) if row.get("step_seconds")), None)
    return Earlier(seconds, lost, max(0, steps), pace)


def _rows(lines: Iterable[bytes]) -> Iterator[dict[str, Any]]:
    for line in lines:
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict) and isinstance(row.get("step"), int) and isinstance(row.get("kind"), str):
            yield row


class Goodput:
    """The clock of one process; a context manager, since it listens to JAX's compiler."""

    def __init__(self) -> None:
        """Begins with ``start``."""
        self._seconds: dict[Cause, float] = dict.fromkeys(CAUSES, 0.0)
        self._earlier = Earlier({})
        self._paces: deque[float] = deque(maxlen=1000)
        self._since = time.perf_counter()
        self._started = False
        self._thread = threading.get_ident()
        self._compiles: list[tuple[float, float]] = []

    def __enter__(self) -> Goodput:
        """Begins to listen."""
        jax.monitoring.register_event_duration_secs_listener(self._note)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Ends it."""
        jax.monitoring.unregister_event_duration_listener(self._note)

    def go_on(self, before: Earlier) -> None:
        """Adds the time of earlier processes to what is told."""
        self._earlier = before

    def started(self) -> None:
        """What comes now is training, unless it is said to be something else."""
        self.charge("start")
        self._started = True

    def charge(self, cause: Cause) -> None:
        """Puts the time since the last such call down to a cause (but for what was compiled in it)."""
        now = time.perf_counter()
        compiled = sum(end - max(begin, self._since) for begin, end in self._compiles if end > self._since)
        self._compiles.clear()
        spent = now - self._since
        compiled = min(spent, compiled)
        self._seconds["compile"] += compiled
        self._seconds[cause] += spent - compiled
        self._since = now

    @contextlib.contextmanager
    def during(self, cause: Cause) -> Iterator[None]:
        """Puts the time of a block down to a cause."""
        self.charge("step" if self._started else "start")
        try:
            yield
        finally:
            self.charge(cause)

    def training(self) -> float:
        """Seconds of this process that went into steps and waits for their data."""
        self.charge("step" if self._started else "start")
        return self._seconds["step"] + self._seconds["data"]

    def pace(self, seconds: float) -> None:
        """Notes what a step of the last few took."""
        self._paces.append(seconds)

    def row(self, step: int) -> dict[str, Any]:
        """A row of metrics: seconds by cause, of all processes so far, and the share of ``step``.

        Args:
            step: updates done.
        """
        self.training()
        pace = statistics.median(self._paces) if self._paces else self._earlier.step_seconds
        before = self._earlier
        seconds = {cause: before.seconds.get(cause, 0.0) + self._seconds[cause] for cause in CAUSES}
        seconds["lost"] += before.lost_seconds + before.lost_steps * (pace or 0.0)
        whole = sum(seconds.values())
        rounded = {cause: round(value, 3) for cause, value in seconds.items()}
        share = round(seconds["step"] / whole, 4) if whole else 0.0
        return {"step": step, "kind": KIND, "goodput": share, "seconds": rounded, "step_seconds": pace}

    def _note(self, event: str, duration_secs: float, **_: str | int) -> None:
        if not event.startswith(_COMPILING) or threading.get_ident() != self._thread:
            return
        end = time.perf_counter()
        begin = end - duration_secs
        while self._compiles and self._compiles[-1][0] >= begin:
            self._compiles.pop()  # a part of this one: functions are traced inside functions
        self._compiles.append((begin, end))


def said(row: dict[str, Any]) -> str:
    """A row in a line: ``goodput 87%: step 120 s, compile 9.1 s, ...``, causes without time left out."""
    spent = sorted(row["seconds"].items(), key=lambda item: -item[1])
    parts = [f"{cause} {_short(seconds)}" for cause, seconds in spent if seconds >= 0.05]
    return f"goodput {row['goodput']:.0%}: {', '.join(parts)}"


def _short(seconds: float) -> str:
    return f"{seconds:,.0f} s" if seconds >= 10 else f"{seconds:.1f} s"
