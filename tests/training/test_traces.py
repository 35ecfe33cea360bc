"""A run traces, and so compiles, each of its programs once, however often it evaluates."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import chex
import pytest

from jaxblock.cli import main
from jaxblock.evaluation import runner
from jaxblock.training import step

PROGRAMS = [(step, "train_step"), (runner, "_decode_prompts"), (runner, "_nelbo_of_rows")]


def test_a_run_traces_each_program_once(tiny_config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    chex.clear_trace_counter()
    traced = set()

    def noted(function: Any, name: str) -> Any:
        @functools.wraps(function)
        def run(*arguments: Any, **named: Any) -> Any:
            traced.add(name)
            return function(*arguments, **named)

        return run

    for module, name in PROGRAMS:
        once = chex.assert_max_traces(getattr(module, name), n=1)
        monkeypatch.setattr(module, name, noted(once, name))
    flags = ["--train.steps", "6", "--train.eval_every", "2", "--train.save_every", "3", "--train.keep_best", "nelbo"]
    # The records of the two evaluations do not fill their last batches.
    flags += ["--train.eval_problems", "6", "--train.eval_nelbo_rows", "5"]
    assert main(["train", "--config", str(tiny_config), "--train.out", str(tmp_path / "run"), *flags]) == 0
    assert traced == {name for _, name in PROGRAMS}
