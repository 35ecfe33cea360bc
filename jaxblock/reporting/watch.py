"""Shows a decode as it happens: the response canvas block by block, and what each step commits."""

from __future__ import annotations

import time
from collections.abc import Sequence
from types import TracebackType

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from jaxblock.reporting.describe import MASK_GLYPH, Box, Piece, boxes, visible_text


class Watch:
    """Shows a decode while it runs. It is a context manager whose `step` is called with the canvas after each decode step.

    On a terminal the canvas is redrawn in place: masks are dim, tokens that the last step committed are highlighted, and
    the active block is marked. Where the output is not a terminal, one line is printed for each finished block.
    """

    def __init__(
        self,
        prompt: str,
        piece: Piece,
        *,
        mask_id: int,
        block: int,
        stop_ids: Sequence[int] = (),
        start: Sequence[int] = (),
        console: Console | None = None,
        pause: float = 0.0,
    ) -> None:
        """Prepares the display, which starts when the context is entered.

        Args:
            prompt: the prompt's text.
            piece: returns the text of a token id.
            mask_id: the id of the mask token.
            block: the number of positions in a block.
            stop_ids: the ids that end the response; tokens after the first of them are shown dim.
            start: the canvas before the first step, where some of it is given; empty for masks alone.
            console: the console to draw on; None for standard output.
            pause: the time to wait after each redraw on a terminal, in seconds, to slow down the replay of a finished decode.
        """
        self._prompt, self._piece, self._mask = prompt, piece, mask_id
        self._block, self._stops, self._pause = block, frozenset(stop_ids), pause
        self._console = console or Console()
        self._ids: list[int] = list(start)
        self._is_given = [i != mask_id for i in start]
        self._fresh: set[int] = set()
        self._steps = 0
        self._nfe = 0
        self._printed = 0
        self._block_steps = 0
        self._over = False
        self._live: Live | None = None

    def __enter__(self) -> Watch:
        """Starts the display of the canvas."""
        if self._console.is_terminal:
            self._live = Live(console=self._console, auto_refresh=False, vertical_overflow="crop")
            self._live.__enter__()
            self._live.update(self._view(), refresh=True)
        else:
            self._console.print(Text(f"prompt: {self._prompt.strip()}"), soft_wrap=True)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Ends the display with the final canvas on a terminal, or else with the last blocks and a summary line."""
        self._fresh, self._over = set(), kind is None
        if self._live is not None:
            self._live.update(self._view(), refresh=True)
            self._live.__exit__(kind, error, trace)
            self._live = None
        elif kind is None:
            self._print_finished_blocks(last=True)
            self._console.print(Text(self._status().plain), soft_wrap=True)

    def step(self, response_ids: Sequence[int], nfe: int | None = None) -> None:
        """Shows the canvas after one decode step.

        Args:
            response_ids: the R response ids, with mask ids where nothing is committed yet.
            nfe: the number of forward passes spent on this prompt so far; None counts one per step.
        """
        ids = [int(i) for i in response_ids]
        before = self._ids or [self._mask] * len(ids)
        self._fresh = {i for i, (old, new) in enumerate(zip(before, ids, strict=True)) if old != new}
        self._ids = ids
        self._steps += 1
        self._block_steps += 1
        self._nfe = self._steps if nfe is None else int(nfe)
        if self._live is not None:
            self._live.update(self._view(), refresh=True)
            if self._pause > 0:
                time.sleep(self._pause)
        else:
            self._print_finished_blocks()

    def _boxes(self) -> list[Box]:
        return boxes(self._is_given or [False] * len(self._ids), self._block)

    def _active(self) -> int:
        """Returns the index of the box in which the last step committed tokens, else of the first one with masks, else -1."""
        if self._over:
            return -1
        if self._fresh:
            return next(k for k, box in enumerate(self._boxes()) if min(self._fresh) < box.end)
        return next((k for k, box in enumerate(self._boxes()) if self._mask in self._ids[box.first : box.end]), -1)

    def _print_finished_blocks(self, last: bool = False) -> None:
        """Prints the finished blocks that are not printed yet; with ``last`` also a block that still holds some masks."""
        found = self._boxes()
        n_blocks = sum(box.block is not None for box in found)
        for box in found[self._printed :]:
            ids = self._ids[box.first : box.end]
            if all(i == self._mask for i in ids) or (self._mask in ids and not last):
                return
            text = self._line(box).plain
            count = f"{self._block_steps} step{'' if self._block_steps == 1 else 's'}"
            line = f"given  {text}" if box.block is None else f"block {box.block + 1}/{n_blocks}  {count}  {text}"
            self._console.print(Text(line), soft_wrap=True)
            self._printed += 1
            if box.block is not None:
                self._block_steps = 0

    def _status(self) -> Text:
        if not self._steps:
            return Text("compiling the decoder", style="bold")
        committed = sum(i != self._mask for i in self._ids) - sum(self._is_given)
        per_forward = f"  {committed / self._nfe:.2f} tokens per forward" if self._nfe else ""
        stopped = self._over and self._mask in self._ids and any(i in self._stops for i in self._ids)
        return Text.assemble(
            (f"step {self._steps}  NFE {self._nfe}  {committed}/{len(self._ids) - sum(self._is_given)} tokens", "bold"),
            per_forward,
            "  stopped early" if stopped else "",
        )

    def _view(self) -> Group:
        blocks, active = self._boxes(), self._active()
        # Prompt, status and blank lines take 8 lines. Of a long canvas only the blocks around the active one are shown.
        room = max(3, self._console.height - 8)
        centre = len(blocks) if self._over else active
        first = min(max(0, centre - room // 2), max(0, len(blocks) - room))
        grid = Table.grid(padding=(0, 1))
        grid.add_column(justify="right", no_wrap=True)
        grid.add_column(overflow="fold")
        if first:
            grid.add_row("", Text(f"… {first} blocks above", style="dim"))
        for k in range(first, min(first + room, len(blocks))):
            number = blocks[k].block
            name = "given" if number is None else str(number + 1)
            label = Text(f"▶ {name}" if k == active else name, style="bold yellow" if k == active else "dim")
            grid.add_row(label, self._line(blocks[k]))
        if first + room < len(blocks):
            grid.add_row("", Text(f"… {len(blocks) - first - room} blocks below", style="dim"))
        prompt = Text("\n".join(self._prompt.strip().splitlines()[-5:]), style="cyan", overflow="ellipsis")
        return Group(prompt, "", grid, "", self._status())

    def _ended(self) -> int:
        """Returns the position of the first stop token if no mask comes before it, else the number of response positions."""
        for i, token in enumerate(self._ids):
            if token == self._mask:
                break
            if token in self._stops:
                return i
        return len(self._ids)

    def _line(self, box: Box) -> Text:
        """Formats the tokens of a box; stop tokens after the one that ends the response are shown as dots."""
        line, ended = Text(), self._ended()
        for i, token in enumerate(self._ids[box.first : box.end], box.first):
            if token == self._mask:
                line.append(MASK_GLYPH + " ", style="bright_black")
                continue
            # A background colour, so that a highlighted space is visible.
            style = "black on yellow" if i in self._fresh else "dim" if i >= ended else ""
            line.append(" ·" if i > ended and token in self._stops else visible_text(self._piece(token)), style=style)
        return line
