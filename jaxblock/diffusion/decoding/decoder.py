"""Decodes responses block by block: ``decode_block`` decodes one block, ``decode`` scans it over all blocks of the canvas.

Each step shows the network the same view that training builds (``canvas.view``), scores the active block's masks, and
commits those that the transfer rule picks. A committed token is never masked again, so every
intermediate canvas can be rebuilt from ``commit_step``. The mask token is never committed.
"""

from __future__ import annotations

from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Bool, Float, Int

from jaxblock.diffusion.canvas import Canvas, Layout, active_positions, block_tokens, for_decoding, view
from jaxblock.diffusion.decoding.config import DecodeConfig
from jaxblock.diffusion.decoding.rules import RULES
from jaxblock.diffusion.decoding.scoring import score
from jaxblock.diffusion.decoding.transfer import StepInfo
from jaxblock.types import Network, Params, View


class Carry(NamedTuple):
    """Holds the decoder's state between blocks.

    Attributes:
        ids: the tokens of the canvas; what is not committed yet is a mask.
        commit_step: the step, counted over the whole response, that committed each response position; -1 for a mask.
        done: the rows that stopped early.
        nfe: the forward passes spent on each row.
        row_key: one random key per row [B], so that a row's result does not depend on its batch.
    """

    ids: Int[Array, "B T"]
    commit_step: Int[Array, "B R"]
    done: Bool[Array, " B"]
    nfe: Int[Array, " B"]
    row_key: Array


class Responses(NamedTuple):
    """Holds the decoded responses of a batch.

    Attributes:
        response: the response tokens; positions that were never decoded (early stop) hold the fill token.
        commit_step: the decode step of the row that committed each position; -1 where none did.
        nfe: the forward passes spent on each row.
    """

    response: Int[Array, "B R"]
    commit_step: Int[Array, "B R"]
    nfe: Int[Array, " B"]


class _Loop(NamedTuple):
    """Holds the state between two steps of a block: tokens [B, A], the step that committed each [B, A], forward passes [B]."""

    step: Array
    tokens: Array
    commit_step: Array
    nfe: Array


def start_decoding(layout: Layout, canvas: Canvas, seed: int | Int[Array, ""]) -> Carry:
    """Returns the state before the first block.

    Args:
        layout: the canvas's static part.
        canvas: the prompts, from ``canvas.for_decoding``; a row's random key comes from its ``row_id``, so it does not
            depend on the batch that the row is in.
        seed: the seed of sampling.
    """
    rows = canvas.ids.shape[0]
    keys = jax.vmap(jax.random.fold_in, in_axes=(None, 0))(jax.random.key(seed), canvas.row_id)
    return Carry(
        ids=canvas.ids,
        commit_step=jnp.full((rows, layout.response_len), -1, jnp.int32),
        done=jnp.zeros(rows, bool),
        nfe=jnp.zeros(rows, jnp.int32),
        row_key=keys,
    )


def decode_block(
    net: Network,
    layout: Layout,
    options: DecodeConfig,
    params: Params,
    canvas: Canvas,
    carry: Carry,
    block: Int[Array, ""],
) -> Carry:
    """Decodes one block of every row that is not done.

    Args:
        net: the network (static).
        layout: the canvas's static part.
        options: the decoder's settings (static).
        params: the network's parameters.
        canvas: the lengths of the rows; its tokens are not read.
        carry: the state after the blocks before this one.
        block: the index of the block.

    Returns:
        The state after this block.
    """
    rows = canvas.ids.shape[0]
    chex.assert_rank(block, 0)
    chex.assert_equal_shape([carry.ids, canvas.ids])
    chex.assert_shape(carry.commit_step, (rows, layout.response_len))
    chex.assert_shape([carry.done, carry.nfe, carry.row_key], (rows,))
    rule = RULES[options.rule]
    pick = rule.transfer(options, layout.block)
    most_steps = layout.block if rule.pace == "rule" else options.steps(layout.block)
    canvas = canvas._replace(ids=carry.ids)
    blocks = jnp.full_like(canvas.prompt_len, block)
    active, valid = active_positions(layout, canvas, blocks)
    tokens = block_tokens(canvas, active)
    live = valid & ~carry.done[:, None]
    masks_at_start = jnp.sum((tokens == layout.mask_id) & live, axis=-1)

    def unfinished(loop: _Loop) -> Array:
        return (loop.step < most_steps) & jnp.any((loop.tokens == layout.mask_id) & live)

    def step(loop: _Loop) -> _Loop:
        eligible = (loop.tokens == layout.mask_id) & live
        seen = view(layout, canvas, blocks, loop.tokens)
        logits = _logits(net, layout, options, params, canvas, seen)
        taken = loop.nfe // options.passes
        keys = jax.vmap(jax.random.fold_in)(carry.row_key, taken)
        scores = score(layout, options, logits, eligible, keys)
        chosen = pick(scores, StepInfo(loop.step, masks_at_start))
        return _Loop(
            step=loop.step + 1,
            tokens=jnp.where(chosen, scores.token, loop.tokens),
            commit_step=jnp.where(chosen, taken[:, None], loop.commit_step),
            nfe=loop.nfe + options.passes * jnp.any(eligible, axis=-1),
        )

    begin = _Loop(jnp.zeros((), jnp.int32), tokens, jnp.full(tokens.shape, -1, jnp.int32), carry.nfe)
    loop = jax.lax.while_loop(unfinished, step, begin)
    return _commit(layout, options, canvas, carry, block, live, loop)


