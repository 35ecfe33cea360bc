"""A run that does not move is reported once, with the stacks of all threads."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from pathlib import Path

from jaxblock.training.watchdog import HUNG, Watchdog

BOUND = 0.05


def a_stage_that_blocks() -> None:
    threading.Event().wait(6 * BOUND)


def test_a_hang_is_reported_once_with_its_place(tmp_path: Path) -> None:
    with (tmp_path / "said").open("w+") as out, Watchdog(BOUND, out=out) as watchdog:
        watchdog.at("save", 40)
        a_stage_that_blocks()
        out.seek(0)
        said = out.read()
    assert said.count("does not move") == 1
    assert "in `save` after step 40" in said and "a_stage_that_blocks" in said and "it goes on waiting" in said


def test_a_run_that_moves_is_left_alone(tmp_path: Path) -> None:
    with (tmp_path / "said").open("w+") as out:
        with Watchdog(60.0, out=out) as watchdog, Watchdog(0.0, out=out) as off:
            for step in range(1000):
                watchdog.at("step", step)
                off.at("step", step)
        out.seek(0)
        assert out.read() == ""


def test_a_hang_may_end_the_process() -> None:
    code = "import threading\nfrom jaxblock.training.watchdog import Watchdog\n"
    code += f"with Watchdog({BOUND}, 'abort'): threading.Event().wait()"
    root, environment = Path(__file__).parents[2], {**os.environ, "JAX_PLATFORMS": "cpu"}
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=root, env=environment)
    assert ended.returncode == HUNG and "it is ended now" in ended.stderr
