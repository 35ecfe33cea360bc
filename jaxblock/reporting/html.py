"""Draws examined records as one HTML file without scripts, fonts or pictures; all text in it is escaped."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from html import escape

from jaxblock.diffusion.canvas import Layout
from jaxblock.reporting import describe
from jaxblock.reporting.describe import Cell, Piece
from jaxblock.reporting.examine import ExaminedDraw, ExaminedRecord, Position
from jaxblock.reporting.page import html_document


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
    intro = f"<header><h1>{escape(title)}</h1><p>{escape(describe.layout_line(layout))}</p><p>{escape(about)}</p>"
    meanings = "".join(
        f'<dt><span class="t {cell.style}">{cell.text}</span></dt><dd>{escape(meaning)}</dd>'
        for cell, meaning in describe.legend(records)
    )
    body = "\n".join(_record_section(record, layout, piece) for record in records)
    return html_document(title, f"{intro}<dl>{meanings}</dl></header>\n{body}", styles=["inspect.css"])


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
