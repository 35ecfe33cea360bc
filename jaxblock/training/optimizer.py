"""AdamW with a warm-up, a decay to the last step, and clipping by the global norm (Optax)."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import optax
from flax import traverse_util

from jaxblock.config import OptimizerConfig
from jaxblock.models.params import Table
from jaxblock.types import Params


def schedule(config: OptimizerConfig, steps: int) -> optax.Schedule:
    """Learning rate of update k = 0 .. steps - 1.

    Warm-up: peak * (k + 1) / warmup_steps, so that update 0 moves. Then ``cosine`` or ``linear`` decay that reaches
    ``final_ratio`` of the peak at update ``steps``, or ``constant``.

    Args:
        config: the ``optimizer`` section.
        steps: updates of the run.
    """
    warmup = config.warmup_steps
    left = max(steps - warmup, 1)
    if config.schedule == "cosine":
        decay = optax.cosine_decay_schedule(config.lr, left, config.final_ratio)
    elif config.schedule == "linear":
        decay = optax.linear_schedule(config.lr, config.lr * config.final_ratio, left)
    else:
        decay = optax.constant_schedule(config.lr)
    if not warmup:
        return decay
    rising = optax.linear_schedule(config.lr / warmup, config.lr * (warmup + 1) / warmup, warmup)
    return optax.join_schedules([rising, decay], [warmup])


def make(config: OptimizerConfig, steps: int, table: Table) -> optax.GradientTransformation:
    """The optimizer: clip, AdamW, schedule. Its state is float32 whatever the parameters are.

    Args:
        config: the ``optimizer`` section.
        steps: updates of the run.
        table: the parameters' specs: which of them are matrices.
    """

    def decays(params: Params) -> Params:
        mask = {path: config.decay == "all" or table[path].is_matrix for path in _paths(params)}
        return traverse_util.unflatten_dict(mask, sep="/")

    parts = [optax.clip_by_global_norm(config.clip_norm)] if config.clip_norm > 0 else []
    parts.append(optax.scale_by_adam(config.b1, config.b2, config.eps))
    if config.weight_decay:
        parts.append(optax.add_decayed_weights(config.weight_decay, mask=decays))
    parts.append(optax.scale_by_learning_rate(schedule(config, steps)))
    return _in_float32(optax.chain(*parts))


def _in_float32(inner: optax.GradientTransformation) -> optax.GradientTransformation:
    """Gradients and parameters are cast before ``inner`` sees them: Adam's moments take their type from both."""

    def wide(tree: Params) -> Params:
        return jax.tree.map(lambda leaf: leaf.astype(jnp.promote_types(leaf.dtype, jnp.float32)), tree)

    def update(grads: Params, state: optax.OptState, params: Params) -> tuple[Params, optax.OptState]:
        return inner.update(wide(grads), state, wide(params))

    return optax.GradientTransformation(lambda params: inner.init(wide(params)), update)


def _paths(params: Params) -> list[str]:
    return list(traverse_util.flatten_dict(params, sep="/"))
