"""Computes attention with JAX's composition of XLA operations, for every platform, type and mask."""

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
    """Computes scaled dot-product attention (see ``backends.attend``); the softmax is in float32 for every type."""
    length = mask.length.astype(jnp.int32)  # JAX accepts only int32 lengths here; with x64 they are int64
    with jax.default_matmul_precision(matmul_precision(q)):
        return jax.nn.dot_product_attention(
            q, k, v, is_causal=mask.kind == "causal", key_value_seq_lengths=length, implementation="xla"
        )
