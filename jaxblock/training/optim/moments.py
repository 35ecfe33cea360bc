"""Stores Adam's moments in float32, bfloat16 or 8 bits; the arithmetic on them is float32.

The 8-bit format follows the idea of Dettmers et al. (2022, "8-bit Optimizers via Block-wise Quantization"): one scale
per row (along the last axis) and codes with a wide range, here in equal ratios, eight codes per factor of two. The
first moment has a sign and 127 magnitudes (a range of 2^16), the second 256 magnitudes (a range of 2^32, so that its root
has a range of 2^16). Rounding to bfloat16 and to 8 bits is stochastic. With rounding to the nearest, a second moment would
stop changing where its change per step, a share of (1 - b2), is less than half the distance to the next code: with
b2 = 0.999 in bfloat16 and with b2 = 0.95 in 8 bits.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import optax
from jax import Array
from jaxtyping import Float, UInt

from jaxblock.training.optim.config import Storage
from jaxblock.training.optim.precision import path_name, random_bits, stochastic_bfloat16
from jaxblock.types import Params

PER_OCTAVE = 8
"""The number of codes per factor of two; neighbouring codes differ by 9%."""


class Quantised(NamedTuple):
    """Holds a tensor stored in 8 bits.

    Attributes:
        codes: one code for each element, in the tensor's shape; int8 where values have a sign, uint8 where they have none.
        scale: the largest magnitude of each row, float32 [..., 1].
    """

    codes: Array
    scale: Array


def quantise_moment(x: Float[Array, "..."], bits: UInt[Array, "..."], *, signed: bool) -> Quantised:
    """Stores a tensor in 8 bits per element and a scale per row, unbiased; the largest element of a row stays exact.

    Args:
        x: the tensor, float32, with at least one axis; not negative where ``signed`` is False.
        bits: random bits, one number for each element; the low 16 bits are used.
        signed: use int8 codes with a sign and a zero. Otherwise use uint8 codes without a zero: smaller values are raised to
            the smallest magnitude, since a second moment of 0 would make the update infinite.
    """
    chex.assert_equal_shape([x, bits])
    chex.assert_type(x, jnp.float32)
    top = 127 if signed else 255
    scale = jnp.max(jnp.abs(x), axis=-1, keepdims=True)
    share = jnp.abs(x) / jnp.where(scale > 0, scale, 1.0)
    below = jnp.clip(jnp.floor(top + PER_OCTAVE * jnp.log2(share)), 0, top - 1)
    low, high = _magnitude(below, top, signed), _magnitude(below + 1, top, signed)
    chance = (share - low) / (high - low)
    code = below + ((bits & 0xFFFF).astype(jnp.float32) * 2.0**-16 < chance)
    if signed:
        return Quantised((jnp.sign(x) * code).astype(jnp.int8), scale)
    return Quantised(code.astype(jnp.uint8), scale)


def dequantise_moment(stored: Quantised) -> Float[Array, "..."]:
    """Returns the float32 values that codes and scales stand for."""
    signed = stored.codes.dtype == jnp.int8
    code = stored.codes.astype(jnp.float32)
    sign = jnp.sign(code) if signed else 1.0
    return sign * stored.scale * _magnitude(jnp.abs(code), 127 if signed else 255, signed)


def _magnitude(code: Array, top: int, signed: bool) -> Array:
    value = jnp.exp2((code - top) / PER_OCTAVE)
    return jnp.where(code > 0, value, 0.0) if signed else value


class MomentFormat(NamedTuple):
    """Holds the functions that store a moment and load it again.

    Attributes:
        zeros: makes the stored moment before the first update from a float32 parameter.
        load: returns the float32 values of a stored moment.
        store: stores float32 values, rounded by random bits.
    """

    zeros: Callable[[Array], Any]
    load: Callable[[Any], Array]
    store: Callable[[Array, Array], Any]


def moment_format(storage: Storage, *, signed: bool) -> MomentFormat:
    """Returns the format of a moment: the first moment is signed, the second is not."""
    if storage == "int8":

        def zeros(p: Array) -> Quantised:
            codes = jnp.zeros(p.shape, jnp.int8 if signed else jnp.uint8)
            return Quantised(codes, jnp.zeros((*p.shape[:-1], 1), jnp.float32))

        return MomentFormat(zeros, dequantise_moment, lambda x, bits: quantise_moment(x, bits, signed=signed))
    if storage == "bfloat16":
        return MomentFormat(
            lambda p: jnp.zeros(p.shape, jnp.bfloat16),
            lambda stored: stored.astype(jnp.float32),
            lambda x, bits: stochastic_bfloat16(x, bits).astype(jnp.bfloat16),
        )
    return MomentFormat(lambda p: jnp.zeros(p.shape, p.dtype), lambda stored: stored, lambda x, bits: x)


class MomentumState(NamedTuple):
    """Holds the number of updates and their running mean, a tree with the parameters' structure."""

    step: Array
    mu: Any


def momentum(b1: float, storage: Storage, seed: int) -> optax.GradientTransformation:
    """Makes the bias-corrected running mean of updates, which follows Adafactor's scaling.

    Args:
        b1: the decay of the mean.
        storage: the type that the mean is stored in. Updates must be float32.
        seed: the seed of the stochastic rounding.
    """
    mean = moment_format(storage, signed=True)

    def update(updates: Params, state: MomentumState, params: Params | None = None) -> tuple[Params, MomentumState]:
        step = state.step + 1
        found = jax.tree.map(lambda u, mu: b1 * mean.load(mu) + (1 - b1) * u, updates, state.mu)

        def write(path: Any, m: Array) -> Any:
            return mean.store(m, random_bits(seed, state.step, f"momentum/{path_name(path)}", m.shape))

        unbias = 1 - b1 ** step.astype(jnp.float32)
        mu = jax.tree_util.tree_map_with_path(write, found)
        return jax.tree.map(lambda m: m / unbias, found), MomentumState(step, mu)

    return optax.GradientTransformation(
        lambda params: MomentumState(jnp.zeros((), jnp.int32), jax.tree.map(mean.zeros, params)), update
    )
