"""Tests the display of progress, with a clock that the test sets."""

from __future__ import annotations

import io
from collections.abc import Iterator

import pytest
from rich.console import Console

from jaxblock.training.observe.progress import TrainProgress


def ticking(seconds: float) -> Iterator[float]:
    now = 0.0
    while True:
        yield now
        now += seconds


def shown(terminal: bool, width: int = 120) -> str:
    out, clock = io.StringIO(), ticking(2.0)
    console = Console(file=out, force_terminal=terminal, width=width, _environ={})
    with TrainProgress(10, every=4, console=console, clock=lambda: next(clock)) as progress:
        progress.evaluation(0, nelbo=5.25, pass_at_1=(0, 8))
        for step in range(1, 11):
            progress.train(step, 1.0 / step if step % 2 == 0 else None, 1234.5)
        progress.evaluation(10, pass_at_1=(5, 8))
        progress.say("saved to runs/[x]")
    return out.getvalue()


def test_plain_lines_without_a_terminal() -> None:
    assert shown(False).splitlines() == [
        "evaluation at step 0: NELBO 5.25  Pass@1 0.0% (0/8)",
        "step 4/10  loss 0.25  1,234 tok/s  0:12 left",
        "step 8/10  loss 0.125  1,234 tok/s  0:04 left",
        "step 10/10  loss 0.1  1,234 tok/s  0:00 left",
        "evaluation at step 10: Pass@1 62.5% (5/8)",
        "saved to runs/[x]",
    ]


@pytest.mark.parametrize("width", [60, 80, 120])
def test_the_bar_ends_complete(width: int) -> None:
    text = shown(True, width)
    assert "10/10" in text and "evaluation at step 0" in text and "saved to runs/[x]" in text


def test_time_left_counts_from_where_a_resumed_run_began_and_ignores_evaluations() -> None:
    now = [0.0]
    progress = TrainProgress(1000, start=900, clock=lambda: now[0])
    assert progress.seconds_left() is None
    for step in range(901, 911):
        now[0] += 3.0
        progress.train(step)
    assert progress.seconds_left() == pytest.approx(3.0 * 90)
    now[0] += 1e6
    progress.evaluation(910, nelbo=1.0)
    for step in (911, 912):
        now[0] += 3.0
        progress.train(step)
    assert progress.seconds_left() == pytest.approx(3.0 * 88)
