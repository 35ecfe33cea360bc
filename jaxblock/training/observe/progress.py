"""Shows the progress of a training run: a bar on a terminal, plain lines elsewhere. It takes numbers, not device arrays."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn
from rich.text import Text


class TrainProgress:
    """Shows step, loss, tokens per second, time left and the last evaluation while its ``with`` block runs."""

    def __init__(
        self,
        total: int,
        *,
        start: int = 0,
        every: int = 20,
        console: Console | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Sets up the display; nothing is shown before ``with``.

        Args:
            total: the step at which the run ends.
            start: the step that the run begins at; above 0 after a resume.
            every: the number of steps between two plain lines, which are printed where there is no terminal.
            console: the console to print to; None for standard error, which leaves standard output to results.
            clock: returns the time in seconds; tests replace it.
        """
        self._total, self._every, self._clock = total, max(1, every), clock
        self._console = console or Console(stderr=True)
        self._recent: deque[tuple[float, int]] = deque(maxlen=200)
        self._step = start
        self._printed = start
        self._numbers = ""
        self._bar: Progress | None = None
        self._task = TaskID(0)

    def __enter__(self) -> TrainProgress:
        """Starts to show the progress."""
        if self._console.is_terminal:
            self._bar = Progress(
                TextColumn("{task.completed:,.0f}/{task.total:,.0f}"),
                BarColumn(bar_width=24 if self._wide() else 8),
                TextColumn("{task.fields[numbers]}"),
                TextColumn("{task.fields[evaluated]}", style="cyan"),
                console=self._console,
                refresh_per_second=4,
            )
            self._bar.start()
            self._task = self._bar.add_task("train", total=self._total, completed=self._step, numbers="", evaluated="")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Stops the display and leaves the last state on the screen."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def train(self, step: int, loss: float | None = None, tokens_per_second: float | None = None) -> None:
        """Shows that training has reached a step.

        Args:
            step: the number of updates done.
            loss: a recent loss; None leaves the shown one, so that the caller need not wait for the device.
            tokens_per_second: a recent speed; only shown together with a loss.
        """
        self._step = step
        self._recent.append((self._clock(), step))
        if loss is not None:
            speed = "" if tokens_per_second is None else f"  {tokens_per_second:,.0f} tok/s"
            self._numbers = f"loss {loss:.4g}{speed}"
        if self._bar is not None:
            self._bar.update(self._task, completed=step, numbers=f"{self._numbers}{self._left()}")
        elif step - self._printed >= self._every or (step == self._total and step != self._printed):
            self._printed = step
            self._print(f"step {step:,}/{self._total:,}  {self._numbers}{self._left()}")

    def evaluation(
        self,
        step: int,
        *,
        nelbo: float | None = None,
        pass_at_1: tuple[int, int] | None = None,
    ) -> None:
        """Shows the result of an evaluation.

        Args:
            step: the step after which the evaluation ran.
            nelbo: the held-out NELBO, in nats per text token.
            pass_at_1: the number of problems solved, and of problems tried.
        """
        parts = [] if nelbo is None else [f"NELBO {nelbo:.4g}"]
        if pass_at_1 is not None and pass_at_1[1]:
            parts.append(f"Pass@1 {pass_at_1[0] / pass_at_1[1]:.1%}")
        if self._bar is not None:
            self._bar.update(self._task, evaluated="  ".join(parts if self._wide() else parts[-1:]))
        if parts:
            count = f" ({pass_at_1[0]}/{pass_at_1[1]})" if pass_at_1 is not None and pass_at_1[1] else ""
            self._print(f"evaluation at step {step:,}: {'  '.join(parts)}{count}")
        self._recent.clear()  # the time of the evaluation must not count as slow training

    def say(self, text: str) -> None:
        """Prints a line (above the bar where there is one).

        Args:
            text: the line, printed as it is.
        """
        self._print(text)

    def seconds_left(self) -> float | None:
        """Estimates the time to the last step from the recent speed, not counting evaluations.

        Returns:
            Seconds; None until two steps have been seen.
        """
        if len(self._recent) < 2:
            return None
        (t0, s0), (t1, s1) = self._recent[0], self._recent[-1]
        return None if s1 <= s0 else (t1 - t0) / (s1 - s0) * max(0, self._total - s1)

    def _wide(self) -> bool:
        return self._console.width >= 110

    def _left(self) -> str:
        left = self.seconds_left()
        if left is None:
            return ""
        minutes, seconds = divmod(round(left), 60)
        hours, minutes = divmod(minutes, 60)
        return f"  {hours}:{minutes:02}:{seconds:02} left" if hours else f"  {minutes}:{seconds:02} left"

    def _print(self, text: str) -> None:
        # A Text, since rich would read brackets in a str as markup.
        self._console.print(Text(text), soft_wrap=True)
