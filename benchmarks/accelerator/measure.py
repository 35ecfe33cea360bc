"""How the items measure: timed calls with a warm-up and repeats, compilations, and what becomes of an error."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from types import TracebackType
from typing import Any

import jax

Row = dict[str, Any]
"""One measured case: ``case`` names it, and every other entry is a quantity (its unit in its name) with its value."""
Rows = Iterator[Row]

_CACHE_HIT = "/jax/compilation_cache/cache_hits"


class Skip(Exception):
    """What was asked for does not exist on this device or does not fit; the message says which."""


class NoTime(Exception):
    """Too little time is left to begin; the message says how much it takes."""


def timed(call: Callable[[], Any], repeats: int, seconds: float, warm_up: int = 1) -> list[float]:
    """Times a call again and again, and waits for its result each time.

    Args:
        call: what is timed; the arrays that it returns are waited for.
        repeats: the number of timed runs.
        seconds: no further run begins after so many seconds, once there are three.
        warm_up: untimed runs before.

    Returns:
        Wall times in seconds.
    """
    for _ in range(warm_up):
        jax.block_until_ready(call())
    times: list[float] = []
    while len(times) < repeats and (len(times) < 3 or sum(times) < seconds):
        begin = time.perf_counter()
        jax.block_until_ready(call())
        times.append(time.perf_counter() - begin)
    return times


def spread(values: list[float]) -> dict[str, float]:
    """Describes repeated measurements by their median and range."""
    return {"median": statistics.median(values), "least": min(values), "most": max(values), "runs": len(values)}


def rates(amount: float, times: list[float]) -> dict[str, float]:
    """Describes how much was done per second in each of some runs that did the same amount."""
    return spread([amount / seconds for seconds in times])


def attempt(case: str, measured: Callable[[], Mapping[str, Any]]) -> Row:
    """Measures one case of an item; an error, running out of memory among them, is a row that says so."""
    try:
        return {"case": case, **measured()}
    except Skip as skip:
        return {"case": case, "skipped": str(skip)}
    except Exception as error:
        return {"case": case, "failed": reason(error)}


def reason(error: BaseException) -> str:
    """Returns an error's type and first line, at a length that fits a table."""
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0][:300]}"


def out_of_memory(error: BaseException) -> bool:
    """Says whether an error means that the device (or the host) has no memory left."""
    return isinstance(error, MemoryError) or any(
        sign in str(error) for sign in ("RESOURCE_EXHAUSTED", "Out of memory", "out of memory")
    )


def gib(size: float | None) -> float | None:
    """Converts bytes to GiB; None stays None."""
    return None if size is None else size / 2**30


class Compilation:
    """Times a ``with`` block that compiles, and notes whether the program came from the cache on disk."""

    _hits = 0
    _listening = False

    def __enter__(self) -> Compilation:
        """Starts the clock."""
        if not Compilation._listening:
            jax.monitoring.register_event_listener(_count_hits)
            Compilation._listening = True
        self._before, self._begin = Compilation._hits, time.perf_counter()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Stops the clock."""
        self._seconds = time.perf_counter() - self._begin

    def described(self) -> Row:
        """Returns the seconds that it took, under a name that says whether a compiler did the work."""
        found = Compilation._hits > self._before
        return {"program read from the cache, s" if found else "compiling, s": self._seconds}


def _count_hits(event: str, **_: Any) -> None:
    Compilation._hits += event == _CACHE_HIT
