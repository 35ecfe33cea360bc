"""Computes attention over a row's visible keys with one of several backends."""

from __future__ import annotations

import chex
import jax.numpy as jnp
from jax import Array
from jax.typing import DTypeLike
from jaxtyping import Float

from jaxblock.models.attention import cudnn, reference, xla
from jaxblock.models.attention.mask import Mask, MaskKind
from jaxblock.models.config import Backend
from jaxblock.models.lines import by_width, join_lines, split_lines


def backend_of(platform: str) -> Backend:
    """Returns the fastest backend for a platform (``cpu``, ``gpu``, ``cuda``, ``tpu``)."""
    by_platform: dict[str, Backend] = {"tpu": "splash", "gpu": "cudnn", "cuda": "cudnn"}
    return by_platform.get(platform, "xla")


def serving(backend: Backend, dtype: DTypeLike, kind: MaskKind) -> Backend:
    """Returns the backend that is used for a type and a kind of mask: this one, or the one that replaces it there."""
    # The other backends compute the softmax in float32 for every type, so float64 (for proofs) needs the reference.
    if backend == "reference" or dtype == jnp.float64:
        return "reference"
    # The kernels multiply in 16 bits for every type, but we promise float32 products for float32.
    return backend if jnp.dtype(dtype).itemsize == 2 and kind == "bidirectional" else "xla"


def attend(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S G H"],
    v: Float[Array, "B S G H"],
    mask: Mask,
    backend: Backend,
) -> Float[Array, "B T N H"]:
    """Computes scaled dot-product attention.

    Args:
        q: the queries, rotated.
        k: the keys, rotated; N is a multiple of G.
        v: the values.
        mask: which keys a query sees. Where it has places, each line is split into its rows.
        backend: ``xla`` is JAX's own attention. ``splash`` (TPU) and ``cudnn`` (NVIDIA) are fused kernels, which hold no
            matrix of scores; ``xla`` replaces them where they do not apply. ``reference`` is a plain float32 softmax.

    Returns:
        The attended values, in the queries' type.
    """
    if mask.places:
        split = [split_lines(x, mask.places) for x in (q, k, v)]
        lengths = by_width(mask.length, mask.places)
        rows = zip(*split, lengths, strict=True)
        return join_lines([attend(q, k, v, Mask(n, mask.kind), backend) for q, k, v, n in rows], mask.places)
    chex.assert_rank([q, k, v], 4)
    chex.assert_equal_shape([k, v])
    chex.assert_is_divisible(q.shape[2], k.shape[2])
    chex.assert_shape(mask.length, q.shape[:1])
    backend = serving(backend, q.dtype, mask.kind)
    if backend == "reference":
        return reference.attend(q, k, v, mask)
    if backend == "xla":
        return xla.attend(q, k, v, mask)
    if backend == "cudnn":
        return cudnn.attend(q, k, v, mask)
    from jaxblock.models.attention import splash  # imported here: it takes half a second, and only TPUs need it

    return splash.attend(q, k, v, mask)
