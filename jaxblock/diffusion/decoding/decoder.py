"""Decodes responses block by block: ``decode_block`` decodes one block, ``decode`` scans it over all blocks of the canvas.

Each step shows the network the same view that training builds (``canvas.view``), scores the active block's masks, and
commits those that the transfer rule picks. A committed token is never masked again, so every
intermediate canvas can be rebuilt from ``commit_step``. The mask token is never committed. ``decode.cache`` decides which
positions a step computes (``passes``).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Bool, Int

from jaxblock.diffusion.canvas import Canvas, Layout, active_positions, block_tokens, for_decoding, view
from jaxblock.diffusion.decoding.beliefs import Beliefs, believed, moved, no_beliefs, pick, with_committed
from jaxblock.diffusion.decoding.config import DecodeConfig
from jaxblock.diffusion.decoding.masked import counts_by_step, look
from jaxblock.diffusion.decoding.passes import PassCost, Passes, Sizes, sizes_by_block, widest
from jaxblock.diffusion.decoding.rules import transfer_of
from jaxblock.diffusion.decoding.scoring import Found, find, score
from jaxblock.diffusion.decoding.transfer import StepInfo
from jaxblock.types import Network, Params

GIVEN = -2
"""What stands in place of a commit step for the tokens of a text whose spans are filled."""


class Carry(NamedTuple):
    """Holds the decoder's state between blocks.

    Attributes:
        ids: the tokens of the canvas; what is not committed yet is a mask.
        commit_step: the step, counted over the whole response, that committed each response position; -1 for a mask, ``GIVEN``
            for a token that was there before.
        done: the rows that stopped early.
        nfe: the forward passes spent on each row.
        positions: the canvas positions that those passes needed to compute, summed (token-forwards).
        computed: the positions that were computed for the row, padding and passes after its own last one included.
        beliefs: what the network believed of each response position when it was committed; None where nobody asks.
        row_key: one random key per row [B], so that a row's result does not depend on its batch.
    """

    ids: Int[Array, "B T"]
    commit_step: Int[Array, "B R"]
    done: Bool[Array, " B"]
    nfe: Int[Array, " B"]
    positions: Int[Array, " B"]
    computed: Int[Array, " B"]
    beliefs: Beliefs | None
    row_key: Array


class Responses(NamedTuple):
    """Holds the decoded responses of a batch.

    Attributes:
        response: the response tokens; positions that were never decoded (early stop) hold the fill token.
        commit_step: the decode step of the row that committed each position; -1 where none did, ``GIVEN`` for a given token.
        nfe: the forward passes spent on each row.
        positions: the canvas positions that those passes needed to compute, summed (token-forwards).
        computed: the positions that were computed for the row, padding and passes after its own last one included.
    """

    response: Int[Array, "B R"]
    commit_step: Int[Array, "B R"]
    nfe: Int[Array, " B"]
    positions: Int[Array, " B"]
    computed: Int[Array, " B"]


class _Loop(NamedTuple):
    """Holds the state between two steps of a block: tokens, their steps and beliefs [B, A], and counts per row [B]."""

    step: Array
    tokens: Array
    commit_step: Array
    nfe: Array
    positions: Array
    computed: Array
    beliefs: Beliefs | None


def start_decoding(layout: Layout, canvas: Canvas, seed: int | Int[Array, ""], candidates: int = 0) -> Carry:
    """Returns the state before the first block.

    Args:
        layout: the canvas's static part.
        canvas: the prompts, from ``canvas.for_decoding``, or texts with spans; a row's random key comes from its ``row_id``, so
            it does not depend on the batch that the row is in.
        seed: the seed of sampling.
        candidates: how many of the most probable tokens of each position are kept; with 0 no beliefs are.
    """
    rows = canvas.ids.shape[0]
    keys = jax.vmap(jax.random.fold_in, in_axes=(None, 0))(jax.random.key(seed), canvas.row_id)
    none = jnp.zeros(rows, jnp.int32)
    return Carry(
        ids=canvas.ids,
        commit_step=jnp.where(_response(layout, canvas) == layout.mask_id, jnp.int32(-1), jnp.int32(GIVEN)),
        done=jnp.zeros(rows, bool),
        nfe=none,
        positions=none,
        computed=none,
        beliefs=no_beliefs(rows, layout.response_len, candidates) if candidates else None,
        row_key=keys,
    )


def decode_block(
    net: Network,
    layout: Layout,
    options: DecodeConfig,
    params: Params,
    canvas: Canvas,
    carry: Carry,
    blocks: Int[Array, " B"],
    sizes: Sizes | None = None,
) -> Carry:
    """Decodes one block of every row that is not done; rows may be at different blocks.

    Args:
        net: the network (static).
        layout: the canvas's static part.
        options: the decoder's settings (static).
        params: the network's parameters.
        canvas: the lengths of the rows; its tokens are not read.
        carry: the state after the blocks before this one.
        blocks: the index of each row's block; in infilling, the response position of the first mask, where the block begins.
        sizes: how many positions the passes compute (static), from ``sizes_by_block``: those of every row's block must be
            equal; None for sizes that serve all blocks.

    Returns:
        The state after this block.
    """
    rows = canvas.ids.shape[0]
    chex.assert_shape([carry.ids, carry.commit_step, blocks], [canvas.ids.shape, (rows, layout.response_len), (rows,)])
    choose = transfer_of(options, layout.block)
    counts = counts_by_step(options, layout.block)
    candidates = carry.beliefs.ids.shape[-1] if carry.beliefs else 0
    canvas = canvas._replace(ids=carry.ids)
    sizes = widest(layout, options, _room(layout, canvas)) if sizes is None else sizes
    given = carry.commit_step == GIVEN
    passes = Passes(net, layout, options, net.unstacked(params), canvas, given, blocks, sizes)
    tokens, live = _open_block(layout, canvas, carry, blocks)
    masks_at_start = jnp.sum((tokens == layout.mask_id) & live, axis=-1)

    def unfinished(loop: _Loop) -> Array:
        return (loop.step < len(counts)) & jnp.any((loop.tokens == layout.mask_id) & live)

    def commit(loop: _Loop, hidden: list[Array], cost: PassCost, counts: Sequence[int] = counts) -> _Loop:
        eligible = (loop.tokens == layout.mask_id) & live
        taken = loop.nfe // options.passes
        keys = jax.vmap(jax.random.fold_in)(carry.row_key, taken)
        found, beliefs = look(hidden, eligible, counts, loop.step, partial(_find, passes, keys, candidates))
        scores = score(layout, options, found, eligible, keys)
        chosen = choose(scores, StepInfo(loop.step, masks_at_start))
        busy = jnp.any(eligible, axis=-1)
        return _Loop(
            step=loop.step + 1,
            tokens=jnp.where(chosen, scores.token, loop.tokens),
            commit_step=jnp.where(chosen, taken[:, None], loop.commit_step),
            nfe=loop.nfe + options.passes * busy,
            positions=loop.positions + cost.needed * busy,
            computed=loop.computed + cost.computed,
            beliefs=loop.beliefs and beliefs and with_committed(loop.beliefs, beliefs, chosen),
        )

    none = no_beliefs(rows, layout.block, candidates) if candidates else None
    loop = _Loop(jnp.int32(0), tokens, jnp.full_like(tokens, -1), carry.nfe, carry.positions, carry.computed, none)
    if options.cache == "none":
        full = lambda loop: commit(loop, passes.full(loop.tokens), passes.full_cost)  # noqa: E731
        loop = jax.lax.while_loop(unfinished, full, loop)
    else:
        hidden, caches = passes.refresh(loop.tokens)
        loop = commit(loop, hidden, passes.full_cost, counts[:1])
        update = lambda loop: commit(loop, passes.update(loop.tokens, caches), passes.update_cost)  # noqa: E731
        loop = jax.lax.while_loop(unfinished, update, loop)
    return _write(layout, options, canvas, carry, blocks, live, loop)


def _find(passes: Passes, keys: Array, candidates: int, hidden: list[Array]) -> tuple[Found, Beliefs | None]:
    """Returns what a step finds at positions, by their hidden states, and what the network believes of them if it is asked."""
    logits = passes.logits(hidden)
    found = find(passes.layout, passes.options, logits, keys)
    return found, believed(logits, found.token, candidates) if candidates else None


def _open_block(layout: Layout, canvas: Canvas, carry: Carry, blocks: Array) -> tuple[Array, Array]:
    """Returns the tokens of each row's block [B, A], and which of its positions the decoder may write [B, A]."""
    canvas = canvas._replace(ids=carry.ids)
    active, valid = active_positions(layout, canvas, blocks)
    live = valid & ~carry.done[:, None]
    return block_tokens(canvas, active), live


