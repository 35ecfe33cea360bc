"""Tests real file systems that are full or read-only: training continues, the user is told once, no whole checkpoint is deleted."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import chex
import jax
import pytest

import jaxblock
from tests import runs

ROOT = Path(__file__).parents[2]

PRIVATE = """
import json, os, pathlib, shutil, subprocess, sys
from tests.faults import harmed_run
disk, out, fault, until, command = json.loads(sys.argv[1])
disk = pathlib.Path(disk)
subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "none", disk], check=True)

def train(module, *words):
    done = subprocess.run([sys.executable, "-m", module, *words, *command], stderr=subprocess.PIPE, text=True)
    steps = sorted(int(name) for name in os.listdir(disk / "run" / "checkpoints") if name.isdigit())
    return {"code": done.returncode, "said": done.stderr, "after": steps}

found = [train("tests.faults.harmed_run", fault, str(disk), str(until))]
if not until:
    harmed_run.mend(fault, disk)
    found.append(train("jaxblock"))
shutil.copytree(disk / "run", out)
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def private() -> list[str]:
    """Returns the prefix of a command that may mount file systems which no other process sees."""
    command = ["unshare", "-rm"]
    if shutil.which("unshare") is None:
        pytest.skip("no unshare(1) here: no file system can be mounted")
    tried = subprocess.run([*command, "mount", "-t", "tmpfs", "none", "/mnt"], capture_output=True, text=True)
    if tried.returncode:
        pytest.skip(f"no file system can be mounted here: {tried.stderr.strip()}")
    return command


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fault", "until"), [("full", 0), ("full", 80), ("read-only", 0), ("read-only", 80)], ids=lambda value: str(value)
)
def test_a_run_outlives_its_disk(
    tiny_config: Path, tiny_run: Path, tmp_path: Path, private: list[str], fault: str, until: int
) -> None:
    """The run folder, or its checkpoints, cannot be written from step 40 on, to the end or to a later step."""
    disk, out = tmp_path / "disk", tmp_path / "saved"
    disk.mkdir()
    command = ["train", "--config", str(tiny_config), "--train.out", f"{disk}/run"]
    command += ["--train.save_every", "20", "--train.keep", "2", "--train.eval_every", "0"]
    told = json.dumps([str(disk), str(out), fault, until, command])
    done = subprocess.run(
        [*private, sys.executable, "-c", PRIVATE, told], capture_output=True, text=True, cwd=ROOT, timeout=300
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    said = found[0]["said"]
    cause = "the disk is full" if fault == "full" else "the file system is read-only"
    assert "harmed with [20]" in said and "step 120/120" in said, said
    assert f"step 40: no checkpoint was written in {disk}/run/checkpoints: {cause}" in " ".join(said.split()), said
    assert said.count("step 40: no checkpoint") == 1 and "Traceback" not in said, said
    if fault == "full":
        assert said.count("rows wait") == 1, said
    if until:
        assert [run["code"] for run in found] == [0] and found[0]["after"] == [100, 120], said
    else:
        assert found[0]["code"] == 2 and found[0]["after"] == [20], said
        assert found[1]["code"] == 0 and "going on from step 20" in found[1]["said"], found[1]["said"]
    chex.assert_trees_all_equal(*(jax.device_get(jaxblock.load(folder).params) for folder in (out, tiny_run)))
    assert runs.rows(out) == runs.rows(tiny_run)
