"""Computes attention with Splash, JAX's Pallas kernel for TPUs, which never holds all scores of a row.

It compiles for a TPU only; ``interpret`` runs the same kernel step by step anywhere, for tests.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernel
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks
from jaxtyping import Float

from jaxblock.models.attention.mask import Mask
from jaxblock.parallel.collectives import per_device

LANES = 128
"""The width of the kernel's tiles; sequence lengths and head sizes are padded to multiples of it."""

_LONGEST_TILE = 512


def attend(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S G H"],
    v: Float[Array, "B S G H"],
    mask: Mask,
    *,
    interpret: bool = False,
) -> Float[Array, "B T N H"]:
    """Computes scaled dot-product attention under a bidirectional mask (see ``backends.attend``).

    Segment ids tell the kernel which keys are visible: visible keys are in the queries' segment, hidden keys and padding
    in another. Each device runs the kernel on its own rows and heads.

    Args:
        q: the queries, rotated.
        k: the keys, rotated; N is a multiple of G.
        v: the values.
        mask: which keys a query sees.
        interpret: run the kernel step by step, without a TPU.

    Returns:
        The attended values, in the queries' type.
    """
    (_, width, _, head_dim), keys = q.shape, k.shape[1]
    q = q * head_dim**-0.5
    q, k, v = (_padded(x.swapaxes(1, 2)) for x in (q, k, v))
    visible = jnp.pad(mask.visible_keys(keys), ((0, 0), (0, k.shape[2] - keys))).astype(jnp.int32)
    rows, heads = ("batch", "heads", None, None), ("batch", "kv_heads", None, None)
    run = per_device(partial(_run, interpret=interpret), (rows, heads, heads, ("batch", None)), rows)
    return run(q, k, v, visible).swapaxes(1, 2)[:, :width, :, :head_dim]


def _padded(x: Array) -> Array:
    """Pads the length and the width of heads [B, N, T, H] with zeros to multiples of the tile."""
    pad = [(0, -size % LANES) if axis >= 2 else (0, 0) for axis, size in enumerate(x.shape)]
    return jnp.pad(x, pad)


def _run(q: Array, k: Array, v: Array, visible: Array, *, interpret: bool) -> Array:
    """Runs the kernel on one device's rows and heads."""
    (_, heads, queries, _), keys = q.shape, k.shape[2]
    by_query, by_key = _tile(queries), _tile(keys)
    tiles = kernel.BlockSizes(
        block_q=by_query,
        block_kv=by_key,
        block_kv_compute=by_key,
        block_q_dkv=by_query,
        block_kv_dkv=by_key,
        block_kv_dkv_compute=by_key,
        block_q_dq=by_query,
        block_kv_dq=by_key,
    )
    everything = masks.MultiHeadMask([masks.FullMask((queries, keys)) for _ in range(heads)])
    one = kernel.make_splash_mha(everything, block_sizes=tiles, head_shards=1, q_seq_shards=1, interpret=interpret)

    def row(q: Array, k: Array, v: Array, visible: Array) -> Array:
        return one(q, k, v, segment_ids=kernel.SegmentIds(jnp.ones(queries, jnp.int32), visible))

    return jax.vmap(row)(q, k, v, visible)


def _tile(size: int) -> int:
    """Returns the longest tile, in positions, that divides a padded length."""
    return max(tile for tile in range(LANES, min(size, _LONGEST_TILE) + 1, LANES) if size % tile == 0)
