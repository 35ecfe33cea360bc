"""Tells whether two LaTeX answers are equal as mathematics, by math-verify in a process that is killed if it takes too long."""

from __future__ import annotations

import atexit
import functools
import importlib.metadata
import json
import queue
import re
import subprocess
import sys
import threading
from pathlib import Path
from typing import NamedTuple

from jaxblock.errors import UserError, install_command

LONGEST = 500
"""The most characters of an answer that are parsed."""

_START_SECONDS = 120.0


class Comparison(NamedTuple):
    """Holds what comparing two answers found.

    Attributes:
        equal: whether they are equal; False where that was not found out.
        undecided: why it was not found out; None where it was.
    """

    equal: bool
    undecided: str | None = None


class Comparer:
    """Compares answers in a worker process, which is started at the first comparison and replaced after one that fails.

    A process can be stopped whatever it computes, in any thread and on any system; an alarm signal cannot do that.
    """

    def __init__(self, seconds: float = 5.0) -> None:
        """Makes a comparer that gives each comparison this many seconds."""
        self.seconds = seconds
        self._lock = threading.Lock()
        self._worker: subprocess.Popen[str] | None = None
        self._lines: queue.SimpleQueue[str] = queue.SimpleQueue()

    def compare(self, given: str, expected: str) -> Comparison:
        """Compares two answers in LaTeX, without dollar signs around them.

        Raises:
            UserError: math-verify cannot be imported.
        """
        if max(len(given), len(expected)) > LONGEST:
            return Comparison(False, f"longer than {LONGEST} characters")
        # A dollar sign inside would end the formula that the worker puts the answer into.
        pair = [re.sub(r"\\?[$£€]|\s+", lambda found: " " * found[0].isspace(), text) for text in (given, expected)]
        with self._lock:
            try:
                worker = self._running()
                assert worker.stdin is not None
                worker.stdin.write(json.dumps(pair) + "\n")
                worker.stdin.flush()
                answer = self._lines.get(timeout=self.seconds)
            except queue.Empty:
                self._stop()
                return Comparison(False, f"not compared within {self.seconds:g} s")
            except BrokenPipeError:
                answer = ""
            except BaseException:  # a late answer must not be taken for the next pair's
                self._stop()
                raise
            if answer.strip() not in ("true", "false"):
                self._stop()
                return Comparison(False, "the comparison ran out of memory or stack")
            return Comparison(answer.strip() == "true")

    def _running(self) -> subprocess.Popen[str]:
        """Returns the worker, started if need be."""
        if self._worker is not None:
            return self._worker
        check_installed()
        # -P: the files beside the worker must not hide modules of the standard library.
        command = [sys.executable, "-P", str(Path(__file__).with_name("symbolic_worker.py"))]
        pipe, nowhere = subprocess.PIPE, subprocess.DEVNULL
        worker = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=nowhere, text=True, encoding="utf-8")
        self._worker, self._lines = worker, queue.SimpleQueue()
        threading.Thread(target=_forward, args=(worker, self._lines), daemon=True).start()
        try:
            said = self._lines.get(timeout=_START_SECONDS).strip()
        except queue.Empty:
            said = ""
        if said != "ready":
            self._stop()
            raise UserError(
                "evaluate.grader: math-verify cannot be imported; install it again: "
                + install_command("math-verify", "--force-reinstall")
            )
        return worker

    def _stop(self) -> None:
        worker, self._worker = self._worker, None
        if worker is not None:
            worker.kill()
            worker.wait()

    def close(self) -> None:
        """Ends the worker; the next comparison starts another."""
        with self._lock:
            self._stop()


def _forward(worker: subprocess.Popen[str], lines: queue.SimpleQueue[str]) -> None:
    """Puts the worker's lines into a queue, which unlike a pipe can be read with a time limit on every system."""
    assert worker.stdout is not None
    for line in worker.stdout:
        lines.put(line)
    lines.put("")  # the worker has ended


@functools.cache
def shared_comparer() -> Comparer:
    """Returns the one comparer of this process."""
    comparer = Comparer()
    atexit.register(comparer.close)
    return comparer


def check_installed() -> str:
    """Returns the name and version of the library that compares.

    Raises:
        UserError: it is not installed.
    """
    try:
        return f"math-verify {importlib.metadata.version('math-verify')}"
    except importlib.metadata.PackageNotFoundError as error:
        raise UserError(
            "evaluate.grader: math_boxed compares answers with math-verify, which is not installed: "
            f"{install_command('math-verify')}, or set evaluate.grader to hendrycks_math"
        ) from error
