"""Applies rotary positions: each pair of a head's dimensions is rotated by an angle that grows with the position."""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
from jax import Array
from jax.typing import DTypeLike
from jaxtyping import Float, Int

from jaxblock.models.architecture import Architecture, RopeScaling
from jaxblock.models.numerics import at_least_float32


class Rotation(NamedTuple):
    """Holds the cosines and sines of rotary positions, [B, T, 1, H/2] each, in float32 or wider."""

    cos: Float[Array, "B T 1 half"]
    sin: Float[Array, "B T 1 half"]


def compute_rotation(positions: Int[Array, "B T"], arch: Architecture, dtype: DTypeLike) -> Rotation:
    """Computes the cosines and sines of rotary positions.

    Args:
        positions: the rotary position of each token.
        arch: the architecture; its frequency base, its scaling and its head size are used.
        dtype: the type of the activations, which are rotated in float32 or wider.
    """
    wide = at_least_float32(dtype)
    rate = arch.rope_theta ** (-jnp.arange(0, arch.head_dim, 2, dtype=wide) / arch.head_dim)
    if arch.rope_scaling is not None:
        rate = _stretched(rate, arch.rope_scaling)
    angle = positions[..., None, None].astype(wide) * rate
    return Rotation(jnp.cos(angle), jnp.sin(angle))


def _stretched(rate: Array, scaling: RopeScaling) -> Array:
    """Scales rotary frequencies down for a longer context, as transformers' ``linear`` and ``llama3`` do."""
    if scaling.kind == "linear":
        return rate / scaling.factor
    turns = scaling.original_len * rate / (2 * jnp.pi)  # rotations within the original context length
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    kept = jnp.clip((turns - low) / (high - low), 0.0, 1.0)  # 1: so fast that it is not scaled
    return (1 - kept) * rate / scaling.factor + kept * rate


def rotate(x: Float[Array, "B T N H"], rotation: Rotation) -> Float[Array, "B T N H"]:
    """Rotates the two halves of each head against each other."""
    first, second = jnp.split(x.astype(rotation.cos.dtype), 2, axis=-1)
    cos, sin = rotation
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)
