"""Tests real file systems that are full or read-only: training continues, the user is told once, no whole checkpoint is deleted.

    python -m tests.faults.test_disks FAULT DISK UNTIL ...

runs jaxblock's command line on a disk that fails from just before the save of step 40, when that of step 20 is whole, until
the save of step UNTIL (0: until the process has ended).
"""

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
from tests import pod, runs

SAVED = "run/checkpoints"
FAULTS = {
    "full": ("the disk is full", "cat /dev/zero >filler 2>&1 || true", "rm filler"),
    "read-only": (
        "the file system is read-only",
        f"mount --bind {SAVED} {SAVED} && mount -o remount,bind,ro {SAVED}",
        f"mount -o remount,bind,rw {SAVED}",
    ),
}
"""The cause that is told, and the commands that harm a disk and mend it again."""

ON_A_DISK_OF_ITS_OWN = """
python=$1 disk=$2 out=$3 fault=$4 until=$5 mend=$6
shift 6
mount -t tmpfs -o size=4m none "$disk"
trained() {
    code=0
    "$python" -m "$@" || code=$?
    echo "$code:" $(ls "$disk/run/checkpoints" | grep -x "[0-9]*" | sort -n)
}
trained tests.faults.test_disks "$fault" "$disk" "$until" "$@"
if [ "$until" = 0 ]; then
    (cd "$disk" && eval "$mend")
    trained jaxblock "$@"
fi
cp -r "$disk/run" "$out"
"""
"""Trains while the disk fails, and again where it has not worked again by itself; prints the exit codes and the checkpoints."""


@pytest.mark.slow
@pytest.mark.parametrize(("fault", "until"), [("full", 0), ("full", 80), ("read-only", 0)])
def test_a_run_outlives_its_disk(tiny_config, tiny_run, tmp_path, fault, until):
    """The run folder, or its checkpoints, cannot be written from step 40 on, to the end or to a later step."""
    private = ["unshare", "-rm"]  # may mount file systems which no other process sees
    tried = [*private, "mount", "-t", "tmpfs", "none", "/mnt"]
    if shutil.which("unshare") is None or subprocess.run(tried, capture_output=True).returncode:
        pytest.skip("no file system can be mounted here")
    disk, out, (cause, _, mend) = tmp_path / "disk", tmp_path / "saved", FAULTS[fault]
    disk.mkdir()
    train = (
        f"train --config {tiny_config} --train.out {disk}/run --train.save_every 20 --train.keep 2 --train.eval_every 0"
    )
    script = [*private, "sh", "-ec", ON_A_DISK_OF_ITS_OWN, "sh", sys.executable, disk, out, fault, str(until), mend]
    done = subprocess.run([*script, *train.split()], capture_output=True, text=True, cwd=pod.ROOT, timeout=300)
    said = done.stderr
    assert done.returncode == 0 and "harmed with [20]" in said, said
    assert f"step 40: no checkpoint was written in {disk}/run/checkpoints: {cause}" in " ".join(said.split()), said
    assert said.count("step 40: no checkpoint") == 1 and "Traceback" not in said, said
    assert fault != "full" or said.count("rows wait") == 1, said
    assert done.stdout.splitlines() == (["0: 100 120"] if until else ["2: 20", "0: 100 120"]), said
    assert said.count("step 120/120") == (1 if until else 2) and ("going on from step 20" in said) == (not until), said
    chex.assert_trees_all_equal(*(jax.device_get(jaxblock.load(folder).params) for folder in (out, tiny_run)))
    assert runs.rows(out) == runs.rows(tiny_run)


if __name__ == "__main__":
    fault, disk, until = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])
    save, (_, harm, mend) = CheckpointWriter.save, FAULTS[fault]

    def harmed(checkpoints: CheckpointWriter, state: Any, step: int, *rest: Any) -> None:
        if step == 40:
            checkpoints.wait()
            print(f"harmed with {checkpoints.steps()}", file=sys.stderr, flush=True)
        if step in (40, until):
            subprocess.run(["sh", "-ec", harm if step == 40 else mend], cwd=disk, check=True)
        save(checkpoints, state, step, *rest)

    CheckpointWriter.save = harmed
    sys.exit(main(sys.argv[4:]))
