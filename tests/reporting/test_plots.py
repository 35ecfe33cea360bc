"""Tests what is drawn, and that pictures of full, short and empty runs are written."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.figure import Figure

from jaxblock.reporting import curves, plots
from jaxblock.training.observe import metrics


def train(step: int, **more: Any) -> dict[str, Any]:
    return {"step": step, "kind": "train", "loss": 5.0 / (1 + step), "lr": 1e-3, "grad_norm": 1.0} | more


def evaluation(step: int, correct: int) -> dict[str, Any]:
    nelbo = {"mean": 4.0 / (1 + step), "se": 0.1}
    pass_at_1 = {"correct": correct, "n": 8, "low": 0.1, "high": 0.9}
    return {"step": step, "kind": "eval", "nelbo_per_token": nelbo, "pass_at_1": pass_at_1}


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def test_smoothing_keeps_constants_and_means() -> None:
    assert curves.smoothed(np.full(7, 3.0), 5).tolist() == [3.0] * 7
    assert curves.smoothed(np.array([0.0, 3.0, 6.0]), 3).tolist() == [0.0, 3.0, 6.0]
    assert curves.smoothed(np.array([0.0, 9.0, 0.0]), 3)[1] == 3.0


RUNS = {
    "full": [evaluation(0, 1)]
    + [train(s, loss_by_block=[[2.0, 1.0]] * 4, loss_by_count=[[1.0, 2.0]] * 8) for s in range(1, 40)]
    + [evaluation(40, 7)],
    "one step": [train(1, loss_by_block=[[0.0, 0.0]], loss_by_count=[[0.0, 0.0]]), evaluation(1, 0)],
    "diverged": [train(s, loss=float("nan"), grad_norm=float("inf")) for s in (1, 2)],
    "empty": [],
}


@pytest.mark.parametrize("name", RUNS)
@pytest.mark.filterwarnings("error")
def test_pictures_of_full_short_and_empty_runs(tmp_path: Path, name: str) -> None:
    written = plots.plot_run(write(tmp_path / "metrics.jsonl", RUNS[name]), tmp_path / "plots")
    assert [Path(p).name for p in written] == ["loss.png", "nelbo.png", "pass_at_1.png", "curves.png"]
    assert all(Path(p).read_bytes().startswith(b"\x89PNG") for p in written)


def test_what_is_drawn_is_what_was_logged(tmp_path: Path) -> None:
    run = metrics.read_metrics(write(tmp_path / "m.jsonl", RUNS["full"]))
    axes = Figure().subplots()
    curves.draw_pass_at_1(axes, run)
    line = axes.get_lines()[0]
    assert np.asarray(line.get_ydata()).tolist() == [1 / 8, 7 / 8]
    bars = axes.containers[0].lines[2][0].get_segments()  # type: ignore[attr-defined]
    assert np.allclose(np.stack(bars)[:, :, 1], [[0.1, 0.9]] * 2)
    axes = Figure().subplots()
    curves.draw_breakdown(axes, run, "loss_by_count")
    assert np.asarray(axes.get_lines()[0].get_xdata()).tolist() == list(range(1, 9))  # masked counts start at 1
    assert np.asarray(axes.get_lines()[0].get_ydata()).tolist() == [0.5] * 8
    for name, drawn, words in (("one step", 0, "there is only one block index"), ("full", 2, "")):
        axes = Figure().subplots()
        curves.draw_breakdown(axes, metrics.read_metrics(write(tmp_path / "m.jsonl", RUNS[name])), "loss_by_block")
        assert len(axes.get_lines()) == drawn and all(words in text.get_text() for text in axes.texts)


def test_a_logarithmic_axis_says_so() -> None:
    axes = Figure().subplots()
    wide = [train(step, loss=10.0 ** (3 - step)) for step in range(5)]
    curves.draw_loss(axes, metrics.Metrics(wide, []))
    assert axes.get_yscale() == "log" and axes.get_ylabel().endswith(", logarithmic")
