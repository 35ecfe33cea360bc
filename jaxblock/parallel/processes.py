"""Joining a group of processes, when the environment says that there is one.

Tried in this order: variables that name the group outright (the process's number may be that of a Kubernetes indexed
job), `JAXBLOCK_DISTRIBUTED=1` or a TPU's own variables where JAX can find out by itself (TPU VMs, GKE), and Slurm.
"""

from __future__ import annotations

import os
import re
import socket
import sys
import threading
import time
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from jaxblock.errors import UserError

SWITCH = "JAXBLOCK_DISTRIBUTED"
"""``1``: join the group that JAX detects; ``0``: stay alone, whatever else is set; unset: other variables decide."""

START_TIMEOUT, HEARTBEAT_TIMEOUT = "JAXBLOCK_START_TIMEOUT", "JAXBLOCK_HEARTBEAT_TIMEOUT"
"""Seconds for all processes to appear (default 300), and after which a silent one counts as lost."""

HEARTBEAT = 45
"""Default of the latter; JAX's is 100. Its own threads send the beats, so that neither Python nor the compiler holds them
up, and a host that is well misses them only while the network finds another way, which takes seconds to half a minute."""


_EXPLICIT = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
_LOST_SIGNS = ("Gloo", "heartbeat", "coordination service", "Connection closed by peer", "unhealthy", "preempted")
_STATUS = re.compile(r"[A-Z]+(_[A-Z]+)*: ")
_place: tuple[int, int] | None = None
_INDEXED_JOB = "JOB_COMPLETION_INDEX"  # Kubernetes numbers the pods of an indexed job, as a JobSet's are
_SLURM = ("SLURM_STEP_NODELIST", "SLURM_PROCID", "SLURM_LOCALID")


def start() -> tuple[int, int]:
    """Joins the process group that the environment describes, or does nothing where it describes none.

    Must run before JAX touches a device. Calling it again is harmless.

    Returns:
        (this process's index, how many processes).

    Raises:
        UserError: variables are half set or wrong, or the group cannot be joined.
    """
    global _place
    if not jax.distributed.is_initialized():
        arguments = from_environment(os.environ)
        if arguments is not None:
            _initialize(arguments)
        elif (count := jax.process_count()) > 1:
            # A TPU slice knows its hosts even so; each of them would take itself for the one that writes.
            raise UserError(
                f"this is one of the {count} hosts of a TPU slice, and no process group was joined: set {SWITCH}=1 on all "
                "of them (launch/tpu.sh does)"
            )
    _place = jax.process_index(), jax.process_count()
    return _place


def place() -> tuple[int, int] | None:
    """What `start` has returned; None before it has.

    For threads that must not wait: JAX's own answer starts the devices, under a lock, and they may wait for other hosts.
    """
    return _place


def wait(name: str) -> None:
    """Waits until every process of the group is at this point."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


def any_of(flag: bool) -> bool:
    """Whether the flag is set in any process of the group. Every process must ask."""
    if jax.process_count() == 1:
        return flag
    return bool(np.any(multihost_utils.process_allgather(np.asarray(flag))))


def partner_lost(error: BaseException) -> bool:
    """Whether an error of JAX says that another process of this one's group has ended, rather than a mistake here."""
    text = str(error)
    # A failing first call of a function raises the runtime's status ("UNKNOWN: Gloo ...") as a ValueError.
    of_runtime = isinstance(error, RuntimeError) or (isinstance(error, ValueError) and _STATUS.match(text) is not None)
    if not jax.distributed.is_initialized() or not of_runtime:
        return False
    return any(sign in text for sign in _LOST_SIGNS)


