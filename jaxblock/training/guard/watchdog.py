"""Watches from a thread whether the run makes progress, and prints the stacks of all threads when it does not.

In a process group, one process that hangs makes all the others wait in their next collective operation. Each prints its
own stacks to its own standard error; the process whose stacks differ from the others' is the one that hangs.
"""

from __future__ import annotations

import faulthandler
import os
import sys
import threading
import time
from types import TracebackType
from typing import IO

from jaxblock.parallel import processes
from jaxblock.training.config import OnHang

HUNG = 124
"""The exit code of a process that the watchdog ended; timeout(1) uses the same."""


class Watchdog:
    """Reports a stage that takes too long: ``with Watchdog(...) as dog``, then ``dog.at(stage, step)`` as each begins."""

    def __init__(self, seconds: float, on_hang: OnHang = "report", out: IO[str] | None = None) -> None:
        """Sets the limits; the thread starts with the ``with`` block.

        Args:
            seconds: the longest time that a stage may take; 0 for no limit.
            on_hang: ``report`` only reports; ``abort`` then ends the process with exit code ``HUNG``, so that a launcher
                starts it again.
            out: the file to print to, which must have a file descriptor; None for standard error.
        """
        self._seconds, self._on_hang, self._out = seconds, on_hang, out
        self._changed = threading.Condition()
        self._stage, self._step, self._since, self._ended = "start", 0, time.monotonic(), False
        self._reported = False
        self._thread: threading.Thread | None = None

    def at(self, stage: str, step: int) -> None:
        """Records that a stage begins, and starts its time limit anew. Takes about a microsecond.

        Args:
            stage: the stage that begins now.
            step: the number of updates done.
        """
        if self._thread is None:
            return
        with self._changed:
            self._stage, self._step, self._since, self._reported = stage, step, time.monotonic(), False

    def __enter__(self) -> Watchdog:
        """Starts the thread that watches."""
        if self._seconds > 0:
            self._since = time.monotonic()
            self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Ends the thread that watches."""
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
        index, count = processes.place() or (0, 1)  # JAX is not asked, since it may be what hangs
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
