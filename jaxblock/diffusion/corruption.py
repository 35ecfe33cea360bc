"""Turns a canvas and a draw into what the model sees and what it must predict: masks the active block, applies the ablations."""

from __future__ import annotations

import chex
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Int

from jaxblock.diffusion.canvas import Canvas, Layout, active_positions, block_start, block_tokens, supervised_end, view
from jaxblock.diffusion.config import MethodConfig
from jaxblock.diffusion.sampling import Draw
from jaxblock.types import View

CLEAN = MethodConfig()
"""A method without ablations: the prefix is clean, and everything after the active block is masked."""


def corrupt(
    layout: Layout,
    canvas: Canvas,
    draw: Draw,
    method: MethodConfig = CLEAN,
    noise: Float[Array, "B R"] | None = None,
) -> tuple[View, Int[Array, "B A"]]:
    """Returns what the model sees under one draw per row, and the true tokens of the active block.

    Args:
        layout: the canvas's static part.
        canvas: the prompts and responses.
        draw: one active block and masked set per row (map over the K axis with ``jax.vmap``).
        method: its ablations mask or show tokens outside the block; its other fields are not read.
        noise: uniforms by response position, needed where ``method.needs_noise``; a token is masked where its uniform is
            smaller than its rate. NaN never masks.

    Returns:
        (view, targets).
    """
    rows = canvas.ids.shape[0]
    chex.assert_shape([draw.block, draw.weight], (rows,))
    chex.assert_shape(draw.masked, (rows, layout.block))
    active, _ = active_positions(layout, canvas, draw.block)
    targets = block_tokens(canvas, active)
    seen = view(layout, canvas, draw.block, jnp.where(draw.masked, layout.mask_id, targets))
    if method.needs_noise:
        if noise is None:
            raise ValueError("method.prefix_mask_rate and method.suffix_mask_prob need noise: pass the step's uniforms")
        chex.assert_shape(noise, (rows, layout.response_len))
        seen = seen._replace(ids=_ablate(layout, canvas, draw, method, seen.ids, noise))
    return seen, targets


def _ablate(layout: Layout, canvas: Canvas, draw: Draw, method: MethodConfig, ids: Array, noise: Array) -> Array:
    at = jnp.arange(canvas.ids.shape[1])[None, :]
    offset = jnp.clip(at - canvas.prompt_len[:, None], 0, noise.shape[1] - 1)
    u = jnp.take_along_axis(noise, offset, axis=1)
    start = block_start(layout, canvas, draw.block)[:, None]
    response = (at >= canvas.prompt_len[:, None]) & (at < supervised_end(layout, canvas)[:, None])
    prefix, suffix = response & (at < start), response & (at >= start + layout.block)
    ids = jnp.where(prefix & (u < method.prefix_mask_rate), layout.mask_id, ids)
    if method.suffix_mask_prob < 1:
        ids = jnp.where(suffix & ~(u < method.suffix_mask_prob), canvas.ids, ids)
    return ids
