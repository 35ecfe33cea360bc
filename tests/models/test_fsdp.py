"""Products with stated exchanges between devices, against the plain products that leave these to the compiler."""

import dataclasses
import functools
import itertools
from functools import partial
from typing import Any

import chex
import jax
import jax.numpy as jnp
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
MESHES = {"rows": dict(data=8), "fsdp": dict(data=1, fsdp=8), "all axes": dict(data=2, fsdp=2, tensor=2)}
ADAPTERS = Lora(8, 8.0, 0.0, ("blocks/q", "blocks/down"))
NETWORKS = {
    "chunks, remat": Transformer(ARCH, loss_chunk=1, remat="full"),
    "tied": Transformer(dataclasses.replace(ARCH, tie_embeddings=True)),
    "adapters": Transformer(ARCH, lora=ADAPTERS),
    "adapters on int8": Transformer(ARCH, lora=ADAPTERS, quantize="int8"),
}
# The last mesh splits over every axis. tests/training/test_sharding.py has tied embeddings.
FAST = [("chunks, remat", "all axes"), ("adapters on int8", "all axes")]
GRID = [
    pytest.param(*case, id="-".join(case), marks=() if case in FAST else pytest.mark.slow)
    for case in itertools.product(NETWORKS, MESHES)
]


@partial(jax.jit, static_argnums=0)
@partial(jax.value_and_grad, argnums=1)
def loss(net: Transformer, trained: Params, frozen: Params, seen: View) -> jax.Array:
    params = lora.attach(frozen, trained)
    return net.nll(params, net.hidden(params, seen), seen.ids[:, :2]).sum()


@functools.cache
def weights_and_oracle(name: str) -> tuple[Params, Params, Any]:
    """Returns what is trained of a network, what is frozen beneath it, and what plain products give on one device."""
    net = NETWORKS[name]
    trained = random_params(net.trainable, 1)
    frozen = {} if net.lora is None else random_params(net.param_table)
    return trained, frozen, loss(dataclasses.replace(net, products="plain"), trained, frozen, SEEN)


@pytest.mark.parametrize(("network", "mesh"), GRID)
def test_both_kinds_of_products_agree_in_value_and_gradient(network, mesh):
    net, over = NETWORKS[network], make_mesh(**MESHES[mesh])
    trained, frozen, plain = weights_and_oracle(network)
    split = jax.device_put(trained, rules.param_shardings(over, net.trainable))
    split_frozen = jax.device_put(frozen, rules.param_shardings(over, net.param_table)) if frozen else frozen
    with jax.set_mesh(over):
        stated = loss(net, split, split_frozen, jax.device_put(SEEN, rules.sharding(over, "batch")))
    chex.assert_trees_all_close(stated, plain, rtol=2e-5, atol=2e-5)
    chex.assert_trees_all_equal_shapes_and_dtypes(stated, plain)


def test_the_gradient_of_a_product_is_that_of_plain_matmul():
    """In bfloat16 the oracle is float32's: products of two bfloat16 are exact there, and the weight's sum stays wide."""
    rng, cases = np.random.default_rng(0), list(itertools.product(("float32", "bfloat16"), ((), (3,))))

    def gradients(product, x, w, cotangent):
        def loss(x, w):
            of_draw = lambda part: product(part, w, x.dtype, Split.of(("embed", "mlp")))  # noqa: E731
            return jnp.vdot(cotangent, (jax.vmap(of_draw) if x.ndim > 3 else of_draw)(x), precision="highest")

        return jax.grad(lambda x, w: loss(x, w).astype(jnp.float32), argnums=(0, 1))(x, w)

    def plain(x, w, out, _):
        return jnp.matmul(x, w, precision="highest", preferred_element_type=out)

    @jax.jit
    def both(given):
        return [
            (
                gradients(matmul, x.astype(dtype), w, cotangent.astype(dtype)),
                gradients(plain, *(a.astype(dtype).astype(jnp.float32) for a in (x, w, cotangent))),
            )
            for (dtype, _), (x, w, cotangent) in zip(cases, given, strict=True)
        ]

    shapes = [((*draws, 2, 9, 5), (5, 7), (*draws, 2, 9, 7)) for _, draws in cases]
    given = [[rng.normal(size=shape).astype(np.float32) for shape in of_case] for of_case in shapes]
    for (dtype, _), ((dx, dw), (exact_x, exact_w)) in zip(cases, both(given), strict=True):
        assert (dx.dtype, dw.dtype) == (dtype, "float32")
        np.testing.assert_allclose(dw, exact_w, rtol=2e-6, atol=1e-5)
        rounding = 2e-6 if dtype == "float32" else 2**-8
        np.testing.assert_allclose(dx.astype(np.float32), exact_x, rtol=rounding, atol=1e-5)
