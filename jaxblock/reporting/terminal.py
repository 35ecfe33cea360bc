"""``inspect`` in a terminal. Without colour the same facts stand in the text: ``░x░`` is a mask that must become x."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from rich.cells import cell_len
from rich.console import Console
from rich.rule import Rule
from rich.table import Table
from rich.text import Text

from jaxblock.diffusion.canvas import Layout
from jaxblock.reporting.examine import MEANING, DrawShown, Examined, Kind, Seen
from jaxblock.reporting.pieces import MASK_GLYPH, visible

_STYLE: dict[Kind, str] = {
    "prompt": "bright_blue",
    "response": "green",
    "terminator": "bold yellow",
    "fill": "magenta",
    "padding": "magenta dim",
    "unused": "bright_black",
    "hidden": "bright_black strike",
}
_LOSS = "bold black on yellow"
_SEPARATOR = ("│", "bright_black")
_LABEL, _NUMBER = 10, 5


def show(
    console: Console, layout: Layout, examined: Sequence[Examined], piece: Callable[[int], str], about: str = ""
) -> None:
    """Prints records and their draws.

    Args:
        console: where to.
        layout: the canvas's static part.
        examined: what ``inspect.examine`` returned.
        piece: the text of a token id.
        about: a line on the objective (law, weighting, draws).
    """
    width = max(20, console.width - _LABEL - _NUMBER - 3)
    console.print(Text(describe(layout)))
    if about:
        console.print(Text(about))
    console.print(_legend(examined))
    for record in examined:
        console.print()
        console.print(Rule(Text(record.label, style="bold"), align="left", style="bright_black"))
        console.print(Text(summary(record, layout)))
        console.print(_canvas(record, layout, piece, width))
        for number, shown in enumerate(record.draws, 1):
            console.print()
            console.print(Text(f"draw {number}: {draw_summary(shown)}", style="bold"))
            if shown.weight > 0:
                console.print(_draw(record, shown, piece, width))
            for finding in shown.findings:
                console.print(Text(f"  ✗ {finding}", style="bold red"))


def describe(layout: Layout) -> str:
    """One line on what is static."""
    window = "" if layout.suffix_window is None else f", {layout.suffix_window} positions visible after the block"
    alignment = "" if layout.alignment == "same_position" else "; each token is predicted from the position before it"
    return (
        f"{layout.context} canvas: {layout.response_len} response positions in {layout.n_blocks} blocks of "
        f"{layout.block}; mask id {layout.mask_id}, fill id {layout.fill_id}, "
        f"stop ids {', '.join(map(str, layout.stop_ids))}{window}{alignment}"
    )


def summary(record: Examined, layout: Layout) -> str:
    """One line on a record."""
    fill = sum(p.kind == "fill" for p in record.positions)
    end = "" if any(p.kind == "terminator" for p in record.positions) else " (no terminator: it was cut)"
    return (
        f"prompt {record.prompt_len} tokens; response {record.text_len} tokens{end}, fill {fill}; "
        f"{record.n_blocks} of {layout.n_blocks} blocks may be active; {record.length} visible positions"
    )


def draw_summary(shown: DrawShown) -> str:
    """One line on a draw."""
    if shown.weight <= 0:
        return "unused (the record has fewer blocks than draws): no loss"
    return (
        f"block {shown.block} active, {shown.masked} of {shown.supervised} masked, weight {shown.weight:.4g} "
        f"(× {shown.coefficient:.3g} in the loss of these rows); the model sees {shown.visible_len} positions, "
        f"rotary {shown.rotary[0]} to {shown.rotary[1]}"
    )


def _legend(examined: Sequence[Examined]) -> Table:
    kinds = {p.kind for record in examined for p in record.positions}
    grid = Table.grid(padding=(0, 2))
    for kind, meaning in MEANING.items():
        if kind in kinds:
            grid.add_row(Text.assemble((kind, _STYLE[kind])), Text(meaning, style="bright_black"))
    grid.add_row(Text.assemble(("░x░", _LOSS)), Text("fed as a mask, has loss: must become x", style="bright_black"))
    grid.add_row(Text(MASK_GLYPH, style="bright_black"), Text("fed as a mask, no loss", style="bright_black"))
    return grid


def _rows(record: Examined) -> list[tuple[str, list[int]]]:
    """Canvas positions by line: the prompt, each block, and the count of what is hidden."""
    lines = [("prompt", [at for at, p in enumerate(record.positions) if p.kind == "prompt"])]
    blocks = sorted({p.block for p in record.positions if p.block is not None and p.kind != "hidden"})
    for k in blocks:
        where = [at for at, p in enumerate(record.positions) if p.block == k and p.kind != "hidden"]
        lines.append((f"block {k}", where))
    beyond = [at for at, p in enumerate(record.positions) if p.block is None and p.kind not in ("prompt", "hidden")]
    return [*lines, ("beyond", beyond)] if beyond else lines


def _grid() -> Table:
    grid = Table.grid(padding=(0, 1))
    grid.add_column(justify="right", no_wrap=True, min_width=_LABEL)
    grid.add_column(justify="right", no_wrap=True, min_width=_NUMBER, style="bright_black")
    grid.add_column(no_wrap=True)
    return grid


def _joined(parts: Sequence[tuple[str, str]], width: int) -> Text:
    """Tokens with separators, broken between tokens only: a token's own leading space is no place to break a line."""
    line, used = Text(no_wrap=True, overflow="ellipsis"), 0
    for number, (text, style) in enumerate(parts):
        size = cell_len(text) + 1
        if number and used + size > width:
            line.append("\n")
            used = 0
        line.append(text, style=style)
        if number < len(parts) - 1:
            line.append(*_SEPARATOR)
        used += size
    return line


def _canvas(record: Examined, layout: Layout, piece: Callable[[int], str], width: int) -> Table:
    grid = _grid()
    for name, where in _rows(record):
        inactive = name.startswith("block") and int(name.split()[1]) >= record.n_blocks
        parts = [
            (MASK_GLYPH if p.id == layout.mask_id else visible(piece(p.id)), _STYLE[p.kind])
            for p in (record.positions[at] for at in where)
        ]
        label = Text(name, style="bright_black" if inactive else "")
        grid.add_row(label, f"{where[0]}" if where else "", _joined(parts, width))
    hidden = sum(p.kind == "hidden" for p in record.positions)
    if hidden:
        grid.add_row("", "", Text(f"{hidden} more positions of the canvas are hidden", style="bright_black"))
    return grid


def _draw(record: Examined, shown: DrawShown, piece: Callable[[int], str], width: int) -> Table:
    grid = _grid()
    for name, where in _rows(record):
        if name == "prompt":
            grid.add_row(Text("prompt", style="bright_black"), "0", Text("as above", style="bright_black"))
            continue
        active = name == f"block {shown.block}"
        parts = [_cell(shown.seen[at], record.positions[at].kind, piece) for at in where]
        label = Text(f"▶ {name}" if active else name, style="bold yellow" if active else "")
        grid.add_row(label, str(where[0]), _joined(parts, width))
    return grid


def _cell(seen: Seen, kind: Kind, piece: Callable[[int], str]) -> tuple[str, str]:
    if not seen.visible:
        return "hidden", _STYLE["hidden"]
    if seen.loss and seen.target is not None:
        return f"░{visible(piece(seen.target))}░", _LOSS
    if seen.masked:
        return MASK_GLYPH, _STYLE["unused"]
    return visible(piece(seen.id)), _STYLE[kind]
