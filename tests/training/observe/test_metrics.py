"""Reading a run's metrics back: rows that a resumed run repeats, broken lines, series and breakdowns."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jaxblock.errors import UserError
from jaxblock.training.observe import metrics
from jaxblock.training.observe.goodput import read_earlier_time


def train(step: int, **more: Any) -> dict[str, Any]:
    return {"step": step, "kind": "train", "loss": 5.0 / (1 + step)} | more


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def test_a_resumed_run_replaces_the_steps_it_repeats(tmp_path: Path) -> None:
    rows = [train(1), train(2), train(3, loss=9.0), {"step": 3, "kind": "eval"}, train(2, loss=7.0), train(3, loss=8.0)]
    got = metrics.read_metrics(write(tmp_path / "m.jsonl", rows))
    assert [(r["step"], r["loss"]) for r in got.train] == [(1, 2.5), (2, 7.0), (3, 8.0)]
    assert [r["step"] for r in got.evals] == [3]


def test_a_line_cut_off_by_a_kill_is_left_out_and_a_broken_one_is_named(tmp_path: Path) -> None:
    path = write(tmp_path / "m.jsonl", [train(1)])
    path.write_text(path.read_text() + '{"step": 2, "ki', encoding="utf-8")
    assert len(metrics.read_metrics(path).train) == 1
    path.write_text('{"step": 2, "ki\n' + json.dumps(train(3)) + "\n", encoding="utf-8")
    with pytest.raises(UserError, match=r"m\.jsonl:1: not JSON"):
        metrics.read_metrics(path)
    with pytest.raises(UserError, match="cannot read the metrics"):
        metrics.read_metrics(tmp_path / "absent.jsonl")


def test_a_resumed_run_sets_broken_lines_aside(tmp_path: Path) -> None:
    """They are told once and kept in a file of their own; a line that a kill cut off is made again, and is not kept."""
    broken = [b"garbage\r\xff", b'{"step": "1", "kind": "train"}', b"[" * 100_000, b""]
    rows = [json.dumps(train(step)).encode() for step in (1, 2, 3)]
    said: list[str] = []
    for _ in range(2):  # a kill in between, before the lines were removed
        lines = [broken[0], rows[0], *broken[1:], rows[1], rows[2], b'{"step": 4, "ki']
        (tmp_path / "metrics.jsonl").write_bytes(b"\n".join(lines))
        writer = metrics.MetricsWriter(tmp_path, 2, said.append)
        writer.write(train(3))
        writer.close()
        assert [row["step"] for row in metrics.read_metrics(tmp_path / "metrics.jsonl").train] == [1, 2, 3]
        assert (tmp_path / metrics.BROKEN_FILE).read_bytes() == b"".join(line + b"\n" for line in broken)
    assert "metrics.jsonl:1 is not a row of metrics" in said[0] and "nor are 3 other lines" in said[0]
    metrics.MetricsWriter(tmp_path, 2, said.append).close()
    assert len(said) == 2


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"step": -1}, "'step' is not a step"),
        ({"step": True}, "'step' is not a step"),
        ({"step": 10**400}, "'step' is not a step"),
        ({"kind": 3}, "'kind' is not a text"),
        ({"kind": "goodput"}, "no 'seconds'"),
        ({"kind": "goodput", "seconds": None}, "'seconds' is not an object of numbers"),
        ({"kind": "goodput", "seconds": {"step": "long"}}, "'seconds' is not an object of numbers"),
        ({"step_seconds": []}, "'step_seconds' is not a number or null"),
        ({"loss_by_block": [[1.0], [2.0, 3.0]]}, "'loss_by_block' is not pairs of numbers"),
        ({"loss_by_count": [[1.0, 10**400]]}, "'loss_by_count' is not pairs of numbers"),
        ({"nelbo_per_token": 3.0}, "'nelbo_per_token' is not an object of numbers"),
        ({"pass_at_1": {"n": 3}}, "'pass_at_1' is not an object of correct, n, low and high"),
    ],
)
def test_a_damaged_field_is_named(tmp_path: Path, change: dict[str, Any], problem: str) -> None:
    """It would end a run, or a plot, that reads it."""
    path = write(tmp_path / "metrics.jsonl", [train(1) | change, train(2, loss="nan", loss_by_block=[["nan", 1]])])
    with pytest.raises(UserError, match=f"{path}:1: {problem}"):
        metrics.read_metrics(path)
    assert read_earlier_time(path, 2).lost_seconds == 0
    metrics.MetricsWriter(tmp_path, 2).close()
    assert [row["step"] for row in metrics.read_metrics(path).train] == [2]


def test_breakdowns_are_pooled_before_dividing() -> None:
    rows = [train(1, loss_by_block=[[1.0, 1.0], [0.0, 0.0]]), train(2, loss_by_block=[[9.0, 3.0], [0.0, 0.0]])]
    pooled = metrics.pooled(rows, "loss_by_block")
    assert pooled[0] == 2.5 and np.isnan(pooled[1])  # (1 + 9) / (1 + 3), not the mean of 1 and 3
    assert metrics.pooled([train(1)], "loss_by_block").size == 0


def test_series_skips_what_is_not_finite() -> None:
    rows = [train(1), train(2, loss=float("nan")), train(3, loss=None), train(4)]
    steps, values = metrics.series(rows, "loss")
    assert steps.tolist() == [1, 4] and values.tolist() == [2.5, 1.0]
