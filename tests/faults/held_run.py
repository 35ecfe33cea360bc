"""`python -m tests.faults.held_run FOLDER ...`: jaxblock's command line, whose process 1 blocks once in each stage.

It says ``held in STAGE``, and goes on when somebody writes to the named pipe FOLDER/STAGE.
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
"""Stage -> updates done when it is held, in this order."""


def hold(stage: str) -> None:
    """Blocks."""
    print(f"held in {stage}", file=sys.stderr, flush=True)
    (Path(sys.argv[1]) / stage).read_text()


def before(owner: Any, name: str, stage: str, due: Callable[..., bool] = lambda *arguments: True) -> None:
    """Holds the first due call of a function."""
    original, waiting = getattr(owner, name), [stage]

    def held(*arguments: Any, **named: Any) -> Any:
        if waiting and due(*arguments):
            hold(waiting.pop())
        return original(*arguments, **named)

    setattr(owner, name, held)


if __name__ == "__main__":
    if os.environ["JAX_PROCESS_ID"] == "1":
        before(Evaluator, "estimate_nelbo", "evaluation")
        before(StepWindow, "idle", "step", lambda window: window.step == HELD["step"])  # each step asks
        before(CheckpointWriter, "save", "save", lambda checkpoints, state, step, *rest: step == HELD["save"])
        before(CheckpointWriter, "close", "end")
    sys.exit(main(sys.argv[2:]))
