"""Tests the view of a decode, on a terminal and elsewhere."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from jaxblock.reporting.describe import visible_text
from jaxblock.reporting.watch import Watch

MASK, EOS, EOT = 99, 8, 9


def piece(token: int) -> str:
    return {EOS: "<eos>", EOT: "<eot>"}.get(token, f"▁t{token}")


def shown(terminal: bool, canvases: list[list[int]], height: int = 30, nfe: int | None = None) -> str:
    out = io.StringIO()
    console = Console(file=out, force_terminal=terminal, width=80, height=height, color_system="standard", _environ={})
    with Watch("How [many]?", piece, mask_id=MASK, block=2, stop_ids=(EOS, EOT), console=console) as watch:
        for canvas in canvases:
            watch.step(canvas, nfe)
    return out.getvalue()


CANVASES = [[1, MASK, MASK, MASK], [1, 2, MASK, MASK], [1, 2, MASK, EOS], [1, 2, EOT, EOS]]


def test_without_a_terminal_one_line_per_block() -> None:
    lines = shown(False, CANVASES).splitlines()
    assert lines == [
        "prompt: How [many]?",
        "block 1/2  2 steps   t1 t2",
        "block 2/2  2 steps  <eot> ·",
        "step 4  NFE 4  4/4 tokens  1.00 tokens per forward",
    ]


def test_an_early_stop_is_said_and_unfinished_blocks_are_not_lines() -> None:
    lines = shown(False, [[1, MASK, MASK, MASK], [1, EOT, MASK, MASK]], nfe=4).splitlines()
    assert lines[1:] == [
        "block 1/2  2 steps   t1<eot>",
        "step 2  NFE 4  2/4 tokens  0.50 tokens per forward  stopped early",
    ]


def test_on_a_terminal_fresh_tokens_are_highlighted_and_masks_dim() -> None:
    text = shown(True, CANVASES[:3])
    assert "\x1b[30;43m t2\x1b[0m" in text and "\x1b[90m░░ " in text
    assert "How [many]?" in text and "▶ 1" in text and "▶ 2" in text
    final = text[text.rindex("How [many]?") :]
    assert "43m" not in final and "▶" not in final


def test_a_canvas_taller_than_the_terminal_is_shown_around_the_active_block() -> None:
    canvas = list(range(1, 7)) * 20
    text = shown(True, [[*canvas[:60], *[MASK] * 60]], height=14)
    assert "blocks above" in text or "blocks below" in text
    frame = text[: text.index("step 1")].rsplit("How", 1)[1]
    assert frame.count("\n") < 14


def test_no_steps_at_all() -> None:
    for terminal in (False, True):  # as while the decoder is compiled
        assert "compiling" in shown(terminal, []) and "0/0" not in shown(terminal, [])


@pytest.mark.parametrize(
    ("raw", "expected"),
    [("▁a", " a"), ("Ġa", " a"), ("\n", "⏎"), ("\x1b[31m", "\\x1b[31m"), ("", "∅"), ("é", "é"), ("\t", "⇥")],
)
def test_pieces_are_visible_and_harmless(raw: str, expected: str) -> None:
    assert visible_text(raw) == expected
