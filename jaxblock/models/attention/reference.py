"""Computes attention as a plain softmax over a dense matrix of scores in float32 or wider; other backends are tested by it."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float

from jaxblock.models.attention.mask import Mask
from jaxblock.models.numerics import at_least_float32


def attend(
    q: Float[Array, "B T N H"], k: Float[Array, "B S G H"], v: Float[Array, "B S G H"], mask: Mask
) -> Float[Array, "B T N H"]:
    """Computes scaled dot-product attention (see ``backends.attend``)."""
    groups = q.shape[2] // k.shape[2]
    wide = at_least_float32(q.dtype)
    k, v = jnp.repeat(k, groups, axis=2), jnp.repeat(v, groups, axis=2)
    scores = jnp.einsum("btnh,bsnh->bnts", q.astype(wide), k.astype(wide), precision="highest") * q.shape[-1] ** -0.5
    scores = jnp.where(mask.dense(q.shape[1], k.shape[1])[:, None], scores, -jnp.inf)
    weights = jax.nn.softmax(scores, axis=-1)
    return jnp.einsum("bnts,bsnh->btnh", weights, v.astype(wide), precision="highest").astype(q.dtype)
