"""Traces a few steps with JAX's profiler, for TensorBoard's profile page, Perfetto or XProf."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

from jaxblock.errors import first_line
from jaxblock.io.files import write_bytes
from jaxblock.io.paths import PathLike, as_path, is_remote

PROFILE_FOLDER = "profile"
"""The folder, inside the run folder, that holds the trace."""


class Profiler:
    """Traces the steps of a window. A trace that fails is reported, and training goes on."""

    def __init__(
        self,
        window: tuple[int, int] | None,
        run: PathLike,
        process: int,
        processes: int,
        say: Callable[[str], None],
    ) -> None:
        """Sets up the profiler; tracing begins with the window's first step.

        Args:
            window: the first and the last step to trace; None for no trace.
            run: the run folder; the trace goes into ``profile`` there, where several processes have a folder each.
            process: this process's index.
            processes: the number of processes.
            say: prints a line for the user: where the trace is, or why there is none.
        """
        self._window, self._say = window, say
        self.folder = as_path(run) / PROFILE_FOLDER
        if processes > 1:
            self.folder /= f"process-{process}"
        self._scratch: tempfile.TemporaryDirectory[str] | None = None
        self._running = False

    def skip_to(self, step: int) -> None:
        """Cancels the trace and prints why, if the run continues from a step after the window's beginning."""
        if self._window is not None and step >= self._window[0]:
            first, last = self._window
            self._say(f"no trace: train.profile is steps {first} to {last}, and the run goes on from step {step}")
            self._window = None

    def before(self, step: int) -> None:
        """Begins to trace if the window's first step comes next.

        Args:
            step: the step that comes next, counted from 1.
        """
        if self._window is None or step != self._window[0]:
            return
        try:
            if is_remote(self.folder):
                self._scratch = tempfile.TemporaryDirectory(prefix="jaxblock-profile-")
            jax.profiler.start_trace(self._scratch.name if self._scratch else os.fspath(self.folder))
            self._running = True
        except Exception as error:
            self._failed(error)

    def after(self, step: int, result: Any) -> None:
        """Waits for the device and ends the trace if the window's last step was just dispatched.

        Args:
            step: the step that was dispatched, counted from 1.
            result: the arrays that it returns.
        """
        if self._running and self._window is not None and step == self._window[1]:
            jax.block_until_ready(result)
            self.close()

    def close(self) -> None:
        """Ends the trace if one is running."""
        if not self._running:
            return
        self._running = False
        try:
            jax.profiler.stop_trace()
            if self._scratch is not None:
                self._upload(Path(self._scratch.name))
                self._scratch.cleanup()
        except Exception as error:
            self._failed(error)
            return
        self._say(f"the trace is in {os.fspath(self.folder)} (tensorboard --logdir, with tensorboard-plugin-profile)")

    def _upload(self, scratch: Path) -> None:
        for file in sorted(path for path in scratch.rglob("*") if path.is_file()):
            write_bytes(self.folder / file.relative_to(scratch), file.read_bytes(), overwrite=True)

    def _failed(self, error: Exception) -> None:
        self._window, self._running = None, False
        self._say(f"no trace: {first_line(error)}; training goes on")
