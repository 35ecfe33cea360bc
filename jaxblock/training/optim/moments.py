"""Adam's moments in few bits: float32 arithmetic on moments that are kept in bfloat16 or in 8 bits.

8 bits follow Dettmers et al. (2022, "8-bit Optimizers via Block-wise Quantization") in idea: one scale per row (along
the last axis) and codes with a wide range, here spaced by equal ratios, eight to a factor of two. The first moment has
a sign and 127 magnitudes (a range of 2^16), the second 256 magnitudes (2^32, so that its root spans as much).
Rounding is stochastic for both types. Rounded to the nearest, a second moment that changes by (1 - b2) a step would
not change at all once that is below half a spacing: with b2 = 0.999 for bfloat16, with b2 = 0.95 for 8 bits.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array
from jaxtyping import Float, UInt

from jaxblock.training.optim.config import Storage
from jaxblock.training.optim.precision import path_name, random_bits, stochastic_bfloat16
from jaxblock.types import Params

PER_OCTAVE = 8
"""Codes to a factor of two: neighbours differ by 9%."""


class Quantised(NamedTuple):
    """A tensor in 8 bits.

    Attributes:
        codes: of the tensor's shape; int8 where values have a sign, uint8 where they have none.
        scale: float32, the largest magnitude of each row; shape [..., 1].
    """

    codes: Array
    scale: Array


def quantise(x: Float[Array, "..."], bits: UInt[Array, "..."], *, signed: bool) -> Quantised:
    """8 bits per element and a scale per row; unbiased, the largest of a row exact.

    Args:
        x: float32, at least one axis; not negative where ``signed`` is False.
        bits: random; the low 16 bits of each are used.
        signed: int8 codes with a zero, else uint8 codes without: what is below the smallest is kept as the smallest,
            for a second moment that vanished would send the update to infinity.
    """
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


def dequantise(stored: Quantised) -> Float[Array, "..."]:
    """The float32 values that codes and scales stand for."""
    signed = stored.codes.dtype == jnp.int8
    code = stored.codes.astype(jnp.float32)
    sign = jnp.sign(code) if signed else 1.0
    return sign * stored.scale * _magnitude(jnp.abs(code), 127 if signed else 255, signed)


def _magnitude(code: Array, top: int, signed: bool) -> Array:
    value = jnp.exp2((code - top) / PER_OCTAVE)
    return jnp.where(code > 0, value, 0.0) if signed else value


class Kept(NamedTuple):
    """How a moment is kept.

    Attributes:
        zeros: from a parameter in float32 to its first moment, as it is kept.
        read: from what is kept to float32.
        write: from float32 and random bits to what is kept.
    """

    zeros: Callable[[Array], Any]
    read: Callable[[Any], Array]
    write: Callable[[Array, Array], Any]


def kept(storage: Storage, *, signed: bool) -> Kept:
    """How a moment is kept under a storage; ``signed`` for the first, not for the second."""
    if storage == "int8":

        def zeros(p: Array) -> Quantised:
            codes = jnp.zeros(p.shape, jnp.int8 if signed else jnp.uint8)
            return Quantised(codes, jnp.zeros((*p.shape[:-1], 1), jnp.float32))

        return Kept(zeros, dequantise, lambda x, bits: quantise(x, bits, signed=signed))
    if storage == "bfloat16":
        return Kept(
            lambda p: jnp.zeros(p.shape, jnp.bfloat16),
            lambda kept: kept.astype(jnp.float32),
            lambda x, bits: stochastic_bfloat16(x, bits).astype(jnp.bfloat16),
        )
    return Kept(lambda p: jnp.zeros(p.shape, p.dtype), lambda kept: kept, lambda x, bits: x)


class MomentumState(NamedTuple):
    """A running mean over the parameters' paths."""

    step: Array
    mu: Any


def momentum(b1: float, storage: Storage, seed: int) -> optax.GradientTransformation:
    """The bias-corrected running mean of updates (what follows Adafactor's scaling).

    Args:
        b1: decay.
        storage: of the mean. Updates must be float32.
        seed: of the rounding.
    """
    mean = kept(storage, signed=True)

    def update(updates: Params, state: MomentumState, params: Params | None = None) -> tuple[Params, MomentumState]:
        step = state.step + 1
        found = jax.tree.map(lambda u, mu: b1 * mean.read(mu) + (1 - b1) * u, updates, state.mu)

        def write(path: Any, m: Array) -> Any:
            return mean.write(m, random_bits(seed, state.step, f"momentum/{path_name(path)}", m.shape))

        unbias = 1 - b1 ** step.astype(jnp.float32)
        mu = jax.tree_util.tree_map_with_path(write, found)
        return jax.tree.map(lambda m: m / unbias, found), MomentumState(step, mu)

    return optax.GradientTransformation(
        lambda params: MomentumState(jnp.zeros((), jnp.int32), jax.tree.map(mean.zeros, params)), update
    )