def _commit(
    layout: Layout, options: DecodeConfig, canvas: Canvas, carry: Carry, block: Array, live: Array, loop: _Loop
) -> Carry:
    """Writes a finished block back into the canvas and stops the rows whose text has ended."""
    seen = view(layout, canvas, jnp.full_like(canvas.prompt_len, block), loop.tokens)
    ids = jnp.where(carry.done[:, None], carry.ids, seen.ids)
    at = jnp.arange(layout.response_len) - block * layout.block
    inside = (at >= 0) & (at < layout.block)
    here = jnp.clip(at, 0, layout.block - 1)
    written = jnp.where(inside & live[:, here], loop.commit_step[:, here], carry.commit_step)
    done = carry.done
    if options.early_stop:
        stops = jnp.isin(loop.tokens, jnp.asarray(layout.stop_ids)) & live
        done = done | jnp.any(stops, axis=-1)
    return carry._replace(ids=ids, commit_step=written, done=done, nfe=loop.nfe)


def _logits(
    net: Network, layout: Layout, options: DecodeConfig, params: Params, canvas: Canvas, seen: View
) -> Float[Array, "B A V"]:
    """Returns the active block's logits, with classifier-free guidance where the settings ask for it."""
    conditional = net.logits(params, net.hidden(params, seen))
    if not options.cfg_scale:
        return conditional
    in_prompt = jnp.arange(seen.ids.shape[1]) < canvas.prompt_len[:, None]
    blind = seen._replace(ids=jnp.where(in_prompt, layout.mask_id, seen.ids))
    unconditional = net.logits(params, net.hidden(params, blind))
    return unconditional + (options.cfg_scale + 1) * (conditional - unconditional)


def decode(
    net: Network,
    layout: Layout,
    options: DecodeConfig,
    params: Params,
    canvas: Canvas,
    seed: int | Int[Array, ""],
) -> Responses:
    """Decodes every block, left to right, by ``lax.scan``; blocks after which every row is done are skipped.

    Args:
        net: the network (static).
        layout: the canvas's static part.
        options: the decoder's settings (static).
        params: the network's parameters.
        canvas: the prompts, from ``canvas.for_decoding``; a row's random key comes from its ``row_id``.
        seed: the seed of sampling.

    Returns:
        The responses, and when each token was committed.
    """

    def body(carry: Carry, block: Array) -> tuple[Carry, None]:
        def go(carry: Carry) -> Carry:
            return decode_block(net, layout, options, params, canvas, carry, block)

        return jax.lax.cond(jnp.all(carry.done), lambda c: c, go, carry), None

    first = start_decoding(layout, canvas, seed)
    carry, _ = jax.lax.scan(body, first, jnp.arange(layout.n_blocks, dtype=jnp.int32))
    return finish(layout, canvas, carry)


def decode_prompts(
    net: Network, layout: Layout, options: DecodeConfig, params: Params, seed: int | Int[Array, ""], *prompts: Array
) -> Responses:
    """Makes the canvas of a batch of prompts (``prompts``: the arguments of ``canvas.for_decoding``) and decodes it."""
    return decode(net, layout, options, params, for_decoding(layout, *prompts), seed)


def finish(layout: Layout, canvas: Canvas, carry: Carry) -> Responses:
    """Returns the responses of a canvas whose blocks are decoded."""
    at = canvas.prompt_len[:, None] + jnp.arange(layout.response_len)
    response = jnp.take_along_axis(carry.ids, at, axis=1)
    response = jnp.where(carry.commit_step < 0, layout.fill_id, response)
    return Responses(response, carry.commit_step, carry.nfe)


def responses_by_step(layout: Layout, responses: Responses, steps: int) -> np.ndarray:
    """Rebuilds the responses before the first decode step and after each of ``steps``, masks included.

    Args:
        layout: the canvas's static part.
        responses: the decoded responses; they are read on the host.
        steps: the number of steps to show.

    Returns:
        Tokens, int32 [S, B, R] with S = steps + 1.
    """
    committed, tokens = np.asarray(responses.commit_step), np.asarray(responses.response)
    when = np.arange(-1, steps)[:, None, None]
    return np.where((committed >= 0) & (committed <= when), tokens, np.int32(layout.mask_id))
