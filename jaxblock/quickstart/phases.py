"""Runs verbs one after the other as processes of their own, and records how long each took and how much memory it needed."""

from __future__ import annotations

import json
import os
import pathlib
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from types import FrameType
from typing import Any

from jaxblock.errors import UserError
from jaxblock.io.paths import explained


def run_phase(record: pathlib.Path, name: str, arguments: Sequence[str]) -> int:
    """Runs one verb as a child process and appends its wall time, peak memory and exit code to the record.

    SIGTERM is passed on to the child process.

    Args:
        record: the file that gets one JSON line per finished phase.
        name: the name of the phase in the record.
        arguments: the command line of ``jaxblock``, without the program.

    Returns:
        The exit code as a shell would give it: 128 + signal number where a signal ended the process.

    Raises:
        UserError: the record cannot be written.
    """
    start = time.monotonic()
    # A terminal sends Ctrl-C to the child process as well, which saves and ends by itself. This process ignores it, so that it
    # can still record the phase and return its exit code.
    on_interrupt = signal.signal(signal.SIGINT, lambda number, frame: None)
    process = subprocess.Popen([*program(), *arguments], env={**os.environ, "PYTHONPATH": _search_path()})

    def forward(number: int, frame: FrameType | None) -> None:
        process.send_signal(number)

    on_termination = signal.signal(signal.SIGTERM, forward)
    try:
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = code = os.waitstatus_to_exitcode(status)
    finally:
        signal.signal(signal.SIGINT, on_interrupt)
        signal.signal(signal.SIGTERM, on_termination)
    # The unit is KiB on Linux and bytes on macOS. It is the peak of the largest single process, not a sum over all of them.
    peak = usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    entry = {"phase": name, "seconds": round(time.monotonic() - start, 1), "peak_bytes": peak, "exit": code}
    with explained("write", record), open(record, "a", encoding="utf-8") as file:
        file.write(json.dumps(entry) + "\n")
    return code if code >= 0 else 128 - code


def program() -> list[str]:
    """Returns the command that starts ``jaxblock`` with this interpreter; -P keeps modules of the user's folder out of it."""
    return [sys.executable, "-P", "-m", "jaxblock"]


def _search_path() -> str:
    """Returns the PYTHONPATH of a child process: it imports the jaxblock that runs here, which need not be installed."""
    here = str(pathlib.Path(__file__).resolve().parents[2])
    return os.pathsep.join(filter(None, (here, os.environ.get("PYTHONPATH"))))


def read_phases(record: pathlib.Path) -> list[dict[str, Any]]:
    """Returns the longest successful run of each phase, in the order of their first appearance.

    A phase that finds its work done ends within seconds; the run that did the work is the one to show.

    Args:
        record: the file that `run_phase` appended to; where it is absent, there are no phases.

    Returns:
        For each phase its name (``phase``), ``seconds``, ``peak_bytes``, and ``exit``, which is 0.

    Raises:
        UserError: a line of the record is not what `run_phase` writes.
    """
    best: dict[str, dict[str, Any]] = {}
    if not record.exists():
        return []
    for number, line in enumerate(record.read_text(encoding="utf-8").splitlines(), 1):
        try:
            entry = json.loads(line)
            if entry["exit"] == 0 and entry["seconds"] >= best.get(entry["phase"], entry)["seconds"]:
                best[entry["phase"]] = entry
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{record}:{number}: not a phase of the quickstart: remove this line") from error
    return list(best.values())
