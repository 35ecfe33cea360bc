"""The train step: a pure function of (state, batch). Every draw comes from (seed, step), never from where it runs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array
from jax.sharding import Mesh

from jaxblock.diffusion import canvas as canvases
from jaxblock.diffusion import sampling
from jaxblock.diffusion.corruption import Ablation
from jaxblock.diffusion.objective import Losses, losses
from jaxblock.diffusion.sampling import Sampling
from jaxblock.models.params import Table
from jaxblock.parallel import axes
from jaxblock.training.state import TrainState, shardings
from jaxblock.types import Canvas, Draw, Layout, Network, Normalize, Params

if TYPE_CHECKING:
    from jaxblock.data.loader import Batch


class StepMetrics(NamedTuple):
    """What a step reports, left on the device until somebody reads it."""

    losses: Losses
    grad_norm: Array


@dataclass(frozen=True)
class Objective:
    """The loss of a batch at a step. Static and hashable.

    Attributes:
        net: the network.
        layout: the canvas's static part.
        sampling: law, block choice, K, weighting.
        normalize: what the sum is divided by.
        ablation: noise outside the active block.
        seed: of the draws.
        rows: the global batch size.
    """

    net: Network
    layout: Layout
    sampling: Sampling
    normalize: Normalize
    ablation: Ablation
    seed: int
    rows: int

    def canvas(self, batch: Batch) -> Canvas:
        """The batch's rows, laid out."""
        rows = (batch.prompt_ids, batch.prompt_len, batch.response_ids, batch.text_len, batch.row_id)
        return canvases.from_rows(self.layout, *map(jnp.asarray, rows))

    def draw(self, batch: Batch, canvas: Canvas, step: Array | int) -> tuple[Draw, Array]:
        """The step's draws [K, B, ...] and the ablations' noise [K, B, R]: functions of (seed, step) and row alone."""
        key = jax.random.fold_in(jax.random.key(self.seed), step)
        uniforms = sampling.draw_uniforms(
            key, self.rows, self.sampling.draws, self.layout, noise=self.ablation.needs_noise
        )
        draws = sampling.draw(self.sampling, self.layout, canvas, uniforms, self.drawn_blocks(batch))
        return draws, jnp.moveaxis(uniforms.noise[canvas.row_id], 1, 0)

    def drawn_blocks(self, batch: Batch) -> Array | None:
        """The data's own blocks [B] under ``pairs``; None where a row stands for its whole sequence."""
        return jnp.asarray(batch.block) if self.sampling.blocks == "pairs" else None

    def __call__(self, params: Params, batch: Batch, step: Array) -> Losses:
        """The objective's sums and weights."""
        canvas = self.canvas(batch)
        draws, noise = self.draw(batch, canvas, step)
        drawn = self.drawn_blocks(batch)
        return losses(
            self.net, params, self.layout, canvas, draws, self.normalize, self.ablation, noise, drawn_blocks=drawn
        )


def gradients(objective: Objective, params: Params, batch: Batch, step: Array) -> tuple[Losses, Params]:
    """The losses and the gradient of ``total / weight``."""

    def loss(params: Params) -> tuple[Array, Losses]:
        found = objective(params, batch, step)
        return found.loss.total / found.loss.weight, found

    return jax.grad(loss, has_aux=True)(params)[::-1]


def train_step(
    objective: Objective, optimizer: optax.GradientTransformation, state: TrainState, batch: Batch
) -> tuple[TrainState, StepMetrics]:
    """One update.

    Args:
        objective: the loss (static).
        optimizer: the update rule (static).
        state: before.
        batch: the global batch, as arrays.

    Returns:
        (state after, metrics).
    """
    found, grads = gradients(objective, state.params, batch, state.step)
    updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    return TrainState(params, opt_state, state.step + 1), StepMetrics(found, optax.tree.norm(grads))


def compile_step(
    objective: Objective, optimizer: optax.GradientTransformation, state: TrainState, mesh: Mesh, table: Table
) -> Callable[[TrainState, Batch], tuple[TrainState, StepMetrics]]:
    """The jitted step: state in place (donated), rows split over the mesh, metrics on every device.

    Args:
        objective: the loss.
        optimizer: the update rule.
        state: a state (or its shapes), for the layout of the optimizer's part.
        mesh: the mesh; the call must run under ``jax.set_mesh(mesh)``.
        table: the parameters' specs.
    """
    placed = shardings(state.opt_state, mesh, table)
    return jax.jit(
        lambda state, batch: train_step(objective, optimizer, state, batch),
        in_shardings=(placed, axes.sharding(mesh, "batch")),
        out_shardings=(placed, axes.replicated(mesh)),
        donate_argnums=0,
    )
