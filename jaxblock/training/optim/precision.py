"""Computes in float32 and rounds results to bfloat16 without a bias.

A bfloat16 has 8 significant bits. Rounding to the nearest loses every change below 1/512 of a weight, which at a
fine-tuning learning rate is nearly every change; stochastic rounding keeps each in expectation (Gupta et al., 2015,
"Deep Learning with Limited Numerical Precision").
"""

from __future__ import annotations

import zlib
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array
from jaxtyping import Float, UInt

from jaxblock.types import Params


def widen(tree: Any) -> Any:
    """Casts every leaf to float32; leaves of wider types stay as they are."""
    return jax.tree.map(lambda leaf: leaf.astype(jnp.promote_types(leaf.dtype, jnp.float32)), tree)


def global_norm(tree: Any) -> Array:
    """Returns the norm over all leaves together, summed in float32 for every type."""
    return optax.tree.norm(widen(tree))


_PURPOSE = zlib.crc32(
    b"rounding"
)  # makes these keys differ from those of masks and weights, which come from the same seed


def clip_share(grads: Any, limit: float) -> Array | float:
    """Returns the factor min(1, limit / (norm + 1e-6)) of ``torch.nn.utils.clip_grad_norm_``; a limit of 0 never clips."""
    return jnp.minimum(1.0, limit / (global_norm(grads) + 1e-6)) if limit > 0 else 1.0


def random_bits(
    seed: int, step: Array, path: str, shape: tuple[int, ...], layer: Array | None = None
) -> UInt[Array, "..."]:
    """Returns 32 random bits per element, a function of (seed, step, path) and the element's indices alone.

    Each element's indices are hashed (the finaliser of MurmurHash3) under a key of jax.random. That takes a few
    integer operations, which XLA fuses with their consumer, where jax.random.bits would hold several arrays of the
    parameter's size. The bits do not depend on how the array is split over devices.

    Args:
        seed: the seed of the whole run.
        step: the number of the update.
        path: the tensor's name.
        shape: the shape of the result.
        layer: the index on axis 0 of a stacked tensor, whose bits of this layer are returned; None for the whole tensor.
    """
    key = jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), _PURPOSE), step)
    first, last = jax.random.bits(key, (2,), jnp.uint32)
    mixed = jnp.broadcast_to(_mix(first ^ jnp.uint32(zlib.crc32(path.encode()))), (1,) * len(shape))
    if layer is not None:
        mixed = _mix(mixed ^ layer.astype(jnp.uint32))
    for axis, size in enumerate(shape):
        across = [1] * len(shape)
        across[axis] = size
        mixed = _mix(mixed ^ jax.lax.broadcasted_iota(jnp.uint32, across, axis))
    return _mix(mixed ^ last)


def _mix(x: Array) -> Array:
    x = (x ^ (x >> 16)) * jnp.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35)
    return x ^ (x >> 16)


def stochastic_bfloat16(x: Float[Array, "..."], bits: UInt[Array, "..."]) -> Float[Array, "..."]:
    """Rounds to one of the two bfloat16 numbers around x, the nearer one with the higher chance, so that the mean is x.

    Args:
        x: the numbers, float32.
        bits: random bits, one number for each element; the low 16 bits are used.

    Returns:
        float32 numbers that bfloat16 holds exactly. Numbers that bfloat16 holds exactly, infinities and NaN
        are returned as they are.
    """
    raw = jax.lax.bitcast_convert_type(x, jnp.uint32) + (bits & 0xFFFF)
    rounded = jax.lax.bitcast_convert_type(raw & jnp.uint32(0xFFFF0000), jnp.float32)
    # A GPU's NaN has all mantissa bits set, so adding random bits would carry into the sign bit and give -0.
    return jnp.where(jnp.isfinite(x), rounded, x)


def rounded_update(weight: Array, change: Array, bits: Array) -> Array:
    """Returns the change that takes a bfloat16 weight to weight + change, rounded stochastically.

    Args:
        weight: the bfloat16 weight, in float32.
        change: the change before rounding, float32.
        bits: random bits, one number for each element.
    """
    return stochastic_bfloat16(weight + change, bits) - weight


class RoundingState(NamedTuple):
    """Holds the number of updates rounded so far, on which the next random bits depend."""

    step: Array


def round_parameters(seed: int) -> optax.GradientTransformation:
    """Makes the last link of an optimizer, which rounds the updated bfloat16 parameters stochastically.

    The update u of a parameter p becomes (p + u rounded) - p, so that ``optax.apply_updates``, which adds it to p and
    rounds to the nearest, gives the stochastically rounded number. Parameters of other types pass through.

    Args:
        seed: the seed of the random bits.
    """

    def update(updates: Params, state: RoundingState, params: Params) -> tuple[Params, RoundingState]:
        def one(path: Any, u: Array, p: Array) -> Array:
            if p.dtype != jnp.bfloat16:
                return u
            bits = random_bits(seed, state.step, f"weights/{path_name(path)}", p.shape)
            return rounded_update(p.astype(jnp.float32), u, bits)

        return jax.tree_util.tree_map_with_path(one, updates, params), RoundingState(state.step + 1)

    return optax.GradientTransformation(lambda params: RoundingState(jnp.zeros((), jnp.int32)), update)


def path_name(path: Any) -> str:
    """Writes a tree path as the parameter tables do: ``blocks/q``."""
    return jax.tree_util.keystr(path, simple=True, separator="/")
