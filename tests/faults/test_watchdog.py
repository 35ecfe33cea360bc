"""Tests that every process of a run that hangs reports it once, with the stacks of all threads.

``python -m tests.faults.test_watchdog FOLDER ...`` runs jaxblock's command line; process 1 blocks once in each stage, prints
``held in STAGE``, and continues when the test writes to the named pipe FOLDER/STAGE.
"""

import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import pytest

from jaxblock.cli import main
from jaxblock.errors import UserError
from jaxblock.evaluation.runner import Evaluator
from jaxblock.io.locks import only_writer
from jaxblock.training.checkpoints.writer import CheckpointWriter
from jaxblock.training.guard.watchdog import HUNG, Watchdog
from jaxblock.training.observe.window import StepWindow
from tests import pod, runs

BOUND = 0.05
HELD = {"evaluation": 0, "step": 5, "save": 10, "end": pod.STEPS}
"""The number of updates done when each stage blocks, in this order."""


def a_stage_that_blocks() -> None:
    threading.Event().wait(6 * BOUND)


def _said(path: Path, work: Callable[[Watchdog], object], bound: float) -> str:
    """Returns what a watchdog with this bound reports while work is done."""
    with path.open("w+") as out, Watchdog(bound, out=out) as watchdog:
        work(watchdog)
        out.seek(0)
        return out.read()


def test_a_hang_is_reported_once_with_its_place_and_a_run_that_moves_is_left_alone(tmp_path):
    def hang(watchdog: Watchdog) -> None:
        watchdog.at("save", 40)
        a_stage_that_blocks()

    said = _said(tmp_path / "said", hang, BOUND)
    assert said.count("does not move") == 1
    assert "in `save` after step 40" in said and "a_stage_that_blocks" in said and "it goes on waiting" in said
    for bound in (60.0, 0.0):
        moves = lambda watchdog: [watchdog.at("step", step) for step in range(1000)]  # noqa: E731
        assert _said(tmp_path / "said", moves, bound) == ""


def test_a_hang_may_end_the_process():
    code = "import threading\nfrom jaxblock.training.guard.watchdog import Watchdog\n"
    code += f"with Watchdog({BOUND}, 'abort'): threading.Event().wait()"
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(__file__).parents[2])
    assert ended.returncode == HUNG and "it is ended now" in ended.stderr


def test_a_start_that_waits_for_other_hosts_is_reported(tmp_path, monkeypatch):
    """JAX starts the devices under a lock, so a thread that asks JAX for its process index would wait too."""
    over = threading.Event()
    monkeypatch.setattr(jax.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(jax, "process_index", over.wait)
    said = _said(tmp_path / "said", lambda watchdog: (a_stage_that_blocks(), over.set()), BOUND)
    assert "the run does not move" in said and "in `start` after step 0" in said


REPORT = re.compile(r"\[(\d)\] jaxblock: process (\d) of 2 does not move: .* in `(\w+)` after step (\d+) ")


class Told:
    """Collects what two processes print: lines, process ids, and the stacks reported by (process, stage, updates done)."""

    def __init__(self, group: subprocess.Popen[str]) -> None:
        self._coming = group.stderr
        self._last: dict[str, list[str]] = {"0": [], "1": []}
        self.lines: list[str] = []
        self.pids: dict[str, int] = {}
        self.reports: dict[tuple[int, str, int], list[str]] = {}

    def until(self, seen: Callable[[], bool]) -> None:
        while not seen():
            line = next(self._coming, None)
            assert line is not None, "the run ended before: " + "".join(self.lines)
            self._note(line)

    def rest(self) -> None:
        for line in self._coming:
            self._note(line)

    def reported(self, process: int, stage: str, steps: range) -> bool:
        return any((process, stage, step) in self.reports for step in steps)

    def _note(self, line: str) -> None:
        self.lines.append(line)
        if found := re.match(r"process (\d) is (\d+)", line):
            self.pids[found[1]] = int(found[2])
        elif found := REPORT.match(line):
            assert found[1] == found[2], line  # each process reports for itself
            self._last[found[1]] = self.reports.setdefault((int(found[1]), found[3], int(found[4])), [])
        elif found := re.match(r"\[(\d)\]   File ", line):
            self._last[found[1]].append(line.strip())


@pytest.mark.slow
def test_a_hang_of_one_process_is_reported_by_both_and_the_run_goes_on_as_if_nothing_had_been(
    tiny_config, tiny_pod_run, tmp_path
):
    """Process 1 blocks once in each stage, and is stopped once by a signal: then only process 0 can report."""
    run, by = tmp_path / "run", (sys.executable, "-m", "tests.faults.test_watchdog", str(tmp_path))
    for stage in HELD:
        os.mkfifo(tmp_path / stage)

    def let_go(stage: str) -> None:
        step = HELD[stage]
        # A report's first line comes before its stacks are taken, so the test waits for the stack itself: let go after
        # the first line alone, the process might have left `hold` by then. Process 0 has dispatched a step or two more
        # before it waits.
        told.until(
            lambda: (
                f"[1] held in {stage}\n" in told.lines
                and any(" in hold" in frame for frame in told.reports.get((1, stage, step), ()))
                and told.reported(0, stage, range(step, step + (3 if stage == "step" else 1)))
            )
        )
        (tmp_path / stage).write_text("go on")

    flags = ["--train.watchdog_seconds", "2", "--train.eval_nelbo_rows", "8"]
    with pod.started(tiny_config, run, *flags, by=by) as group:
        told = Told(group)
        for stage in ("evaluation", "step", "save"):
            let_go(stage)
        told.until(lambda: told.lines[-1].startswith("[0] step 12/"))
        holder = rf"is being written by process {told.pids['0']} on"  # process 0 holds the run folder's lock for both
        with pytest.raises(UserError, match=holder), only_writer(run):
            pass
        os.kill(told.pids["1"], signal.SIGSTOP)
        told.until(lambda: told.reported(0, "step", range(12, 40)) or told.reported(0, "save", range(12, 40)))
        os.kill(told.pids["1"], signal.SIGCONT)
        let_go("end")
        told.rest()
    assert group.returncode == 0, told.lines
    for stage, step in HELD.items():
        assert " in hold" in "".join(told.reports[1, stage, step]), told.reports
    assert all(" in hold" not in "".join(stack) for key, stack in told.reports.items() if key[0] == 0)
    runs.check_same(run, tiny_pod_run, ("train",))


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
