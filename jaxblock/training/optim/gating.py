"""Optimizers whose update is undone where a step is not finite."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import optax
from jax import Array

from jaxblock.types import Params

if TYPE_CHECKING:
    pass


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
