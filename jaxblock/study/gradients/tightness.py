"""Measures how far the NELBO lies above the -log p of the decoder that it bounds, by block size (Theorem 3.2 of the paper)."""

from __future__ import annotations

import math
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float

from jaxblock.data.loader import filled
from jaxblock.diffusion.canvas import Canvas, Layout
from jaxblock.diffusion.objective import token_losses
from jaxblock.diffusion.sampling import Draw
from jaxblock.evaluation.statistics import Estimate, mean_se
from jaxblock.models.transformer import Transformer
from jaxblock.study.gradients.probe import Probe
from jaxblock.types import Params

_ROWS, _ORDERS = 8, 9
"""The streams of random numbers that draw examples and orders."""

_CHUNK = 64
_MOST_ENUMERATED = 8
"""The most positions of a block whose masked sets are all computed: 255 of them."""


class Tightness(NamedTuple):
    """Holds the bound and what it bounds at one block size, in nats per text token.

    Attributes:
        nelbo: the blockwise NELBO; exact, or the unbiased mean over the drawn orders.
        minus_log_p: -log p of the decoder that commits one token a step in uniformly random order inside each block; exact where
            ``exact``, else an estimate that is too large on average, by less the more orders there are.
        gap: the first less the second: exact where ``exact``, else too small on average.
        exact: whether all orders were taken into account.
    """

    nelbo: Estimate
    minus_log_p: Estimate
    gap: Estimate
    exact: bool


@partial(jax.jit, static_argnums=(0, 1))
def _losses(net: Transformer, layout: Layout, params: Params, canvas: Canvas, draw: Draw) -> jax.Array:
    return token_losses(net, params, layout, canvas, draw)


def surprises(
    probe: Probe, canvas: Canvas, row: np.ndarray, masked: Bool[np.ndarray, "M R"]
) -> Float[np.ndarray, "M R"]:
    """Computes -log p of the masked tokens of many inputs; 0 where a position is not masked.

    Args:
        probe: the checkpoint.
        canvas: the examples, with one block as long as the response.
        row: the example of each input.
        masked: the masked response positions of each input.
    """
    found = np.zeros(masked.shape)
    for at in range(0, len(row), _CHUNK):
        end = min(at + _CHUNK, len(row))
        taken = np.array(filled(range(at, end), _CHUNK))
        draw = Draw(jnp.zeros(_CHUNK, jnp.int32), jnp.asarray(masked[taken]), jnp.ones(_CHUNK))
        rows = jax.tree.map(lambda x, taken=taken: x[row[taken]], canvas)
        found[at:end] = np.asarray(_losses(probe.net, probe.whole, probe.params, rows, draw))[: end - at]
    return found


def measure_tightness(probe: Probe, sizes: tuple[int, ...], examples: int, orders: int) -> dict[int, Tightness]:
    """Measures the bound at several block sizes, on the same examples.

    Args:
        probe: the checkpoint and its examples.
        sizes: the block sizes.
        examples: the number of examples.
        orders: the random orders of each block that is too large for all of them.
    """
    places = probe.population.draw(probe.rng(_ROWS), (examples,))
    canvas, rng = probe.population.canvas(probe.whole, places), probe.rng(_ORDERS)
    found = {}
    for size in sizes:
        exact = size <= _MOST_ENUMERATED
        sums = np.zeros((examples, 2))
        for example in range(examples):
            for k in range(-(-int(canvas.text_len[example]) // size)):
                first = k * size
                sums[example] += (
                    _enumerated(probe, canvas, example, first, size)
                    if exact
                    else _over_orders(probe, canvas, example, first, size, orders, rng)
                )
        # Ratios of sums would weigh long responses more; a response's own nats per token are averaged.
        nelbo, minus_log_p = (sums / canvas.text_len[:, None]).T
        found[size] = Tightness(mean_se(nelbo), mean_se(minus_log_p), mean_se(nelbo - minus_log_p), exact)
    return found


def _inputs(response: int, first: int, sets: Bool[np.ndarray, "M B"]) -> Bool[np.ndarray, "M R"]:
    """Returns the masked response positions where each set of a block is masked: the set, and all after the block."""
    size = sets.shape[1]
    before, after = np.zeros((len(sets), first), bool), np.ones((len(sets), response - first - size), bool)
    return np.concatenate([before, sets, after], axis=1)


def _enumerated(probe: Probe, canvas: Canvas, example: int, first: int, size: int) -> tuple[float, float]:
    """Computes a block's NELBO and -log p from all its masked sets."""
    sets = (np.arange(2**size)[:, None] >> np.arange(size) & 1).astype(bool)
    masked = _inputs(probe.layout.response_len, first, sets[1:])
    losses = surprises(probe, canvas, np.full(len(masked), example), masked)[:, first : first + size]
    return bound_and_log_p(np.concatenate([np.zeros((1, size)), losses]))


def bound_and_log_p(losses: Float[np.ndarray, "S B"]) -> tuple[float, float]:
    """Computes the NELBO and -log p of a block over all orders of commitment.

    The chance of ending with the true tokens from a masked set S is p(S) = mean over i in S of p(x_i | S masked) p(S without i), with
    p(empty) = 1. So all n! orders take 2^n steps.

    Args:
        losses: -log p of each token by the masked set (bit i of its number says whether token i is masked); 0 where not masked.

    Returns:
        (NELBO, -log p), in nats.
    """
    size = losses.shape[1]
    log_p, nelbo = np.zeros(2**size), 0.0
    for chosen in range(1, 2**size):
        members = [i for i in range(size) if chosen >> i & 1]
        paths = [log_p[chosen ^ (1 << i)] - losses[chosen, i] for i in members]
        log_p[chosen] = np.logaddexp.reduce(paths) - math.log(len(members))
        nelbo += losses[chosen].sum() / (len(members) * math.comb(size, len(members)))
    return float(nelbo), float(-log_p[-1])


def _over_orders(
    probe: Probe, canvas: Canvas, example: int, first: int, size: int, orders: int, rng: np.random.Generator
) -> tuple[float, float]:
    """Estimates a block's NELBO and -log p from random orders of commitment."""
    order = rng.permuted(np.tile(np.arange(size), (orders, 1)), axis=1)
    when = np.argsort(order, axis=1)  # the step at which each position is committed
    sets = when[:, None, :] >= np.arange(size)[:, None]  # [order, step, position]
    masked = _inputs(probe.layout.response_len, first, sets.reshape(-1, size))
    losses = surprises(probe, canvas, np.full(len(masked), example), masked)[:, first : first + size]
    steps = np.take_along_axis(losses.reshape(orders, size, size), order[..., None], axis=2)[..., 0]
    paths = steps.sum(1)
    return float(paths.mean()), float(math.log(orders) - np.logaddexp.reduce(-paths))
