"""A real ``jaxblock train`` that also writes down what no metric shows, for tests that compare groups of processes.

    python -m tests.training.recorded_run LINES STOP train --config FILE ...

Process 0 writes a line of JSON to LINES for the state that the run begins with and for each step: ``step``, ``state``
(SHA-256 of parameters, optimizer state and average), and of the step before it ``drawn`` (of ids, lengths, draws and
noise of the global batch) and ``loss``. After STOP (0: never) the last process sends itself SIGTERM.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxblock.cli import main
from jaxblock.parallel import rules
from jaxblock.training import loop
from jaxblock.training.session import Session
from jaxblock.training.step import Step


def digest(tree: Any) -> str:
    """SHA-256 of all leaves, which are whole in every process."""
    return hashlib.sha256(b"".join(np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(tree))).hexdigest()


def draws(session: Session) -> Callable[[Any, int], str]:
    """Batch (placed on the mesh) and step -> digest of the global batch and of all that is drawn for it."""
    objective = session.learner.objective
    everything = jax.jit(
        lambda batch, step: (batch, objective.draw(batch, objective.canvas(batch), step)),
        out_shardings=rules.replicated(session.mesh),
    )
    return lambda batch, step: digest(everything(batch, step))


def record(file: Path, stop: int) -> None:
    """Puts the recorder around the step and the loop of this process."""
    run = loop.run

    def note(**row: Any) -> None:
        if jax.process_index() == 0:
            with file.open("a") as lines:
                lines.write(json.dumps(row) + "\n")

    def recorded(session: Session, step_fn: Step) -> Step:
        whole = jax.jit(lambda tree: tree, out_shardings=rules.replicated(session.mesh))
        drawn, counter = draws(session), itertools.count(session.step)

        def state_of(state: Any) -> str:
            return digest(whole((state.params, state.opt_state, state.average)))

        note(step=session.step, state=state_of(session.state))

        def recorded_step(state: Any, batch: Any, frozen: Any) -> Any:
            step = next(counter)
            found = drawn(batch, step)
            state, metrics = step_fn(state, batch, frozen)
            loss = metrics.losses.loss
            loss = float(loss.total) / float(loss.weight)
            note(step=step + 1, state=state_of(state), drawn=found, loss=loss)
            if step + 1 == stop and session.process_index == session.process_count - 1:
                os.kill(os.getpid(), signal.SIGTERM)
            return state, metrics

        return recorded_step

    def recorded_loop(session: Session, step_fn: Step, *rest: Any) -> Any:
        with jax.set_mesh(session.mesh):
            step_fn = recorded(session, step_fn)
        return run(session, step_fn, *rest)

    loop.run = recorded_loop


if __name__ == "__main__":
    lines, stop_at, *rest = sys.argv[1:]
    record(Path(lines), int(stop_at))
    sys.exit(main(rest))
