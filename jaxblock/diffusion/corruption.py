"""Draw + Canvas -> View and targets: the active block's masks, and the ablations outside it."""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Int

from jaxblock.diffusion.canvas import active_positions, block_start, block_tokens, supervised_end, view
from jaxblock.types import Canvas, Draw, Layout, View


class Ablation(NamedTuple):
    """Departures from a clean prefix and a hidden suffix. Static.

    Attributes:
        prefix_mask_rate: chance of a mask on each response token before the active block; the prompt is never touched.
        suffix_mask_prob: chance of a mask on each supervised token after it (else the true token shows).
    """

    prefix_mask_rate: float = 0.0
    suffix_mask_prob: float = 1.0

    @property
    def needs_noise(self) -> bool:
        """Whether any uniforms outside the block are used."""
        return self.prefix_mask_rate > 0 or self.suffix_mask_prob < 1


NO_ABLATION = Ablation()


def corrupt(
    layout: Layout,
    canvas: Canvas,
    draw: Draw,
    ablation: Ablation = NO_ABLATION,
    noise: Float[Array, "B R"] | None = None,
) -> tuple[View, Int[Array, "B A"]]:
    """What the model sees under one draw per row, and the true tokens of the active block.

    Args:
        layout: the canvas's static part.
        canvas: prompts and responses.
        draw: one active block and masked set per row (map over the K axis with ``jax.vmap``).
        ablation: noise outside the block.
        noise: uniforms by response position, needed where the ablation is not the default; a token is masked where
            its uniform is smaller than its rate. NaN never masks.

    Returns:
        (view, targets).
    """
    active, _ = active_positions(layout, canvas, draw.block)
    targets = block_tokens(canvas, active)
    seen = view(layout, canvas, draw.block, jnp.where(draw.masked, layout.mask_id, targets))
    if ablation.needs_noise:
        if noise is None:
            raise ValueError("this ablation needs noise")
        seen = seen._replace(ids=_ablate(layout, canvas, draw, ablation, seen.ids, noise))
    return seen, targets


def _ablate(layout: Layout, canvas: Canvas, draw: Draw, ablation: Ablation, ids: Array, noise: Array) -> Array:
    at = jnp.arange(canvas.ids.shape[1])[None, :]
    offset = jnp.clip(at - canvas.prompt_len[:, None], 0, noise.shape[1] - 1)
    u = jnp.take_along_axis(noise, offset, axis=1)
    start = block_start(layout, canvas, draw.block)[:, None]
    response = (at >= canvas.prompt_len[:, None]) & (at < supervised_end(layout, canvas)[:, None])
    prefix, suffix = response & (at < start), response & (at >= start + layout.block)
    ids = jnp.where(prefix & (u < ablation.prefix_mask_rate), layout.mask_id, ids)
    if ablation.suffix_mask_prob < 1:
        ids = jnp.where(suffix & ~(u < ablation.suffix_mask_prob), canvas.ids, ids)
    return ids
