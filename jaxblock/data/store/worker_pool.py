"""Applies a function to many things in worker processes, and yields the results in the order of the things."""

from __future__ import annotations

import contextlib
import datetime
import functools
import itertools
import multiprocessing
import os
import pathlib
import pickle
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.connection import wait
from typing import Any, TypeVar

from jaxblock.data.text.pieces import InOrder
from jaxblock.data.tokens.templates import clock
from jaxblock.errors import UserError

A = TypeVar("A")
B = TypeVar("B")

_AHEAD = 3  # things that are being worked on or wait, for each process
_WORTH_PROCESSES = 8 << 20  # bytes of text below which starting processes takes longer than they save


def count_processes(asked: int | None, size: int) -> int:
    """Returns how many worker processes to use; 0 for none, so that this process does the work.

    Args:
        asked: `data.prepare_workers`; None for as many as this process may use processors, where the inputs are large enough.
        size: The size of the inputs in bytes.
    """
    if asked is not None:
        return asked
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return cores if cores > 1 and size >= _WORTH_PROCESSES else 0


@contextlib.contextmanager
def worker_pool(processes: int) -> Iterator[InOrder]:
    """Yields what applies a function to many things; it is `map` where there are no processes.

    Functions and things must be picklable. However fast the results come, a bounded number of things is in memory.

    Args:
        processes: The number of worker processes, which are started when they are first needed.

    Raises:
        UserError: If a process ends unexpectedly.
    """
    if not processes:
        yield map
        return
    # Forked processes would inherit locks of threads that they do not have, such as JAX's or the tokenizer's.
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(processes, context, _begin, (clock(),))
    try:
        yield functools.partial(_in_order, pool, processes * _AHEAD)
    except BrokenProcessPool as error:
        raise UserError(
            "a process that prepares data ended unexpectedly, as when memory runs out: set data.prepare_workers lower (0 works "
            "without such processes)"
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


class FileFunction:
    """Is a function that workers read once from a file, since it would be slow to send it along with each thing."""

    def __init__(self, function: Callable[..., Any], path: pathlib.Path) -> None:
        """Writes the function to a file, which must exist as long as workers may call it."""
        self._path = path
        path.write_bytes(pickle.dumps(function))

    def __call__(self, *arguments: Any) -> Any:
        """Calls the function that was written to the file, with these arguments."""
        return _unpickled(self._path)(*arguments)


@functools.lru_cache(1)
def _unpickled(path: pathlib.Path) -> Any:
    return pickle.loads(path.read_bytes())


def _in_order(pool: ProcessPoolExecutor, ahead: int, function: Callable[[A], B], things: Iterable[A]) -> Iterator[B]:
    waiting: deque[Future[B]] = deque()
    things = iter(things)
    try:
        while True:
            waiting += [pool.submit(function, thing) for thing in itertools.islice(things, ahead - len(waiting))]
            if not waiting:
                return
            yield waiting.popleft().result()
    finally:
        for future in waiting:
            future.cancel()


def _begin(moment: datetime.datetime) -> None:
    """Prepares a worker process: it ends with the process that started it, even where that was killed."""
    signal.signal(
        signal.SIGINT, signal.SIG_IGN
    )  # Ctrl-C reaches all processes of a terminal; the first one ends the others
    clock(moment)
    parent = multiprocessing.parent_process()
    if parent is not None:
        threading.Thread(target=_end_with, args=(parent.sentinel,), daemon=True).start()


def _end_with(sentinel: int) -> None:
    wait([sentinel])
    os._exit(1)
