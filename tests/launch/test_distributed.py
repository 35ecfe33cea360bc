"""Tests how processes join a group: the variables they need, and real processes over loopback (launch/local_pod.sh)."""

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from jaxblock.errors import UserError
from jaxblock.parallel.environment import HEARTBEAT, from_environment
from tests.launch.conftest import LAUNCH

THREE = {"JAX_COORDINATOR_ADDRESS": "10.0.0.2:8476", "JAX_NUM_PROCESSES": "4", "JAX_PROCESS_ID": "3"}
BEAT = {"heartbeat_timeout_seconds": HEARTBEAT}
EXPLICIT = BEAT | {"coordinator_address": "10.0.0.2:8476", "num_processes": 4, "process_id": 3}
SLURM = {"SLURM_JOB_ID": "1", "SLURM_NTASKS": "2"}
GKE = {"TPU_WORKER_HOSTNAMES": "a,b,c", "TPU_WORKER_ID": "1"}
INDEXED = {k: v for k, v in THREE.items() if k != "JAX_PROCESS_ID"} | {"JOB_COMPLETION_INDEX": "3"}
STEP = {"SLURM_STEP_NODELIST": "n[1-2]", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"}


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({}, None),
        (THREE, EXPLICIT),
        (THREE | {"JAXBLOCK_DISTRIBUTED": "1"}, EXPLICIT),
        (THREE | {"JAXBLOCK_DISTRIBUTED": "0"}, None),
        ({"JAXBLOCK_DISTRIBUTED": "1"}, BEAT),
        (SLURM | STEP, BEAT),
        (SLURM | STEP | {"SLURM_NTASKS": "1"}, None),
        ({"SLURM_JOB_ID": "1"}, None),
        (SLURM | {"JAXBLOCK_DISTRIBUTED": "0"}, None),
        (GKE, BEAT),
        (GKE | {"TPU_WORKER_HOSTNAMES": "a"}, None),
        (GKE | {"TPU_WORKER_HOSTNAMES": "a", "MEGASCALE_NUM_SLICES": "2"}, BEAT),
        (INDEXED, EXPLICIT),
        ({"JOB_COMPLETION_INDEX": "3"}, None),
        (THREE | {"JAXBLOCK_START_TIMEOUT": "60"}, EXPLICIT | {"initialization_timeout": 60}),
        ({"JAXBLOCK_DISTRIBUTED": "1", "JAXBLOCK_HEARTBEAT_TIMEOUT": "20"}, {"heartbeat_timeout_seconds": 20}),
    ],
)
def test_what_the_environment_says(variables, expected):
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
        ({"TPU_WORKER_HOSTNAMES": "a,b"}, "names 2 hosts, but TPU_WORKER_ID is not set"),
        (INDEXED | {"JOB_COMPLETION_INDEX": "4"}, "JOB_COMPLETION_INDEX is 4 and JAX_NUM_PROCESSES is 4"),
        (THREE | {"JAXBLOCK_START_TIMEOUT": "0"}, "whole seconds above 0"),
        (THREE | {"JAXBLOCK_START_TIMEOUT": "1m"}, "JAXBLOCK_START_TIMEOUT is '1m'"),
    ],
)
def test_half_set_or_wrong(variables, message):
    with pytest.raises(UserError, match=message):
        from_environment(variables)


JOIN = """
import jax
from jaxblock.parallel import processes
first = processes.join_group()
assert first == processes.join_group()
from jax.experimental.multihost_utils import process_allgather
print('joined', *first, len(jax.devices()), process_allgather(jax.numpy.array(first[0] + 1)).tolist())
"""


def pod(*arguments: str | Path, **variables: str) -> subprocess.CompletedProcess[str]:
    command = [LAUNCH / "local_pod.sh", *arguments]
    return subprocess.run(command, env=os.environ | variables, capture_output=True, text=True, timeout=180)


def test_two_processes_join_over_loopback():
    done = pod("2", "--devices", "2", "--", sys.executable, "-c", JOIN)
    assert done.returncode == 0, done.stderr
    # Standard output is for Python alone: Gloo's greetings, which tear lines apart, are on standard error.
    assert sorted(done.stdout.splitlines()) == ["[0] joined 0 2 4 [1, 2]", "[1] joined 1 2 4 [1, 2]"]
    assert "[Gloo]" in done.stderr


def test_a_process_that_never_comes_is_told_within_the_timeout(monkeypatch):
    for name, value in (THREE | {"JAX_COORDINATOR_ADDRESS": "127.0.0.1:1", "JAXBLOCK_START_TIMEOUT": "1"}).items():
        monkeypatch.setenv(name, value)
    alone = "from jaxblock.parallel import processes; processes.join_group()"
    done = subprocess.run([sys.executable, "-c", alone], capture_output=True, text=True, timeout=120)
    assert done.returncode == 1 and "process 0 of the group was not found at 127.0.0.1:1 for 1 s" in done.stderr


ONE_FAILS = """
[ $JAX_PROCESS_ID = 1 ] || { trap '' TERM; touch "$READY/$JAX_PROCESS_ID"; while :; do sleep 1; done; }
while [ "$(ls "$READY" | wc -l)" -lt 2 ]; do sleep 0.05; done
exit 7
"""
"""The others ignore SIGTERM, as a process deep in a collective would."""


def test_one_that_fails_ends_the_others(tmp_path):
    done = pod("3", "--grace", "1", "--", "bash", "-c", ONE_FAILS, READY=str(tmp_path))
    assert done.returncode == 7
    assert "process 1 ended with exit code 7: ending the others" in done.stderr
    assert "process 0 ended with exit code 137" in done.stderr and "process 2 ended with exit code 137" in done.stderr


def test_a_signal_to_the_script_reaches_every_process(tmp_path):
    program = "trap 'exit 75' TERM; echo ready; while :; do read -r -t 60 <>\"$0\"; done"
    os.mkfifo(tmp_path / "pipe")
    command = [LAUNCH / "local_pod.sh", "2", "--", "bash", "-c", program, tmp_path / "pipe"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert sorted(process.stdout.readline() for _ in range(2)) == ["[0] ready\n", "[1] ready\n"]
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 75
        assert "ending the others" not in process.stderr.read()


LOSES = """
from jaxblock import cli
from jaxblock.parallel import processes
def verb(options, config):
    me, _ = processes.join_group()
    processes.any_of(False)
    if me == 1:
        raise cli.UserError("a mistake of process 1")
    processes.any_of(False)
cli.VERBS["inspect"] = cli.VERBS["inspect"]._replace(run=verb)
raise SystemExit(cli.main(["inspect"]))
"""


@pytest.mark.slow
def test_a_process_whose_partner_makes_a_mistake_says_so_and_ends_with_134():
    """Without this, a mistake of one process would leave both waiting for each other for 5 minutes."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    group = os.environ | {"JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": "2", "XLA_FLAGS": ""}
    group |= {"JAXBLOCK_HEARTBEAT_TIMEOUT": "10", "JAX_CPU_COLLECTIVES_IMPLEMENTATION": "gloo"}
    command, pipe = [sys.executable, "-c", LOSES], subprocess.PIPE
    both = [subprocess.Popen(command, env=group | {"JAX_PROCESS_ID": i}, stderr=pipe, text=True) for i in "01"]
    said = [process.communicate(timeout=120)[1] for process in both]
    assert [process.returncode for process in both] == [134, 2] and "a mistake of process 1" in said[1], said
    assert "another process of the group" in said[0] or "another task died" in said[0], said[0]
    assert "this is a bug" not in said[0]
