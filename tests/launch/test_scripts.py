"""Tests the scripts of launch/ but tpu.sh: what they install and run, and all scripts' messages on mistakes; and jobset.yaml."""

import json
import math
import os
import re
import shlex
import shutil
import subprocess
import sys
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
import yaml
from packaging.utils import canonicalize_name

from jaxblock.parallel.chips import CHIPS
from tests.launch.conftest import LAUNCH, put

ROOT = LAUNCH.parent


def start(script: str, *arguments: str, root: Path = ROOT, **variables: str) -> subprocess.CompletedProcess[str]:
    """Runs a script of a checkout, from another folder."""
    inherited = {k: v for k, v in os.environ.items() if not k.startswith(("CUDA_", "JAXBLOCK_", "SLURM_", "XLA_"))}
    how = {"env": inherited | variables, "cwd": "/", "capture_output": True, "text": True, "timeout": 60}
    return subprocess.run(["bash", root / "launch" / script, *arguments], **how)


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
tpu.sh | usage
tpu.sh launch | unknown verb 'launch'
tpu.sh create --zone z --type v6e-8 | --name
tpu.sh create --name n --type v6e-8 | --zone
tpu.sh create POD | --type
tpu.sh run POD | needs a command
tpu.sh resume POD | needs a command
tpu.sh resume POD --recreate -- true | --recreate needs --type
tpu.sh resume POD --backoff soon -- true | --backoff must be a whole number
tpu.sh run POD --env KEY=1 -- true | --env must be the name of a variable, not 'KEY=1'
tpu.sh run POD --env NOT_SET -- true | NOT_SET is not set here; export NOT_SET first
tpu.sh stop POD -- true | stop takes no command
tpu.sh run POD jaxblock | after --
tpu.sh logs POD --lines '5; rm -rf /' | must be a whole number
tpu.sh delete POD --name | --name needs a value
tpu.sh delete POD --yes=no | unknown argument '--yes=no'
tpu.sh delete POD '--name --zone' z | unknown argument '--name --zone'
"""


@pytest.mark.parametrize("mistake", MISTAKES.strip().splitlines())
def test_mistakes(mistake):
    command, message = mistake.replace("POD", "--dry-run --name pod --zone z").split(" | ")
    done = start(*shlex.split(command))
    assert done.returncode == 2 and message in done.stdout + done.stderr


# Records pip, jaxblock and pytest calls, with the folder where they are made; all else is the real Python.
INTERPRETER = f"""#!{sys.executable} -SE
import json, os, pathlib, sys
arguments = [one for one in sys.argv[1:] if one != "-P"]
if arguments[:1] != ["-m"] or arguments[1] not in ("pip", "jaxblock", "pytest"):
    os.execv({sys.executable!r}, [{sys.executable!r}, *arguments])
if arguments == ["-m", "pip", "--version"]:
    sys.exit(0)
with open(pathlib.Path(__file__).parents[2] / "calls.jsonl", "a") as calls:
    calls.write(json.dumps(arguments[1:]) + "\\n")
if arguments[1] == "jaxblock":
    print("in", os.getcwd())
if os.environ.get("FAIL_AT") in arguments:
    sys.exit(3)
