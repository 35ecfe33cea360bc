"""Joining a group of processes, when the environment says that there is one.

Three ways, tried in this order: variables that name the group outright, `JAXBLOCK_DISTRIBUTED=1` where JAX can find out
by itself (TPU pods, GKE), and Slurm.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from jaxblock.errors import UserError

SWITCH = "JAXBLOCK_DISTRIBUTED"
"""``1``: join the group that JAX detects; ``0``: stay alone, whatever else is set; unset: other variables decide."""

_EXPLICIT = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
_SLURM = ("SLURM_STEP_NODELIST", "SLURM_PROCID", "SLURM_LOCALID")


def start() -> tuple[int, int]:
    """Joins the process group that the environment describes, or does nothing where it describes none.

    Must run before JAX touches a device. Calling it again is harmless.

    Returns:
        (this process's index, how many processes).

    Raises:
        UserError: variables are half set or wrong, or the group cannot be joined.
    """
    if not jax.distributed.is_initialized():
        arguments = from_environment(os.environ)
        if arguments is None:
            return 0, 1
        _initialize(arguments)
    return jax.process_index(), jax.process_count()


def wait(name: str) -> None:
    """Waits until every process of the group is at this point."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


def any_of(flag: bool) -> bool:
    """Whether the flag is set in any process of the group. Every process must ask."""
    if jax.process_count() == 1:
        return flag
    return bool(np.any(multihost_utils.process_allgather(np.asarray(flag))))


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
    given = [name for name in _EXPLICIT if variables.get(name)]
    if given:
        return _explicit(variables, given)
    if switch == "1":
        return {}
    if variables.get("SLURM_JOB_ID") and _number(variables, "SLURM_NTASKS", default=1) > 1:
        missing = [name for name in _SLURM if not variables.get(name)]
        if missing:
            raise UserError(
                f"this Slurm job has {variables['SLURM_NTASKS']} tasks, but {', '.join(missing)} is not set: start "
                f"with `srun`, so that every task runs, or set {SWITCH}=0 to run one process alone"
            )
        return {}
    return None


def _explicit(variables: Mapping[str, str], given: list[str]) -> dict[str, Any]:
    missing = [name for name in _EXPLICIT if name not in given]
    if missing:
        raise UserError(f"{' and '.join(given)} set, but not {' and '.join(missing)}: set all three, or none")
    address = variables["JAX_COORDINATOR_ADDRESS"]
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit():
        raise UserError(f"JAX_COORDINATOR_ADDRESS is {address!r}: must be host:port of process 0, as in 10.0.0.2:8476")
    count, index = _number(variables, "JAX_NUM_PROCESSES"), _number(variables, "JAX_PROCESS_ID")
    if not 0 <= index < count:
        raise UserError(f"JAX_PROCESS_ID is {index} and JAX_NUM_PROCESSES is {count}: ids run from 0 to count - 1")
    return {"coordinator_address": address, "num_processes": count, "process_id": index}


def _number(variables: Mapping[str, str], name: str, default: int | None = None) -> int:
    text = variables.get(name, "")
    if not text and default is not None:
        return default
    if not text.isdigit():
        raise UserError(f"{name} is {text!r}: must be a whole number")
    return int(text)


def _initialize(arguments: dict[str, Any]) -> None:
    try:
        jax.distributed.initialize(**arguments)
    except (RuntimeError, ValueError, OSError) as error:
        what = f"at {arguments['coordinator_address']}" if arguments else "that JAX was to detect"
        raise UserError(
            f"cannot join the process group {what}: {error}. Check that process 0 runs and that its port is reachable, "
            f"set {', '.join(_EXPLICIT)} outright, or set {SWITCH}=0 to run alone"
        ) from error
