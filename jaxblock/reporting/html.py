"""Draws examined records as one HTML file without scripts, fonts or pictures; all text in it is escaped."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from html import escape

from jaxblock.diffusion.canvas import Layout
from jaxblock.reporting import describe
from jaxblock.reporting.describe import Cell, Piece
from jaxblock.reporting.examine import ExaminedDraw, ExaminedRecord, Position

_CSS = """
:root { --ink:#1d2330; --soft:#6a7280; --line:#d9dde3; --paper:#f6f7f9; --card:#ffffff;
  --prompt:#dbe9fb; --response:#d8f0dc; --terminator:#fbe3a6; --fill:#eddcf7; --padding:#f6eefa; --unused:#e6e8ec;
  --loss:#ffd23f; --active:#d08700; --bad:#b3261e; }
@media (prefers-color-scheme: dark) { :root { --ink:#e5e8ee; --soft:#99a2b1; --line:#3a414d; --paper:#15181d;
  --card:#1e232b; --prompt:#20406b; --response:#1f4a2c; --terminator:#6b5210; --fill:#4b2d60; --padding:#35263f;
  --unused:#2d333d; --loss:#8a6a00; --active:#ffbf3f; --bad:#ff8a80; } }
* { box-sizing:border-box; }
body { margin:0 auto; padding:24px; max-width:1180px; background:var(--paper); color:var(--ink);
  font:14px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,sans-serif; }
h1 { font-size:20px; margin:0 0 4px; } h2 { font-size:16px; margin:0 0 2px; } h3 { font-size:13px; margin:18px 0 6px; }
p { margin:2px 0; color:var(--soft); }
section { background:var(--card); border:1px solid var(--line); border-radius:8px; padding:16px 18px; margin:16px 0; }
dl { display:grid; grid-template-columns:max-content 1fr; gap:4px 12px; margin:12px 0 0; align-items:baseline; }
dt,dd { margin:0; } dd { color:var(--soft); }
.blocks { display:flex; flex-wrap:wrap; gap:14px 8px; align-items:stretch; margin-top:14px; }
.block { position:relative; border:1px solid var(--line); border-radius:6px; padding:8px 6px 5px; max-width:100%; }
.block > b { position:absolute; top:-9px; left:8px; padding:0 4px; background:var(--card); color:var(--soft);
  font-size:11px; font-weight:600; }
summary { color:var(--soft); font-size:11px; font-weight:600; cursor:pointer; }
.block.active { border:2px solid var(--active); } .block.active > b { color:var(--active); }
.block.never { border-style:dashed; }
.t { display:inline-block; font:12.5px/1.45 ui-monospace,SFMono-Regular,Menlo,Consolas,"DejaVu Sans Mono",monospace;
  padding:1px 4px; margin:1px; border-radius:4px; white-space:pre-wrap; overflow-wrap:anywhere; cursor:default;
  vertical-align:top; }
.t:hover { outline:2px solid var(--ink); }
.prompt { background:var(--prompt); } .response { background:var(--response); }
.terminator { background:var(--terminator); } .fill { background:var(--fill); } .padding { background:var(--padding); }
.unused,.mask { background:var(--unused); color:var(--soft); }
.loss { background:var(--loss); color:var(--ink); font-weight:600; }
.hidden { color:var(--soft); text-decoration:line-through; opacity:.6; }
.bad { color:var(--bad); font-weight:600; }
"""


def html_page(
    layout: Layout,
    records: Sequence[ExaminedRecord],
    piece: Piece,
    *,
    title: str = "What the model sees in training",
    about: str = "",
) -> str:
    """Draws records and their draws as HTML.

    Args:
        layout: the layout of the canvas.
        records: the records that ``examine`` returned.
        piece: returns the text of a token id.
        title: the heading of the page.
        about: a line on the objective (law, weighting, draws); empty for none.

    Returns:
        A whole HTML document; ids, positions and weights are shown when the pointer is over a token.
    """
    head = (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><style>{_CSS}</style></head><body>'
    )
    intro = f"<header><h1>{escape(title)}</h1><p>{escape(describe.layout_line(layout))}</p><p>{escape(about)}</p>"
    meanings = "".join(
        f'<dt><span class="t {cell.style}">{cell.text}</span></dt><dd>{escape(meaning)}</dd>'
        for cell, meaning in describe.legend(records)
    )
    body = "\n".join(_record_section(record, layout, piece) for record in records)
    return f"{head}{intro}<dl>{meanings}</dl></header>\n{body}\n</body></html>\n"


def _record_section(record: ExaminedRecord, layout: Layout, piece: Piece) -> str:
    hidden = describe.hidden_line(record)
    parts = [
        f"<section><h2>{escape(record.label)}</h2><p>{escape(describe.record_line(record, layout))}</p>",
        _blocks(record, lambda at: _canvas_span(at, record.positions[at], layout, piece), None),
        f"<p>{hidden}.</p>" if hidden else "",
    ]
    for number, draw in enumerate(record.draws, 1):
        parts.append(f"<h3>draw {number}: {escape(describe.draw_line(draw))}</h3>")
        parts += [f'<p class="bad">✗ {escape(finding)}</p>' for finding in draw.findings]
        if draw.weight > 0:
            # The prompt is folded under each draw, to keep the block in view, unless the model is fed a changed prompt.
            same = all(draw.seen[at].id == record.positions[at].id for at in range(record.prompt_len))
            seen = partial(_seen_span, record=record, draw=draw, piece=piece)
            parts.append(_blocks(record, seen, draw.block, fold_prompt=same))
    return "".join(parts) + "</section>"


def _blocks(
    record: ExaminedRecord, span: Callable[[int], str], active: int | None, *, fold_prompt: bool = False
) -> str:
    """Draws the sections of a record: the prompt and the blocks.

    Args:
        record: the record.
        span: returns the HTML of a canvas position.
        active: the index of the active block; None for none.
        fold_prompt: whether the prompt is folded into a line that opens on a click.
    """
    out = []
    for name, block, positions in describe.sections(record):
        spans = "".join(map(span, positions))
        if name == "prompt" and fold_prompt:
            count = f"prompt as above, {len(positions)} tokens"
            out.append(f'<details class="block"><summary>{count}</summary>{spans}</details>')
            continue
        state = ""
        if block is not None:
            state = " active" if block == active else " never" if block >= record.n_blocks else ""
        out.append(f'<div class="block{state}"><b>{name}</b>{spans}</div>')
    return f'<div class="blocks">{"".join(out)}</div>'


def _span(cell: Cell, hover: str) -> str:
    return f'<span class="t {cell.style}" title="{escape(hover, quote=True)}">{escape(cell.text)}</span>'


def _canvas_span(at: int, position: Position, layout: Layout, piece: Piece) -> str:
    block = "" if position.block is None else f", block {position.block}"
    hover = f"id {position.id}, canvas position {at}{block}: {position.kind}"
    return _span(describe.canvas_cell(position, layout, piece), hover)


def _seen_span(at: int, record: ExaminedRecord, draw: ExaminedDraw, piece: Piece) -> str:
    seen = draw.seen[at]
    cell = describe.seen_cell(seen, record.positions[at].kind, piece)
    hover = f"fed id {seen.id}, canvas position {at}, rotary position {seen.rotary}"
    if cell.style == "hidden":
        hover += ": not visible"
    elif cell.style == "loss":
        hover += (
            f"; must become id {seen.target}, predicted from the hidden state at {seen.read_at}; weight "
            f"{draw.weight:.6g}, {draw.coefficient:.4g} in the loss of these rows"
        )
    elif cell.style == "mask":
        hover += "; no loss"
    return _span(cell, hover)
