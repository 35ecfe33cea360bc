"""Measures how far gradients of noisy prefixes and visible suffixes point from the ideal one (Theorem 3.1 of the paper)."""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from jaxblock.diffusion.canvas import Canvas, Layout
from jaxblock.diffusion.sampling import Draw, Uniforms, draw, draw_uniforms
from jaxblock.evaluation.statistics import Estimate
from jaxblock.study.gradients.contexts import CONTEXTS, IDEAL, NOISE, Context, block_weights, masked_response
from jaxblock.study.gradients.moments import estimate, product_of_means
from jaxblock.study.gradients.probe import Probe
from jaxblock.study.gradients.rows import CHUNK, all_rows, summed_gradient

_ROWS, _MASKS = 6, 7
"""The streams of random numbers that draw examples and masks."""


class Angle(NamedTuple):
    """Compares the direction of an expected gradient with that of the ideal one.

    Attributes:
        cosine: their cosine.
        distance: the distance between them, each divided by its length: sqrt(2 - 2 cosine), from 0 to 2.
        length: the length of the gradient divided by that of the ideal one.
    """

    cosine: Estimate
    distance: Estimate
    length: Estimate


class Steepness(NamedTuple):
    """Holds lower estimates of the Lipschitz constant of a row's gradient as a function of its embedded input.

    Attributes:
        largest: the largest |g(noised) - g(clean)| / distance of the inputs among the rows.
        median: the median of this ratio.
        rows: the number of rows whose input changed.
    """

    largest: float
    median: float
    rows: int


class Direction(NamedTuple):
    """Holds what was measured of one context.

    Attributes:
        all: the direction of the whole gradient.
        by_block: that of each block's part of it, up to the last block that a response reaches.
        steepness: lower estimates of a Lipschitz constant, where only the prefix differs; else None.
    """

    all: Angle
    by_block: list[Angle]
    steepness: Steepness | None


class Group(NamedTuple):
    """Holds some examples, each once for each block, and the draws that all contexts share.

    Attributes:
        canvas: the rows on the canvas of Blockwise SFT: block after block, and in each block example after example.
        whole: the same rows with one block as long as the response.
        drawn: the block and the masked set of each row; rows that do not have their block have weight 0.
        uniforms: the numbers that drew them.
    """

    canvas: Canvas
    whole: Canvas
    drawn: Draw
    uniforms: Uniforms


def draw_group(probe: Probe, which: int, examples: int) -> Group:
    """Draws the group of a number; masked counts are stratified over its rows, as `stratified_count` does over a batch.

    Args:
        probe: the checkpoint and its examples.
        which: the number of the group.
        examples: its examples.
    """
    blocks = probe.layout.n_blocks
    places = np.tile(probe.population.draw(np.random.default_rng([probe.seed, _ROWS, which]), (examples,)), blocks)
    block = np.repeat(np.arange(blocks, dtype=np.int32), examples)
    canvas = probe.population.canvas(probe.layout, places)
    uniforms = draw_uniforms(NOISE, probe.layout, jax.random.fold_in(probe.key(_MASKS), which), len(places))
    drawn = _draw(probe.layout, canvas, uniforms, jnp.asarray(block))
    return Group(canvas, probe.population.canvas(probe.whole, places), *jax.device_get((drawn, uniforms)))


@partial(jax.jit, static_argnums=0)
def _draw(layout: Layout, canvas: Canvas, uniforms: Uniforms, block: jax.Array) -> Draw:
    """Draws a masked set in the given block of each row."""
    drawn: Draw = jax.tree.map(lambda x: x[0], draw(NOISE, layout, canvas, uniforms, block))
    return drawn


def masked_rows(probe: Probe, group: Group, context: Context) -> np.ndarray:
    """Returns the masked response positions of a group's rows in a context: bool [rows, R]."""
    return masked_response(probe.layout, group.canvas, group.drawn, group.uniforms, context)


def block_gradients(probe: Probe, group: Group, context: Context) -> Float[np.ndarray, "K P"]:
    """Computes the gradient of each block's losses in a context, summed over the group's examples."""
    rows, blocks = _whole_rows(probe, group, context), probe.layout.n_blocks
    each = len(rows[2]) // blocks
    found = []
    for k in range(blocks):
        one = jax.tree.map(lambda x, k=k: x[k * each : (k + 1) * each], rows)
        found.append(np.asarray(summed_gradient(probe.net, probe.whole, probe.params, *one)))
    return np.stack(found)


