"""Numbers of few bits: what is computed in float32, and how a result is rounded to bfloat16 without a bias.

A bfloat16 has 8 significant bits. Rounding to the nearest loses every change below 1/512 of a weight, which at a
fine-tuning learning rate is nearly all of them; stochastic rounding keeps each in expectation (Gupta et al., 2015,
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


def wide(tree: Any) -> Any:
    """Every leaf in float32, or as wide as it is where that is wider."""
    return jax.tree.map(lambda leaf: leaf.astype(jnp.promote_types(leaf.dtype, jnp.float32)), tree)


def global_norm(tree: Any) -> Array:
    """The norm over all leaves, summed in float32 whatever they are stored in."""
    return optax.tree.norm(wide(tree))


_PURPOSE = zlib.crc32(b"rounding")  # the same seed draws masks and weights, from keys of their own


def clip_share(grads: Any, limit: float) -> Array | float:
    """min(1, limit / (norm + 1e-6)), what ``torch.nn.utils.clip_grad_norm_`` multiplies gradients by; 0 never clips."""
    return jnp.minimum(1.0, limit / (global_norm(grads) + 1e-6)) if limit > 0 else 1.0


def random_bits(
    seed: int, step: Array, path: str, shape: tuple[int, ...], layer: Array | None = None
) -> UInt[Array, "..."]:
    """32 random bits per element: a function of (seed, step, path) and the element's indices alone.

    Each element's indices are hashed (the finaliser of MurmurHash3) under a key of jax.random. It costs a few integer
    operations that fuse into what uses them, where jax.random.bits would hold several arrays of the parameter's size;
    and it does not depend on how the array is split over devices.

    Args:
        seed: of the whole run.
        step: the update.
        path: which tensor.
        shape: of the result.
        layer: the result is this slice of axis 0 of a tensor with one more axis; None for the whole tensor.
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
    """One of the two bfloat16 numbers around x, the nearer the likelier, so that the mean is x.

    Args:
        x: float32.
        bits: random; the low 16 bits of each are used.

    Returns:
        float32 that bfloat16 holds exactly. What bfloat16 holds already stays, and so do infinities and NaN.
    """
    raw = jax.lax.bitcast_convert_type(x, jnp.uint32) + (bits & 0xFFFF)
    rounded = jax.lax.bitcast_convert_type(raw & jnp.uint32(0xFFFF0000), jnp.float32)
    # A GPU's NaN is all ones: the sum would carry it over to -0.
    return jnp.where(jnp.isfinite(x), rounded, x)


def rounded_update(weight: Array, change: Array, bits: Array) -> Array:
    """The change after which a bfloat16 weight is one of the two neighbours of weight + change, the nearer likelier.

    Args:
        weight: the bfloat16 weight, in float32.
        change: float32.
        bits: random.
    """
    return stochastic_bfloat16(weight + change, bits) - weight


class RoundingState(NamedTuple):
    """How many updates were rounded: which random bits come next."""

    step: Array


def round_parameters(seed: int) -> optax.GradientTransformation:
    """The last link of an optimizer: updates after which bfloat16 parameters are rounded stochastically.

    The update u of a parameter p becomes (p + u rounded) - p, so that ``optax.apply_updates``, which rounds p plus the
    update to the nearest, finds the number that was drawn. Parameters of other types pass through.

    Args:
        seed: of the random bits.
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
    """A tree path as the tables write it: ``blocks/q``."""
    return jax.tree_util.keystr(path, simple=True, separator="/")
