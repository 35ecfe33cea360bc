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
from jaxblock.models import lora
from jaxblock.models.params import Table
from jaxblock.parallel import axes
from jaxblock.training.precision import global_norm
from jaxblock.training.state import TrainState, shardings
from jaxblock.types import Canvas, Draw, Layout, Network, Normalize, Params

if TYPE_CHECKING:
    from jaxblock.data.loader import Batch


Step = Callable[["TrainState", "Batch", Params], tuple["TrainState", "StepMetrics"]]
"""A compiled update: (state, batch, frozen base) -> (state, metrics)."""

_DROPOUT = 0x10A
"""Keeps dropout's keys apart from those of the draws."""


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
        dropout: the network's adapters drop inputs.
    """

    net: Network
    layout: Layout
    sampling: Sampling
    normalize: Normalize
    ablation: Ablation
    seed: int
    rows: int
    dropout: bool = False

    def canvas(self, batch: Batch) -> Canvas:
        """The batch's rows, laid out."""
        rows = (batch.prompt_ids, batch.prompt_len, batch.response_ids, batch.text_len, batch.row_id)
        return canvases.from_rows(self.layout, *map(jnp.asarray, rows))

    def draw(self, batch: Batch, canvas: Canvas, step: Array | int) -> tuple[Draw, Array]:
        """The step's draws [K, B, ...] and the ablations' noise [K, B, R]: functions of (seed, step) and row alone."""
        uniforms = sampling.draw_uniforms(
            self._key(step), self.rows, self.sampling.draws, self.layout, noise=self.ablation.needs_noise
        )
        draws = sampling.draw(self.sampling, self.layout, canvas, uniforms, self.drawn_blocks(batch))
        return draws, jnp.moveaxis(uniforms.noise[canvas.row_id], 1, 0)

    def row_keys(self, canvas: Canvas, step: Array | int) -> Array | None:
        """Keys of dropout [K, B]: functions of (seed, step), the draw and the row's place in the global batch alone."""
        if not self.dropout:
            return None
        key = jax.random.fold_in(self._key(step), _DROPOUT)
        per_draw = jax.vmap(lambda k: jax.random.fold_in(key, k))(jnp.arange(self.sampling.draws))
        return jax.vmap(lambda k: jax.vmap(lambda row: jax.random.fold_in(k, row))(canvas.row_id))(per_draw)

    def _key(self, step: Array | int) -> Array:
        return jax.random.fold_in(jax.random.key(self.seed), step)

    def drawn_blocks(self, batch: Batch) -> Array | None:
        """The data's own blocks [B] under ``pairs``; None where a row stands for its whole sequence."""
        return jnp.asarray(batch.block) if self.sampling.blocks == "pairs" else None

    def __call__(self, params: Params, batch: Batch, step: Array) -> Losses:
        """The objective's sums and weights."""
        canvas = self.canvas(batch)
        draws, noise = self.draw(batch, canvas, step)
        return losses(
            self.net,
            params,
            self.layout,
            canvas,
            draws,
            self.normalize,
            self.ablation,
            noise,
            row_keys=self.row_keys(canvas, step),
            drawn_blocks=self.drawn_blocks(batch),
        )


def gradients(
    objective: Objective, params: Params, batch: Batch, step: Array, frozen: Params | None = None
) -> tuple[Losses, Params]:
    """The losses and the gradient of ``total / weight`` with respect to ``params``, which stand beside a frozen base."""

    def loss(params: Params) -> tuple[Array, Losses]:
        found = objective(lora.attach(frozen or {}, params), batch, step)
        return found.loss.total / found.loss.weight, found

    return jax.grad(loss, has_aux=True)(params)[::-1]


def train_step(
    objective: Objective,
    optimizer: optax.GradientTransformation,
    state: TrainState,
    batch: Batch,
    frozen: Params | None = None,
) -> tuple[TrainState, StepMetrics]:
    """One update.

    Args:
        objective: the loss (static).
        optimizer: the update rule (static).
        state: before.
        batch: the global batch, as arrays.
        frozen: the base of a state that holds adapters; read only.

    Returns:
        (state after, metrics).
    """
    found, grads = gradients(objective, state.params, batch, state.step, frozen)
    updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    return TrainState(params, opt_state, state.step + 1), StepMetrics(found, global_norm(grads))


def compile_step(
    objective: Objective,
    optimizer: optax.GradientTransformation,
    state: TrainState,
    mesh: Mesh,
    table: Table,
    frozen_table: Table | None = None,
) -> Step:
    """The jitted step: state in place (donated), rows split over the mesh, metrics on every device.

    Args:
        objective: the loss.
        optimizer: the update rule.
        state: a state (or its shapes), for the layout of the optimizer's part.
        mesh: the mesh; the call must run under ``jax.set_mesh(mesh)``.
        table: the specs of what is trained.
        frozen_table: those of the base that it stands beside; None for none.

    Returns:
        A function of (state, batch, frozen); ``frozen`` is {} where there is no base.
    """
    placed = shardings(state.opt_state, mesh, table)
    frozen_placed = axes.param_shardings(mesh, frozen_table) if frozen_table else {}
    return jax.jit(
        lambda state, batch, frozen: train_step(objective, optimizer, state, batch, frozen),
        in_shardings=(placed, axes.sharding(mesh, "batch"), frozen_placed),
        out_shardings=(placed, axes.replicated(mesh)),
        donate_argnums=0,
    )
