"""Examines what training feeds the model: kinds of tokens, blocks, masks, and which tokens have loss.

``examine`` gets the draws of the training step, calls the function that training calls (``corruption.corrupt``) and only
reports what that returns, so that a bug in the masking is visible. ``terminal`` and ``html`` draw the result.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import jax
import numpy as np
from jax import Array

from jaxblock.diffusion.canvas import Canvas, Layout, supervised_end
from jaxblock.diffusion.config import MethodConfig
from jaxblock.diffusion.corruption import CLEAN, corrupt
from jaxblock.diffusion.objective import normaliser
from jaxblock.diffusion.sampling import Draw
from jaxblock.types import View

Kind = Literal["prompt", "response", "terminator", "fill", "padding", "unused", "hidden"]

KIND_MEANINGS: dict[Kind, str] = {
    "prompt": "given; never masked, never supervised",
    "response": "text of the response",
    "terminator": "ends the response; counted as text",
    "fill": "fills the terminator's block; supervised, not counted as text",
    "padding": "fill that the model sees after the text; never supervised",
    "unused": "masks to the end of the response positions; never supervised",
    "hidden": "after the row's end; the model never sees it",
}
"""The meaning of every kind of canvas position, for legends."""


@dataclass(frozen=True)
class Position:
    """Describes one position of a record's canvas.

    Attributes:
        id: the token id.
        kind: the role of the token in training (``KIND_MEANINGS``).
        block: the index of the position's block; None in the prompt and after the response positions.
    """

    id: int
    kind: Kind
    block: int | None


@dataclass(frozen=True)
class SeenPosition:
    """Describes one canvas position as the model is fed it under one draw.

    Attributes:
        id: the token id that the model is fed.
        rotary: the rotary position of the token.
        visible: whether the position is before the visible length.
        masked: whether the model is fed the mask token.
        active: whether the position is in the active block.
        loss: whether -log p of ``target`` is part of the loss.
        target: the id of the true token; None where ``loss`` is false.
        read_at: the canvas position whose hidden state predicts the target; None where ``loss`` is false.
    """

    id: int
    rotary: int
    visible: bool
    masked: bool
    active: bool
    loss: bool
    target: int | None
    read_at: int | None


@dataclass(frozen=True)
class ExaminedDraw:
    """Describes one draw of one row.

    Attributes:
        block: the index of the active block.
        supervised: n, the number of positions of the active block that may be masked.
        masked: l, the number of positions of the active block that are masked.
        weight: the draw's weight, by which the -log p of each masked token is multiplied; 0 for an unused draw.
        coefficient: the weight divided by the batch's normaliser: the derivative of the batch's loss with respect to the
            -log p of a masked token.
        visible_len: the number of positions that the model sees.
        rotary: the rotary positions of the first and the last visible position.
        seen: every canvas position as the model is fed it.
        findings: descriptions of what looks wrong; empty where nothing does.
    """

    block: int
    supervised: int
    masked: int
    weight: float
    coefficient: float
    visible_len: int
    rotary: tuple[int, int]
    seen: tuple[SeenPosition, ...]
    findings: tuple[str, ...]


@dataclass(frozen=True)
class ExaminedRecord:
    """Describes one record on its canvas, and its draws.

    Attributes:
        label: the record's name.
        positions: the description of every canvas position.
        prompt_len: the number of the prompt's tokens.
        text_len: the number of the response's tokens, the terminator counted.
        n_blocks: the number of blocks that may be active.
        length: the number of visible positions without a suffix window.
        draws: the draws, each with what training would feed the model.
    """

    label: str
    positions: tuple[Position, ...]
    prompt_len: int
    text_len: int
    n_blocks: int
    length: int
    draws: tuple[ExaminedDraw, ...]


def draws_of_steps(draw_of: Callable[[Array], tuple[Draw, Array]], steps: Sequence[int]) -> tuple[Draw, Array]:
    """Makes the draws of several training steps, one after the other along the K axis.

    Args:
        draw_of: the function that training draws with: step -> (draws [K, B, ...], noise [K, B, N]).
        steps: the numbers of the training steps.

    Returns:
        (draws, noise), each with a leading axis of steps * K.
    """

    @jax.jit
    def all_draws(steps: Array) -> tuple[Draw, Array]:
        return jax.tree.map(lambda x: x.reshape(x.shape[0] * x.shape[1], *x.shape[2:]), jax.vmap(draw_of)(steps))

    return all_draws(np.asarray(steps))


def examine(
    layout: Layout,
    canvas: Canvas,
    draws: Draw,
    *,
    method: MethodConfig = CLEAN,
    noise: Array | None = None,
    drawn_blocks: Array | None = None,
    labels: Sequence[str] | None = None,
) -> list[ExaminedRecord]:
    """Examines what the model is fed, and which tokens have loss.

    Args:
        layout: the layout of the canvas.
        canvas: the prompts and responses, B rows.
        draws: the draws with a leading K axis, as training gets them from ``sampling.draw``.
        method: the ``method`` section, which gives the normaliser and the ablations outside the active block.
        noise: the uniforms [K, B, N] for the ablations; None without ablations.
        drawn_blocks: the blocks [B] that the data draws under ``pairs``; None otherwise.
        labels: the names of the rows; None numbers them.

    Returns:
        One examined record for each row.
    """

    @jax.jit  # one program: the single operations would be dozens
    def computed(canvas: Canvas, draws: Draw, noise: Array | None) -> Any:
        fed = jax.vmap(lambda one, uniforms: corrupt(layout, canvas, one, method, uniforms))
        seen = fed(draws, noise if method.needs_noise else None)
        return normaliser(layout, canvas, method.normalize, drawn_blocks), supervised_end(layout, canvas), seen

    (share, divisor), ends, seen = jax.tree.map(np.asarray, computed(canvas, draws, noise))
    scale = np.asarray(share, np.float64) / max(float(divisor), 1e-30)
    rows = [jax.tree.map(lambda x, i=i: np.asarray(x)[i], canvas) for i in range(canvas.ids.shape[0])]
    host = jax.tree.map(np.asarray, draws)
    shown: list[list[ExaminedDraw]] = [[] for _ in rows]
    for k in range(draws.block.shape[0]):
        for i, (row, column) in enumerate(zip(rows, shown, strict=True)):
            its: tuple[Draw, View, np.ndarray] = jax.tree.map(lambda x, k=k, i=i: x[k, i], (host, *seen))
            column.append(_examined_draw(layout, row, *its, float(scale[i]), method))
    names = labels or [f"row {i}" for i in range(len(rows))]
    return [
        ExaminedRecord(
            label=name,
            positions=_positions(layout, row, int(end)),
            prompt_len=int(row.prompt_len),
            text_len=int(row.text_len),
            n_blocks=int(row.n_blocks),
            length=int(row.length),
            draws=tuple(column),
        )
        for name, row, end, column in zip(names, rows, ends, shown, strict=True)
    ]


def _positions(layout: Layout, row: Canvas, end: int) -> tuple[Position, ...]:
    """Returns the id, kind and block of every canvas position of one row, whose arrays are on the host."""
    text_end = int(row.prompt_len + row.text_len)

    def kind(at: int, token: int) -> Kind:
        if at < row.prompt_len:
            return "prompt"
        if at < text_end:
            return "terminator" if at == text_end - 1 and token in layout.stop_ids else "response"
        if at >= row.length:
            return "hidden"
        if at < end:
            return "fill"
        return "unused" if token == layout.mask_id else "padding"

    def block(at: int) -> int | None:
        offset = at - int(row.prompt_len)
        return offset // layout.block if 0 <= offset < layout.response_len else None

    return tuple(Position(int(token), kind(at, int(token)), block(at)) for at, token in enumerate(row.ids))


def _examined_draw(
    layout: Layout, canvas: Canvas, one: Draw, seen: View, targets: np.ndarray, scale: float, method: MethodConfig
) -> ExaminedDraw:
    """Describes one row's draw; all arrays are on the host and have no batch axis."""
    weight, length = float(one.weight), int(seen.length)
    start = int(canvas.prompt_len + one.block * layout.block)
    slots = {int(at): j for j, at in enumerate(seen.active) if bool(one.masked[j])} if weight > 0 else {}
    positions = tuple(
        SeenPosition(
            id=int(token),
            rotary=int(rotary),
            visible=at < length,
            masked=int(token) == layout.mask_id,
            active=start <= at < start + layout.block,
            loss=at in slots,
            target=int(targets[slots[at]]) if at in slots else None,
            read_at=int(seen.at[slots[at]]) if at in slots else None,
        )
        for at, (token, rotary) in enumerate(zip(np.asarray(seen.ids), np.asarray(seen.positions), strict=True))
    )
    return ExaminedDraw(
        block=int(one.block),
        supervised=int(np.sum(seen.valid)),
        masked=int(np.sum(one.masked)),
        weight=weight,
        coefficient=weight * scale,
        visible_len=length,
        rotary=(int(seen.positions[0]), int(seen.positions[max(0, length - 1)])),
        seen=positions,
        findings=_findings(layout, canvas, one, seen, positions, method),
    )


