"""Splash attention: JAX's Pallas kernel for TPUs, which never holds the scores of a whole row.

Compiled for a TPU only; ``interpret`` runs the same kernel step by step anywhere, for tests.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernel
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks
from jaxtyping import Float, Int

from jaxblock.parallel.collectives import per_device

LANES = 128
"""The kernel's tile: lengths and the head's width are padded to multiples of it."""
_LONGEST_TILE = 512


def attend(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S G H"],
    v: Float[Array, "B S G H"],
    length: Int[Array, " B"],
    *,
    interpret: bool = False,
) -> Float[Array, "B T N H"]:
    """Scaled dot-product attention of queries that are all visible over keys before ``length``.

    A key's visibility goes in as a segment: visible keys are of the queries' segment, the others (and the padding) of
    none. Each device runs the kernel on its own rows and heads.

    Args:
        q: queries, rotated.
        k: keys, rotated; N is a multiple of G.
        v: values.
        length: visible keys of each row, at least 1.
        interpret: run without a TPU.

    Returns:
        The attended values, in the queries' type.
    """
    (_, width, _, head_dim), keys = q.shape, k.shape[1]
    q = q * head_dim**-0.5
    q, k, v = (_padded(x.swapaxes(1, 2)) for x in (q, k, v))
    visible = (jnp.arange(k.shape[2]) < jnp.minimum(length, keys)[:, None]).astype(jnp.int32)
    rows, heads = ("batch", "heads", None, None), ("batch", "kv_heads", None, None)
    run = per_device(partial(_run, interpret=interpret), (rows, heads, heads, ("batch", None)), rows)
    return run(q, k, v, visible).swapaxes(1, 2)[:, :width, :, :head_dim]


def _padded(x: Array) -> Array:
    pad = [(0, -size % LANES) if axis >= 2 else (0, 0) for axis, size in enumerate(x.shape)]
    return jnp.pad(x, pad)


def _run(q: Array, k: Array, v: Array, visible: Array, *, interpret: bool) -> Array:
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
    return max(tile for tile in range(LANES, min(size, _LONGEST_TILE) + 1, LANES) if size % tile == 0)
