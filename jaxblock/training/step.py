"""Computes one train step: a pure function of (state, batch), compiled or not.

All random draws come from the seed and the step, so they do not depend on the number of devices or processes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, NamedTuple

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
from jaxblock.models.spec import count_params
from jaxblock.models.transformer import Transformer
from jaxblock.parallel import rules
from jaxblock.parallel.compiling import quick_options
from jaxblock.training.lines import sort_into_lines
from jaxblock.training.optim.gating import gated, select
from jaxblock.training.optim.precision import global_norm
from jaxblock.training.state import TrainState, next_average, state_shardings
from jaxblock.types import Lines, Network, Params, Places, Sum, positions_of_line, rows_of_line

if TYPE_CHECKING:
    from jaxblock.data.loader import Batch


Step = Callable[["TrainState", "Batch", Params], tuple["TrainState", "StepMetrics"]]
"""An update, compiled or not: (state, batch, frozen base) -> (state, metrics)."""

_DROPOUT = 0x10A
"""Folded into the step's key for dropout, so that dropout is independent of the masks."""


class StepMetrics(NamedTuple):
    """Holds what a step reports, on the device until the host reads it.

    Attributes:
        losses: the summed losses and their weights.
        grad_norm: the global norm of the gradient, before clipping.
        skipped: whether the loss or the gradient was not finite, so that the step changed nothing.
    """

    losses: Losses
    grad_norm: Array
    skipped: Array


@dataclass(frozen=True)
class Objective:
    """Computes the loss of a batch at a step. Static and hashable.

    Attributes:
        net: the network.
        layout: the canvas's static part.
        method: the ``method`` section: how masks are drawn, weighted and normalised.
        seed: the seed of the draws.
        rows: the global batch size.
        dropout: whether the network's adapters drop inputs.
        lines: the widths at which ``gradients`` computes the rows; None for the canvas's.
    """

    net: Network
    layout: Layout
    method: MethodConfig
    seed: int
    rows: int
    dropout: bool = False
    lines: Lines | None = None

    def at_widths(self, places: Places, **changes: Any) -> Objective:
        """Returns the objective of rows that are laid side by side in the places of lines.

        Args:
            places: the places of a line.
            changes: fields of the network that are changed too.
        """
        net = replace(self.net, places=places, **changes)  # type: ignore[type-var]  # a Transformer is a dataclass
        return replace(self, net=net, lines=None)

    def needed(self, batch: Batch) -> Array:
        """Returns the positions that each row needs [B], which depend on the row alone."""
        width = canvases.canvas_width(self.layout, batch.prompt_ids.shape[1])
        return canvases.needed_positions(self.layout, width, jnp.asarray(batch.prompt_len), self.drawn_blocks(batch))

    def canvas(self, batch: Batch) -> Canvas:
        """Makes the canvas of a batch."""
        rows = (batch.prompt_ids, batch.prompt_len, batch.response_ids, batch.text_len, batch.row_id)
        return canvases.from_rows(self.layout, *map(jnp.asarray, rows))

    def draw(self, batch: Batch, canvas: Canvas, step: Array | int) -> tuple[Draw, Array]:
        """Returns the step's draws [K, B, ...] and the ablations' noise [K, B, N], which depend on seed, step and row alone."""
        room = batch.prompt_ids.shape[1]
        uniforms = sampling.draw_uniforms(self.method, self.layout, self._key(step), self.rows, room)
        draws = sampling.draw(self.method, self.layout, canvas, uniforms, self.drawn_blocks(batch))
        return draws, jnp.moveaxis(uniforms.noise[canvas.row_id], 1, 0)

    def row_keys(self, canvas: Canvas, step: Array | int) -> Array | None:
        """Returns the keys of dropout [K, B], which depend on seed, step, draw and row alone; None without dropout."""
        if not self.dropout:
            return None
        key = jax.random.fold_in(self._key(step), _DROPOUT)
        per_draw = jax.vmap(lambda k: jax.random.fold_in(key, k))(jnp.arange(self.method.draws))
        return jax.vmap(lambda k: jax.vmap(lambda row: jax.random.fold_in(k, row))(canvas.row_id))(per_draw)

    def _key(self, step: Array | int) -> Array:
        return jax.random.fold_in(jax.random.key(self.seed), step)

    def drawn_blocks(self, batch: Batch) -> Array | None:
        """Returns each row's active block [B] where the loader chooses it (``pairs``); None where the draw does."""
        return jnp.asarray(batch.block) if self.method.pairs else None

    def __call__(self, params: Params, batch: Batch, step: Array) -> Losses:
        """Computes the summed losses of a batch and their weights."""
        canvas = self.canvas(batch)
        draws, noise = self.draw(batch, canvas, step)
        found = losses(
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
        rows, width = canvas.ids.shape
        places: Places = getattr(self.net, "places", ()) or ((1, width),)
        computed = rows // rows_of_line(places) * positions_of_line(places)
        needed = self.needed(batch).sum().astype(jnp.float32)
        times = self.method.draws
        return found._replace(positions=Sum(jnp.float32(computed * times), needed * times))


@dataclass(frozen=True)
class Learner:
    """Holds the static parts of a train step: network, objective and optimizer.

    Attributes:
        net: the network.
        objective: the loss.
        optimizer: the update rule.
        accumulate: the number of parts of the batch that are computed one after the other.
        ema: the decay of the moving average of the trained parameters; 0 for no average.
    """

    net: Transformer
    objective: Objective
    optimizer: optax.GradientTransformation
    accumulate: int = 1
    ema: float = 0.0

    def update(self, state: TrainState, batch: Batch, frozen: Params) -> tuple[TrainState, StepMetrics]:
        """Computes one step with ``train_step``; ``frozen`` is the frozen base of the adapters, or {}."""
        return train_step(
            self.objective, self.optimizer, state, batch, frozen, accumulate=self.accumulate, ema=self.ema
        )


def gradients(
    objective: Objective, params: Params, batch: Batch, step: Array, frozen: Params | None = None, accumulate: int = 1
) -> tuple[Losses, Params]:
    """Computes the losses, and the gradient of ``total / weight`` with respect to the trained parameters.

    Args:
        objective: the loss.
        params: the trained parameters.
        batch: the global batch.
        step: the step whose draws are used.
        frozen: the frozen base of the adapters; None or {} where the whole network is trained.
        accumulate: the number of parts of the batch that are computed one after the other. Weights depend on the data
            alone, so the sum of the parts' gradients divided by the sum of their weights is the whole batch's gradient.

    Returns:
        (losses, gradient of the same structure as ``params``).
    """
    lines = objective.lines
    if lines is None:
        return _gradients(objective, params, batch, step, frozen, accumulate)
    row: Places = ((1, lines.widest),)
    if all(width == lines.widest for _, width in lines.places):
        return _gradients(objective.at_widths(row), params, batch, step, frozen, accumulate)
    # Few batches do not fit: to compile a single layer for them saves more time than their steps would with unrolled ones.
    whole, laid = objective.at_widths(row, scan_layers=True), objective.at_widths(lines.places)
    in_order, fits = sort_into_lines(batch, objective.needed(batch), lines.places)
    size = rows_of_line(lines.places)
    return jax.lax.cond(
        fits,
        lambda: _gradients(laid, params, in_order, step, frozen, accumulate, size),
        lambda: _gradients(whole, params, batch, step, frozen, accumulate),
    )


def _gradients(
    objective: Objective,
    params: Params,
    batch: Batch,
    step: Array,
    frozen: Params | None,
    accumulate: int,
    size: int = 1,
) -> tuple[Losses, Params]:
    """Computes losses and gradient at the widths of the objective's network (see ``gradients``); a line has ``size`` rows."""

    def total(params: Params, rows: Batch) -> tuple[Array, Losses]:
        found = objective(lora.attach(frozen or {}, params), rows, step)
        return found.loss.total, found

    def part(rows: Batch) -> tuple[Losses, Params]:
        return jax.grad(total, has_aux=True)(params, rows)[::-1]

    if accumulate == 1:
        found, grads = part(batch)
    else:
        # Line l goes to part l mod n, so that every device has lines of every part and no row moves between devices.
        parts: Batch = jax.tree.map(lambda x: _interleaved(jnp.asarray(x), accumulate, size), batch)
        nothing = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.promote_types(x.dtype, jnp.float32)), params)
        first = jax.tree.map(jnp.zeros_like, jax.eval_shape(lambda: part(jax.tree.map(lambda x: x[0], parts))[0]))
        (found, grads), _ = jax.lax.scan(
            lambda sums, rows: (jax.tree.map(jnp.add, sums, part(rows)), None), (first, nothing), parts
        )
    weight = found.loss.weight
    return found, jax.tree.map(lambda grad: grad / weight.astype(grad.dtype), grads)


