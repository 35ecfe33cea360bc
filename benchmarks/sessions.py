"""Opens and loads a run as ``jaxblock train`` does, for benchmarks that call its parts themselves."""

from __future__ import annotations

from rich.console import Console

from jaxblock import build
from jaxblock.config.config import Config
from jaxblock.training import start
from jaxblock.training.session import Session


def loaded_session(config: Config, console: Console) -> Session:
    """Returns a run whose state is on the devices; its step is not compiled."""
    opened = start.open_session(config, console)
    learner = build.learner(config, opened.arch, opened.prepared.special.stop_ids, lines=opened.lines)
    return start.load_session(opened, learner, console)
