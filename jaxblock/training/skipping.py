"""Steps that count for nothing: where the loss or a gradient is not finite, parameters and optimizer state stay.

The choice is made inside the compiled step, element by element where a tensor is written: nothing is copied, and the
host need not look.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array

from jaxblock.errors import UserError
from jaxblock.parallel import distributed
from jaxblock.types import Params

if TYPE_CHECKING:
    from jaxblock.training.step import StepMetrics


class Gated(optax.GradientTransformationExtraArgs):
    """An optimizer whose update takes ``finite``: where it is false, updates are zero and the state is as it was."""


def select(finite: Array | bool, new: Any, old: Any) -> Any:
    """``new`` where the step was finite, else ``old``; trees of one structure."""
    return new if finite is True else jax.tree.map(lambda a, b: jnp.where(finite, a, b), new, old)


def no_update(finite: Array | bool, update: Array) -> Array:
    """The update, or -0, which leaves every number as it is, -0 included."""
    return update if finite is True else jnp.where(finite, update, jnp.asarray(-0.0, update.dtype))


def gated(optimizer: optax.GradientTransformation) -> Gated:
    """Any optimizer, gated from outside; its own state is held twice for a moment.

    Args:
        optimizer: one that is gated already is returned.
    """
    if isinstance(optimizer, Gated):
        return optimizer

    def update(grads: Params, state: Any, params: Params | None = None, *, finite: Array | bool = True) -> Any:
        updates, after = optimizer.update(grads, state, params)
        return jax.tree.map(lambda u: no_update(finite, u), updates), select(finite, after, state)

    return Gated(optimizer.init, update)


def updates(opt_state: Any) -> int:
    """How many updates an optimizer's state has seen: skipped steps are none. Waits for the device.

    Args:
        opt_state: of any optimizer here; each counts in an integer scalar, and all that it holds are equal.
    """
    counts = (leaf for leaf in jax.tree.leaves(opt_state) if leaf.ndim == 0 and jnp.issubdtype(leaf.dtype, jnp.integer))
    return int(jax.device_get(next(counts)))


class Skips:
    """Counts skipped steps on the host, and stops the run when there are too many in a row.

    Attributes:
        total: steps skipped so far, those before a resume included.
    """

    def __init__(self, limit: int, total: int = 0) -> None:
        """Begins with an empty row.

        Args:
            limit: so many in a row are too many; 0 for no limit.
            total: skipped before.
        """
        self._limit = limit
        self.total = total
        self._row: list[tuple[int, StepMetrics, np.ndarray]] = []

    def look(self, found: list[StepMetrics], before: int, indices: list[np.ndarray]) -> str | None:
        """Looks at some steps' metrics. In a process group every process must, with the same metrics.

        Args:
            found: on the host.
            before: the step before the first of them.
            indices: the record numbers of each step's batch (this process's part).

        Returns:
            What to tell about skipped steps, with the records of all processes; None without any.

        Raises:
            UserError: too many in a row; names the steps and the records.
        """
        skipped = []
        for step, (metrics, index) in enumerate(zip(found, indices, strict=True), before + 1):
            if not bool(metrics.skipped):
                self._row = []
                continue
            self.total += 1
            skipped.append((step, index))
            self._row.append((step, metrics, index))
            if self._limit and len(self._row) >= self._limit:
                self._stop()
        if not skipped:
            return None
        steps = "; ".join(f"{step:,} (train records {_records(index)})" for step, index in skipped[:10])
        more = f"; and {len(skipped) - 10} more" if len(skipped) > 10 else ""
        return f"skipped step {steps}{more}: the loss or the gradient was not finite, and nothing was updated"

    def _stop(self) -> None:
        lines = [
            f"step {step}: the loss is {float(m.losses.loss.total)}, the gradient's norm {float(m.grad_norm)} "
            f"(train records {_records(index)})"
            for step, m, index in self._row
        ]
        raise UserError(
            f"{len(lines)} steps in a row (train.max_skipped) could not be used:\n  " + "\n  ".join(lines) + "\n"
            "Nothing was updated by them. Look at these records, lower optimizer.lr in a new run, or run the same command "
            "with --train.debug to find the layer"
        )


def _records(index: np.ndarray) -> str:
    """The numbers of a batch's records, those of other processes too."""
    return ", ".join(map(str, distributed.gathered(index).tolist()))
