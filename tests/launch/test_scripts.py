"""Tests launch/gpu.sh, launch/slurm.sbatch and launch/jobset.yaml: what they would run, and their messages on mistakes."""

import math
import os
import shlex
import shutil
import subprocess
import sys

import pytest
import yaml

from jaxblock.parallel.chips import CHIPS
from tests.launch.conftest import LAUNCH, put


def start(script: str, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    inherited = {k: v for k, v in os.environ.items() if not k.startswith(("CUDA_", "SLURM_", "XLA_"))}
    command = ["bash", LAUNCH / script, *arguments]
    return subprocess.run(command, env=inherited | variables, capture_output=True, text=True, timeout=60)


MISTAKES = """
gpu.sh | usage
gpu.sh fly | unknown verb 'fly'
gpu.sh run | needs a command
gpu.sh check -- true | takes no command
gpu.sh run jaxblock | after --
gpu.sh run --gpus a,b -- true | --gpus must be numbers
gpu.sh run --gpus 0,1,2 --processes 2 -- true | 3 GPUs do not divide among 2
gpu.sh debug --gpu | --gpu needs a value
slurm.sbatch | usage
slurm.sbatch jaxblock train | inside a Slurm job
local_pod.sh | usage
local_pod.sh two -- true | how many processes
local_pod.sh 0 -- true | how many processes
local_pod.sh 08 -- true | how many processes? '08'
local_pod.sh 9999999999 -- true | how many processes? '9999999999'
local_pod.sh 2 --grace 08 -- true | --grace must be a whole number without leading zeros
local_pod.sh 2 | a command
local_pod.sh 2 true | after --
local_pod.sh 2 --devices x -- true | --devices must be a whole number
local_pod.sh 2 --devices | --devices needs a value
"""


@pytest.mark.parametrize("mistake", MISTAKES.strip().splitlines())
def test_mistakes(mistake):
    command, message = mistake.split(" | ")
    done = start(*command.split())
    assert done.returncode == 2 and message in done.stdout + done.stderr


@pytest.mark.parametrize("made", [False, True], ids=["without .venv", "with .venv"])
def test_a_dry_setup_installs_nothing(tmp_path, made):
    """The stand-in for Python records its arguments; it makes and installs nothing."""
    (tmp_path / "launch").mkdir()
    scripts = (f"launch/{name}.sh" for name in ("gpu", "environment", "command_line"))
    for name in (*scripts, "requirements.txt", "pyproject.toml"):
        shutil.copy(LAUNCH.parent / name, tmp_path / name)
    pins = tmp_path / f"constraints-py{sys.version_info[0]}{sys.version_info[1]}.txt"
    pins.touch()
    noted, venv = tmp_path / "noted", tmp_path / ".venv"
    script = f"""#!/bin/sh
case "$1 $2" in
    '-m venv' | '-m pip') echo "$2 $3" >>'{noted}' ;;
    *'import jax'*) echo check >>'{noted}' ;;
    *) exec {shlex.quote(sys.executable)} "$@" ;;
esac
"""
    python = put(venv / "bin/python" if made else tmp_path / "python", script)
    done = start(str(tmp_path / "launch/gpu.sh"), "setup", "--cuda", "12", "--dry-run", PYTHON=str(python))
    assert done.returncode == 0, done.stderr
    commands = [shlex.split(line)[1:] for line in done.stdout.splitlines() if line[0] != "#"]
    if not made:
        assert commands.pop(0) == ["-m", "venv", "--clear", str(venv)]
    jaxblock, jax, check = commands
    assert jaxblock[:3] == jax[:3] == ["-m", "pip", "install"] and jax[-1] == "jax[cuda12]"
    assert jaxblock[-4:] == ["--constraint", str(pins), "--editable", f"{tmp_path}[gcs]"]
    assert check[0] == "-c" and "jax.devices()" in check[1]
    assert (noted.read_text() if noted.exists() else "") == ("pip --version\n" if made else "")
    assert not list(tmp_path.glob(".venv/.installed*")) and venv.exists() == made


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({}, "0.9 and none"),
        ({"XLA_CLIENT_MEM_FRACTION": "0.5"}, "0.5 and none"),
        ({"XLA_PYTHON_CLIENT_MEM_FRACTION": "0.6"}, "none and 0.6"),
    ],
)
@pytest.mark.parametrize("way", ["debug", "run", "run --gpus 0,1 --processes 2", "slurm"])
def test_jax_may_take_what_the_plan_counts_on(tmp_path, way, given, told):
    show = ["sh", "-c", 'echo "${XLA_CLIENT_MEM_FRACTION:-none} and ${XLA_PYTHON_CLIENT_MEM_FRACTION:-none}"']
    if way == "slurm":
        put(tmp_path / "srun", '#!/bin/sh\nshift 2\nexec "$@"\n')
        job = {"SLURM_JOB_ID": "7", "SLURM_SUBMIT_DIR": str(tmp_path), "PATH": f"{tmp_path}:{os.environ['PATH']}"}
        done = start("slurm.sbatch", *show, **job, **given)
    else:
        done = start("gpu.sh", *way.split(), "--", *show, **given)
    lines = [line.removeprefix("[0] ").removeprefix("[1] ") for line in done.stdout.splitlines()]
    assert lines == [told] * (2 if "processes" in way else 1), done.stderr
    assert given or CHIPS["h200"].memory == float(lines[0].split()[0]) * 141e9


