"""Splits the variance of one row's gradient into the parts of its example, block, masked count and masked set."""

from __future__ import annotations

from typing import NamedTuple

import jax
import numpy as np
from jaxtyping import Float

from jaxblock.diffusion.canvas import Canvas
from jaxblock.diffusion.config import MethodConfig
from jaxblock.diffusion.sampling import Draw, draw, draw_uniforms
from jaxblock.evaluation.statistics import Estimate
from jaxblock.study.gradients.moments import Moment, estimate, mean_of, product_of_means
from jaxblock.study.gradients.probe import Probe
from jaxblock.study.gradients.rows import CHUNK, parts_of, row_gradients

SOURCES = ("example", "block", "count", "set")
REPEATS = 4
"""The draws of an example: two masked sets of one count of one block, another count of that block, and another block."""

ONE_DRAW = MethodConfig()
"""The law `exact_count` with one draw, each row by itself."""

_ROWS, _MASKS = 4, 5
"""The streams of random numbers that draw examples and masks."""


class Decomposition(NamedTuple):
    """Holds the variance of one row's gradient, for one group of parameters.

    Attributes:
        relative: tr Cov / |mean|^2.
        shares: the part of tr Cov that comes from each of ``SOURCES``; together they are 1.
    """

    relative: Estimate
    shares: dict[str, Estimate]


def nested_draws(probe: Probe, method: MethodConfig, canvas: Canvas) -> Draw:
    """Draws four times for each row: the second shares block and count with the first, the third its block, the fourth nothing.

    Args:
        probe: the checkpoint, for the layout and the random numbers.
        method: a law with one draw, each row by itself.
        canvas: the rows.

    Returns:
        The draws, with a leading axis of four.
    """
    rows = canvas.ids.shape[0]
    first, other_set, other_count, other_block = (
        draw_uniforms(method, probe.layout, key, rows) for key in jax.random.split(probe.key(_MASKS), REPEATS)
    )
    nested = (
        first,
        first._replace(position=other_set.position),
        other_count._replace(block=first.block),
        other_block,
    )
    one = jax.jit(lambda canvas, uniforms: draw(method, probe.layout, canvas, uniforms))
    drawn = [jax.device_get(one(canvas, uniforms)) for uniforms in nested]
    stacked: Draw = jax.tree.map(lambda *leaves: np.concatenate(leaves), *drawn)
    return stacked


def measure_decomposition(probe: Probe, examples: int, method: MethodConfig = ONE_DRAW) -> dict[str, Decomposition]:
    """Measures where the variance of one row's gradient comes from.

    Args:
        probe: the checkpoint and its examples.
        examples: the number of examples, at least 3; four gradients are computed of each.
        method: a law with one draw, each row by itself.

    Returns:
        The decomposition by the group of parameters (``all`` for all).
    """
    canvas = probe.population.canvas(probe.layout, probe.population.draw(probe.rng(_ROWS), (examples,)))
    draws = nested_draws(probe, method, canvas)
    parts = parts_of(probe.net.param_table)
    # Rows of one example stand side by side, so that a chunk holds whole examples.
    flat = jax.tree.map(lambda x: x.swapaxes(0, 1).reshape(-1, *x.shape[2:]), draws)
    rows = jax.tree.map(lambda x: np.repeat(x, REPEATS, axis=0), canvas)
    weight = flat.weight[:, None] * np.ones(flat.masked.shape[1:], np.float32)
    means, within = [], []
    assert CHUNK % REPEATS == 0
    for _, gradients in row_gradients(probe.net, probe.layout, probe.params, rows, flat, weight):
        of = gradients.reshape(-1, REPEATS, gradients.shape[-1])
        means.append(of.mean(1))
        within.append(np.stack([np.einsum("ejp,ekp->ejk", part.of(of), part.of(of)) for part in parts], axis=1))
    mean, products = np.concatenate(means), np.concatenate(within)
    return {
        part.name: decomposition(part.of(mean), products[:, at].astype(np.float64)) for at, part in enumerate(parts)
    }


def decomposition(mean: Float[np.ndarray, "N P"], products: Float[np.ndarray, "N 4 4"]) -> Decomposition:
    """Computes the decomposition from nested draws; every moment is without bias, since no gradient is multiplied with itself.

    With g the gradient of one draw, T0 = |E g|^2, T1 = E|E[g given example]|^2, T2 the same given the block too, T3 given the
    count too, and T4 = E|g|^2. The parts are T1 - T0, T2 - T1, T3 - T2 and T4 - T3.

    Args:
        mean: the mean gradient of each example's four draws.
        products: the inner products of each example's four draws.
    """
    levels = [
        product_of_means(mean, mean),
        mean_of(products[:, :3, 3].mean(-1)),
        mean_of(products[:, :2, 2].mean(-1)),
        mean_of(products[:, 0, 1]),
        mean_of(np.einsum("ejj->ej", products).mean(-1)),
    ]
    parts = [_difference(upper, lower) for lower, upper in zip(levels, levels[1:], strict=False)]
    total = _difference(levels[-1], levels[0])
    shares = {name: estimate(np.divide, part, total) for name, part in zip(SOURCES, parts, strict=True)}
    return Decomposition(estimate(np.divide, total, levels[0]), shares)


def _difference(one: Moment, other: Moment) -> Moment:
    return Moment(one.value - other.value, one.without - other.without)