def _whole_rows(probe: Probe, group: Group, context: Context) -> tuple[Canvas, Draw, np.ndarray]:
    """Returns the rows as the gradients' functions take them: the canvas, what is masked, and which losses count how much."""
    masked = masked_rows(probe, group, context)
    everywhere = Draw(jnp.zeros(len(masked), jnp.int32), jnp.asarray(masked), jnp.ones(len(masked)))
    return group.whole, everywhere, block_weights(probe.layout, group.drawn)


def measure_direction(probe: Probe, groups: int, examples: int) -> dict[str, Direction]:
    """Compares the expected gradient in every context with the ideal one, on the same examples, blocks and masked sets.

    Args:
        probe: the checkpoint and its examples.
        groups: the number of independent groups of examples, at least 3.
        examples: the examples of a group; each has a gradient for each of its blocks in each context.

    Returns:
        The directions by the name of the context.
    """
    drawn = [draw_group(probe, which, examples) for which in range(groups)]
    ideal = np.stack([block_gradients(probe, group, IDEAL) for group in drawn], axis=1)
    reached = int(ideal.any(axis=(1, 2)).sum())  # blocks up to the longest response's last one; later ones have no loss
    found = {}
    for context in CONTEXTS:
        other = np.stack([block_gradients(probe, group, context) for group in drawn], axis=1)
        prefix_only = not context.classical and context.suffix_mask_prob == 1
        found[context.name] = Direction(
            angle(ideal.sum(0), other.sum(0)),
            [angle(one, two) for one, two in zip(ideal[:reached], other[:reached], strict=True)],
            steepness(probe, drawn[0], context) if prefix_only else None,
        )
    return found


def angle(ideal: Float[np.ndarray, "N P"], other: Float[np.ndarray, "N P"]) -> Angle:
    """Compares two expected gradients by inner products of the gradients of different groups; NaN where noise hides a length.

    Args:
        ideal: a gradient of each group in the ideal context.
        other: one in another context, of the same groups.
    """
    moments = product_of_means(ideal, ideal), product_of_means(ideal, other), product_of_means(other, other)

    def cosine(one: Any, both: Any, two: Any) -> Any:
        return both / (np.sqrt(one) * np.sqrt(two))  # NaN where either squared length is estimated below 0

    return Angle(
        estimate(cosine, *moments),
        # Noise may take the estimated cosine above 1.
        estimate(lambda *three: np.sqrt(np.maximum(2 - 2 * cosine(*three), 0)), *moments),
        estimate(lambda one, both, two: np.sqrt(two) / np.sqrt(one), *moments),
    )


def steepness(probe: Probe, group: Group, context: Context) -> Steepness | None:
    """Compares rows' gradients in a context with those in the ideal one; None where no input changed.

    The rows are evenly spread over the group's rows that have a loss. A row's loss is the sum over its block's masks times n / l.
    """
    live = np.flatnonzero(np.asarray(group.drawn.weight) > 0)
    chosen = live[np.linspace(0, len(live) - 1, min(2 * CHUNK, len(live))).astype(int)]
    clean, noisy = (
        jax.tree.map(lambda x: np.asarray(x)[chosen], _whole_rows(probe, group, one)) for one in (IDEAL, context)
    )
    distance = input_distance(probe, clean[0], clean[1].masked, noisy[1].masked)
    moved = distance > 0
    if not moved.any():
        return None
    one, two = (all_rows(probe.net, probe.whole, probe.params, *rows) for rows in (clean, noisy))
    ratio = np.linalg.norm(two[moved] - one[moved], axis=1) / distance[moved]
    return Steepness(float(ratio.max()), float(np.median(ratio)), int(moved.sum()))


def input_distance(probe: Probe, canvas: Canvas, clean: np.ndarray, masked: np.ndarray) -> Float[np.ndarray, " N"]:
    """Computes the Euclidean distance between two embedded inputs that differ in which response positions are masked.

    Args:
        probe: the checkpoint, for its embedding.
        canvas: the rows, with one block as long as the response.
        clean: the masked response positions of one input [N, R].
        masked: those of the other.
    """
    embedding = np.asarray(probe.params["embed"], np.float32)
    from_mask = np.square(embedding - embedding[probe.layout.mask_id]).sum(-1)
    at = np.asarray(canvas.prompt_len)[:, None] + np.arange(clean.shape[1])
    tokens = np.take_along_axis(np.asarray(canvas.ids), at, axis=1)
    return np.sqrt(np.where(clean != masked, from_mask[tokens], 0).sum(-1))
