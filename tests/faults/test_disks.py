"""Tests real file systems that are full or read-only: training continues, the user is told once, no whole checkpoint is deleted.

    python -m tests.faults.test_disks FAULT DISK UNTIL ...

runs jaxblock's command line on a disk that fails from just before the save of step 40, when that of step 20 is whole, until
the save of step UNTIL (0: until the process has ended).
"""

import contextlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import chex
import jax
import pytest

import jaxblock
from jaxblock.cli import main
from jaxblock.training.checkpoints.writer import CheckpointWriter
from tests import runs

ROOT = Path(__file__).parents[2]


def harm(fault: str, disk: Path) -> None:
    """Fills a disk, or makes its checkpoints read-only."""
    if fault == "full":
        with open(disk / "filler", "wb", buffering=0) as file, contextlib.suppress(OSError):
            while file.write(bytes(4096)):
                pass
    else:
        checkpoints = disk / "run" / "checkpoints"
        subprocess.run(["mount", "--bind", checkpoints, checkpoints], check=True)
        subprocess.run(["mount", "-o", "remount,bind,ro", checkpoints], check=True)


def mend(fault: str, disk: Path) -> None:
    if fault == "full":
        (disk / "filler").unlink()
    else:
        subprocess.run(["mount", "-o", "remount,bind,rw", disk / "run" / "checkpoints"], check=True)


def on_a_disk_of_its_own(disk: str, out: str, fault: str, until: int, command: str) -> None:
    """Trains while the disk fails, and again where it has not worked again by itself; prints what each process told."""
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "none", disk], check=True)

    def train(*module: str) -> dict[str, Any]:
        done = subprocess.run([sys.executable, "-m", *module, *command.split()], stderr=subprocess.PIPE, text=True)
        steps = sorted(int(name) for name in os.listdir(f"{disk}/run/checkpoints") if name.isdigit())
        return {"code": done.returncode, "said": done.stderr, "after": steps}

    found = [train("tests.faults.test_disks", fault, disk, str(until))]
    if not until:
        mend(fault, Path(disk))
        found.append(train("jaxblock"))
    shutil.copytree(f"{disk}/run", out)
    print(json.dumps(found))


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
@pytest.mark.parametrize(("fault", "until"), [("full", 0), ("full", 80), ("read-only", 0), ("read-only", 80)])
def test_a_run_outlives_its_disk(tiny_config, tiny_run, tmp_path, private, fault, until):
    """The run folder, or its checkpoints, cannot be written from step 40 on, to the end or to a later step."""
    disk, out = tmp_path / "disk", tmp_path / "saved"
    disk.mkdir()
    command = (
        f"train --config {tiny_config} --train.out {disk}/run --train.save_every 20 --train.keep 2 --train.eval_every 0"
    )
    how = [
        "-c",
        "import sys, json; from tests.faults import test_disks as t; t.on_a_disk_of_its_own(*json.loads(sys.argv[1]))",
    ]
    told = json.dumps([str(disk), str(out), fault, until, command])
    done = subprocess.run([*private, sys.executable, *how, told], capture_output=True, text=True, cwd=ROOT, timeout=300)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    said = found[0]["said"]
    cause = "the disk is full" if fault == "full" else "the file system is read-only"
    assert "harmed with [20]" in said and "step 120/120" in said, said
    assert f"step 40: no checkpoint was written in {disk}/run/checkpoints: {cause}" in " ".join(said.split()), said
    assert said.count("step 40: no checkpoint") == 1 and "Traceback" not in said, said
    assert fault != "full" or said.count("rows wait") == 1, said
    if until:
        assert [run["code"] for run in found] == [0] and found[0]["after"] == [100, 120], said
    else:
        assert found[0]["code"] == 2 and found[0]["after"] == [20], said
        assert found[1]["code"] == 0 and "going on from step 20" in found[1]["said"], found[1]["said"]
    chex.assert_trees_all_equal(*(jax.device_get(jaxblock.load(folder).params) for folder in (out, tiny_run)))
    assert runs.rows(out) == runs.rows(tiny_run)


if __name__ == "__main__":
    fault, disk, until = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])
    save = CheckpointWriter.save

    def harmed(checkpoints: CheckpointWriter, state: Any, step: int, *rest: Any) -> None:
        if step == 40:
            checkpoints.wait()
            print(f"harmed with {checkpoints.steps()}", file=sys.stderr, flush=True)
            harm(fault, disk)
        elif step == until:
            mend(fault, disk)
        save(checkpoints, state, step, *rest)

    CheckpointWriter.save = harmed
    sys.exit(main(sys.argv[4:]))
