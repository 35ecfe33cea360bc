"""Finds, in debug mode, what first becomes NaN or infinite (a layer, the loss, the gradient), at which step and examples."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from jaxblock.errors import UserError
from jaxblock.models.spec import flatten
from jaxblock.training.step import StepMetrics
from jaxblock.types import Params


class NanFinder:
    """Records the layers whose output is not finite while a step runs, and raises an error after the step."""

    def __init__(self) -> None:
        """Begins with no layers recorded."""
        self._layers: set[int] = set()

    def layer(self, index: int, hidden: Array) -> None:
        """Records the layer if its output is not finite; the network calls this for every layer, under vmap and grad too.

        Args:
            index: the layer's number, from 0.
            hidden: the layer's output.
        """
        jax.debug.callback(self._note, jnp.int32(index), jnp.all(jnp.isfinite(hidden)))

    def _note(self, index: Array, finite: Array) -> None:
        if not bool(np.all(finite)):
            self._layers.add(int(np.min(index)))

    def check(self, step: int, metrics: StepMetrics, records: np.ndarray) -> None:
        """Raises an error if a layer, the loss or the gradient of this step was not finite.

        Args:
            step: the step's number, from 1.
            metrics: what the step reported.
            records: the numbers of the batch's training records.

        Raises:
            UserError: names the first layer, or says that the loss or the gradient was the first.
        """
        jax.effects_barrier()
        rows = ", ".join(map(str, records.tolist()))
        if self._layers:
            raise UserError(
                f"step {step}: layer {min(self._layers)} is the first whose output is not finite "
                f"(train records of the batch: {rows}); the weights before this step made it, or optimizer.lr is too high"
            )
        for name, value in (("loss", metrics.losses.loss.total), ("gradient norm", metrics.grad_norm)):
            if not np.isfinite(float(value)):
                raise UserError(
                    f"step {step}: every layer is finite but the {name} is {float(value)} (train records: {rows})"
                )


def not_finite(params: Params) -> list[str]:
    """Returns the names of the parameters that hold NaN or infinity, as ``blocks/q (layer 1)``, layers from 0."""
    found = []
    for path, leaf in flatten(params).items():
        if path.startswith("blocks/"):
            finite = np.asarray(jnp.all(jnp.isfinite(leaf), axis=tuple(range(1, leaf.ndim))))
            found += [f"{path} (layer {layer})" for layer in np.flatnonzero(~finite)]
        elif not bool(jnp.all(jnp.isfinite(leaf))):
            found.append(path)
    return found