def _response(layout: Layout, canvas: Canvas) -> Array:
    """Returns the tokens at the R response positions [B, R]."""
    at = canvas.prompt_len[:, None] + jnp.arange(layout.response_len)
    return jnp.take_along_axis(canvas.ids, at, axis=1)


def _room(layout: Layout, canvas: Canvas) -> int:
    """Returns the canvas positions of the longest prompt."""
    return canvas.ids.shape[1] - layout.response_len


def _write(
    layout: Layout, options: DecodeConfig, canvas: Canvas, carry: Carry, blocks: Array, live: Array, loop: _Loop
) -> Carry:
    """Writes a finished block back into the canvas and stops the rows whose text has ended."""
    seen = view(layout, canvas, blocks, loop.tokens)
    ids = jnp.where(carry.done[:, None], carry.ids, seen.ids)
    at = jnp.arange(layout.response_len) - blocks[:, None] * layout.stride
    here = jnp.clip(at, 0, layout.block - 1)
    inside = (at == here) & jnp.take_along_axis(live, here, axis=1)
    written, beliefs = jax.tree.map(
        lambda old, new: pick(inside, moved(new, here), old),
        (carry.commit_step, carry.beliefs),
        (loop.commit_step, loop.beliefs),
    )
    done = carry.done
    if options.early_stop:
        stops = jnp.isin(loop.tokens, jnp.asarray(layout.stop_ids)) & live
        done = done | jnp.any(stops, axis=-1)
    counts = dict(nfe=loop.nfe, positions=loop.positions, computed=loop.computed)
    return carry._replace(ids=ids, commit_step=written, done=done, beliefs=beliefs, **counts)


