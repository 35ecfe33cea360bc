"""Debug mode's detective: which layer, loss or gradient stopped being a number first, at which step, on which examples."""

from __future__ import annotations

from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from jaxblock.errors import UserError
from jaxblock.models.spec import flatten
from jaxblock.types import Params

if TYPE_CHECKING:
    from jaxblock.data.loader import Batch
    from jaxblock.training.step import StepMetrics


class NanFinder:
    """Collects, during a step, the layers whose output is not finite; raises after it."""

    def __init__(self) -> None:
        """Begins with nothing found."""
        self._layers: set[int] = set()

    def layer(self, index: int, hidden: Array) -> None:
        """Looks at a layer's output (``Transformer.check_layer``); works under vmap and grad."""
        jax.debug.callback(self._note, jnp.int32(index), jnp.all(jnp.isfinite(hidden)))

    def _note(self, index: Array, finite: Array) -> None:
        if not bool(np.all(finite)):
            self._layers.add(int(np.min(index)))

    def check(self, step: int, metrics: StepMetrics, batch: Batch) -> None:
        """Raises if anything of this step was not finite.

        Raises:
            UserError: names the first layer, or says that the loss or the gradient was the first.
        """
        jax.effects_barrier()
        rows = ", ".join(map(str, batch.index.tolist()))
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
    """The parameters that hold NaN or infinity, as ``blocks/q (layer 1)``; layers are counted from 0."""
    found = []
    for path, leaf in flatten(params).items():
        if path.startswith("blocks/"):
            finite = np.asarray(jnp.all(jnp.isfinite(leaf), axis=tuple(range(1, leaf.ndim))))
            found += [f"{path} (layer {layer})" for layer in np.flatnonzero(~finite)]
        elif not bool(jnp.all(jnp.isfinite(leaf))):
            found.append(path)
    return found
