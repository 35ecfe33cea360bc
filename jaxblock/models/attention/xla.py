"""Attention as JAX composes it of XLA's own operations, for every platform, type and mask."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float

from jaxblock.models.attention.mask import Mask
from jaxblock.models.numerics import matmul_precision


def attend(
    q: Float[Array, "B T N H"], k: Float[Array, "B S G H"], v: Float[Array, "B S G H"], mask: Mask
) -> Float[Array, "B T N H"]:
    """Computes scaled dot-product attention (see ``backends.attend``); the softmax is in float32 whatever the type."""
    length = mask.length.astype(jnp.int32)  # the only type that JAX takes here; 64-bit mode makes int64
    with jax.default_matmul_precision(matmul_precision(q)):
        return jax.nn.dot_product_attention(
            q, k, v, is_causal=mask.kind == "causal", key_value_seq_lengths=length, implementation="xla"
        )
