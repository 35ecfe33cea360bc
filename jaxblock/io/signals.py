"""Lets a process that is told to end tell the processes that it started."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType


@contextlib.contextmanager
def sigterm_raises() -> Iterator[None]:
    """Makes SIGTERM raise SystemExit (code 143) in this block, so that its `finally` clauses end the processes that it started.

    Without it, SIGTERM ends this process at once, and those that it started go on by themselves. Has an effect in the main
    thread only, where alone Python allows it.
    """

    def leave(number: int, frame: FrameType | None) -> None:
        raise SystemExit(128 + number)

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
