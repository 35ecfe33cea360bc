"""Adapters and int8: names find their matrices, draws do not depend on layout, int8 is near."""

import dataclasses
from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxblock.errors import UserError
from jaxblock.models.families import registry
from jaxblock.models.linear import int8, lora
from jaxblock.models.linear.dense import dense
from jaxblock.models.linear.lora import Lora, LowRank
from jaxblock.models.spec import count_params, flatten, nest
from jaxblock.models.transformer import Transformer
from jaxblock.parallel import rules
from jaxblock.parallel.mesh import make_mesh
from jaxblock.types import Params, View
from tests.models.networks import make_arch, make_view, random_params

ARCH, SEEN = make_arch("dream", vocab_size=16), make_view([6, 5, 6, 4], [3, 4], 16)
TABLE = registry.param_table(ARCH)
NET = Transformer(ARCH)
ADAPTED = Transformer(ARCH, lora=Lora(3, 6.0, 0.0, lora.resolve(TABLE, ["all"])))
BASE, ADAPTERS = random_params(TABLE), random_params(ADAPTED.trainable, 1)
hidden = jax.jit(lambda net, params, view, keys=None: net.hidden(params, view, keys), static_argnums=0)


@partial(jax.jit, static_argnums=0)
@partial(jax.grad, argnums=2)
def gradient(net: Transformer, base: Params, own: Params, view: View) -> jax.Array:
    """Returns the gradient of a loss with respect to the adapters."""
    return jnp.sum(jnp.sin(net.hidden(lora.attach(base, own), view)))


def test_dropout_depends_on_the_row_alone():
    """Neither on its neighbours, nor on how rows are split over devices, nor on how layers are run."""
    net = dataclasses.replace(ADAPTED, lora=Lora(3, 6.0, 0.5, ("blocks/q", "blocks/down")))
    params = lora.attach(BASE, ADAPTERS)
    keys = jax.random.split(jax.random.key(3), 4)
    want = hidden(net, params, SEEN, keys)
    assert np.abs(want - hidden(ADAPTED, params, SEEN)).max() > 0.05
    turned = hidden(net, params, jax.tree.map(lambda x: x[::-1], SEEN), keys[::-1])
    np.testing.assert_allclose(turned[::-1], want, atol=1e-5)
    mesh = make_mesh(2, 2, 2)
    with jax.set_mesh(mesh):
        placed = jax.device_put((SEEN, keys), rules.sharding(mesh, "batch"))
        net = dataclasses.replace(net, scan_layers=False)
        for split in (params, net.unstacked(params)):
            np.testing.assert_allclose(hidden(net, split, *placed), want, atol=1e-5)


def test_every_layer_and_matrix_drops_inputs_of_its_own():
    @jax.jit
    def drawn(rows: jax.Array) -> list[jax.Array]:
        one = jax.tree.map(lambda x: x[0], ADAPTERS["blocks"])
        layers = [lora.layer_branches(ADAPTED.lora, one, layer, rows) for layer in range(2)]
        return [jax.random.key_data(branch.keys) for layer in layers for branch in layer.values()]

    keys = [np.asarray(key).tobytes() for key in drawn(jax.random.split(jax.random.key(3), 4))]
    assert len(set(keys)) == len(keys) == 2 * 7


def test_dropout_keeps_the_mean_and_drops_inputs_of_the_branch_alone():
    draw = np.random.default_rng(0)
    x, w, a, b = (draw.normal(size=s).astype(np.float32) for s in ((2, 5), (5, 3), (5, 2), (2, 3)))
    many = jax.jit(jax.vmap(lambda x, w, a, b, k: dense(x, w, lora=LowRank(a, b, 2.0, 0.25, k)), (None,) * 4 + (0,)))
    branch = np.asarray(many(x, w, a, b, jax.random.split(jax.random.key(0), (4000, 2)))) - x @ w
    standard_error = branch.std(0) / 4000**0.5
    assert (np.abs(branch.mean(0) - x @ a @ b * 2) < 5 * standard_error).all()
    # Every outcome is a subset of inputs, scaled by 1 / 0.75: 32 of them.
    subsets = np.array([[(i >> j) & 1 for j in range(5)] for i in range(32)])
    possible = (subsets * x[0] / 0.75) @ (a @ b) * 2
    assert np.abs(branch[:200, 0, None] - possible).max(-1).min(-1).max() < 1e-4


def test_int8_is_near_and_the_network_of_its_whole_numbers():
    flat = flatten(BASE)
    matrices = {path: flat[path] for path in flat if int8.quantised(TABLE[path])}
    quantised = jax.device_get(jax.jit(lambda matrices: jax.tree.map(int8.quantise, matrices))(matrices))
    stored, numbers = dict(flat), dict(flat)  # the base in int8, and the same whole numbers as ordinary weights
    for path, (whole, scale) in quantised.items():
        stored |= {path: whole, path + int8.SCALE: scale}
        numbers[path] = whole * scale[:, None, :]
        assert (np.abs(numbers[path] - flat[path]) <= scale[:, None, :] * 0.5001).all() and np.abs(whole).max() == 127
    small, whole = nest(stored), nest(numbers)
    net = Transformer(ARCH, quantize="int8")
    shapes = {path: (spec.shape, spec.dtype or "float32") for path, spec in net.param_table.items()}
    assert {path: (x.shape, x.dtype.name) for path, x in flatten(small).items()} == shapes
    got, want = hidden(net, small, SEEN), hidden(NET, BASE, SEEN)
    assert 0 < np.abs(got - want).max() < 0.05 * np.abs(want).max()
    np.testing.assert_allclose(got, hidden(NET, whole, SEEN), atol=2e-5)
    # Adapters have the same gradients on either.
    on_int8 = gradient(dataclasses.replace(ADAPTED, quantize="int8"), small, ADAPTERS, SEEN)
    chex.assert_trees_all_close(on_int8, gradient(ADAPTED, whole, ADAPTERS, SEEN), rtol=1e-4, atol=1e-4)


OURS = ["q", "k", "v", "o", "gate", "up", "down"]
PEFT = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def test_names_find_every_intended_matrix():
    every = tuple(f"blocks/{name}" for name in OURS)
    llada = registry.param_table(dataclasses.replace(ARCH, family="llada", qkv_bias=False))
    for table in (TABLE, llada):
        assert lora.resolve(table, OURS) == lora.resolve(table, ["all"]) == every
    assert lora.resolve(TABLE, PEFT) == every
    with pytest.raises(UserError, match=r"'o_proj' matches no matrix.*attn_out"):
        lora.resolve(llada, PEFT)
    with pytest.raises(UserError, match="none of 'o_proj'"):
        lora.resolve(llada, ["o_proj"], "ignore")
    found = lora.resolve(llada, PEFT, "ignore")
    assert found == ("blocks/q", "blocks/k", "blocks/v", "blocks/up")  # what the paper's names really adapt
    # The paper's adapters have as many parameters as the paper's script trains.
    sizes = dict(vocab_size=126464, d_model=4096, n_layers=32, n_heads=32, n_kv_heads=32, head_dim=128, mlp_dim=12288)
    arch = dataclasses.replace(ARCH, family="llada", qkv_bias=False, **sizes)
    paper = lora.adapter_table(registry.param_table(arch), Lora(256, 512.0, 0.05, found))
    assert count_params(paper) == 335_544_320
