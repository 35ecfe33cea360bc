"""Tests the view of a decode, on a terminal and elsewhere, and what is drawn of full, short and empty runs."""

import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.figure import Figure
from rich.console import Console

from jaxblock.reporting import curves, panels, plots
from jaxblock.reporting.describe import boxes, visible_text
from jaxblock.reporting.watch import Watch
from jaxblock.training.observe import metrics

MASK, EOS, EOT = 99, 8, 9
CANVASES = [[1, MASK, MASK, MASK], [1, 2, MASK, MASK], [1, 2, MASK, EOS], [1, 2, EOT, EOS]]


def piece(token: int) -> str:
    return {EOS: "<eos>", EOT: "<eot>"}.get(token, f"▁t{token}")


def shown(
    terminal: bool, canvases: list[list[int]], height: int = 30, nfe: int | None = None, start: Sequence[int] = ()
) -> str:
    out = io.StringIO()
    console = Console(file=out, force_terminal=terminal, width=80, height=height, color_system="standard", _environ={})
    with Watch("How [many]?", piece, mask_id=MASK, block=2, stop_ids=(EOS, EOT), start=start, console=console) as watch:
        for canvas in canvases:
            watch.step(canvas, nfe)
    return out.getvalue()


def test_without_a_terminal_one_line_per_block():
    assert shown(False, CANVASES).splitlines() == [
        "prompt: How [many]?",
        "block 1/2  2 steps   t1 t2",
        "block 2/2  2 steps  <eot> ·",
        "step 4  NFE 4  4/4 tokens  1.00 tokens per forward",
    ]
    # An early stop is said, and unfinished blocks are not lines.
    assert shown(False, [[1, MASK, MASK, MASK], [1, EOT, MASK, MASK]], nfe=4).splitlines()[1:] == [
        "block 1/2  2 steps   t1<eot>",
        "step 2  NFE 4  2/4 tokens  0.50 tokens per forward  stopped early",
    ]
    for terminal in (False, True):  # as while the decoder is compiled
        assert "compiling" in shown(terminal, []) and "0/0" not in shown(terminal, [])


def test_blocks_of_spans_begin_after_given_text():
    given, masks = [False, True], [False] * 3 + [True] * 3 + [False] * 2
    assert boxes([False] * 5, 2) == [(0, 2, 0), (2, 4, 1), (4, 5, 2)] and boxes([], 2) == []
    assert boxes(given, 2) == [(0, 1, 0), (1, 2, None)]
    assert boxes(masks, 2) == [(0, 2, 0), (2, 3, 1), (3, 6, None), (6, 8, 2)]
    filled = [[1, MASK, MASK, 4, 5, 6, MASK], [1, 2, MASK, 4, 5, 6, MASK], [1, 2, 3, 4, 5, 6, MASK], [*range(1, 8)]]
    start = [MASK] * 3 + [4, 5, 6, MASK]
    assert shown(False, filled, start=start).splitlines()[1:-1] == [
        "block 1/3  2 steps   t1 t2",
        "block 2/3  1 step   t3",
        "given   t4 t5 t6",
        "block 3/3  1 step   t7",
    ]
    assert "▶ 3" in shown(True, filled, start=start) and "given" in shown(True, filled, start=start)


def test_on_a_terminal_fresh_tokens_are_highlighted_and_masks_dim():
    text = shown(True, CANVASES[:3])
    assert "\x1b[30;43m t2\x1b[0m" in text and "\x1b[90m░░ " in text
    assert "How [many]?" in text and "▶ 1" in text and "▶ 2" in text
    final = text[text.rindex("How [many]?") :]
    assert "43m" not in final and "▶" not in final
    # A canvas taller than the terminal is shown around the active block.
    text = shown(True, [[*list(range(1, 7)) * 10, *[MASK] * 60]], height=14)
    assert "blocks above" in text or "blocks below" in text
    assert text[: text.index("step 1")].rsplit("How", 1)[1].count("\n") < 14


