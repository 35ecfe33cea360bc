"""`python -m tests.faults.harmed_run FAULT DISK UNTIL ...`: runs jaxblock's command line on a disk that fails for a while.

The disk fails from just before the save of step 40, when that of step 20 is whole, until the save of step UNTIL (0: until
the process has ended).
"""

from __future__ import annotations

import contextlib
import subprocess
import sys
from pathlib import Path
from typing import Any

from jaxblock.cli import main
from jaxblock.training.checkpoints.writer import CheckpointWriter


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
    """Makes the disk work again."""
    if fault == "full":
        (disk / "filler").unlink()
    else:
        subprocess.run(["mount", "-o", "remount,bind,rw", disk / "run" / "checkpoints"], check=True)


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

    CheckpointWriter.save = harmed  # type: ignore[method-assign]
    sys.exit(main(sys.argv[4:]))