def decode(
    net: Network,
    layout: Layout,
    options: DecodeConfig,
    params: Params,
    canvas: Canvas,
    seed: int | Int[Array, ""],
) -> Responses:
    """Decodes every block, left to right, by ``lax.scan``; blocks in which no row has anything to decode are skipped.

    Args:
        net: the network (static).
        layout: the canvas's static part.
        options: the decoder's settings (static).
        params: the network's parameters.
        canvas: the prompts, from ``canvas.for_decoding``, or texts with spans; a row's random key comes from its ``row_id``.
        seed: the seed of sampling.

    Returns:
        The responses, and when each token was committed.
    """

    by_block = sizes_by_block(layout, options, _room(layout, canvas))
    kinds = list(dict.fromkeys(by_block))
    kind_of_block = jnp.array([kinds.index(sizes) for sizes in by_block])
    params = net.unstacked(params)

    def body(carry: Carry, block: Array) -> tuple[Carry, None]:
        blocks = jnp.full_like(canvas.prompt_len, block)

        def go(carry: Carry) -> Carry:
            one = partial(decode_block, net, layout, options, params, canvas)
            runs = [lambda carry, sizes=sizes: one(carry, blocks, sizes) for sizes in kinds]
            return jax.lax.switch(kind_of_block[block], runs, carry)

        _, live = _open_block(layout, canvas, carry, blocks)
        return jax.lax.cond(jnp.any(live), go, lambda c: c, carry), None

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
    response = _response(layout, canvas._replace(ids=carry.ids))
    response = jnp.where(carry.commit_step == -1, layout.fill_id, response)
    return Responses(response, carry.commit_step, carry.nfe, carry.positions, carry.computed)


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
    return np.where((committed != -1) & (committed <= when), tokens, np.int32(layout.mask_id))