def test_pieces_are_visible_and_harmless():
    pieces = {"▁a": " a", "Ġa": " a", "\n": "⏎", "\x1b[31m": "\\x1b[31m", "": "∅", "é": "é", "\t": "⇥"}
    assert {raw: visible_text(raw) for raw in pieces} == pieces


def train(step: int, **more: Any) -> dict[str, Any]:
    return {"step": step, "kind": "train", "loss": 5.0 / (1 + step), "lr": 1e-3, "grad_norm": 1.0} | more


def evaluation(step: int, correct: int) -> dict[str, Any]:
    nelbo = {"mean": 4.0 / (1 + step), "se": 0.1}
    pass_at_1 = {"correct": correct, "n": 8, "low": 0.1, "high": 0.9}
    return {"step": step, "kind": "eval", "nelbo_per_token": nelbo, "pass_at_1": pass_at_1}


RUNS = {
    "full": [evaluation(0, 1)]
    + [train(s, loss_by_block=[[2.0, 1.0]] * 4, loss_by_count=[[1.0, 2.0]] * 8) for s in range(1, 40)]
    + [evaluation(40, 7), evaluation(50, 6)],
    "one step": [train(1, loss_by_block=[[0.0, 0.0]], loss_by_count=[[0.0, 0.0]]), evaluation(1, 0)],
    "diverged": [train(s, loss=float("nan"), grad_norm=float("inf")) for s in (1, 2)],
    "empty": [],
}


def write(path: Path, name: str) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in RUNS[name]), encoding="utf-8")
    return path


@pytest.mark.parametrize("name", RUNS)
@pytest.mark.filterwarnings("error", "ignore::ResourceWarning")  # what earlier tests left may be collected here
def test_pictures_of_full_short_and_empty_runs(tmp_path, name):
    written = plots.plot_run(write(tmp_path / "metrics.jsonl", name), tmp_path / "plots")
    assert [Path(p).name for p in written] == ["loss.png", "nelbo.png", "pass_at_1.png", "curves.png"]
    assert all(Path(p).read_bytes().startswith(b"\x89PNG") for p in written)


def test_what_is_drawn_is_what_was_logged(tmp_path):
    full, one = (metrics.read_metrics(write(tmp_path / "m.jsonl", name)) for name in ("full", "one step"))
    axes = [Figure().subplots() for _ in range(5)]
    curves.draw_panel(axes[0], panels.PANELS["pass_at_1"](full))
    assert np.asarray(axes[0].get_lines()[0].get_ydata()).tolist() == [1 / 8, 7 / 8, 6 / 8]
    bars = axes[0].containers[0].lines[2][0].get_segments()
    assert np.allclose(np.stack(bars)[:, :, 1], [[0.1, 0.9]] * 3)
    assert axes[0].get_ylabel() == "share of problems solved, linear scale"
    curves.draw_panel(axes[1], panels.PANELS["loss_by_count"](full))
    line = np.asarray(axes[1].get_lines()[0].get_xydata())
    assert line.tolist() == [[count, 0.5] for count in range(1, 9)]  # masked counts start at 1
    # Of fewer points than make a curve, the values are written.
    curves.draw_panel(axes[2], panels.PANELS["loss_by_block"](one))
    curves.draw_panel(axes[3], panels.PANELS["pass_at_1"](one))
    assert not axes[2].get_lines() and not axes[3].get_lines()
    assert axes[2].texts[0].get_text().startswith("there is only one block index")
    assert axes[3].texts[0].get_text() == "step 1: 0.0% [10.0%, 90.0%]"
    wide = [train(step, loss=10.0 ** (3 - step)) for step in range(5)]
    curves.draw_panel(axes[4], panels.PANELS["loss"](metrics.Metrics(wide, [])))
    assert axes[4].get_yscale() == "log" and axes[4].get_ylabel().endswith("nats, log scale")


def test_smoothing_keeps_constants_and_means():
    assert panels.smoothed(np.full(7, 3.0), 5).tolist() == [3.0] * 7
    assert panels.smoothed(np.array([0.0, 3.0, 6.0]), 3).tolist() == [0.0, 3.0, 6.0]
    assert panels.smoothed(np.array([0.0, 9.0, 0.0]), 3)[1] == 3.0
