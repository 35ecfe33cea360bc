"""Opens, loads and steps a run as ``jaxblock train`` does, for benchmarks that call its parts themselves."""

from __future__ import annotations

from collections.abc import Iterator

import jax
from rich.console import Console

from jaxblock import build
from jaxblock.config.config import Config
from jaxblock.data.loader import Batch, BatchAt, batches
from jaxblock.training import start
from jaxblock.training.session import Session
from jaxblock.training.state import TrainState
from jaxblock.training.step import jit_step


def loaded_session(config: Config, console: Console) -> Session:
    """Returns a run whose state is on the devices; its step is not compiled."""
    opened = start.open_session(config, console)
    learner = build.learner(config, opened.arch, opened.prepared.special.stop_ids, lines=opened.lines)
    return start.load_session(opened, learner, console)


def train_batches(session: Session) -> Iterator[Batch]:
    """Returns the batches that the run trains on, from the first."""
    size = session.config.train.batch_size
    return batches(BatchAt(session.prepared.records("train"), canvas=session.config.canvas, seed=0, batch_size=size))


def first_step(session: Session) -> TrainState:
    """Compiles the step, takes one, and returns its state; that of the session is used up."""
    with jax.set_mesh(session.mesh):
        step_fn = jit_step(session.learner, session.state, session.mesh)
        return jax.block_until_ready(step_fn(session.state, session.on_mesh(next(train_batches(session))), {})[0])
