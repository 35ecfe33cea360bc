"""Computes attention with cuDNN's fused kernel for NVIDIA GPUs, which never holds all scores of a row; 16-bit types only."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float

from jaxblock.models.attention.mask import Mask


def attend(
    q: Float[Array, "B T N H"], k: Float[Array, "B S G H"], v: Float[Array, "B S G H"], mask: Mask
) -> Float[Array, "B T N H"]:
    """Computes scaled dot-product attention under a bidirectional mask (see ``backends.attend``)."""
    length = mask.length.astype(jnp.int32)  # JAX accepts only int32 lengths here; with x64 they are int64
    return jax.nn.dot_product_attention(q, k, v, key_value_seq_lengths=length, implementation="cudnn")
