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
from jaxblock.diffusion.canvas import Canvas, Layout
from jaxblock.diffusion.config import MethodConfig
from jaxblock.diffusion.objective import Losses, losses
from jaxblock.diffusion.sampling import Draw
from jaxblock.models.linear import lora
from jaxblock.models.spec import Table
from jaxblock.parallel import rules
from jaxblock.training.optim.gating import gated, select
from jaxblock.training.optim.precision import global_norm
from jaxblock.training.state import TrainState, next_average, shardings
from jaxblock.types import Network, Params

if TYPE_CHECKING:
    from jaxblock.data.loader import Batch


Step = Callable[["TrainState", "Batch", Params], tuple["TrainState", "StepMetrics"]]
"""A compiled update: (state, batch, frozen base) -> (state, metrics)."""

_DROPOUT = 0x10A
"""Keeps dropout's keys apart from those of the draws."""


class StepMetrics(NamedTuple):
    """What a step reports, left on the device until somebody reads it; ``skipped``: it was not finite, nothing changed."""

    losses: Losses
    grad_norm: Array
    skipped: Array


@dataclass(frozen=True)
class Objective:
    """The loss of a batch at a step. Static and hashable.

    Attributes:
        net: the network.
        layout: the canvas's static part.
        method: law, choice of blocks, K, weighting, what the sum is divided by, and the ablations.
        seed: of the draws.
        rows: the global batch size.
        dropout: the network's adapters drop inputs.
    """

    net: Network
    layout: Layout
    method: MethodConfig
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
            self._key(step), self.rows, self.method.draws, self.layout, noise=self.method.needs_noise
        )
        draws = sampling.draw(self.method, self.layout, canvas, uniforms, self.drawn_blocks(batch))
        return draws, jnp.moveaxis(uniforms.noise[canvas.row_id], 1, 0)

    def row_keys(self, canvas: Canvas, step: Array | int) -> Array | None:
        """Keys of dropout [K, B]: functions of (seed, step), the draw and the row's place in the global batch alone."""
        if not self.dropout:
            return None
        key = jax.random.fold_in(self._key(step), _DROPOUT)
        per_draw = jax.vmap(lambda k: jax.random.fold_in(key, k))(jnp.arange(self.method.draws))
        return jax.vmap(lambda k: jax.vmap(lambda row: jax.random.fold_in(k, row))(canvas.row_id))(per_draw)

    def _key(self, step: Array | int) -> Array:
        return jax.random.fold_in(jax.random.key(self.seed), step)

    def drawn_blocks(self, batch: Batch) -> Array | None:
        """The data's own blocks [B] under ``pairs``; None where a row stands for its whole sequence."""
        return jnp.asarray(batch.block) if self.method.pairs else None

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
            self.method,
            noise,
            row_keys=self.row_keys(canvas, step),
            drawn_blocks=self.drawn_blocks(batch),
        )


def gradients(
    objective: Objective, params: Params, batch: Batch, step: Array, frozen: Params | None = None, accumulate: int = 1
) -> tuple[Losses, Params]:
    """The losses and the gradient of ``total / weight`` with respect to ``params``, which stand beside a frozen base.

    Args:
        objective: the loss.
        params: what is trained.
        batch: the global batch.
        step: of the draws.
        frozen: the base beneath adapters.
        accumulate: how many parts of the batch go one after the other. Weights depend on the data alone, so the sum of
            the parts' gradients over the sum of their weights is the whole batch's gradient, whatever the parts hold.
    """

    def total(params: Params, rows: Batch) -> tuple[Array, Losses]:
        found = objective(lora.attach(frozen or {}, params), rows, step)
        return found.loss.total, found

    def part(rows: Batch) -> tuple[Losses, Params]:
        return jax.grad(total, has_aux=True)(params, rows)[::-1]

    if accumulate == 1:
        found, grads = part(batch)
    else:
        # Row r goes to part r mod n: every device has its share of every part, and no row moves between devices.
        parts: Batch = jax.tree.map(lambda x: _interleaved(jnp.asarray(x), accumulate), batch)
        nothing = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.promote_types(x.dtype, jnp.float32)), params)
        first = jax.tree.map(jnp.zeros_like, jax.eval_shape(lambda: part(jax.tree.map(lambda x: x[0], parts))[0]))
        (found, grads), _ = jax.lax.scan(
            lambda sums, rows: (jax.tree.map(jnp.add, sums, part(rows)), None), (first, nothing), parts
        )
    weight = found.loss.weight
    return found, jax.tree.map(lambda grad: grad / weight.astype(grad.dtype), grads)


def _interleaved(x: Array, parts: int) -> Array:
    split = x.reshape(x.shape[0] // parts, parts, *x.shape[1:]).swapaxes(0, 1)
    return rules.constrain(split, None, "batch", *(None,) * (split.ndim - 2))


def train_step(
    objective: Objective,
    optimizer: optax.GradientTransformation,
    state: TrainState,
    batch: Batch,
    frozen: Params | None = None,
    *,
    accumulate: int = 1,
    ema: float = 0.0,
) -> tuple[TrainState, StepMetrics]:
    """One update; a step whose loss or gradient is not finite updates nothing but the step.

    Args:
        objective: the loss (static).
        optimizer: the update rule (static).
        state: before.
        batch: the global batch, as arrays.
        frozen: the base of a state that holds adapters; read only.
        accumulate: parts of the batch that go one after the other (static).
        ema: decay of the moving average, where the state has one (static).

    Returns:
        (state after, metrics).
    """
    found, grads = gradients(objective, state.params, batch, state.step, frozen, accumulate)
    norm = global_norm(grads)
    finite = jnp.isfinite(found.loss.total) & jnp.isfinite(norm)
    updates, opt_state = gated(optimizer).update(grads, state.opt_state, state.params, finite=finite)
    params = optax.apply_updates(state.params, updates)
    average = state.average
    if average is not None:
        average = select(finite, next_average(average, params, state.step, ema), average)
    return TrainState(params, opt_state, state.step + 1, average), StepMetrics(found, norm, ~finite)


def compile_step(
    objective: Objective,
    optimizer: optax.GradientTransformation,
    state: TrainState,
    mesh: Mesh,
    table: Table,
    frozen_table: Table | None = None,
    *,
    accumulate: int = 1,
    ema: float = 0.0,
) -> Step:
    """The jitted step: state in place (donated), rows split over the mesh, metrics on every device.

    Args:
        objective: the loss.
        optimizer: the update rule.
        state: a state (or its shapes), for the layout of the optimizer's part.
        mesh: the mesh; the call must run under ``jax.set_mesh(mesh)``.
        table: the specs of what is trained.
        frozen_table: those of the base that it stands beside; None for none.
        accumulate: see ``train_step``.
        ema: see ``train_step``.

    Returns:
        A function of (state, batch, frozen); ``frozen`` is {} where there is no base.
    """
    placed = shardings(state.opt_state, mesh, table, averaged=state.average is not None)
    frozen_placed = rules.param_shardings(mesh, frozen_table) if frozen_table else {}
    return jax.jit(
        lambda state, batch, frozen: train_step(
            objective, optimizer, state, batch, frozen, accumulate=accumulate, ema=ema
        ),
        in_shardings=(placed, rules.sharding(mesh, "batch"), frozen_placed),
        out_shardings=(placed, rules.replicated(mesh)),
        donate_argnums=0,
    )
