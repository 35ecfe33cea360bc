"""Measures the variance of the stochastic gradient at equal compute, for every law, choice of blocks and number of draws."""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Float

from jaxblock.data.loader import list_pairs
from jaxblock.diffusion.canvas import Canvas, Layout
from jaxblock.diffusion.config import Law, MethodConfig, Normalize, Weighting
from jaxblock.diffusion.laws import LAWS
from jaxblock.diffusion.objective import normaliser
from jaxblock.diffusion.sampling import Draw, draw, draw_uniforms
from jaxblock.evaluation.statistics import Estimate
from jaxblock.study.gradients.moments import Moment, estimate, product_of_means, variance_of
from jaxblock.study.gradients.probe import Probe
from jaxblock.study.gradients.rows import Part, parts_of, summed_gradient

_ROWS, _PAIRS, _MASKS = 1, 2, 3
"""The streams of random numbers that draw rows, pairs of rows and blocks, and masks."""

DRAWS = (1, 2, 4)


class Batches(NamedTuple):
    """Holds the rows, draws and weights of several batches, flattened over draws: each has the same number of row forwards.

    Attributes:
        canvas: the rows, each once for each of its draws: [batches, forwards, ...].
        draw: the draws; ``weight`` is that of the loss in the batch's mean: [batches, forwards, ...].
    """

    canvas: Canvas
    draw: Draw


MASKED_MEAN = "masked_mean"
"""The name of the estimator of the paper's script in results; its expectation is not that of the others."""


def estimators(normalize: Normalize) -> dict[str, MethodConfig]:
    """Returns the ways to estimate the gradient that are compared, by names such as ``exact_count, per_sequence, K = 1``.

    The estimator of the paper's script (`floored_bernoulli` with a masked mean) stands beside the five laws. Under ``antithetic``
    the number of draws is even.
    """
    named = {}
    kinds: list[tuple[Law, Weighting]] = [*((law, "nelbo") for law in LAWS), ("floored_bernoulli", "masked_mean")]
    for law, weighting in kinds:
        for blocks in ("per_sequence", "pairs"):
            for k in DRAWS:
                if law == "antithetic" and k % 2:
                    continue
                name = f"{law if weighting == 'nelbo' else MASKED_MEAN}, {blocks}, K = {k}"
                named[name] = MethodConfig(law=law, weighting=weighting, blocks=blocks, draws=k, normalize=normalize)
    return named


REFERENCE = "exact_count, per_sequence, K = 1"
"""The estimator with which the others are compared: the library's default."""


def is_unbiased(method: MethodConfig) -> bool:
    """Tells whether an estimator's expectation is the gradient of the NELBO."""
    return method.weighting == "nelbo" and method.law != "floored_bernoulli"


@partial(jax.jit, static_argnums=(0, 1))
@partial(jax.vmap, in_axes=(None, None, 0, 0, 0))
def _drawn(
    method: MethodConfig, layout: Layout, canvas: Canvas, block: jax.Array | None, key: jax.Array
) -> tuple[Canvas, Draw]:
    """Draws what a training step would for a batch of rows, and flattens the draws."""
    rows = canvas.ids.shape[0]
    found = draw(method, layout, canvas, draw_uniforms(method, layout, key, rows), block)
    share, weight = normaliser(layout, canvas, method.normalize, block)
    of_row = np.tile(np.arange(rows), method.draws)
    flat = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), found._replace(weight=found.weight * share / weight))
    return jax.tree.map(lambda x: x[of_row], canvas), flat


