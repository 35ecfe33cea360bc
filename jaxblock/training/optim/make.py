"""Makes the optimizer that the config describes: AdamW or Adafactor, with clipping, a schedule and a storage type."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from jax import Array

from jaxblock.models.spec import Table
from jaxblock.training.optim import moments
from jaxblock.training.optim.adamw import adamw
from jaxblock.training.optim.config import OptimizerConfig
from jaxblock.training.optim.precision import clip_share, path_name, round_parameters, widen
from jaxblock.training.optim.schedules import schedule
from jaxblock.types import Params


def make_optimizer(config: OptimizerConfig, steps: int, table: Table, seed: int = 0) -> optax.GradientTransformation:
    """Makes the optimizer; its arithmetic is float32 for every type of parameters.

    Args:
        config: the ``optimizer`` section.
        steps: the number of updates of the whole run, for the schedule.
        table: the parameters' specs, which say which parameters are matrices.
        seed: the seed of stochastic rounding, where the config asks for it.

    Returns:
        An optimizer whose updates are applied by ``optax.apply_updates``.
    """

    def decays(path: str) -> bool:
        return config.decay == "all" or table[path].is_matrix

    rate = schedule(config, steps)
    if config.name == "adamw":
        return adamw(config, rate, decays, seed)
    return _adafactor(config, rate, decays, seed)


def _adafactor(
    config: OptimizerConfig, rate: optax.Schedule, decays: Callable[[str], bool], seed: int
) -> optax.GradientTransformation:
    """Makes Adafactor: Adam with a second moment of rank one per matrix, and directions clipped to a root mean square of 1.

    ``b2``, ``eps`` and the learning rate mean the same as for Adam, so that it can replace Adam: the decay is
    constant with Adam's bias correction (not 1 - t^-0.8), and steps are not scaled by the parameters' size.
    """

    def decay(k: Array, b2: float) -> Array:
        t = jnp.asarray(k, jnp.float32) + 1
        return b2 * (1 - b2 ** (t - 1)) / (1 - b2**t)

    def mask(params: Params) -> Params:
        return jax.tree_util.tree_map_with_path(lambda path, _: decays(path_name(path)), params)

    scale = optax.scale_by_factored_rms(decay_rate=config.b2, epsilon=config.eps**2, decay_rate_fn=decay)
    parts = [optax.stateless(lambda grads, _: _clip(grads, config.clip_norm)), scale, optax.clip_by_block_rms(1.0)]
    if config.b1:
        parts.append(moments.momentum(config.b1, config.moments, seed))
    if config.weight_decay:
        parts.append(optax.add_decayed_weights(config.weight_decay, mask=mask))
    optimizer = _in_float32(optax.chain(*parts, optax.scale_by_learning_rate(rate)))
    return optax.chain(optimizer, round_parameters(seed)) if config.rounding == "stochastic" else optimizer


def _clip(grads: Params, limit: float) -> Params:
    share = clip_share(grads, limit)
    return jax.tree.map(lambda g: g * share, grads)


def _in_float32(inner: optax.GradientTransformation) -> optax.GradientTransformation:
    """Casts gradients and parameters to float32 for ``inner``, whose state takes its type from them."""

    def update(grads: Params, state: optax.OptState, params: Params) -> tuple[Params, optax.OptState]:
        return inner.update(widen(grads), state, widen(params))

    return optax.GradientTransformation(lambda params: inner.init(widen(params)), update)
