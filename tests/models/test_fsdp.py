"""Products with stated exchanges between devices, against the plain products that leave these to the compiler."""

import dataclasses
import itertools
from functools import partial

import chex
import jax
import numpy as np
import pytest

from jaxblock.models.linear import lora
from jaxblock.models.linear.fsdp import Split, matmul
from jaxblock.models.linear.lora import Lora
from jaxblock.models.transformer import Transformer
from jaxblock.parallel import rules
from jaxblock.parallel.mesh import make_mesh
from jaxblock.types import Params, View
from tests.models.networks import make_arch, make_view, random_params

ARCH, SEEN = make_arch(), make_view([6] * 8, [3, 4], 32)
NETWORKS = {
    "chunks, remat": Transformer(ARCH, loss_chunk=1, remat="full"),
    "adapters on int8": Transformer(ARCH, lora=Lora(8, 8.0, 0.0, ("blocks/q", "blocks/down")), quantize="int8"),
}
"""tests/training/test_sharding.py has tied embeddings, ordinary adapters and other meshes."""


@partial(jax.jit, static_argnums=0)
@partial(jax.value_and_grad, argnums=1)
def loss(net: Transformer, trained: Params, frozen: Params, seen: View) -> jax.Array:
    params = lora.attach(frozen, trained)
    return net.nll(params, net.hidden(params, seen), seen.ids[:, :2]).sum()


@pytest.mark.parametrize("name", NETWORKS)
def test_both_kinds_of_products_agree_in_value_and_gradient(name):
    net, mesh = NETWORKS[name], make_mesh(data=2, fsdp=2, tensor=2)
    tables = [net.trainable, {} if net.lora is None else net.param_table]
    params = [random_params(table, seed) for seed, table in enumerate(tables)]
    plain = loss(dataclasses.replace(net, products="plain"), *params, SEEN)
    split = jax.device_put(params, [rules.param_shardings(mesh, table) for table in tables])
    with jax.set_mesh(mesh):
        stated = loss(net, *split, jax.device_put(SEEN, rules.sharding(mesh, "batch")))
    chex.assert_trees_all_close(stated, plain, rtol=2e-5, atol=2e-5)
    chex.assert_trees_all_equal_shapes_and_dtypes(stated, plain)


def test_the_gradient_of_a_product_is_that_of_plain_matmul():
    """For some draws of a batch at once, too. In bfloat16 the weight's sum over rows stays wide."""
    rng, cases = np.random.default_rng(0), list(itertools.product(("float32", "bfloat16"), ((), (3,))))
    shapes = [((*draws, 2, 9, 5), (5, 7), (*draws, 2, 9, 7)) for _, draws in cases]
    given = [tuple(rng.normal(size=shape).astype(np.float32) for shape in of_case) for of_case in shapes]
    given = [(x.astype(dtype), w, out.astype(dtype)) for (dtype, _), (x, w, out) in zip(cases, given, strict=True)]

    def product(x, w):
        one = lambda x: matmul(x, w, x.dtype, Split.of(("embed", "mlp")))  # noqa: E731
        return jax.vmap(one)(x) if x.ndim > 3 else one(x)

    pulled_back = jax.jit(lambda given: [jax.vjp(product, x, w)[1](out) for x, w, out in given])(given)
    for (dtype, _), (x, w, out), (dx, dw) in zip(cases, given, pulled_back, strict=True):
        assert (dx.dtype, dw.dtype) == (dtype, "float32")
        x, w, out = (a.astype(dtype).astype(np.float64) for a in (x, w, out))
        np.testing.assert_allclose(dw, x.reshape(-1, 5).T @ out.reshape(-1, 7), rtol=2e-6, atol=1e-5)
        rounding = 2e-6 if dtype == "float32" else 2**-8
        np.testing.assert_allclose(np.asarray(dx, np.float64), out @ w.T, rtol=rounding, atol=1e-5)
