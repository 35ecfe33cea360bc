"""launch/gpu.sh, launch/slurm.sbatch and launch/jobset.yaml: what they would run, and what they say to mistakes."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

LAUNCH = Path(__file__).resolve().parents[2] / "launch"


def start(script: str, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    inherited = {k: v for k, v in os.environ.items() if not k.startswith(("CUDA_", "SLURM_"))}
    return subprocess.run(
        ["bash", LAUNCH / script, *arguments], env=inherited | variables, capture_output=True, text=True, timeout=60
    )


@pytest.mark.parametrize(
    ("script", "arguments", "message"),
    [
        ("gpu.sh", [], "usage"),
        ("gpu.sh", ["fly"], "unknown verb 'fly'"),
        ("gpu.sh", ["run"], "needs a command"),
        ("gpu.sh", ["check", "--", "true"], "takes no command"),
        ("gpu.sh", ["run", "jaxblock"], "after --"),
        ("gpu.sh", ["run", "--gpus", "a,b", "--", "true"], "--gpus must be numbers"),
        ("gpu.sh", ["run", "--gpus", "0,1,2", "--processes", "2", "--", "true"], "3 GPUs do not divide among 2"),
        ("gpu.sh", ["debug", "--gpu"], "--gpu needs a value"),
        ("slurm.sbatch", [], "usage"),
        ("slurm.sbatch", ["jaxblock", "train"], "inside a Slurm job"),
    ],
)
def test_mistakes(script: str, arguments: list[str], message: str) -> None:
    done = start(script, *arguments)
    assert done.returncode == 2 and message in done.stdout + done.stderr


def test_one_gpu_to_debug_on() -> None:
    done = start("gpu.sh", "debug", "--gpu", "2", "--dry-run", "--", "jaxblock", "train", "two words")
    assert "CUDA_VISIBLE_DEVICES=2 " in done.stdout and "PREALLOCATE=false" in done.stdout
    assert "jaxblock train two\\ words" in done.stdout


def test_each_process_has_its_share_of_the_gpus() -> None:
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
def test_a_preempted_slurm_job_goes_back_into_the_queue(tmp_path: Path, code: int, before: int, requeued: bool) -> None:
    for name, line in (("srun", f"exit {code}"), ("scontrol", "exit 0")):
        tool = tmp_path / name
        tool.write_text(f'#!/bin/sh\necho {name} "$@" >>"$0.log"\n{line}\n')
        tool.chmod(0o755)
    path = f"{tmp_path}:{os.environ['PATH']}"
    job = {"SLURM_JOB_ID": "7", "SLURM_SUBMIT_DIR": str(tmp_path), "SLURM_RESTART_COUNT": str(before)}
    done = start("slurm.sbatch", "jaxblock", "train", PATH=path, **job)
    assert done.returncode == code
    assert (tmp_path / "srun.log").read_text() == "srun --kill-on-bad-exit=1 --wait=60 jaxblock train\n"
    assert (tmp_path / "scontrol.log").exists() == requeued


def test_the_jobset_is_whole() -> None:
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
    chips = 1
    for side in pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"].split("x"):
        chips *= int(side)
    assert chips == job["parallelism"] * container["resources"]["limits"]["google.com/tpu"]
    assert {m["name"] for m in container["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="no shellcheck on PATH; .ci/run runs it too")
def test_shellcheck_is_clean() -> None:
    scripts = [*sorted(LAUNCH.glob("*.sh")), LAUNCH / "slurm.sbatch"]
    subprocess.run(["shellcheck", "--external-sources", *scripts], cwd=LAUNCH.parent, check=True)
