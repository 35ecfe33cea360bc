"""Makes optimizers skip their update where the loss or the gradient of a step is not finite, and counts updates."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import Array

from jaxblock.types import Params


class Gated(optax.GradientTransformationExtraArgs):
    """An optimizer whose update takes ``finite``; where that is false, updates are zero and the state does not change."""


def select(finite: Array | bool, new: Any, old: Any) -> Any:
    """Returns ``new`` if the step was finite, else ``old``; both are trees of the same structure."""
    return new if finite is True else jax.tree.map(lambda a, b: jnp.where(finite, a, b), new, old)


def no_update(finite: Array | bool, update: Array) -> Array:
    """Returns the update, or -0 if the step was not finite: adding -0 changes no number, not even -0."""
    return update if finite is True else jnp.where(finite, update, jnp.asarray(-0.0, update.dtype))


def gated(optimizer: optax.GradientTransformation) -> Gated:
    """Makes any optimizer skip steps that are not finite. Its old and new state are in memory together for a moment.

    Args:
        optimizer: the optimizer; one that is gated already is returned as it is.
    """
    if isinstance(optimizer, Gated):
        return optimizer

    def update(grads: Params, state: Any, params: Params | None = None, *, finite: Array | bool = True) -> Any:
        updates, after = optimizer.update(grads, state, params)
        return jax.tree.map(lambda u: no_update(finite, u), updates), select(finite, after, state)

    return Gated(optimizer.init, update)


def count_updates(opt_state: Any) -> int:
    """Returns the number of updates that an optimizer's state has seen, without skipped steps. Waits for the device.

    Args:
        opt_state: the state of any optimizer of this package. Its transformations count updates in a field of their state's
            named tuple: ``step`` in ours, ``count`` in Optax's. The state may contain other integers.

    Raises:
        ValueError: the state has no counter, or its counters differ.
    """
    counts = {
        int(jax.device_get(leaf))
        for path, leaf in jax.tree_util.tree_leaves_with_path(opt_state)
        if path and isinstance(path[-1], jax.tree_util.GetAttrKey) and path[-1].name in ("step", "count")
    }
    if len(counts) != 1:
        raise ValueError(
            f"an optimizer's state must count its updates in one way, but the counters are {sorted(counts)}"
        )
    return counts.pop()
