"""Measures where a run's time goes, by cause. It reads only the host's clock and never waits for the device.

Every second of a process belongs to one cause:

start       from the call of ``train`` to the first evaluation or step: data, weights, run folder, checkpoint
compile     tracing, lowering and compiling, whenever they happen (also for evaluations)
step        training, and the host's own work beside it
data        the loop waits for the loader while the device has nothing left to do
evaluation  scoring and decoding validation records
save        the loop waits for a checkpoint (most of a save runs beside the training)
lost        earlier processes' work after the checkpoint that this process continues from; it is done again

A resumed run adds its time to that of its earlier processes, which ``metrics.jsonl`` records. The time between two
processes is not counted.
"""

from __future__ import annotations

import contextlib
import statistics
import threading
import time
from collections import deque
from collections.abc import Iterator
from types import TracebackType
from typing import Literal, NamedTuple, get_args

import jax.monitoring

from jaxblock.io.paths import PathLike
from jaxblock.training.observe.metrics import readable_rows
from jaxblock.training.observe.rows import Row

Cause = Literal["start", "compile", "step", "data", "evaluation", "save", "lost"]
CAUSES: tuple[Cause, ...] = get_args(Cause)
KIND = "goodput"
_COMPILING = "/jax/core/compile/"


class EarlierTime(NamedTuple):
    """Holds the time that earlier processes of the run spent.

    Attributes:
        seconds: the seconds of each cause, up to the checkpoint that the run continues from.
        lost_seconds: the recorded seconds spent after that checkpoint.
        lost_steps: the number of further steps after that checkpoint whose time was not recorded.
        step_seconds: how long a step took; None where it was not recorded.
    """

    seconds: dict[str, float]
    lost_seconds: float = 0.0
    lost_steps: int = 0
    step_seconds: float | None = None


def read_earlier_time(metrics: PathLike, step: int) -> EarlierTime:
    """Reads the time of earlier processes. It must be called before the rows after ``step`` are removed from the file.

    Args:
        metrics: the run's ``metrics.jsonl``.
        step: the step that the run continues from; -1 if it begins again.

    Returns:
        The time of all earlier processes; no time where there is no such file.

    Raises:
        UserError: the file cannot be read.
    """
    rows = readable_rows(metrics)
    clocks = [row for row in rows if row["kind"] == KIND]
    kept = next((row for row in reversed(clocks) if row["step"] <= step), None)
    seconds: dict[str, float] = {}
    if kept is not None:
        seconds = {cause: float(kept["seconds"].get(cause, 0.0)) for cause in CAUSES}
    after = [row for row in clocks if row["step"] > step]
    lost = max(0.0, sum(after[-1]["seconds"].values()) - sum(seconds.values())) if after else 0.0
    known = after[-1]["step"] if after else max(step, 0)
    steps = max((row["step"] for row in rows), default=0) - known
    step_seconds = next((row["step_seconds"] for row in reversed(clocks) if row.get("step_seconds")), None)
    return EarlierTime(seconds, lost, max(0, steps), step_seconds)


class Goodput:
    """Measures the time of one process by cause. A context manager, since it listens to JAX's compiler while it is open."""

    def __init__(self) -> None:
        """Starts the clock; time counts as ``start`` until ``started`` is called."""
        self._seconds: dict[Cause, float] = dict.fromkeys(CAUSES, 0.0)
        self._earlier = EarlierTime({})
        self._step_seconds: deque[float] = deque(maxlen=1000)
        self._since = time.perf_counter()
        self._started = False
        self._thread = threading.get_ident()
        self._compiles: list[tuple[float, float]] = []  # (begin, end) of each compilation, by the same clock

    def __enter__(self) -> Goodput:
        """Begins to listen to the compiler."""
        jax.monitoring.register_event_duration_secs_listener(self._note)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Stops listening to the compiler."""
        jax.monitoring.unregister_event_duration_listener(self._note)

    def add_earlier(self, before: EarlierTime) -> None:
        """Makes ``row`` include the time of earlier processes."""
        self._earlier = before

    def started(self) -> None:
        """Ends the cause ``start``: from now on, time without another cause counts as ``step``."""
        self.charge("start")
        self._started = True

    def charge(self, cause: Cause) -> None:
        """Adds the time since the last call to a cause, except for the time spent compiling."""
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
        """Adds the time of a ``with`` block to a cause."""
        self.charge("step" if self._started else "start")
        try:
            yield
        finally:
            self.charge(cause)

    def training(self) -> float:
        """Returns the seconds that this process has spent on steps and on waiting for their data."""
        self.charge("step" if self._started else "start")
        return self._seconds["step"] + self._seconds["data"]

    def note_step(self, seconds: float) -> None:
        """Records how long each of the last few steps took."""
        self._step_seconds.append(seconds)

    def row(self, step: int) -> Row:
        """Returns a row of metrics: the seconds of all processes so far by cause, and the share that ``step`` has of them.

        Args:
            step: the number of updates done.
        """
        self.training()
        earlier = self._earlier
        step_seconds = statistics.median(self._step_seconds) if self._step_seconds else earlier.step_seconds
        seconds = {cause: earlier.seconds.get(cause, 0.0) + self._seconds[cause] for cause in CAUSES}
        seconds["lost"] += earlier.lost_seconds + earlier.lost_steps * (step_seconds or 0.0)
        whole = sum(seconds.values())
        rounded = {cause: round(value, 3) for cause, value in seconds.items()}
        share = round(seconds["step"] / whole, 4) if whole else 0.0
        return {"step": step, "kind": KIND, "goodput": share, "seconds": rounded, "step_seconds": step_seconds}

    def _note(self, event: str, duration_secs: float, **_: str | int) -> None:
        if not event.startswith(_COMPILING) or threading.get_ident() != self._thread:
            return
        end = time.perf_counter()
        begin = end - duration_secs
        while self._compiles and self._compiles[-1][0] >= begin:
            self._compiles.pop()  # the earlier compilation ran inside this one, whose time includes it
        self._compiles.append((begin, end))


def describe(row: Row) -> str:
    """Writes a row as one line, ``goodput 87%: step 120 s, compile 9.1 s, ...``, without the causes that took no time."""
    spent = sorted(row["seconds"].items(), key=lambda item: -item[1])
    parts = [f"{cause} {_short(seconds)}" for cause, seconds in spent if seconds >= 0.05]
    return f"goodput {row['goodput']:.0%}: {', '.join(parts)}"


def _short(seconds: float) -> str:
    return f"{seconds:,.0f} s" if seconds >= 10 else f"{seconds:.1f} s"
