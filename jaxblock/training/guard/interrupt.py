"""Ctrl-C and SIGTERM: finish the step, save, say how to go on. A second Ctrl-C stops at once."""

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
    """Processes started in this block never see Ctrl-C, which a terminal sends to the whole group: we end them."""
    resource_tracker.ensure_running()  # else it starts in the block, and unblocks the signal for its own ends
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})  # a Ctrl-C of meanwhile arrives now


class Interrupt:
    """A context manager that notes SIGINT and SIGTERM instead of dying of them.

    Attributes:
        asked: somebody wants the run to stop.
        terminated: by SIGTERM: a machine is taken away, and a launcher should go on elsewhere.
    """

    def __init__(self) -> None:
        """Nothing is caught before ``with``."""
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
        """Puts the handlers back."""
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.asked and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.asked = True
        self.terminated = self.terminated or number == signal.SIGTERM
