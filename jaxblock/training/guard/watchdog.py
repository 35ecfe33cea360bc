"""A thread that looks whether the run moves, and where it does not, prints where this process stands.

In a process group one process that hangs makes all others wait in their next collective: each prints its own place to
its own standard error, and the one whose place differs is the one to look at.
"""

from __future__ import annotations

import faulthandler
import os
import sys
import threading
import time
from types import TracebackType
from typing import IO, Literal

from jaxblock.parallel import processes

HUNG = 124
"""Exit code of a process that the watchdog ended, as of timeout(1)."""


class Watchdog:
    """``with Watchdog(...) as dog``, then ``dog.at(stage, step)`` at every stage; each stage has the same time."""

    def __init__(
        self, seconds: float, on_hang: Literal["report", "abort"] = "report", out: IO[str] | None = None
    ) -> None:
        """Nothing runs before ``with``.

        Args:
            seconds: a stage that takes longer hangs; 0 never looks.
            on_hang: ``abort`` ends the process with ``HUNG`` after the report, for a launcher that starts it again.
            out: a real file to print to; None for standard error.
        """
        self._seconds, self._on_hang, self._out = seconds, on_hang, out
        self._changed = threading.Condition()
        self._stage, self._step, self._since, self._ended = "start", 0, time.monotonic(), False
        self._reported = False
        self._thread: threading.Thread | None = None

    def at(self, stage: str, step: int) -> None:
        """Says where the run is; costs a microsecond.

        Args:
            stage: what begins now.
            step: updates done.
        """
        if self._thread is None:
            return
        with self._changed:
            self._stage, self._step, self._since, self._reported = stage, step, time.monotonic(), False

    def __enter__(self) -> Watchdog:
        """Begins to look."""
        if self._seconds > 0:
            self._since = time.monotonic()
            self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Stops looking."""
        with self._changed:
            self._ended = True
            self._changed.notify()
        if self._thread is not None:
            self._thread.join()

    def _watch(self) -> None:
        with self._changed:
            while not self._ended:
                left = self._seconds - (time.monotonic() - self._since)
                if left <= 0 and not self._reported:
                    self._reported = True
                    self._report(time.monotonic() - self._since)
                self._changed.wait(max(left, self._seconds / 4))

    def _report(self, seconds: float) -> None:
        out = self._out or sys.__stderr__ or sys.stderr
        index, count = processes.place() or (0, 1)  # JAX is not asked: it may be what hangs
        who = f"process {index} of {count}" if count > 1 else "the run"
        fate = "it is ended now" if self._on_hang == "abort" else "it goes on waiting"
        print(
            f"\njaxblock: {who} does not move: {seconds:,.0f} s in `{self._stage}` after step {self._step:,} "
            f"(train.watchdog_seconds {self._seconds:g}); {fate}. Its threads:",
            file=out,
            flush=True,
        )
        faulthandler.dump_traceback(out, all_threads=True)
        out.flush()
        if self._on_hang == "abort":
            os._exit(HUNG)