def _interleaved(x: Array, parts: int, size: int) -> Array:
    """Splits rows [B, ...] into parts [parts, B / parts, ...]; line l, of ``size`` rows, goes to part l mod ``parts``."""
    split = x.reshape(-1, parts, size, *x.shape[1:]).swapaxes(0, 1)
    split = rules.constrain(split, None, "batch", *(None,) * (split.ndim - 2))
    return split.reshape(parts, -1, *x.shape[1:])


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
    """Computes one update. If the loss or the gradient is not finite, only the step's number changes.

    Args:
        objective: the loss (static).
        optimizer: the update rule (static).
        state: the state before the update.
        batch: the global batch, as arrays.
        frozen: the frozen base of the adapters; None or {} where the whole network is trained.
        accumulate: the number of parts of the batch that are computed one after the other (static).
        ema: the decay of the moving average, where the state has one (static).

    Returns:
        (state after the update, metrics).
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


def jit_step(learner: Learner, state: TrainState, mesh: Mesh) -> jax.stages.Wrapped:
    """Returns the jitted update: the state is donated, rows are split over the mesh, metrics are on every device.

    Args:
        learner: the network, objective and optimizer.
        state: a state or its shapes, from which the shardings are derived.
        mesh: the mesh; the jitted function must be called under ``jax.set_mesh(mesh)``.

    Returns:
        A ``Step`` that can also be lowered.
    """
    net = learner.net
    placed = state_shardings(state.opt_state, mesh, net.trainable, averaged=state.average is not None)
    frozen_placed = {} if net.lora is None else rules.param_shardings(mesh, net.param_table)

    def one_step(state: TrainState, batch: Batch, frozen: Params) -> tuple[TrainState, StepMetrics]:
        return learner.update(state, batch, frozen)

    return jax.jit(
        one_step,
        in_shardings=(placed, rules.sharding(mesh, "batch"), frozen_placed),
        out_shardings=(placed, rules.replicated(mesh)),
        donate_argnums=0,
        compiler_options=quick_options(mesh.devices.flat, count_params(net.param_table)),
    )
