"""Bidirectional attention over a row's visible keys: one function, several backends, one oracle.

With one active block per row the mask is only a key length, so no backend is ever handed a dense mask.
"""

from __future__ import annotations

from typing import Literal

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Int

from jaxblock.models.config import Backend


def backend_of(platform: str) -> Backend:
    """The fastest backend of a platform (``cpu``, ``gpu``, ``cuda``, ``tpu``)."""
    by_platform: dict[str, Backend] = {"tpu": "splash", "gpu": "cudnn", "cuda": "cudnn"}
    return by_platform.get(platform, "xla")


def attend(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S G H"],
    v: Float[Array, "B S G H"],
    length: Int[Array, " B"],
    backend: Backend,
    *,
    causal: bool = False,
) -> Float[Array, "B T N H"]:
    """Scaled dot-product attention; keys at or after ``length`` are hidden.

    Args:
        q: queries, rotated.
        k: keys, rotated; N is a multiple of G.
        v: values.
        length: visible keys of each row, at least 1.
        backend: ``xla`` leaves the layout to JAX; ``splash`` (TPU) and ``cudnn`` (NVIDIA) are fused kernels, which hold no
            matrix of scores and are used for 16-bit types alone; ``reference`` is the plain float32 softmax, the oracle.
        causal: hide keys after each query too (T = S): for comparing with an autoregressive origin.

    Returns:
        The attended values, in the queries' type.
    """
    # JAX's own takes its softmax in float32 whatever the type, so float64 (proofs) is left to the oracle.
    if backend == "reference" or q.dtype == jnp.float64:
        return _reference(q, k, v, length, causal)
    # The kernels multiply in 16 bits whatever they are given: float32 means float32.
    fused = backend != "xla" and q.dtype.itemsize == 2 and not causal
    if fused and backend == "splash":
        from jaxblock.models.attention import splash  # half a second, for TPUs alone

        return splash.attend(q, k, v, length)
    return _dot_product(q, k, v, length, causal, "cudnn" if fused else "xla")


def _reference(q: Array, k: Array, v: Array, length: Array, causal: bool) -> Array:
    groups = q.shape[2] // k.shape[2]
    wide = jnp.promote_types(q.dtype, jnp.float32)
    k, v = jnp.repeat(k, groups, axis=2), jnp.repeat(v, groups, axis=2)
    scores = jnp.einsum("btnh,bsnh->bnts", q.astype(wide), k.astype(wide), precision="highest") * q.shape[-1] ** -0.5
    visible = jnp.arange(k.shape[1]) < length[:, None]
    visible = visible[:, None, None, :]
    if causal:
        visible = visible & jnp.tril(jnp.ones(scores.shape[-2:], bool))
    scores = jnp.where(visible, scores, -jnp.inf)
    weights = jax.nn.softmax(scores, axis=-1)
    return jnp.einsum("bnts,bsnh->btnh", weights, v.astype(wide), precision="highest").astype(q.dtype)


def _dot_product(q: Array, k: Array, v: Array, length: Array, causal: bool, kind: Literal["xla", "cudnn"]) -> Array:
    precision = "highest" if q.dtype == jnp.float32 else "default"
    with jax.default_matmul_precision(precision):
        length = length.astype(jnp.int32)  # the only type it takes; 64-bit mode makes int64
        return jax.nn.dot_product_attention(
            q, k, v, is_causal=causal, key_value_seq_lengths=length, implementation=kind
        )
