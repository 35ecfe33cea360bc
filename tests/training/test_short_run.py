"""A run of twelve steps: it compiles each program once, says where its time went, and keeps its best checkpoint."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import chex
import pytest

from jaxblock import inference
from jaxblock.cli import main
from jaxblock.diffusion.decoding import decoder
from jaxblock.evaluation import runner
from jaxblock.training import step
from jaxblock.training.checkpoints.reader import CheckpointReader
from jaxblock.training.observe.goodput import CAUSES
from tests import runs

PROGRAMS = [(step, "train_step"), (decoder, "decode_block"), (runner, "_nelbo_of_rows")]
FLAGS = ["--train.steps", "12", "--train.eval_every", "3", "--train.save_every", "4", "--profile", "3", "4"]
FLAGS += ["--train.keep", "1", "--train.keep_best", "nelbo", "--train.keep_every", "4"]
# The records of the two evaluations do not fill their last batches.
FLAGS += ["--train.eval_problems", "6", "--train.eval_nelbo_rows", "5"]


def test_a_run_traces_once_tells_its_time_and_keeps_its_best(
    tiny_config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    chex.clear_trace_counter()
    inference._compiled.cache_clear()  # other tests may have used the same decoder
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
    run = tmp_path / "run"
    assert main(["train", "--config", str(tiny_config), "--train.out", str(run), *FLAGS]) == 0
    assert traced == {name for _, name in PROGRAMS}
    monkeypatch.undo()

    said = capsys.readouterr().err
    assert "goodput" in said and "step " in said and f"the trace is in {run / 'profile'}" in said
    assert list((run / "profile").rglob("*.xplane.pb"))
    told = runs.rows(run, "goodput")
    assert {row["step"] for row in told} == {0, 3, 4, 6, 8, 9, 12}
    assert all(set(row["seconds"]) == set(CAUSES) for row in told)
    for cause in ("start", "step", "evaluation"):
        values = [row["seconds"][cause] for row in told]
        assert values == sorted(values) and values[-1] > 0
    assert len(runs.rows(run)) == 12
    assert all("mfu" not in row for row in runs.rows(run))  # the peak of a CPU is not known

    nelbo = {row["step"]: row["nelbo_per_token"]["mean"] for row in runs.rows(run, "eval") if row["step"]}
    best = min(nelbo, key=lambda step: nelbo[step])
    checkpoints = CheckpointReader(run)
    assert checkpoints.best() == best and checkpoints.steps() == sorted({4, 8, 12, best})
    assert main(["decode", "--checkpoint", str(run), "--step", "best", "1+1?"]) == 0
    assert main(["decode", "--checkpoint", str(run), "--step", "7", "1+1?"]) == 2
    assert "no whole checkpoint of step 7; there are 4" in capsys.readouterr().err


@pytest.mark.parametrize("window", [["0", "3"], ["5", "4"], ["5", "121"]], ids=str)
def test_a_window_is_two_steps_of_the_run(
    tiny_config: Path, capsys: pytest.CaptureFixture[str], window: list[str]
) -> None:
    assert main(["train", "--config", str(tiny_config), "--profile", *window]) == 2
    assert f"train.profile is {' '.join(window)}: give the first and the last step" in capsys.readouterr().err
