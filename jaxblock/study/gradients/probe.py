"""Holds what gradients are measured on: a network, its weights, its layouts, and the examples to draw from."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import jax
import numpy as np
from jaxtyping import Int

from jaxblock.data.loader import pad_records
from jaxblock.data.store.records import Records
from jaxblock.diffusion.canvas import Canvas, Layout, from_rows
from jaxblock.diffusion.config import CanvasConfig, MethodConfig, Normalize
from jaxblock.diffusion.layouts import training_layout
from jaxblock.models.transformer import Transformer
from jaxblock.types import Params


@dataclass(frozen=True)
class Population:
    """Holds the examples that gradients are drawn from, each as likely as any other.

    Attributes:
        text_len: the response tokens of each example.
        canvas: a function that lays out the examples at some places (int [N]) as a canvas on the host, with rows numbered from 0.
    """

    text_len: Int[np.ndarray, " n"]
    canvas: Callable[[Layout, np.ndarray], Canvas]

    def draw(self, rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
        """Draws the places of independent examples, with replacement: int of the given shape."""
        return rng.integers(len(self.text_len), size=shape)


@dataclass(frozen=True)
class Probe:
    """Holds a checkpoint and what its gradients are measured on.

    Attributes:
        net: the network.
        params: its weights.
        layout: the canvas of Blockwise SFT.
        whole: the same canvas with one block as long as the response, as classical SFT has it.
        population: the examples.
        normalize: what a batch's loss is divided by.
        seed: the seed of all draws; the same seed draws the same examples and masks for every checkpoint.
    """

    net: Transformer
    params: Params
    layout: Layout
    whole: Layout
    population: Population
    normalize: Normalize
    seed: int

    def key(self, stream: int) -> jax.Array:
        """Returns the random key of one of the measurements, which differ in ``stream``."""
        return jax.random.fold_in(jax.random.key(self.seed), stream)

    def rng(self, stream: int) -> np.random.Generator:
        """Returns the generator that draws the examples of a measurement."""
        return np.random.default_rng([self.seed, stream])


def probe_of(
    net: Transformer,
    params: Params,
    records: Records,
    canvas: CanvasConfig,
    method: MethodConfig,
    stop_ids: tuple[int, ...],
    seed: int,
) -> Probe:
    """Puts a checkpoint and training records together.

    Args:
        net: the network.
        params: its weights.
        records: the records to draw examples from.
        canvas: the ``canvas`` section; its block is that of all blockwise gradients.
        method: the ``method`` section, which says what a loss is divided by.
        stop_ids: the tokens that end a response.
        seed: the seed of all draws.
    """
    lay_out = jax.jit(from_rows, static_argnums=0)

    def laid_out(layout: Layout, places: np.ndarray) -> Canvas:
        batch = pad_records([records[place] for place in places.tolist()], canvas)
        rows = (batch.prompt_ids, batch.prompt_len, batch.response_ids, batch.text_len, batch.row_id)
        found: Canvas = jax.device_get(lay_out(layout, *rows))
        return found

    layout, whole = (
        training_layout(canvas, replace(method, objective=objective), net.arch, stop_ids)
        for objective in ("blockwise", "classical")
    )
    population = Population(records.lengths()[:, 1], laid_out)
    return Probe(net, params, layout, whole, population, method.normalize, seed)
