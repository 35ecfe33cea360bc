"""Computes AdamW's update in one pass over each tensor, without a float32 copy of the whole network.

A chain of Optax transformations passes float32 gradients, directions or updates of all weights from link to link, which
takes at least four bytes per weight. Here a step holds weights, gradients, moments, and the float32 values of one layer.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import optax
from jax import Array

from jaxblock.training.optim.config import OptimizerConfig
from jaxblock.training.optim.gating import Gated, no_update, select
from jaxblock.training.optim.moments import moment_format
from jaxblock.training.optim.precision import clip_share, path_name, random_bits, rounded_update, widen
from jaxblock.types import Params

LOOP_FROM = 2**24
"""Stacked tensors with at least this many weights are updated layer by layer, smaller ones as a whole, which is faster."""


class AdamState(NamedTuple):
    """Holds the number of updates done and the two moments, each a tree with the parameters' structure."""

    step: Array
    mu: Any
    nu: Any


def adamw(config: OptimizerConfig, rate: optax.Schedule, decays: Callable[[str], bool], seed: int) -> Gated:
    """Makes AdamW: w <- w - lr * (m_hat / (sqrt(v_hat) + eps) + weight_decay * w), as PyTorch computes it after clipping.

    Updates have the gradients' type. For bfloat16 gradients and weights that is exact wherever the update is smaller
    than half the weight (Sterbenz); where it is larger, the update itself is rounded to 8 bits.

    Args:
        config: the ``optimizer`` section.
        rate: the learning rate of each update.
        decays: takes a parameter's path and says whether weight decay applies to it.
        seed: the seed of stochastic rounding.
    """
    first, second = moment_format(config.moments, signed=True), moment_format(config.moments, signed=False)

    def init(params: Params) -> AdamState:
        params = widen(params)
        return AdamState(
            jnp.zeros((), jnp.int32), jax.tree.map(first.zeros, params), jax.tree.map(second.zeros, params)
        )

    def update(
        grads: Params, state: AdamState, params: Params, *, finite: Array | bool = True
    ) -> tuple[Params, AdamState]:
        chex.assert_trees_all_equal_shapes(grads, params)
        step = state.step + 1
        share, lr = clip_share(grads, config.clip_norm), rate(state.step)
        unbias1, unbias2 = (1 - b ** step.astype(jnp.float32) for b in (config.b1, config.b2))

        def one(path: str, p: Array, layer: Array | None, g: Array, mu: Any, nu: Any) -> tuple[Array, Any, Any]:
            gradient, weight = widen(g) * share, widen(p)
            m = config.b1 * first.load(mu) + (1 - config.b1) * gradient
            v = config.b2 * second.load(nu) + (1 - config.b2) * gradient**2
            if config.moments == "float32":
                m, v = _in_place(select(finite, (m, v), (mu, nu)))
            change = (m / unbias1) / (jnp.sqrt(v / unbias2) + config.eps)
            if config.weight_decay and decays(path):
                change += config.weight_decay * weight
            change = -lr * change
            if config.rounding == "stochastic" and p.dtype == jnp.bfloat16:
                change = rounded_update(
                    weight, change, random_bits(seed, state.step, f"weights/{path}", p.shape, layer)
                )
            bits = random_bits(seed, state.step, f"moments/{path}", p.shape, layer)
            after = first.store(m, bits), second.store(v, bits >> 16)
            if config.moments != "float32":
                after = select(finite, after, (mu, nu))
            return no_update(finite, change.astype(g.dtype)), *after

        def leaf(path: Any, g: Array, p: Array, mu: Any, nu: Any) -> tuple[Array, Any, Any]:
            if g.ndim < 3 or g.size < LOOP_FROM:
                return one(path_name(path), p, None, g, mu, nu)
            return _by_layer(lambda *slices: one(path_name(path), *slices), p, (g, mu, nu))

        rows = jax.tree_util.tree_map_with_path(leaf, grads, params, state.mu, state.nu)
        updates, mu, nu = (jax.tree.map(lambda g, row, at=at: row[at], grads, rows) for at in range(3))
        return updates, AdamState(select(finite, step, state.step), mu, nu)

    return Gated(init, update)


def _in_place(moments: tuple[Array, Array]) -> tuple[Array, Array]:
    """Makes XLA write the new moments over the old ones before it computes the update from them.

    XLA for CPUs writes one result per fusion: it would compute update and moments each from the old moments, and copy
    the old moments to keep them until then. On other devices one fusion writes all three results.
    """

    def apart(*moments: Array) -> Any:
        return jax.lax.optimization_barrier(moments)

    def together(*moments: Array) -> Any:
        return moments

    done: tuple[Array, Array] = jax.lax.platform_dependent(*moments, cpu=apart, default=together)
    return done


def _by_layer(one: Callable[..., tuple[Array, Any, Any]], p: Array, stacked: Any) -> tuple[Array, Any, Any]:
    """Applies ``one`` to the slices of axis 0 one after the other, and writes each result over its inputs."""

    def layer(at: Array, carry: Any) -> Any:
        def here(x: Array) -> Array:
            return jax.lax.dynamic_index_in_dim(x, at, keepdims=False)

        def put(x: Array, new: Array) -> Array:
            return jax.lax.dynamic_update_index_in_dim(x, new, at, 0)

        # The barriers keep reads and writes apart. If XLA fused them, it would copy the whole tensor.
        weight, slices = jax.lax.optimization_barrier((here(p), jax.tree.map(here, carry)))
        return jax.tree.map(put, carry, jax.lax.optimization_barrier(one(weight, at, *slices)))

    done: tuple[Array, Any, Any] = jax.lax.fori_loop(0, len(p), layer, stacked)
    return done