def test_each_process_has_its_share_of_the_gpus():
    one = start("gpu.sh", "debug", "--gpu", "2", "--dry-run", "--", "jaxblock", "train", "two words")
    assert "CUDA_VISIBLE_DEVICES=2 " in one.stdout and "PREALLOCATE=false" in one.stdout
    assert shlex.split(one.stdout)[-3:] == ["jaxblock", "train", "two words"]
    show = 'echo "$JAX_PROCESS_ID of $JAX_NUM_PROCESSES: $CUDA_VISIBLE_DEVICES on $JAX_PLATFORMS, $1"'
    command = ["bash", "-c", show, "show", "two words"]
    done = start("gpu.sh", "run", "--gpus", "0,1,4,5", "--processes", "2", "--", *command)
    assert done.returncode == 0, done.stderr
    expected = ["[0] 0 of 2: 0,1 on cuda, two words", "[1] 1 of 2: 4,5 on cuda, two words"]
    assert sorted(done.stdout.splitlines()) == expected


@pytest.mark.parametrize(
    ("code", "before", "requeued"),
    [(0, 0, False), (1, 0, False), (130, 9, True), (143, 9, True), (124, 0, True), (134, 4, True), (137, 5, False)],
)
def test_a_preempted_slurm_job_goes_back_into_the_queue(tmp_path, code, before, requeued):
    for name, line in (("srun", f"exit {code}"), ("scontrol", "exit 0")):
        put(tmp_path / name, f'#!/bin/sh\necho {name} "$@" >>"$0.log"\n{line}\n')
    job = {"SLURM_JOB_ID": "7", "SLURM_SUBMIT_DIR": str(tmp_path), "SLURM_RESTART_COUNT": str(before)}
    done = start("slurm.sbatch", "jaxblock", "train", PATH=f"{tmp_path}:{os.environ['PATH']}", **job)
    assert done.returncode == code
    assert (tmp_path / "srun.log").read_text() == "srun --kill-on-bad-exit=1 --wait=60 jaxblock train\n"
    assert (tmp_path / "scontrol.log").exists() == requeued


def test_the_jobset_is_whole():
    jobset = yaml.safe_load((LAUNCH / "jobset.yaml").read_text())
    assert jobset["kind"] == "JobSet" and jobset["apiVersion"].startswith("jobset.x-k8s.io/")
    (replicated,) = jobset["spec"]["replicatedJobs"]
    job = replicated["template"]["spec"]
    assert job["parallelism"] == job["completions"] and job["completionMode"] == "Indexed"
    pod = job["template"]["spec"]
    (container,) = pod["containers"]
    assert {entry["name"]: entry["value"] for entry in container["env"]}["JAXBLOCK_DISTRIBUTED"] == "1"
    assert container["resources"]["requests"] == container["resources"]["limits"]
    (rule,) = job["podFailurePolicy"]["rules"]
    assert rule["onExitCodes"]["containerName"] == container["name"] and rule["action"] == "FailJob"
    assert pod["restartPolicy"] == "Never"  # without it Kubernetes refuses such rules
    chips = math.prod(map(int, pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"].split("x")))
    assert chips == job["parallelism"] * container["resources"]["limits"]["google.com/tpu"]
    assert {m["name"] for m in container["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}
