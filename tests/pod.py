"""Runs two real processes that train as one (launch/local_pod.sh), each with half of every parameter."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np

import jaxblock
from jaxblock.training.observe import metrics

ROOT = Path(__file__).parents[1]
STEPS = 40
SETTINGS = ["--train.fsdp", "2", "--train.steps", str(STEPS), "--train.save_every", "10", "--train.keep", "9"]
SETTINGS += ["--train.eval_every", "0", "--train.eval_problems", "0", "--train.eval_nelbo_rows", "0"]
"""Flags of the undisturbed run (the fixture ``tiny_pod_run``) and of the runs compared with it; a later flag overrides them."""
JAXBLOCK = (sys.executable, "-m", "jaxblock")


@contextlib.contextmanager
def started(
    config: Path, run: str | Path, *flags: str, by: tuple[str, ...] = JAXBLOCK
) -> Iterator[subprocess.Popen[str]]:
    """Starts the two processes; kills what is left of them when the block ends, or after 5 minutes.

    Their standard error comes through that of the script, each line with the number of its process in front.

    Args:
        config: the config file of the experiment.
        run: the run folder (``train.out``).
        flags: flags that follow `SETTINGS`.
        by: the program that each process runs; it passes its arguments on to jaxblock.
    """
    command = [str(ROOT / "launch" / "local_pod.sh"), "2", "--devices", "1", "--", *by]
    command += ["train", "--config", str(config), "--train.out", str(run), *SETTINGS, *flags]
    how: Any = {"cwd": ROOT, "text": True, "start_new_session": True}
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, **how) as group:
        alarm = threading.Timer(300, _kill, [group])
        alarm.start()
        try:
            yield group
        finally:
            alarm.cancel()
            _kill(group)


def _kill(group: subprocess.Popen[str]) -> None:
    """Kills the whole group with SIGKILL, since SIGTERM does not end processes that are stopped or wait for one that is."""
    if group.poll() is None:
        os.killpg(group.pid, signal.SIGKILL)


def lines(group: subprocess.Popen[str]) -> Iterator[str]:
    """Yields the lines that the group prints, as they come."""
    assert group.stderr is not None
    yield from group.stderr


def rows(run: str | Path) -> list[dict[str, Any]]:
    """Returns the training rows of a run's metrics, reduced to what depends on learning and not on time."""
    learnt = ("step", "loss", "grad_norm", "lr", "loss_by_block", "loss_by_count", "skipped")
    return [{name: row[name] for name in learnt} for row in metrics.read_metrics(f"{run}/metrics.jsonl").train]


def check_same(run: str | Path, expected: Path) -> None:
    """Asserts that two runs learnt the same, bit for bit: the metrics of every step and the last parameters."""
    assert rows(run) == rows(expected)
    ours, theirs = (jax.tree.leaves(jaxblock.load(folder).params) for folder in (run, expected))
    for one, other in zip(ours, theirs, strict=True):
        np.testing.assert_array_equal(one, other)
