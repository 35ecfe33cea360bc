"""Joining a process group: what the environment must say, and two real processes over loopback."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from typing import Any

import pytest

from jaxblock.errors import UserError
from jaxblock.parallel.distributed import from_environment

THREE = {"JAX_COORDINATOR_ADDRESS": "10.0.0.2:8476", "JAX_NUM_PROCESSES": "4", "JAX_PROCESS_ID": "3"}
EXPLICIT = {"coordinator_address": "10.0.0.2:8476", "num_processes": 4, "process_id": 3}
SLURM = {"SLURM_JOB_ID": "1", "SLURM_NTASKS": "2"}
STEP = {"SLURM_STEP_NODELIST": "n[1-2]", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"}


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({}, None),
        (THREE, EXPLICIT),
        (THREE | {"JAXBLOCK_DISTRIBUTED": "1"}, EXPLICIT),
        (THREE | {"JAXBLOCK_DISTRIBUTED": "0"}, None),
        ({"JAXBLOCK_DISTRIBUTED": "1"}, {}),
        (SLURM | STEP, {}),
        (SLURM | STEP | {"SLURM_NTASKS": "1"}, None),
        ({"SLURM_JOB_ID": "1"}, None),
        (SLURM | {"JAXBLOCK_DISTRIBUTED": "0"}, None),
    ],
)
def test_what_the_environment_says(variables: dict[str, str], expected: dict[str, Any] | None) -> None:
    assert from_environment(variables) == expected


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"JAXBLOCK_DISTRIBUTED": "yes"}, "JAXBLOCK_DISTRIBUTED is 'yes'"),
        ({k: v for k, v in THREE.items() if k != "JAX_PROCESS_ID"}, "not JAX_PROCESS_ID"),
        ({"JAX_NUM_PROCESSES": "4"}, "not JAX_COORDINATOR_ADDRESS and JAX_PROCESS_ID"),
        (THREE | {"JAX_PROCESS_ID": "4"}, "JAX_PROCESS_ID is 4 and JAX_NUM_PROCESSES is 4"),
        (THREE | {"JAX_PROCESS_ID": "-1"}, "JAX_PROCESS_ID is '-1'"),
        (THREE | {"JAX_NUM_PROCESSES": "four"}, "JAX_NUM_PROCESSES is 'four'"),
        (THREE | {"JAX_COORDINATOR_ADDRESS": "10.0.0.2"}, "host:port"),
        (SLURM, "srun"),
    ],
)
def test_half_set_or_wrong(variables: dict[str, str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        from_environment(variables)


JOIN = """
import jax
from jaxblock.parallel import distributed
first = distributed.start()
assert first == distributed.start()
from jax.experimental.multihost_utils import process_allgather
print('joined', *first, len(jax.devices()), process_allgather(jax.numpy.array(first[0] + 1)).tolist())
"""


def test_two_processes_join_over_loopback() -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    group = {"JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}", "JAX_NUM_PROCESSES": "2", "JAX_PLATFORMS": "cpu"}
    group |= {"XLA_FLAGS": "--xla_force_host_platform_device_count=2"}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", JOIN],
            env=os.environ | group | {"JAX_PROCESS_ID": str(index)},
            stdout=subprocess.PIPE,
            text=True,
        )
        for index in range(2)
    ]
    try:
        printed = [process.communicate(timeout=120)[0].splitlines() for process in processes]
    finally:
        for process in processes:
            process.kill()
    # Gloo prints lines of its own.
    joined = [line for lines in printed for line in lines if line.startswith("joined")]
    assert joined == ["joined 0 2 4 [1, 2]", "joined 1 2 4 [1, 2]"]
