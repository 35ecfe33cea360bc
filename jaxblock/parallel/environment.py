"""Reads from environment variables which group of processes this one is to join.

Three sources are tried in this order: JAX's own variables, which name the group (a Kubernetes indexed job may give the
process's number); `JAXBLOCK_DISTRIBUTED=1` or a TPU's variables, where JAX detects the group (TPU VMs, GKE); and Slurm.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jaxblock.errors import UserError

SWITCH = "JAXBLOCK_DISTRIBUTED"
"""``1``: join the group that JAX detects; ``0``: stay alone, whatever else is set; unset: other variables decide."""

START_TIMEOUT = "JAXBLOCK_START_TIMEOUT"
"""The seconds within which all processes must appear (default 300)."""

HEARTBEAT_TIMEOUT = "JAXBLOCK_HEARTBEAT_TIMEOUT"
"""The seconds after which a silent process counts as lost (default ``HEARTBEAT``)."""

HEARTBEAT = 45
"""The default of ``HEARTBEAT_TIMEOUT`` in seconds; JAX's own is 100. JAX's own threads send the heartbeats, so neither Python
nor the compiler delays them. A healthy host misses them only while the network finds another route, which takes up to half
a minute."""

EXPLICIT = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
"""The variables that describe the group to JAX: the address of process 0, the number of processes, and this one's index."""

_INDEXED_JOB = "JOB_COMPLETION_INDEX"  # Kubernetes numbers the pods of an indexed job, as a JobSet's are
_SLURM = ("SLURM_STEP_NODELIST", "SLURM_PROCID", "SLURM_LOCALID")


def from_environment(variables: Mapping[str, str]) -> dict[str, Any] | None:
    """Returns what to pass to ``jax.distributed.initialize``.

    Args:
        variables: the environment variables.

    Returns:
        The keyword arguments (without an address where JAX detects the group itself), or None where there is no group to
        join.

    Raises:
        UserError: variables are set in part or wrong; the message names them.
    """
    switch = variables.get(SWITCH, "")
    if switch not in ("", "0", "1"):
        raise UserError(f"{SWITCH} is {switch!r}: set it to 1 to join a process group, to 0 to stay alone, or unset it")
    if switch == "0":
        return None
    timeouts = {"heartbeat_timeout_seconds": HEARTBEAT, **_timeouts(variables)}
    given = [name for name in EXPLICIT if variables.get(name)]
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
    """Says whether variables, set by GKE for example, name several TPU hosts or slices; on a TPU VM JAX finds out by itself."""
    hosts = [name for name in variables.get("TPU_WORKER_HOSTNAMES", "").split(",") if name]
    if len(hosts) > 1 and not variables.get("TPU_WORKER_ID"):
        raise UserError(
            f"TPU_WORKER_HOSTNAMES names {len(hosts)} hosts, but TPU_WORKER_ID is not set: set it to this host's place "
            f"among them, or set {SWITCH}=0 to run alone"
        )
    return len(hosts) > 1 or _number(variables, "MEGASCALE_NUM_SLICES", default=1) > 1


def _timeouts(variables: Mapping[str, str]) -> dict[str, Any]:
    """Returns the timeouts that variables set, as arguments of ``jax.distributed.initialize``."""
    names = {START_TIMEOUT: "initialization_timeout", HEARTBEAT_TIMEOUT: "heartbeat_timeout_seconds"}
    found = {argument: _number(variables, name) for name, argument in names.items() if variables.get(name)}
    if 0 in found.values():
        raise UserError(f"{START_TIMEOUT} and {HEARTBEAT_TIMEOUT} are whole seconds above 0")
    return found


def _explicit(variables: Mapping[str, str], given: list[str]) -> dict[str, Any]:
    """Returns the address, size and index from the variables of ``EXPLICIT``, of which those in ``given`` are set."""
    ids = EXPLICIT[2] if variables.get(EXPLICIT[2]) else _INDEXED_JOB
    missing = [name for name in EXPLICIT if name not in given]
    if ids == _INDEXED_JOB and variables.get(ids):
        missing.remove(EXPLICIT[2])
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
    """Reads a variable as a whole number."""
    text = variables.get(name, "")
    if not text and default is not None:
        return default
    if not text.isdigit():
        raise UserError(f"{name} is {text!r}: must be a whole number")
    return int(text)