def draw_batches(probe: Probe, method: MethodConfig, batches: int, forwards: int) -> Batches:
    """Draws independent batches by the code that draws those of training.

    Args:
        probe: the checkpoint and its examples.
        method: the estimator.
        batches: the number of batches; estimators with the same choice of blocks share their examples.
        forwards: the row forwards of a batch, a multiple of K: it has ``forwards / K`` rows.
    """
    population, rows, block = probe.population, forwards // method.draws, None
    if method.pairs:
        pairs = list_pairs(population.text_len, probe.layout.block)
        chosen = pairs[probe.rng(_PAIRS).integers(len(pairs), size=(batches, forwards))[:, :rows]]
        places, block = chosen[..., 0], chosen[..., 1]
    else:
        places = population.draw(probe.rng(_ROWS), (batches, forwards))[:, :rows]
    canvas = population.canvas(probe.layout, places.reshape(-1))
    canvas = jax.tree.map(lambda x: x.reshape(batches, rows, *x.shape[1:]), canvas)
    canvas = canvas._replace(row_id=np.tile(np.arange(rows, dtype=np.int32), (batches, 1)))
    keys = jax.random.split(probe.key(_MASKS), batches)
    return Batches(*jax.device_get(_drawn(method, probe.layout, canvas, block, keys)))


def batch_gradients(probe: Probe, batches: Batches) -> Float[np.ndarray, "M P"]:
    """Computes the gradient of each batch's loss."""
    weight = batches.draw.weight[..., None] * np.ones(batches.draw.masked.shape[2:], np.float32)
    found = []
    for at in range(len(weight)):
        one = jax.tree.map(lambda x, at=at: x[at], (batches.canvas, batches.draw, weight))
        found.append(np.asarray(summed_gradient(probe.net, probe.layout, probe.params, *one)))
    return np.stack(found)


class Spread(NamedTuple):
    """Holds the variance of an estimator, for one group of parameters.

    Attributes:
        relative: tr Cov / |mean|^2 of a batch's gradient.
        ratio: tr Cov / |mean|^2 divided by that of ``REFERENCE``.
    """

    relative: Estimate
    ratio: Estimate


def measure_variance(probe: Probe, batches: int, forwards: int) -> dict[str, dict[str, Spread]]:
    """Measures every estimator's variance at the same number of row forwards.

    The unbiased estimators have the same expectation, whose squared length is therefore estimated from all of them together. A
    biased one is put on the same scale: its expected gradient's component along the common one.

    Args:
        probe: the checkpoint and its examples.
        batches: the number of independent batches of each estimator, at least 3.
        forwards: the row forwards of a batch.

    Returns:
        The variance by the estimator's name and the group of parameters (``all`` for all).
    """
    methods, parts = estimators(probe.normalize), parts_of(probe.net.param_table)
    unbiased = [name for name, method in methods.items() if is_unbiased(method)]
    common: Any = 0.0
    traces: dict[str, list[Moment]] = {}
    for name in unbiased:
        gradients = batch_gradients(probe, draw_batches(probe, methods[name], batches, forwards))
        traces[name] = [variance_of(part.of(gradients)) for part in parts]
        common = common + gradients / len(unbiased)
    lengths = [product_of_means(part.of(common), part.of(common)) for part in parts]
    along: dict[str, list[Moment]] = {name: lengths for name in unbiased}
    for name in methods.keys() - traces.keys():
        gradients = batch_gradients(probe, draw_batches(probe, methods[name], batches, forwards))
        traces[name] = [variance_of(part.of(gradients)) for part in parts]
        along[name] = [product_of_means(part.of(gradients), part.of(common)) for part in parts]
    return {name: _spreads(parts, traces[name], along[name], lengths, traces[REFERENCE]) for name in methods}


def _spreads(
    parts: list[Part], trace: list[Moment], along: list[Moment], length: list[Moment], reference: list[Moment]
) -> dict[str, Spread]:
    """Puts an estimator's moments together: its mean is ``along / length`` times as long as the common one."""
    return {
        part.name: Spread(
            estimate(lambda t, a, n: t * n / a**2, trace[at], along[at], length[at]),
            estimate(lambda t, a, n, r: t * n**2 / (a**2 * r), trace[at], along[at], length[at], reference[at]),
        )
        for at, part in enumerate(parts)
    }
