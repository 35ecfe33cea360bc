"""Attention: every backend is the plain softmax, and the mask hides what it says."""

from __future__ import annotations

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxblock.models.attention import splash
from jaxblock.models.attention.backends import attend, backend_of
from jaxblock.models.attention.mask import Mask
from jaxblock.parallel import rules
from jaxblock.parallel.mesh import make_mesh

B, T = 2, 9


@pytest.mark.parametrize("heads, groups", [(4, 4), (4, 2), (4, 1)])
def test_attention_backends_agree(heads, groups):
    """Against a loop over rows and heads in NumPy, for every grouping of keys and values."""
    draw = np.random.default_rng(0)
    q, k, v = (draw.normal(size=(B, T, n, 8)).astype(np.float32) for n in (heads, groups, groups))
    length = np.array([9, 4], np.int32)
    want = np.zeros_like(q)
    for b in range(B):
        for n in range(heads):
            g, seen = n * groups // heads, length[b]
            score = np.exp(q[b, :, n] @ k[b, :seen, g].T / np.sqrt(8))
            want[b, :, n] = score / score.sum(-1, keepdims=True) @ v[b, :seen, g]
    for backend in ("xla", "reference"):
        got = jax.jit(attend, static_argnums=4)(q, k, v, Mask(jnp.asarray(length)), backend)
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5, err_msg=backend)


@pytest.mark.parametrize("heads, groups, queries", [(4, 2, 9), (2, 2, 3)])
def test_splash_attention_is_the_oracles(heads, groups, queries):
    """Run step by step, in value and gradient, on one device and split over rows and heads."""
    draw = np.random.default_rng(0)
    shapes = (4, queries, heads, 8), (4, 9, groups, 8), (4, 9, groups, 8)
    given = tuple(jnp.asarray(draw.normal(size=shape), jnp.float32) for shape in shapes)
    length = jnp.asarray([9, 4, 1, 7], jnp.int32)

    def both(f):
        return jax.jit(jax.value_and_grad(lambda qkv: jnp.sum(jnp.sin(f(*qkv)))))

    want = both(lambda *qkv: attend(*qkv, Mask(length), "reference"))(given)
    kernel = both(lambda *qkv: splash.attend(*qkv, Mask(length), interpret=True))
    mesh = make_mesh(2, 2, 2)
    with jax.set_mesh(mesh):
        split = kernel(jax.device_put(given, rules.sharding(mesh, "batch")))
    for got in (kernel(given), split):
        chex.assert_trees_all_close(got, want, rtol=1e-5, atol=1e-5)


def test_fused_kernels_are_for_sixteen_bits_and_backends_are_the_platforms():
    """float32 means float32: the kernels, which would multiply in 16 bits, are not used for it (nor for a causal mask)."""
    assert [backend_of(p) for p in ("tpu", "gpu", "cuda", "cpu")] == ["splash", "cudnn", "cudnn", "xla"]
    q, length = jnp.ones((1, 4, 2, 8)), jnp.asarray([3], jnp.int32)
    for backend in ("splash", "cudnn"):
        jax.jit(attend, static_argnums=4)(q, q, q, Mask(length), backend)
        with pytest.raises((ValueError, RuntimeError)):  # neither a TPU nor a GPU is here
            small = q.astype(jnp.bfloat16)
            jax.jit(attend, static_argnums=4)(small, small, small, Mask(length), backend)


@pytest.mark.parametrize(
    "kind, n_queries, seen",
    [
        ("bidirectional", 2, [["11100", "11100"], ["10000", "10000"]]),
        ("causal", 5, [["10000", "11000"], ["10000"] * 2]),
    ],
)
def test_the_mask_by_hand(kind, n_queries, seen):
    dense = Mask(jnp.asarray([3, 1]), kind).dense(n_queries, 5)
    for row, wanted in zip(dense, seen, strict=True):
        assert ["".join(str(int(key)) for key in query) for query in row[:2]] == wanted
