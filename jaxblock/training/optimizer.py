"""AdamW or Adafactor, clipped by the global norm, on a schedule, with their state in as many bits as asked for."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import optax
from flax import traverse_util
from jax import Array

from jaxblock.config import OptimizerConfig
from jaxblock.models.params import Table
from jaxblock.training import moments
from jaxblock.training.precision import global_norm, round_parameters, wide
from jaxblock.training.schedules import schedule
from jaxblock.types import Params


def make(config: OptimizerConfig, steps: int, table: Table, seed: int = 0) -> optax.GradientTransformation:
    """The optimizer: clip, direction, decay, schedule; all arithmetic is float32 whatever the parameters are.

    w <- w - lr * (direction + weight_decay * w), as PyTorch's AdamW. Apply it with ``optax.apply_updates``.

    Args:
        config: the ``optimizer`` section.
        steps: updates of the run.
        table: the parameters' specs: which of them are matrices.
        seed: of stochastic rounding, where there is any.
    """

    def decays(params: Params) -> Params:
        paths = traverse_util.flatten_dict(params, sep="/")
        mask = {path: config.decay == "all" or table[path].is_matrix for path in paths}
        return traverse_util.unflatten_dict(mask, sep="/")

    parts = [clip_by_global_norm(config.clip_norm)] if config.clip_norm > 0 else []
    parts += _adafactor(config, seed) if config.name == "adafactor" else [_adam(config, seed)]
    if config.weight_decay:
        parts.append(optax.add_decayed_weights(config.weight_decay, mask=decays))
    parts.append(optax.scale_by_learning_rate(schedule(config, steps)))
    optimizer = _in_float32(optax.chain(*parts))
    return optax.chain(optimizer, round_parameters(seed)) if config.rounding == "stochastic" else optimizer


def clip_by_global_norm(limit: float) -> optax.GradientTransformation:
    """Multiplies gradients by min(1, limit / (norm + 1e-6)), as ``torch.nn.utils.clip_grad_norm_`` does."""

    def clip(grads: Params, params: Params | None) -> Params:
        share = jnp.minimum(1.0, limit / (global_norm(grads) + 1e-6))
        return jax.tree.map(lambda g: g * share, grads)

    return optax.stateless(clip)


def _adam(config: OptimizerConfig, seed: int) -> optax.GradientTransformation:
    if config.moments == "float32":
        return optax.scale_by_adam(config.b1, config.b2, config.eps)
    return moments.scale_by_adam(config.b1, config.b2, config.eps, config.moments, seed)


def _adafactor(config: OptimizerConfig, seed: int) -> list[optax.GradientTransformation]:
    """Adam with a second moment of rank one per matrix, each tensor's direction limited to a root mean square of 1.

    ``b2``, ``eps`` and the learning rate mean what they mean to Adam, so that it may take Adam's place: the decay is
    constant with Adam's bias correction (not 1 - t^-0.8), and steps are not scaled by the parameters' size.
    """

    def decay(k: Array, b2: float) -> Array:
        t = jnp.asarray(k, jnp.float32) + 1
        return b2 * (1 - b2 ** (t - 1)) / (1 - b2**t)

    scale = optax.scale_by_factored_rms(decay_rate=config.b2, epsilon=config.eps**2, decay_rate_fn=decay)
    parts = [scale, optax.clip_by_block_rms(1.0)]
    return [*parts, moments.momentum(config.b1, config.moments, seed)] if config.b1 else parts


def _in_float32(inner: optax.GradientTransformation) -> optax.GradientTransformation:
    """Gradients and parameters are cast before ``inner`` sees them: Adam's moments take their type from both."""

    def update(grads: Params, state: optax.OptState, params: Params) -> tuple[Params, optax.OptState]:
        return inner.update(wide(grads), state, wide(params))

    return optax.GradientTransformation(lambda params: inner.init(wide(params)), update)
