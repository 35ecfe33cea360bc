"""Applies rotary positions: each pair of a head's dimensions is rotated by an angle that grows with the position."""

from __future__ import annotations

import math
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
    scaling = arch.rope_scaling
    base: float | Array = arch.rope_theta
    if scaling is not None and scaling.kind == "dynamic":
        base = base * _dynamic_growth(positions, arch.head_dim, scaling, wide)
    rate = base ** (-jnp.arange(0, arch.head_dim, 2, dtype=wide) / arch.head_dim)
    if scaling is not None:
        rate = _scaled(rate, scaling, arch)
    angle = positions[..., None, None].astype(wide) * rate
    factor = 1.0 if scaling is None else scaling.attention_factor
    return Rotation(jnp.cos(angle) * factor, jnp.sin(angle) * factor)


def _dynamic_growth(positions: Int[Array, "B T"], head_dim: int, scaling: RopeScaling, dtype: DTypeLike) -> Array:
    """Returns the number [B, 1, 1, 1] that ``dynamic`` multiplies the base by: 1 up to the original length."""
    length = jnp.max(positions, axis=1)[:, None, None, None] + 1
    excess = jnp.maximum(length.astype(dtype) / scaling.original_len - 1, 0)
    # A head of two dimensions has a single frequency, which does not depend on the base.
    return (1 + scaling.factor * excess) ** (head_dim / max(head_dim - 2, 1))


def _scaled(rate: Array, scaling: RopeScaling, arch: Architecture) -> Array:
    """Scales rotary frequencies down for a longer context, as transformers does for each kind."""
    if scaling.kind == "dynamic":
        return rate
    if scaling.kind == "linear":
        return rate / scaling.factor
    if scaling.kind == "llama3":
        turns = scaling.original_len * rate / (2 * jnp.pi)  # rotations within the original context length
        low, high = scaling.low_freq_factor, scaling.high_freq_factor
        kept = jnp.clip((turns - low) / (high - low), 0.0, 1.0)  # 1: so fast that it is not scaled
    else:
        first, last = _yarn_range(scaling, arch)
        kept = 1 - jnp.clip((jnp.arange(rate.shape[-1], dtype=rate.dtype) - first) / (last - first), 0.0, 1.0)
    return (1 - kept) * rate / scaling.factor + kept * rate


def _yarn_range(scaling: RopeScaling, arch: Architecture) -> tuple[float, float]:
    """Returns the pairs of dimensions between which ``yarn`` goes over from unscaled to scaled frequencies."""

    def pair(turns: float) -> float:
        """Returns the pair of dimensions, as a fraction too, that turns this often within the original length."""
        ratio = scaling.original_len / (turns * 2 * math.pi)
        return arch.head_dim * math.log(ratio) / (2 * math.log(arch.rope_theta))

    first, last = pair(scaling.beta_fast), pair(scaling.beta_slow)
    if scaling.truncate:
        first, last = math.floor(first), math.ceil(last)
    first, last = float(max(first, 0)), float(min(last, arch.head_dim - 1))
    return first, last if first != last else last + 0.001


def rotate(x: Float[Array, "B T N H"], rotation: Rotation) -> Float[Array, "B T N H"]:
    """Rotates the two halves of each head against each other."""
    first, second = jnp.split(x.astype(rotation.cos.dtype), 2, axis=-1)
    cos, sin = rotation
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)
