"""Computes attention to keys and values that an earlier pass kept, some of which the positions computed now replace."""

from __future__ import annotations

import jax.numpy as jnp
from jax import Array
from jax.typing import DTypeLike
from jaxtyping import Float, Int

from jaxblock.models.attention import xla
from jaxblock.models.attention.backends import attend, serving
from jaxblock.models.attention.mask import Mask
from jaxblock.models.config import Backend
from jaxblock.parallel.rules import constrain
from jaxblock.types import KeysValues


def keep(k: Float[Array, "B S G H"], v: Float[Array, "B S G H"], backend: Backend) -> KeysValues:
    """Returns the keys and values of a pass in the form that ``attend_beside`` reads."""
    if _joins(backend, k.dtype):
        return KeysValues(*(constrain(leaf, "batch", "kv_heads", None, None) for leaf in xla.keep(k, v)))
    return KeysValues(*(constrain(leaf, "batch", None, "kv_heads", None) for leaf in (k, v)))


def attend_beside(
    q: Float[Array, "B T N H"],
    new: KeysValues,
    kept: KeysValues,
    first: Int[Array, " B"],
    mask: Mask,
    backend: Backend,
) -> Float[Array, "B T N H"]:
    """Computes scaled dot-product attention, where new keys and values replace some of those that were kept.

    The backend ``xla`` attends to both. The others, kernels and ``reference`` by which it is tested, attend to one array, a copy
    in which the new ones have replaced the old.

    Args:
        q: the queries, rotated.
        new: the keys, rotated, and values of Q consecutive canvas positions [B, Q, G, H].
        kept: what ``keep`` returned, of all canvas positions.
        first: the canvas position of each row's first new key; new ones that would lie past the canvas are not seen.
        mask: which canvas positions are seen; it is bidirectional.
        backend: the backend (see ``backends.attend``).
    """
    if _joins(backend, q.dtype):
        return xla.attend_beside(q, new, kept, first, mask)
    k, v = (overlay(old, leaf, first) for old, leaf in zip(kept, new, strict=True))
    return attend(q, k, v, mask, backend)


def overlay(
    kept: Float[Array, "B S G H"], new: Float[Array, "B Q G H"], first: Int[Array, " B"]
) -> Float[Array, "B S G H"]:
    """Replaces each row's positions from ``first`` on by new ones; those that would lie past the end are dropped."""
    at = jnp.arange(kept.shape[1]) - first[:, None]
    here = jnp.clip(at, 0, new.shape[1] - 1)
    moved = jnp.take_along_axis(new, here[..., None, None], axis=1)
    return jnp.where((at == here)[..., None, None], moved, kept)


def _joins(backend: Backend, dtype: DTypeLike) -> bool:
    """Says whether new and kept keys are attended to side by side."""
    return serving(backend, dtype, "bidirectional") == "xla"
