"""Computes the objective: the summed loss of the masked tokens, and what it is divided by.

Classical SFT is the same code with one block as long as the response. What the sum is divided by depends on the data alone,
never on the draw: dividing by the number of masked tokens of a batch would be a biased ratio.
"""

from __future__ import annotations

from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Int

from jaxblock.diffusion.canvas import Canvas, Layout, supervised_end
from jaxblock.diffusion.config import MethodConfig, Normalize
from jaxblock.diffusion.corruption import CLEAN, corrupt
from jaxblock.diffusion.sampling import Draw
from jaxblock.types import Network, Params, Sum


class Losses(NamedTuple):
    """Holds the losses of one batch.

    Attributes:
        loss: the objective; ``total / weight`` is minimised.
        by_block: the unweighted -log p of masked tokens and their number, by the index of the active block [blocks].
        by_count: the same by masked count [A]; entry l - 1 holds the blocks with l masks.
        positions: the canvas positions that the network computed, over all rows and draws, and how many of them were needed.
    """

    loss: Sum
    by_block: Sum
    by_count: Sum
    positions: Sum


def token_losses(
    net: Network,
    params: Params,
    layout: Layout,
    canvas: Canvas,
    draw: Draw,
    method: MethodConfig = CLEAN,
    noise: Float[Array, "B N"] | None = None,
    row_keys: Array | None = None,
) -> Float[Array, "B A"]:
    """Returns the unweighted -log p of the masked tokens of one draw per row, in nats; 0 where nothing is masked."""
    seen, targets = corrupt(layout, canvas, draw, method, noise)
    hidden = net.hidden(params, seen, row_keys)
    return jnp.where(draw.masked, net.nll(params, hidden, targets), 0.0)


def losses(
    net: Network,
    params: Params,
    layout: Layout,
    canvas: Canvas,
    draws: Draw,
    method: MethodConfig,
    noise: Float[Array, "K B N"] | None = None,
    *,
    row_keys: Array | None = None,
    drawn_blocks: Int[Array, " B"] | None = None,
) -> Losses:
    """Computes the objective over K draws per row, mapped by ``jax.vmap``.

    Args:
        net: the network.
        params: the network's parameters.
        layout: the canvas's static part.
        canvas: the prompts and responses.
        draws: the draws, with a leading K axis (``sampling.draw``).
        method: what the sum is divided by (``normaliser``), and the ablations outside the block.
        noise: the ablations' uniforms (``Uniforms.noise``); read where ``method.needs_noise``.
        row_keys: the random keys [K, B] of the network's dropout; None for no dropout.
        drawn_blocks: the active block of each row, where the loader chooses it (``method.pairs``); None where each row is
            its whole sequence.

    Returns:
        Sums and weights, float32 or wider.
    """
    rows = canvas.ids.shape[0]
    chex.assert_shape([draws.block, draws.weight], (None, rows))
    chex.assert_shape(draws.masked, (None, rows, layout.block))

    def one(draw: Draw, noise: Array | None, row_keys: Array | None) -> Array:
        return token_losses(net, params, layout, canvas, draw, method, noise, row_keys)

    nll = jax.vmap(one)(draws, noise if method.needs_noise else None, row_keys)
    share, weight = normaliser(layout, canvas, method.normalize, drawn_blocks)
    total = jnp.sum(nll.sum(-1) * draws.weight * share)

    live = (draws.weight > 0)[..., None] & draws.masked
    per_draw, counts = jnp.where(live, nll, 0.0).sum(-1), live.sum(-1)
    where = jnp.arange(layout.n_blocks) == draws.block[..., None]
    how_many = jnp.arange(1, layout.block + 1) == counts[..., None]

    def tally(hits: Array) -> Sum:
        return Sum(jnp.sum(hits * per_draw[..., None], (0, 1)), jnp.sum(hits * counts[..., None], (0, 1)))

    tallies = jax.lax.stop_gradient((tally(where), tally(how_many)))
    return Losses(Sum(total, weight), *tallies, Sum(jnp.float32(0), jnp.float32(0)))  # the train step counts positions


def normaliser(
    layout: Layout, canvas: Canvas, normalize: Normalize, drawn_blocks: Int[Array, " B"] | None = None
) -> tuple[Float[Array, " B"], Float[Array, ""]]:
    """Returns what each row's loss is multiplied by, and what the batch's sum is divided by.

    Args:
        layout: the canvas's static part.
        canvas: the rows.
        normalize: ``text_tokens`` (terminator counted, fill not), ``supervised_tokens`` (fill counted), ``sequences``,
            ``sequence_mean`` (each row's loss by its own supervised tokens, the sum by the number of rows: LLaDA's SFT), ``blocks``, or
            ``canvas_tokens`` (all positions of the batch: LLaDA's pre-training).
        drawn_blocks: the active block of each row, where the loader chooses it; None where each row is its whole sequence.

    Returns:
        (shares [B], weight); both depend on the data alone.
    """
    rows, width = canvas.ids.shape
    text, supervised = canvas.text_len, supervised_end(layout, canvas) - canvas.prompt_len
    blocks = canvas.n_blocks
    if drawn_blocks is not None:
        start = drawn_blocks * layout.block
        text = jnp.clip(text - start, 0, layout.block)
        supervised = jnp.clip(supervised - start, 0, layout.block)
        blocks = jnp.ones_like(blocks)
    share = jnp.ones(rows)
    if normalize == "sequence_mean":
        share = 1.0 / jnp.maximum(supervised, 1)
    weight = {
        "text_tokens": lambda: text.sum(),
        "supervised_tokens": lambda: supervised.sum(),
        "sequences": lambda: jnp.asarray(rows),
        "sequence_mean": lambda: jnp.asarray(rows),
        "blocks": lambda: blocks.sum(),
        "canvas_tokens": lambda: jnp.asarray(rows * width),
    }[normalize]()
    return share, weight.astype(float)
