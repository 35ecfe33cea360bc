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
from collections.abc import Callable, Iterable
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
    assert said.count("in `save` after step 40") == 1
    assert "the run does not move" in said and "a_stage_that_blocks" in said and "it goes on waiting" in said
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


@pytest.mark.slow
def test_a_hang_of_one_process_is_reported_by_both_and_the_run_goes_on_as_if_nothing_had_been(
    tiny_config, tiny_pod_run, tmp_path
):
    """Process 1 blocks once in each stage, and is stopped once by a signal: then only process 0 can report."""
    run, by = tmp_path / "run", (sys.executable, "-m", "tests.faults.test_watchdog", str(tmp_path))
    said = {"[0]": "", "[1]": "", "process": ""}  # what each process has printed so far, and the script

    def until(who: str, *patterns: str) -> str:
        """Reads on until a process has printed text that matches the patterns, one after the other; returns the last group."""
        pattern = re.compile(".*?".join(patterns), re.S)
        while not (found := pattern.search(said[who])):
            line = next(group.stderr, None)
            assert line is not None, "the run ended before: " + "".join(said.values())
            speaker = line.split(" ")[0]
            said[speaker] = said.get(speaker, "") + line
        return found[found.re.groups]

    def report(process: int, stage: str, steps: Iterable[int]) -> str:
        steps = "|".join(map(str, steps))
        return (
            rf"\[{process}\] jaxblock: process {process} of 2 does not move: [^\n]* in `{stage}` after step ({steps}) "
        )

    for stage in HELD:
        os.mkfifo(tmp_path / stage)
    flags = ["--train.watchdog_seconds", "2", "--train.eval_nelbo_rows", "8"]
    with pod.started(tiny_config, run, *flags, by=by) as group:
        for stage, step in HELD.items():
            if stage == "end":
                until("[0]", r"\n\[0\] step 12/")
                holder = until("process", r"process 0 is (\d+)")  # it holds the run folder's lock for both
                with pytest.raises(UserError, match=rf"is being written by process {holder} on"), only_writer(run):
                    pass
                stopped = int(until("process", r"process 1 is (\d+)"))
                os.kill(stopped, signal.SIGSTOP)
                until("[0]", report(0, "(?:step|save)", range(12, 40)))
                os.kill(stopped, signal.SIGCONT)
            # A report's first line comes before its stacks are taken, so the test waits for the stack itself: let go after
            # the first line alone, the process might have left `hold` by then. Process 0 has dispatched a step or two more
            # before it waits.
            until("[1]", rf"\[1\] held in {stage}\n", report(1, stage, [step]), r"\n\[1\]   File [^\n]* in (hold)\n")
            until("[0]", report(0, stage, range(step, step + (3 if stage == "step" else 1))))
            (tmp_path / stage).write_text("go on")
        said["[0]"] += "".join(line for line in group.stderr if line.startswith("[0]"))
    assert group.returncode == 0 and " in hold" not in said["[0]"], said
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
