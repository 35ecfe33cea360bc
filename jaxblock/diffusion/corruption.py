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
    noise: Float[Array, "B N"] | None = None,
) -> tuple[View, Int[Array, "B A"]]:
    """Returns what the model sees under one draw per row, and the true tokens of the active block.

    Args:
        layout: the canvas's static part.
        canvas: the prompts and responses.
        draw: one active block and masked set per row (map over the K axis with ``jax.vmap``).
        method: its ablations mask or show tokens outside the block; its other fields are not read.
        noise: uniforms by response position, then by prompt position where prompt tokens may be masked (``Uniforms.noise``);
            needed where ``method.needs_noise``. A token is masked where its uniform is smaller than its rate. NaN never masks.

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
            raise ValueError("the ablations of the method need noise: pass the step's uniforms")
        chex.assert_axis_dimension(noise, 0, rows)
        seen = seen._replace(ids=_ablate(layout, canvas, draw, method, seen.ids, noise))
    return seen, targets


def _ablate(layout: Layout, canvas: Canvas, draw: Draw, method: MethodConfig, ids: Array, noise: Array) -> Array:
    """Masks prompt tokens and response tokens before the active block by chance, and shows some after it."""
    at = jnp.arange(canvas.ids.shape[1])[None, :]
    of_response, of_prompt = noise[:, : layout.response_len], noise[:, layout.response_len :]
    chex.assert_axis_dimension(of_response, 1, layout.response_len)
    offset = jnp.clip(at - canvas.prompt_len[:, None], 0, layout.response_len - 1)
    u = jnp.take_along_axis(of_response, offset, axis=1)
    start = block_start(layout, canvas, draw.block)[:, None]
    response = (at >= canvas.prompt_len[:, None]) & (at < supervised_end(layout, canvas)[:, None])
    prefix, suffix = response & (at < start), response & (at >= start + layout.block)
    ids = jnp.where(prefix & (u < method.prefix_mask_rate), layout.mask_id, ids)
    if method.suffix_mask_prob < 1:
        ids = jnp.where(suffix & ~(u < method.suffix_mask_prob), canvas.ids, ids)
    if method.prompt_mask_rate > 0:
        u = of_prompt[:, jnp.minimum(at[0], of_prompt.shape[1] - 1)]
        ids = jnp.where((at < canvas.prompt_len[:, None]) & (u < method.prompt_mask_rate), layout.mask_id, ids)
    return ids
