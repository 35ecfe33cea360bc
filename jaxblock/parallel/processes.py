"""Joins the group of processes of a run, waits for all of them, collects values from all, and leaves after a failure."""

from __future__ import annotations

import contextlib
import os
import re
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils

from jaxblock.errors import UserError
from jaxblock.parallel.environment import EXPLICIT, START_TIMEOUT, SWITCH, from_environment

Held = TypeVar("Held")

_LOST_SIGNS = ("Gloo", "heartbeat", "coordination service", "Connection closed by peer", "unhealthy", "preempted")
_STATUS = re.compile(r"[A-Z]+(_[A-Z]+)*: ")
_TEXT_BYTES = 400  # the longest text that a process sends to the others
_place: tuple[int, int] | None = None  # (index, count) that ``start`` returned


def join_group() -> tuple[int, int]:
    """Joins the process group that the environment describes, or does nothing where it describes none.

    It must run before JAX touches a device. Calling it again is harmless.

    Returns:
        The index of this process, and the number of processes.

    Raises:
        UserError: environment variables are set in part or wrong, or the group cannot be joined.
    """
    global _place
    if not jax.distributed.is_initialized():
        arguments = from_environment(os.environ)
        if arguments is not None:
            _initialize(arguments)
            if jax.process_count() > 1 and jax.default_backend() == "cpu":
                _keep_stdout_for_python()
        elif (count := jax.process_count()) > 1:
            # JAX knows the hosts of a TPU slice even without a process group. Without the group, each host would write the
            # run folder.
            raise UserError(
                f"this is one of the {count} hosts of a TPU slice, and no process group was joined: set {SWITCH}=1 on all "
                "of them (launch/tpu.sh does)"
            )
    _place = jax.process_index(), jax.process_count()
    return _place


def place() -> tuple[int, int] | None:
    """Returns what ``start`` has returned; None before it has.

    It is for threads that must not block: JAX's own functions start the devices under a lock, which may wait for other hosts.
    """
    return _place


