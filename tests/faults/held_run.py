"""`python -m tests.faults.held_run FOLDER ...`: runs jaxblock's command line; process 1 blocks once in each stage.

It prints ``held in STAGE``, and continues when the test writes to the named pipe FOLDER/STAGE.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from jaxblock.cli import main
from jaxblock.evaluation.runner import Evaluator
from jaxblock.training.checkpoints.writer import CheckpointWriter
from jaxblock.training.observe.window import StepWindow
from tests import pod

HELD = {"evaluation": 0, "step": 5, "save": 10, "end": pod.STEPS}
"""The number of updates done when each stage blocks, in this order."""


def hold(stage: str) -> None:
    """Blocks until the test writes to the stage's pipe."""
    print(f"held in {stage}", file=sys.stderr, flush=True)
    (Path(sys.argv[1]) / stage).read_text()


def before(owner: Any, name: str, stage: str, due: Callable[..., bool] = lambda *arguments: True) -> None:
    """Makes a method block before its first call for which ``due`` is true."""
    original, waiting = getattr(owner, name), [stage]

    def held(*arguments: Any, **named: Any) -> Any:
        if waiting and due(*arguments):
            hold(waiting.pop())
        return original(*arguments, **named)

    setattr(owner, name, held)


if __name__ == "__main__":
    if os.environ["JAX_PROCESS_ID"] == "1":
        before(Evaluator, "estimate_nelbo", "evaluation")
        before(StepWindow, "idle", "step", lambda window: window.step == HELD["step"])  # called in each step
        before(CheckpointWriter, "save", "save", lambda checkpoints, state, step, *rest: step == HELD["save"])
        before(CheckpointWriter, "close", "end")
    sys.exit(main(sys.argv[2:]))
