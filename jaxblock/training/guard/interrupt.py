"""Turns Ctrl-C and SIGTERM into a request to finish the step, save and end. A second Ctrl-C stops at once."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from multiprocessing import resource_tracker
from types import FrameType, TracebackType
from typing import Any


@contextlib.contextmanager
def shielded() -> Iterator[None]:
    """Makes processes that are started in this block ignore Ctrl-C, which a terminal sends to all; the run ends them itself."""
    resource_tracker.ensure_running()  # multiprocessing's tracker process would unblock the signal when it starts
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})  # a Ctrl-C that came meanwhile is delivered now


class Interrupt:
    """Records SIGINT and SIGTERM while its ``with`` block runs, instead of letting them end the process.

    Attributes:
        asked: whether either signal asked the run to stop.
        terminated: whether SIGTERM asked: the machine is being taken away, and a launcher should restart the run.
    """

    def __init__(self) -> None:
        """Prepares the handlers; no signal is caught before the ``with`` block."""
        self.asked = self.terminated = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Interrupt:
        """Installs the handlers (Python allows that in the main thread only)."""
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Restores the previous handlers."""
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.asked and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.asked = True
        self.terminated = self.terminated or number == signal.SIGTERM