def wait(name: str) -> None:
    """Waits until every process of the group has reached the point of this name."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


def any_of(flag: bool) -> bool:
    """Says whether the flag is set in any process of the group. Every process must call it."""
    if jax.process_count() == 1:
        return flag
    return bool(np.any(multihost_utils.process_allgather(np.asarray(flag))))


def partner_lost(error: BaseException) -> bool:
    """Says whether an error of JAX means that another process of the group has ended, rather than a mistake in this one."""
    text = str(error)
    # A failing first call of a function raises the runtime's status ("UNKNOWN: Gloo ...") as a ValueError.
    of_runtime = isinstance(error, RuntimeError) or (isinstance(error, ValueError) and _STATUS.match(text) is not None)
    if not jax.distributed.is_initialized() or not of_runtime:
        return False
    return any(sign in text for sign in _LOST_SIGNS)


def leave(code: int, seconds: float) -> None:
    """Ends this process of a group after a failure; without a group, it returns.

    JAX's own exit waits 5 minutes for the other processes, which meanwhile wait in a collective for this one.

    Args:
        code: the exit code.
        seconds: how long to wait for the other processes to fail too, as they do where all made the same mistake.
    """
    if not jax.distributed.is_initialized() or jax.process_count() == 1:
        return
    if seconds > 0:
        waiting = threading.Thread(target=jax.distributed.shutdown, daemon=True)
        waiting.start()
        waiting.join(seconds)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def gather_values(values: np.ndarray) -> np.ndarray:
    """Returns the values [n] of every process, one process after the other [processes * n]. Every process must call it.

    Args:
        values: integers below 2^31 (JAX carries no larger ones), as many in each process.
    """
    if jax.process_count() == 1:
        return values
    return np.asarray(multihost_utils.process_allgather(values.astype(np.int32))).reshape(-1)


def first_problem(problem: str | None) -> str | None:
    """Returns the text of the first process that has a problem; None if none has. Every process must call this.

    It is for checks that each process makes on its own share, or that only one makes, of which all must learn.
    """
    if jax.process_count() == 1:
        return problem
    text = np.frombuffer((problem or "").encode()[:_TEXT_BYTES], np.uint8)
    padded = np.pad(text, (0, _TEXT_BYTES - len(text)))
    rows = gather_values(padded).reshape(-1, _TEXT_BYTES).astype(np.uint8)
    texts = (row.tobytes().rstrip(b"\0").decode(errors="ignore") for row in rows)
    return next(filter(None, texts), None)


@contextlib.contextmanager
def entered_by_first(context: Callable[[], AbstractContextManager[Held]]) -> Iterator[Held | None]:
    """Enters a context in process 0 for all processes of the group. Every process must call this.

    Args:
        context: makes the context; it is called in process 0 only.

    Yields:
        What the context yields; None in other processes.

    Raises:
        UserError: the context could not be entered; raised in every process.
    """
    with contextlib.ExitStack() as entered:
        held, problem = None, None
        if jax.process_index() == 0:
            try:
                held = entered.enter_context(context())
            except UserError as error:
                problem = str(error)
        if (problem := first_problem(problem)) is not None:
            raise UserError(problem)
        yield held


def _initialize(arguments: dict[str, Any]) -> None:
    """Joins the group; prints a line if it has to wait long for the other processes."""
    if arguments.get("process_id"):
        _await_coordinator(arguments["coordinator_address"], arguments.get("initialization_timeout", 300))
    seconds = arguments.get("initialization_timeout", 300)
    # JAX ends the process with a line about a "fatal error" if the group stays incomplete, so our explanation is printed
    # before that.
    waiting = threading.Timer(
        min(15, seconds / 2),
        lambda: print(
            f"waiting for all processes of the group, {seconds:g} s at most ({START_TIMEOUT})", file=sys.stderr
        ),
    )
    waiting.daemon = True
    waiting.start()
    try:
        jax.distributed.initialize(**arguments)
    except (RuntimeError, ValueError, OSError) as error:
        address = arguments.get("coordinator_address")
        what = f"at {address}" if address else "that JAX was to detect"
        raise UserError(
            f"cannot join the process group {what}: {error}. Check that process 0 runs and that its port is reachable, "
            f"set {', '.join(EXPLICIT)} outright, or set {SWITCH}=0 to run alone"
        ) from error
    finally:
        waiting.cancel()


def _keep_stdout_for_python() -> None:
    """Sends what C++ code prints on standard output to standard error from now on.

    Gloo, the transport of groups of CPUs, greets each of its peers there, in pieces that land within the lines of results.
    """
    try:
        theirs, errors = sys.stdout.fileno(), sys.stderr.fileno()
    except (AttributeError, OSError, ValueError):  # closed by the caller, or taken over by a notebook or a test
        return
    sys.stdout.flush()
    how: dict[str, Any] = {"encoding": sys.stdout.encoding, "errors": sys.stdout.errors}
    sys.stdout = open(os.dup(theirs), "w", buffering=1 if sys.stdout.line_buffering else -1, **how)  # noqa: SIM115
    os.dup2(errors, theirs)


def _await_coordinator(address: str, seconds: float) -> None:
    """Waits until process 0 listens, since JAX would end this process without an exception if it never does."""
    host, _, port = address.rpartition(":")
    end = time.monotonic() + seconds
    while True:
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=max(end - time.monotonic(), 0.1)).close()
            return
        except OSError as error:
            if time.monotonic() >= end:
                raise UserError(
                    f"process 0 of the group was not found at {address} for {seconds:g} s ({error}). Check that it runs, "
                    f"that the port is reachable from here, and {' and '.join(EXPLICIT)}; {START_TIMEOUT} sets the time"
                ) from error
            time.sleep(
                min(0.2, max(end - time.monotonic(), 0))
            )  # the host name may not resolve yet, or process 0 not listen
