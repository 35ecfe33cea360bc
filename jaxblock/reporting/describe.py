"""Converts examined records into lines of text, sections and cells, which the terminal and the HTML page then draw."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import groupby
from typing import Literal, NamedTuple

from jaxblock.diffusion.canvas import Layout
from jaxblock.reporting.examine import KIND_MEANINGS, ExaminedDraw, ExaminedRecord, Kind, Position, SeenPosition

MASK_GLYPH = "░░"
"""The text that is drawn for one mask token."""

_GLYPHS = {"\n": "⏎", "\t": "⇥", "\r": "␍", "▁": " ", "Ġ": " ", "Ċ": "⏎", "ĉ": "⇥"}

Piece = Callable[[int], str]
"""A function that returns the text of a token id as the vocabulary writes it."""


class Cell(NamedTuple):
    """Holds what is drawn for one canvas position: a text, and the style to draw it in."""

    text: str
    style: Kind | Literal["loss", "mask"]


class CanvasSection(NamedTuple):
    """Holds the canvas positions that are drawn together.

    Attributes:
        name: the section's name: ``prompt``, ``block 0``, ``block 1``, ... or ``beyond`` (after the response positions).
        block: the index of the block; None for the other sections.
        positions: the canvas positions, in order.
    """

    name: str
    block: int | None
    positions: tuple[int, ...]


class Box(NamedTuple):
    """Holds response positions that are drawn together: a block of the decoder, or a stretch of given text between spans.

    Attributes:
        first: the first response position.
        end: the position after the last one.
        block: the number of the block, from 0 on; None for given text.
    """

    first: int
    end: int
    block: int | None


def boxes(given: Sequence[bool], size: int) -> list[Box]:
    """Cuts response positions into the blocks that the decoder fills one after the other, and the text given between them.

    Args:
        given: for each response position whether it was given, as between the spans of a text that is filled.
        size: the positions of a block. A block begins where the one before it ends, or after given text.
    """
    found: list[Box] = []
    first = blocks = 0
    for is_given, stretch in groupby(given):
        end = first + len(list(stretch))
        for at in range(first, end, end - first if is_given else size):
            found.append(Box(at, end if is_given else min(at + size, end), None if is_given else blocks))
            blocks += not is_given
        first = end
    return found


def visible_text(piece: str) -> str:
    """Makes one token's text safe and legible in a line of text.

    Args:
        piece: a token as its vocabulary writes it; SentencePiece's ``▁`` and byte-level BPE's ``Ġ`` are spaces.

    Returns:
        The text with line breaks and tabs as glyphs and control characters (terminal escapes among them) as ``\\xNN``;
        ``∅`` for a token without text.
    """
    shown = "".join(_GLYPHS.get(c, c if c.isprintable() else c.encode("unicode_escape").decode()) for c in piece)
    return shown or "∅"


def canvas_cell(position: Position, layout: Layout, piece: Piece) -> Cell:
    """Returns the cell for a canvas position of the record, before any draw masks it."""
    text = MASK_GLYPH if position.id == layout.mask_id else visible_text(piece(position.id))
    return Cell(text, position.kind)


def seen_cell(seen: SeenPosition, kind: Kind, piece: Piece) -> Cell:
    """Returns the cell for a canvas position as the model is fed it under a draw.

    Args:
        seen: the position under the draw.
        kind: the kind of the position in the record.
        piece: returns the text of a token id.
    """
    if not seen.visible:
        return Cell(visible_text(piece(seen.id)), "hidden")
    if seen.loss and seen.target is not None:
        return Cell(f"░{visible_text(piece(seen.target))}░", "loss")
    return Cell(MASK_GLYPH, "mask") if seen.masked else Cell(visible_text(piece(seen.id)), kind)


def legend(records: Sequence[ExaminedRecord]) -> list[tuple[Cell, str]]:
    """Returns the legend: a cell for every kind of position that occurs in the records, with its meaning."""
    kinds = {position.kind for record in records for position in record.positions}
    return [
        *((Cell(kind, kind), meaning) for kind, meaning in KIND_MEANINGS.items() if kind in kinds),
        (Cell("░x░", "loss"), "fed as a mask, has loss: must become x"),
        (Cell(MASK_GLYPH, "mask"), "fed as a mask, no loss"),
    ]


def sections(record: ExaminedRecord) -> list[CanvasSection]:
    """Divides the canvas positions that are not hidden into the prompt, the blocks, and the positions after the blocks."""

    def name(at: int) -> tuple[str, int | None]:
        position = record.positions[at]
        if position.kind == "prompt":
            return "prompt", None
        return ("beyond", None) if position.block is None else (f"block {position.block}", position.block)

    shown = (at for at, position in enumerate(record.positions) if position.kind != "hidden")
    return [CanvasSection(*key, tuple(positions)) for key, positions in groupby(shown, name)]


def hidden_line(record: ExaminedRecord) -> str:
    """Describes how many positions are hidden; empty where none are."""
    hidden = sum(position.kind == "hidden" for position in record.positions)
    return f"{hidden} more positions of the canvas are hidden" if hidden else ""


def layout_line(layout: Layout) -> str:
    """Describes the canvas in one line: its sizes, special ids and alignment."""
    window = "" if layout.suffix_window is None else f", {layout.suffix_window} positions visible after the block"
    alignment = "" if layout.alignment == "same_position" else "; each token is predicted from the position before it"
    return (
        f"{layout.context} canvas: {layout.response_len} response positions in {layout.n_blocks} blocks of "
        f"{layout.block}; mask id {layout.mask_id}, fill id {layout.fill_id}, "
        f"stop ids {', '.join(map(str, layout.stop_ids))}{window}{alignment}"
    )


def record_line(record: ExaminedRecord, layout: Layout) -> str:
    """Describes a record in one line: the lengths of its parts, and which blocks may be active."""
    fill = sum(position.kind == "fill" for position in record.positions)
    end = "" if any(p.kind == "terminator" for p in record.positions) else " (no terminator: it was cut)"
    return (
        f"prompt {record.prompt_len} tokens; response {record.text_len} tokens{end}, fill {fill}; "
        f"{record.n_blocks} of {layout.n_blocks} blocks may be active; {record.length} visible positions"
    )


def draw_line(draw: ExaminedDraw) -> str:
    """Describes a draw in one line: the active block, the masked positions, and their weight."""
    if draw.weight <= 0:
        return "unused (the record has fewer blocks than draws): no loss"
    return (
        f"block {draw.block} active, {draw.masked} of {draw.supervised} masked, weight {draw.weight:.4g} "
        f"(× {draw.coefficient:.3g} in the loss of these rows); the model sees {draw.visible_len} positions, "
        f"rotary {draw.rotary[0]} to {draw.rotary[1]}"
    )