def leave(code: int, seconds: float) -> None:
    """Ends this process of a group after a failure, and returns where there is no group.

    The way out that JAX takes waits 5 minutes for the others, which meanwhile wait in a collective for this one.

    Args:
        code: exit code.
        seconds: for the others to get here too, as they do where all made the same mistake.
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


def gathered(values: np.ndarray) -> np.ndarray:
    """The values [n] of every process, one process after the other [processes * n]. Every process must ask.

    Args:
        values: as many in each process; integers below 2^31 (JAX carries no more).
    """
    if jax.process_count() == 1:
        return values
    return np.asarray(multihost_utils.process_allgather(values.astype(np.int32))).reshape(-1)


def from_environment(variables: Mapping[str, str]) -> dict[str, Any] | None:
    """What to pass to ``jax.distributed.initialize``.

    Args:
        variables: the environment.

    Returns:
        Keyword arguments (none where JAX detects them itself), or None where there is no group to join.

    Raises:
        UserError: variables are half set or wrong; the message names them.
    """
    switch = variables.get(SWITCH, "")
    if switch not in ("", "0", "1"):
        raise UserError(f"{SWITCH} is {switch!r}: set it to 1 to join a process group, to 0 to stay alone, or unset it")
    if switch == "0":
        return None
    timeouts = {"heartbeat_timeout_seconds": HEARTBEAT, **_timeouts(variables)}
    given = [name for name in _EXPLICIT if variables.get(name)]
    if given:
        return {**_explicit(variables, given), **timeouts}
    if switch == "1" or _is_tpu_group(variables):
        return timeouts
    if variables.get("SLURM_JOB_ID") and _number(variables, "SLURM_NTASKS", default=1) > 1:
        missing = [name for name in _SLURM if not variables.get(name)]
        if missing:
            raise UserError(
                f"this Slurm job has {variables['SLURM_NTASKS']} tasks, but {', '.join(missing)} is not set: start "
                f"with `srun`, so that every task runs, or set {SWITCH}=0 to run one process alone"
            )
        return timeouts
    return None


def _is_tpu_group(variables: Mapping[str, str]) -> bool:
    """Whether GKE (or whoever starts the container) names several TPU hosts or slices; a TPU VM is asked by JAX."""
    hosts = [name for name in variables.get("TPU_WORKER_HOSTNAMES", "").split(",") if name]
    if len(hosts) > 1 and not variables.get("TPU_WORKER_ID"):
        raise UserError(
            f"TPU_WORKER_HOSTNAMES names {len(hosts)} hosts, but TPU_WORKER_ID is not set: set it to this host's place "
            f"among them, or set {SWITCH}=0 to run alone"
        )
    return len(hosts) > 1 or _number(variables, "MEGASCALE_NUM_SLICES", default=1) > 1


def _timeouts(variables: Mapping[str, str]) -> dict[str, Any]:
    names = {START_TIMEOUT: "initialization_timeout", HEARTBEAT_TIMEOUT: "heartbeat_timeout_seconds"}
    found = {argument: _number(variables, name) for name, argument in names.items() if variables.get(name)}
    if 0 in found.values():
        raise UserError(f"{START_TIMEOUT} and {HEARTBEAT_TIMEOUT} are whole seconds above 0")
    return found


def _explicit(variables: Mapping[str, str], given: list[str]) -> dict[str, Any]:
    ids = _EXPLICIT[2] if variables.get(_EXPLICIT[2]) else _INDEXED_JOB
    missing = [name for name in _EXPLICIT if name not in given]
    if ids == _INDEXED_JOB and variables.get(ids):
        missing.remove(_EXPLICIT[2])
    if missing:
        raise UserError(f"{' and '.join(given)} set, but not {' and '.join(missing)}: set all three, or none")
    address = variables["JAX_COORDINATOR_ADDRESS"]
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit():
        raise UserError(f"JAX_COORDINATOR_ADDRESS is {address!r}: must be host:port of process 0, as in 10.0.0.2:8476")
    count, index = _number(variables, "JAX_NUM_PROCESSES"), _number(variables, ids)
    if not 0 <= index < count:
        raise UserError(f"{ids} is {index} and JAX_NUM_PROCESSES is {count}: ids run from 0 to count - 1")
    return {"coordinator_address": address, "num_processes": count, "process_id": index}


def _number(variables: Mapping[str, str], name: str, default: int | None = None) -> int:
    text = variables.get(name, "")
    if not text and default is not None:
        return default
    if not text.isdigit():
        raise UserError(f"{name} is {text!r}: must be a whole number")
    return int(text)


def _initialize(arguments: dict[str, Any]) -> None:
    if arguments.get("process_id"):
        _await_coordinator(arguments["coordinator_address"], arguments.get("initialization_timeout", 300))
    seconds = arguments.get("initialization_timeout", 300)
    # JAX ends a process whose group stays incomplete with a line about a "fatal error": ours then stands above it.
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
            f"set {', '.join(_EXPLICIT)} outright, or set {SWITCH}=0 to run alone"
        ) from error
    finally:
        waiting.cancel()


def _await_coordinator(address: str, seconds: float) -> None:
    """Waits until process 0 listens: where it never does, JAX ends the process without an exception."""
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
                    f"that the port is reachable from here, and {' and '.join(_EXPLICIT)}; {START_TIMEOUT} sets the time"
                ) from error
            time.sleep(min(0.2, max(end - time.monotonic(), 0)))  # the name may not be known yet, nor anybody listen
