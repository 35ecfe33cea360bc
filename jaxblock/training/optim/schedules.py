"""Computes the learning rate of each update: a warm-up and three decays, and DeepSpeed's WarmupCosineLR."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array
from jax.typing import ArrayLike

from jaxblock.training.optim.config import OptimizerConfig


def schedule(config: OptimizerConfig, steps: int) -> optax.Schedule:
    """Returns the learning rate of update k = 0 .. steps - 1 as a function of k.

    ``cosine``, ``linear`` and ``constant`` warm up by peak * (k + 1) / warmup_steps, so that update 0 has an effect, and reach
    ``final_ratio`` of the peak at update ``steps``. ``deepspeed_cosine`` is ``deepspeed_ratio`` times the peak.

    Args:
        config: the ``optimizer`` section.
        steps: the number of updates of the whole run.
    """
    if config.schedule == "deepspeed_cosine":
        return lambda k: config.lr * deepspeed_ratio(config, steps, k)
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


def learning_rates(config: OptimizerConfig, steps: int) -> np.ndarray:
    """Returns the learning rates of all updates [steps] on the host; computing each during training would wait for the device."""
    every = jax.jit(jax.vmap(schedule(config, steps)))(jnp.arange(steps))
    return np.broadcast_to(np.asarray(every, np.float32), (steps,))


def deepspeed_ratio(config: OptimizerConfig, steps: int, k: ArrayLike) -> Array:
    """Returns the share of the peak learning rate that DeepSpeed's WarmupCosineLR has at update k.

    Iteration i of the scheduler, with w = max(warmup_steps, 2), rises from ``warmup_floor`` by i / w (``linear``) or
    log(i + 1) / log(w) (``log``) while i < w; from then on it follows a cosine that is one iteration ahead and
    reaches ``final_ratio`` at i = steps - 1. The engine steps the scheduler after the optimizer: with
    ``scheduler_steps: after_update`` update k sees iteration k - 1, and update 0 has a learning rate of 0.

    Args:
        config: the ``optimizer`` section.
        steps: the number of updates of the whole run.
        k: the number of the update, from 0.

    Returns:
        A float32 scalar.
    """
    warmup = max(config.warmup_steps, 2)
    i = jnp.asarray(k, jnp.float32) - (config.scheduler_steps == "after_update")
    risen = jnp.log1p(jnp.maximum(i, 0)) / math.log(warmup) if config.warmup == "log" else i / warmup
    risen = config.warmup_floor + (1 - config.warmup_floor) * risen
    done = (i - warmup + 1) / max(steps - warmup, 1)
    fallen = config.final_ratio + (1 - config.final_ratio) * 0.5 * (1 + jnp.cos(jnp.pi * done))
    return jnp.where(i < 0, 0.0, jnp.where(i < warmup, risen, fallen))
