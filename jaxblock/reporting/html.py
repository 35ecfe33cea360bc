"""``inspect`` as one HTML file that needs nothing else: no script, no font, no picture, every text escaped."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from html import escape

from jaxblock.diffusion.canvas import Layout
from jaxblock.reporting.examine import MEANING, DrawShown, Examined, Position, Seen
from jaxblock.reporting.pieces import visible
from jaxblock.reporting.terminal import describe, draw_summary, summary

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


def page(
    layout: Layout,
    examined: Sequence[Examined],
    piece: Callable[[int], str],
    *,
    title: str = "What the model sees in training",
    about: str = "",
) -> str:
    """Draws records and their draws as HTML.

    Args:
        layout: the canvas's static part.
        examined: what ``inspect.examine`` returned.
        piece: the text of a token id.
        title: the heading.
        about: a line on the objective (law, weighting, draws).

    Returns:
        A whole document; ids, positions and weights are shown on hover.
    """
    head = (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><style>{_CSS}</style></head><body>'
    )
    intro = f"<header><h1>{escape(title)}</h1><p>{escape(describe(layout))}</p><p>{escape(about)}</p>"
    records = "\n".join(_record(record, layout, piece) for record in examined)
    return f"{head}{intro}{_legend(examined)}</header>\n{records}\n</body></html>\n"


def _legend(examined: Sequence[Examined]) -> str:
    kinds = {p.kind for record in examined for p in record.positions}
    rows = [(f'<span class="t {kind}">{kind}</span>', meaning) for kind, meaning in MEANING.items() if kind in kinds]
    rows.append(('<span class="t loss">░x░</span>', "fed as a mask, has loss: must become x"))
    rows.append(('<span class="t mask">░░</span>', "fed as a mask, no loss"))
    return "<dl>" + "".join(f"<dt>{mark}</dt><dd>{escape(meaning)}</dd>" for mark, meaning in rows) + "</dl>"


def _record(record: Examined, layout: Layout, piece: Callable[[int], str]) -> str:
    hidden = sum(p.kind == "hidden" for p in record.positions)
    after = f"<p>{hidden} more positions of the canvas are hidden.</p>" if hidden else ""
    cells = {at: _canvas_cell(at, p, layout, piece) for at, p in enumerate(record.positions) if p.kind != "hidden"}
    parts = [
        f"<section><h2>{escape(record.label)}</h2><p>{escape(summary(record, layout))}</p>",
        _blocks(record, cells, None),
        after,
    ]
    for number, shown in enumerate(record.draws, 1):
        parts.append(f"<h3>draw {number}: {escape(draw_summary(shown))}</h3>")
        parts += [f'<p class="bad">✗ {escape(finding)}</p>' for finding in shown.findings]
        if shown.weight > 0:
            seen = {at: _seen_cell(at, record.positions[at], shown, piece) for at in cells}
            # An open prompt under each draw would bury the block; a prompt that was changed must be seen.
            same = all(shown.seen[at].id == record.positions[at].id for at in range(record.prompt_len))
            parts.append(_blocks(record, seen, shown.block, folded=same))
    return "".join(parts) + "</section>"


def _blocks(record: Examined, cells: dict[int, str], active: int | None, *, folded: bool = False) -> str:
    groups: dict[int | None | str, list[str]] = {}
    for at, cell in cells.items():
        position = record.positions[at]
        name = "prompt" if position.kind == "prompt" else position.block
        groups.setdefault(name, []).append(cell)
    out = []
    for name, members in groups.items():
        label = "beyond" if name is None else name if isinstance(name, str) else f"block {name}"
        state = ""
        if isinstance(name, int):
            state = " active" if name == active else " never" if name >= record.n_blocks else ""
        if name == "prompt" and folded:
            count = f"prompt as above, {len(members)} tokens"
            out.append(f'<details class="block"><summary>{count}</summary>{"".join(members)}</details>')
            continue
        out.append(f'<div class="block{state}"><b>{label}</b>{"".join(members)}</div>')
    return f'<div class="blocks">{"".join(out)}</div>'


def _span(text: str, css: str, hover: str) -> str:
    return f'<span class="t {css}" title="{escape(hover, quote=True)}">{escape(text)}</span>'


def _canvas_cell(at: int, position: Position, layout: Layout, piece: Callable[[int], str]) -> str:
    text = "░░" if position.id == layout.mask_id else visible(piece(position.id))
    block = "" if position.block is None else f", block {position.block}"
    return _span(text, position.kind, f"id {position.id}, canvas position {at}{block}: {position.kind}")


def _seen_cell(at: int, position: Position, shown: DrawShown, piece: Callable[[int], str]) -> str:
    seen: Seen = shown.seen[at]
    hover = f"fed id {seen.id}, canvas position {at}, rotary position {seen.rotary}"
    if not seen.visible:
        return _span(visible(piece(seen.id)), "hidden", f"{hover}: not visible")
    if seen.loss and seen.target is not None:
        hover += (
            f"; must become id {seen.target}, predicted from the hidden state at {seen.read_at}; weight "
            f"{shown.weight:.6g}, {shown.coefficient:.4g} in the loss of these rows"
        )
        return _span(f"░{visible(piece(seen.target))}░", "loss", hover)
    if seen.masked:
        return _span("░░", "mask", f"{hover}; no loss")
    return _span(visible(piece(seen.id)), position.kind, hover)
