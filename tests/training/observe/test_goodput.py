"""Tests where a run's time goes, with a clock that the test sets."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from jaxblock.training.observe import goodput
from jaxblock.training.observe.goodput import CAUSES, EarlierTime, Goodput, read_earlier_time


class _Clock:
    """A clock that moves only when the test moves it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 0.0
        monkeypatch.setattr(goodput.time, "perf_counter", lambda: self.now)

    def compile(self, clock: Goodput, seconds: float, inside: float) -> None:
        """Compiles a function, and another one inside it."""
        self.now += seconds
        clock._note("/jax/core/compile/jaxpr_trace_duration", inside)
        clock._note("/jax/core/compile/backend_compile_duration", seconds)
        clock._note("/jax/something/else", seconds)


def test_time_is_split_without_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    time = _Clock(monkeypatch)
    with Goodput() as clock:
        time.now += 3
        time.compile(clock, 5.0, inside=2.0)
        clock.started()
        with clock.during("evaluation"):
            time.now += 1
            time.compile(clock, 4.0, inside=0.5)
        for cause in ("data", "step"):
            clock.charge("step")
            time.now += 2
            clock.charge(cause)
            time.now += 10
        assert clock.training() == 24
        clock.note_step(6.0)
        clock.note_step(7.0)
        clock.note_step(50.0)
        with clock.during("save"):
            time.now += 1
        clock.add_earlier(EarlierTime({"step": 100.0, "lost": 3.0}, lost_seconds=5.0, lost_steps=2))
        row = clock.row(9)
    assert row["seconds"] == {
        "start": 3, "compile": 9, "step": 122, "data": 2, "evaluation": 1, "save": 1, "lost": 3 + 5 + 2 * 7,
    }  # fmt: skip
    assert row["step_seconds"] == 7.0 and row["goodput"] == pytest.approx(122 / 160)
    assert goodput.describe(row) == (
        "goodput 76%: step 122 s, lost 22 s, compile 9.0 s, start 3.0 s, data 2.0 s, evaluation 1.0 s, save 1.0 s"
    )


def test_what_a_killed_process_did_in_vain(tmp_path: Path) -> None:
    def told(at: int, pace: float | None = None, **seconds: float) -> dict[str, Any]:
        return {"step": at, "kind": "goodput", "seconds": seconds, "step_seconds": pace}

    rows = [
        told(0, start=4.0, evaluation=1.0),
        *({"step": step, "kind": "train"} for step in range(1, 11)),
        told(10, 2.0, start=4.0, evaluation=1.0, step=20.0),
        *({"step": step, "kind": "train"} for step in range(11, 26)),
        told(25, 2.5, start=4.0, evaluation=3.0, step=50.0, save=1.0),
        *({"step": step, "kind": "train"} for step in range(26, 30)),
    ]
    path = tmp_path / "metrics.jsonl"
    assert read_earlier_time(path, -1) == EarlierTime({})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"step": 30, "ki')
    at_ten = read_earlier_time(path, 10)
    assert at_ten.seconds == {**dict.fromkeys(CAUSES, 0.0), "start": 4.0, "evaluation": 1.0, "step": 20.0}
    assert at_ten[1:] == (58.0 - 25.0, 4, 2.5)  # known up to step 25, then four steps
    assert read_earlier_time(path, 29)[1:] == (0.0, 0, 2.5)
    assert read_earlier_time(path, -1) == EarlierTime({}, 58.0, 4, 2.5)  # nothing was saved, so everything is lost


def test_compiling_is_heard(monkeypatch: pytest.MonkeyPatch) -> None:
    with Goodput() as clock:
        clock.started()
        jax.jit(lambda x: jnp.sin(x) * 17.25 + jax.jit(jnp.cos)(x))(1.0)
        assert clock.row(0)["seconds"]["compile"] > 0
    before = clock._seconds["compile"]
    jax.jit(lambda x: jnp.sin(x) * 18.25)(1.0)
    assert clock._compiles == [] and clock._seconds["compile"] == before  # a clock that is closed hears nothing
