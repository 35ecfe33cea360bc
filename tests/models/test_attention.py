"""Attention: every backend is the plain softmax, and the mask hides what it says."""

import itertools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxblock.models.attention import beside, splash
from jaxblock.models.attention.backends import attend, backend_of
from jaxblock.models.attention.mask import Mask
from jaxblock.parallel import rules
from jaxblock.parallel.mesh import make_mesh
from jaxblock.types import KeysValues

B, T = 2, 9


def test_attention_backends_agree():
    """Against a loop over rows and heads in NumPy, for every grouping of keys and values and every kind of mask."""
    draw, length = np.random.default_rng(0), np.array([9, 4], np.int32)
    arrays = [[draw.normal(size=(B, T, n, 8)).astype(np.float32) for n in (4, g, g)] for g in (4, 2, 1)]
    cases = list(itertools.product(range(3), ("bidirectional", "causal"), ("xla", "reference")))

    @jax.jit
    def every(arrays, length):
        return [attend(*arrays[at], Mask(length, kind), backend) for at, kind, backend in cases]

    for (at, kind, _), found in zip(cases, every(arrays, length), strict=True):
        q, k, v = arrays[at]
        want = np.zeros_like(q)
        for b, t, n in np.ndindex(B, T, 4):
            g, seen = n * k.shape[2] // 4, min(length[b], t + 1) if kind == "causal" else length[b]
            score = np.exp(q[b, t, n] @ k[b, :seen, g].T / np.sqrt(8))
            want[b, t, n] = score / score.sum() @ v[b, :seen, g]
        np.testing.assert_allclose(found, want, rtol=1e-5, atol=1e-5)


def test_new_keys_take_the_places_of_kept_ones():
    """Against plain attention to one array, for every grouping: inside it, across its end, and beyond what is visible."""
    draw, (length, first) = np.random.default_rng(0), np.array([[9, 4, 9], [7, 3, 2]], np.int32)
    arrays = [[draw.normal(size=(3, t, n, 8)).astype("f4") for t, n in ((2, 4), (T, g), (3, g))] for g in (4, 2, 1)]
    cases = []
    for q, kept, new in arrays:
        whole = np.concatenate([kept, kept[:, :3]], axis=1)
        for row, at in enumerate(first):
            whole[row, at : at + 3] = new[row]
        cases.append((q, *((leaf, leaf + 1) for leaf in (whole[:, :T], kept, new))))

    @jax.jit
    def every(cases, first, length):
        mask = Mask(length)
        want = [attend(q, *whole, mask, "reference") for q, whole, _, _ in cases]

        def kept_and_new(q, _, kept, new, name):
            return beside.attend_beside(q, KeysValues(*new), beside.keep(*kept, name), first, mask, name)

        return want, [[kept_and_new(*case, name) for case in cases] for name in ("xla", "reference")]

    want, got = every(cases, first, length)
    for found in got:
        chex.assert_trees_all_close(found, want, rtol=1e-5, atol=1e-5)


def test_splash_attention_is_the_oracles():
    """Run step by step, in value and gradient, on one device and split over rows and heads, with fewer queries than keys."""
    draw = np.random.default_rng(0)
    given = tuple(draw.normal(size=shape).astype(np.float32) for shape in ((4, 3, 4, 8), (4, 9, 2, 8), (4, 9, 2, 8)))
    length = jnp.asarray([9, 4, 1, 7], jnp.int32)

    def both(f):
        return jax.jit(jax.value_and_grad(lambda qkv, mask: jnp.sum(jnp.sin(f(*qkv, mask)))))

    want = both(lambda *qkvm: attend(*qkvm, "reference"))(given, Mask(length))
    kernel = both(lambda *qkvm: splash.attend(*qkvm, interpret=True))
    mesh = make_mesh(2, 2, 2)
    with jax.set_mesh(mesh):
        split = kernel(*jax.device_put((given, Mask(length)), rules.sharding(mesh, "batch")))
    for got in (kernel(given, Mask(length)), split):
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