def _findings(
    layout: Layout, canvas: Canvas, one: Draw, seen: View, positions: Sequence[SeenPosition], method: MethodConfig
) -> tuple[str, ...]:
    """Checks the arrays that the network is fed for bugs of the masking, and describes those that it finds."""
    shift = 1 if layout.alignment == "shifted" else 0
    block_end = int(canvas.prompt_len + (one.block + 1) * layout.block)
    may_be_masked = method.prompt_mask_rate > 0
    checks = [
        (
            "the model is not fed the prompt as it is",
            lambda p, at: at < canvas.prompt_len and p.id != canvas.ids[at] and not (may_be_masked and p.masked),
        ),
        ("carries loss but its token is shown", lambda p, at: p.loss and not p.masked),
        ("carries loss but is hidden", lambda p, at: p.loss and not p.visible),
        ("carries loss but is in the prompt", lambda p, at: p.loss and at < canvas.prompt_len),
        ("its target is not the record's token", lambda p, at: p.loss and p.target != canvas.ids[at]),
        ("is predicted from the wrong position", lambda p, at: p.loss and p.read_at != max(at - shift, 0)),
    ]
    if layout.context == "aligned" and method.suffix_mask_prob == 1.0:
        checks.append(
            ("shows a token after the active block", lambda p, at: at >= block_end and p.visible and not p.masked)
        )
    found = []
    for text, wrong in checks:
        where = [at for at, p in enumerate(positions) if wrong(p, at)]
        if where:
            found.append(f"{text}: canvas position {', '.join(map(str, where[:5]))}{' …' if len(where) > 5 else ''}")
    outside = np.flatnonzero(np.asarray(one.masked & ~seen.valid))
    if outside.size and float(one.weight) > 0:
        found.append(f"masks positions of the block that may not be supervised: {', '.join(map(str, outside))}")
    return tuple(found)
