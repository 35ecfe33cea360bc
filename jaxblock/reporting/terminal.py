"""Prints examined records in a terminal. The output can be read without colours: ``░x░`` is a mask that must become x."""

from __future__ import annotations

from collections.abc import Sequence

from rich.cells import cell_len
from rich.console import Console
from rich.rule import Rule
from rich.table import Table
from rich.text import Text

from jaxblock.diffusion.canvas import Layout
from jaxblock.reporting import describe
from jaxblock.reporting.describe import Cell, Piece
from jaxblock.reporting.examine import ExaminedDraw, ExaminedRecord

_STYLES = {
    "prompt": "bright_blue",
    "response": "green",
    "terminator": "bold yellow",
    "fill": "magenta",
    "padding": "magenta dim",
    "unused": "bright_black",
    "mask": "bright_black",
    "hidden": "bright_black strike",
    "loss": "bold black on yellow",
}
_DIM = "bright_black"
_LABEL_WIDTH, _NUMBER_WIDTH = 10, 5


def print_records(
    console: Console, layout: Layout, records: Sequence[ExaminedRecord], piece: Piece, about: str = ""
) -> None:
    """Prints records and their draws.

    Args:
        console: the console to print on.
        layout: the layout of the canvas.
        records: the records that ``examine`` returned.
        piece: returns the text of a token id.
        about: a line on the objective (law, weighting, draws); empty for none.
    """
    width = max(20, console.width - _LABEL_WIDTH - _NUMBER_WIDTH - 3)
    console.print(Text(describe.layout_line(layout)))
    if about:
        console.print(Text(about))
    meanings = Table.grid(padding=(0, 2))
    for cell, meaning in describe.legend(records):
        meanings.add_row(Text(cell.text, _STYLES[cell.style]), Text(meaning, _DIM))
    console.print(meanings)
    for record in records:
        console.print()
        console.print(Rule(Text(record.label, style="bold"), align="left", style=_DIM))
        console.print(Text(describe.record_line(record, layout)))
        console.print(_canvas_grid(record, layout, piece, width))
        for number, draw in enumerate(record.draws, 1):
            console.print()
            console.print(Text(f"draw {number}: {describe.draw_line(draw)}", style="bold"))
            if draw.weight > 0:
                console.print(_draw_grid(record, draw, piece, width))
            for finding in draw.findings:
                console.print(Text(f"  ✗ {finding}", style="bold red"))


def _grid() -> Table:
    grid = Table.grid(padding=(0, 1))
    grid.add_column(justify="right", no_wrap=True, min_width=_LABEL_WIDTH)
    grid.add_column(justify="right", no_wrap=True, min_width=_NUMBER_WIDTH, style=_DIM)
    grid.add_column(no_wrap=True)
    return grid


def _joined(cells: Sequence[Cell], width: int) -> Text:
    """Joins cells with separators, and breaks lines only between cells, never at the leading space of a token."""
    line, used = Text(no_wrap=True, overflow="ellipsis"), 0
    for number, cell in enumerate(cells):
        text = "hidden" if cell.style == "hidden" else cell.text
        size = cell_len(text) + 1
        if number and used + size > width:
            line.append("\n")
            used = 0
        line.append(text, style=_STYLES[cell.style])
        if number < len(cells) - 1:
            line.append("│", _DIM)
        used += size
    return line


def _canvas_grid(record: ExaminedRecord, layout: Layout, piece: Piece, width: int) -> Table:
    grid = _grid()
    for name, block, positions in describe.sections(record):
        inactive = block is not None and block >= record.n_blocks
        cells = [describe.canvas_cell(record.positions[at], layout, piece) for at in positions]
        grid.add_row(Text(name, style=_DIM if inactive else ""), str(positions[0]), _joined(cells, width))
    if hidden := describe.hidden_line(record):
        grid.add_row("", "", Text(hidden, style=_DIM))
    return grid


def _draw_grid(record: ExaminedRecord, draw: ExaminedDraw, piece: Piece, width: int) -> Table:
    grid = _grid()
    for name, block, positions in describe.sections(record):
        if name == "prompt":
            grid.add_row(Text("prompt", style=_DIM), "0", Text("as above", style=_DIM))
            continue
        cells = [describe.seen_cell(draw.seen[at], record.positions[at].kind, piece) for at in positions]
        label = Text(f"▶ {name}", style="bold yellow") if block == draw.block else Text(name)
        grid.add_row(label, str(positions[0]), _joined(cells, width))
    return grid