"""


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """Returns a copy of the scripts with a stand-in .venv, in a folder whose name needs quoting."""
    root = tmp_path / "a checkout"
    shutil.copytree(LAUNCH, root / "launch")
    for name in ("requirements.txt", "pyproject.toml"):
        shutil.copy(ROOT / name, root)
    pins(root).touch()
    put(root / ".venv" / "bin" / "python", INTERPRETER)
    return root


def pins(root: Path) -> Path:
    return root / f"constraints-py{sys.version_info.major}{sys.version_info.minor}.txt"


def calls(root: Path) -> list[list[str]]:
    """Returns the recorded calls and forgets them."""
    lines = record.read_text().splitlines() if (record := root / "calls.jsonl").exists() else []
    record.unlink(missing_ok=True)
    return [json.loads(line) for line in lines]


def test_the_script_installs_and_hands_over_to_the_verb(checkout):
    """Without --out everything lies in the repository; a folder that is given is one from where the user stands."""
    done = start("quickstart.sh", "--control", root=checkout)
    assert done.returncode == 0 and f"in {checkout}\n" in done.stdout, done.stderr
    assert f"source '{checkout}/.venv/bin/activate'" in done.stdout.splitlines()[-1]
    pip, verb = calls(checkout)
    assert pip[:2] == ["pip", "install"] and pip[-2:] == ["--editable", str(checkout)]
    assert verb == ["jaxblock", "quickstart", "--control"]
    done = start("quickstart.sh", "--short", "--out", "else where", root=checkout, FAIL_AT="--short")
    assert done.returncode == 3 and "in /\n" in done.stdout and "activate" not in done.stdout
    assert calls(checkout) == [["jaxblock", "quickstart", "--out", "else where", "--short"]]


def test_installation_happens_again_only_when_its_inputs_change(checkout):
    assert start("test.sh", "-k", "two words", root=checkout).returncode == 0
    pip, pytest_call = calls(checkout)
    assert pip[-1] == f"{checkout}[dev]" and pip[-4:-2] == ["--constraint", str(pins(checkout))]
    assert pytest_call == ["pytest", "-m", "not slow", "-n", "2", "--dist", "loadfile", "-k", "two words"]
    assert start("test.sh", root=checkout).returncode == 0
    with open(checkout / "requirements.txt", "a") as file:
        file.write("# another line\n")
    assert start("test.sh", root=checkout, FAIL_AT="pip").returncode == 2
    assert start("test.sh", root=checkout).returncode == 0
    assert [call[0] for call in calls(checkout)] == ["pytest", "pip", "pip", "pytest"]


@pytest.mark.parametrize("made", [False, True], ids=["without .venv", "with .venv"])
def test_a_dry_setup_installs_nothing(checkout, made):
    venv = checkout / ".venv"
    if not made:
        shutil.rmtree(venv)
    done = start("gpu.sh", "setup", "--cuda", "12", "--dry-run", root=checkout, PYTHON=sys.executable)
    assert done.returncode == 0, done.stderr
    commands = [shlex.split(line)[1:] for line in done.stdout.splitlines() if line[0] != "#"]
    assert made or commands.pop(0) == ["-m", "venv", "--clear", str(venv)]
    jaxblock, jax, check = commands
    assert jaxblock[:3] == jax[:3] == ["-m", "pip", "install"] and jax[-1] == "jax[cuda12]"
    assert jaxblock[-4:] == ["--constraint", str(pins(checkout)), "--editable", f"{checkout}[gcs]"]
    assert check[0] == "-c" and "jax.devices()" in check[1]
    assert calls(checkout) == [] and not list(venv.glob(".installed*")) and venv.exists() == made


@pytest.mark.parametrize("script", ["quickstart.sh", "test.sh"])
def test_too_old_a_python_is_told_plainly(checkout, script, tmp_path):
    shutil.rmtree(checkout / ".venv")
    tools = tmp_path / "bin"
    tools.mkdir()
    for name in ("bash", "dirname", "env", "cat"):
        (tools / name).symlink_to(shutil.which(name) or "")
    version = '#!/bin/sh\nif [ "$1" = --version ]; then echo "Python 3.10.12"; else exit 1; fi\n'
    old = put(tools / "python3", version)
    named = start(script, root=checkout, PYTHON=str(old))
    assert named.returncode == 2 and f"PYTHON={old} is not a Python 3.11" in named.stderr
    found = start(script, root=checkout, PATH=str(tools), PYTHON="")
    assert found.returncode == 2 and "no Python 3.11 or newer" in found.stderr and "Python 3.10.12" in found.stderr
    assert start(script, "--help", root=checkout).returncode == 0


FRACTIONS = {"0.9 and none": {}, "0.5 and none": {"XLA_CLIENT_MEM_FRACTION": "0.5"}}
FRACTIONS["none and 0.6"] = {"XLA_PYTHON_CLIENT_MEM_FRACTION": "0.6"}


@pytest.mark.parametrize("told", FRACTIONS)
@pytest.mark.parametrize("way", ["debug", "run", "run --gpus 0,1 --processes 2", "slurm"])
def test_jax_may_take_what_the_plan_counts_on(tmp_path, way, told):
    given = FRACTIONS[told]
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


def test_every_imported_package_is_a_requirement():
    text = "".join((ROOT / name).read_text() for name in ("requirements.txt", "pyproject.toml"))
    declared = {canonicalize_name(name) for name in re.findall(r"([A-Za-z0-9_-]+)(?:\[\w+\])?>=", text)}
    source = "".join(file.read_text() for file in (ROOT / "jaxblock").rglob("*.py"))
    imported = set(re.findall(r"^ *(?:import|from) (\w+)[\w.]*(?: as \w+| import .*)?$", source, re.M))
    assert {"jax", "yaml", "wandb"} <= imported
    owners = packages_distributions()
    for module in imported - sys.stdlib_module_names - {"jaxblock"}:
        names = {canonicalize_name(name) for name in owners.get(module, [module])}
        assert names & declared, f"jaxblock imports {module}, which is in neither requirements.txt nor an extra"


def test_the_jobset_is_whole():
    jobset = yaml.safe_load((LAUNCH / "jobset.yaml").read_text())
    assert jobset["kind"] == "JobSet" and jobset["apiVersion"].startswith("jobset.x-k8s.io/")
    (replicated,) = jobset["spec"]["replicatedJobs"]
    job = replicated["template"]["spec"]
    assert job["parallelism"] == job["completions"] and job["completionMode"] == "Indexed"
    pod, (rule,) = job["template"]["spec"], job["podFailurePolicy"]["rules"]
    (container,) = pod["containers"]
    assert {"name": "JAXBLOCK_DISTRIBUTED", "value": "1"} in container["env"]
    assert rule["onExitCodes"]["containerName"] == container["name"] and rule["action"] == "FailJob"
    assert pod["restartPolicy"] == "Never"  # without it Kubernetes refuses such rules
    chips = math.prod(map(int, pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"].split("x")))
    assert container["resources"]["requests"] == container["resources"]["limits"]
    assert chips == job["parallelism"] * container["resources"]["limits"]["google.com/tpu"]
    assert {m["name"] for m in container["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}
