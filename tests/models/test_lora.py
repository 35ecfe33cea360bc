"""Adapters and int8: the branch is what a merged matrix does, names find their matrices, draws do not depend on layout."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

from jaxblock.errors import UserError
from jaxblock.models.architecture import Architecture
from jaxblock.models.families import registry
from jaxblock.models.linear import int8, lora
from jaxblock.models.linear.dense import dense
from jaxblock.models.linear.lora import Lora, LowRank
from jaxblock.models.spec import count_params, flatten, init_params, nest
from jaxblock.models.transformer import Transformer
from jaxblock.parallel import rules
from jaxblock.parallel.mesh import make_mesh
from jaxblock.types import Params, View

B, T = 4, 6
ARCH = Architecture(
    "dream", vocab_size=16, d_model=16, n_layers=2, n_heads=4, n_kv_heads=2, head_dim=4, mlp_dim=24, norm_eps=1e-6,
    rope_theta=100.0, max_len=64, tie_embeddings=False, mask_id=11, eos_id=10, pad_id=10, **registry.traits("dream"),
)  # fmt: skip
TABLE = registry.param_table(ARCH)
ALL = lora.resolve(TABLE, ["all"])


def view() -> View:
    ids = jnp.asarray(np.random.default_rng(0).integers(0, 16, (B, T)), jnp.int32)
    at = jnp.broadcast_to(jnp.asarray([2, 3], jnp.int32), (B, 2))
    whole = jnp.broadcast_to(jnp.arange(T, dtype=jnp.int32), (B, T))
    return View(ids, whole, jnp.asarray([6, 5, 6, 4], jnp.int32), at + 1, at, jnp.ones((B, 2), bool))


@pytest.fixture(scope="module")
def adapted() -> tuple[Transformer, Params]:
    """A network with random adapters (``b`` not zero, as after training) on every matrix."""
    net = Transformer(ARCH, lora=Lora(3, 6.0, 0.0, ALL))
    base = init_params(TABLE, 0, "float32")
    adapters = init_params(net.trainable, 1, "float32")
    filled = jax.tree.map(lambda x: 0.2 * jax.random.normal(jax.random.key(x.size), x.shape), adapters)
    return net, lora.attach(base, filled)


hidden = jax.jit(lambda net, params, view, keys=None: net.hidden(params, view, keys), static_argnums=0)


def test_a_branch_is_what_the_merged_matrix_does(adapted: tuple[Transformer, Params]) -> None:
    net, params = adapted
    merged = lora.merge(params, net.lora)
    assert merged.keys() == params.keys() - {"lora"}
    alone = dataclasses.replace(net, lora=None)
    want = hidden(alone, merged, view())
    np.testing.assert_allclose(hidden(net, params, view()), want, atol=2e-5)
    assert np.abs(want - hidden(alone, {k: v for k, v in params.items() if k != "lora"}, view())).max() > 0.05
    unrolled = dataclasses.replace(net, scan_layers=False)
    np.testing.assert_allclose(hidden(unrolled, params, view()), want, atol=2e-5)


def test_adapters_begin_as_nothing_and_only_b_has_a_gradient_then() -> None:
    net = Transformer(ARCH, lora=Lora(3, 6.0, 0.0, ALL), remat="dots")
    base, adapters = init_params(TABLE, 0, "bfloat16"), init_params(net.trainable, 1, "float32")
    assert all(
        spec.shape == leaf.shape for spec, leaf in zip(net.trainable.values(), flatten(adapters).values(), strict=True)
    )
    np.testing.assert_array_equal(
        hidden(net, lora.attach(base, adapters), view()), hidden(dataclasses.replace(net, lora=None), base, view())
    )
    grads = jax.jit(jax.grad(lambda own: hidden(net, lora.attach(base, own), view()).sum()))(adapters)
    for path, grad in flatten(grads).items():
        assert grad.dtype == jnp.float32
        assert bool(jnp.any(grad != 0)) == path.endswith("/b"), path


def test_dropout_depends_on_the_row_alone(adapted: tuple[Transformer, Params]) -> None:
    """Neither on its neighbours, nor on how rows are split over devices, nor on how layers are run."""
    net, params = adapted
    net = dataclasses.replace(net, lora=dataclasses.replace(net.lora, dropout=0.5))
    keys, seen = jax.random.split(jax.random.key(3), B), view()
    want = hidden(net, params, seen, keys)
    assert np.abs(want - hidden(net, params, seen)).max() > 0.05  # without keys nothing is dropped
    turned = hidden(net, params, jax.tree.map(lambda x: x[::-1], seen), keys[::-1])
    np.testing.assert_allclose(turned[::-1], want, atol=1e-5)
    unrolled = hidden(dataclasses.replace(net, scan_layers=False), params, seen, keys)
    np.testing.assert_allclose(unrolled, want, atol=1e-5)
    mesh = make_mesh(2, 2, 2)
    with jax.set_mesh(mesh):
        placed = jax.device_put((seen, keys), rules.sharding(mesh, "batch"))
        np.testing.assert_allclose(hidden(net, params, *placed), want, atol=1e-5)


def test_every_layer_and_matrix_drops_inputs_of_its_own(adapted: tuple[Transformer, Params]) -> None:
    net, params = adapted
    rows = jax.random.split(jax.random.key(3), B)
    keys = [
        np.asarray(jax.random.key_data(branch.keys)).tobytes()
        for layer in range(2)
        for branch in lora.layer_branches(
            net.lora, jax.tree.map(lambda x: x[0], params["lora"]["blocks"]), layer, rows
        ).values()
    ]
    assert len(set(keys)) == len(keys) == 2 * 7


def test_dropout_keeps_the_mean_and_drops_inputs_of_the_branch_alone() -> None:
    draw = np.random.default_rng(0)
    x, w, a, b = (jnp.asarray(draw.normal(size=s), jnp.float32) for s in ((2, 5), (5, 3), (5, 2), (2, 3)))
    keys = jax.random.split(jax.random.key(0), (4000, 2))
    out = jax.vmap(lambda k: dense(x, w, lora=LowRank(a, b, 2.0, 0.25, k)))(keys)
    branch = np.asarray(out) - np.asarray(x @ w)
    standard_error = branch.std(0) / 4000**0.5
    assert (np.abs(branch.mean(0) - np.asarray(x @ a @ b * 2)) < 5 * standard_error).all()
    # Every outcome is a subset of inputs, scaled by 1 / 0.75: 32 of them.
    subsets = np.array([[(i >> j) & 1 for j in range(5)] for i in range(32)])
    possible = (subsets * np.asarray(x)[0] / 0.75) @ np.asarray(a @ b) * 2
    nearest = np.abs(branch[:200, 0, None] - possible).max(-1).min(-1)
    assert nearest.max() < 1e-4


@pytest.mark.parametrize("family", ["llada", "dream"])
def test_names_find_every_intended_matrix(family: str) -> None:
    arch = dataclasses.replace(ARCH, family=family, qkv_bias=family == "dream")
    table = registry.param_table(arch)
    ours = ["q", "k", "v", "o", "gate", "up", "down"]
    assert lora.resolve(table, ours) == lora.resolve(table, ["all"]) == tuple(f"blocks/{n}" for n in ours)
    peft = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    if family == "llada":
        with pytest.raises(UserError, match=r"'o_proj' matches no matrix.*attn_out"):
            lora.resolve(table, peft)
        found = lora.resolve(table, peft, "ignore")
        assert found == ("blocks/q", "blocks/k", "blocks/v", "blocks/up")  # what the paper's names really adapt
        with pytest.raises(UserError, match="none of 'o_proj'"):
            lora.resolve(table, ["o_proj"], "ignore")
    else:
        assert lora.resolve(table, peft) == lora.resolve(table, ["all"])


def test_the_papers_adapters_have_as_many_parameters_as_the_paper_script_trains() -> None:
    sizes = dict(vocab_size=126464, d_model=4096, n_layers=32, n_heads=32, n_kv_heads=32, head_dim=128, mlp_dim=12288)
    arch = dataclasses.replace(ARCH, family="llada", qkv_bias=False, **sizes)
    table = registry.param_table(arch)
    names = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    paper = Lora(256, 512.0, 0.05, lora.resolve(table, names, "ignore"))
    assert count_params(lora.adapter_table(table, paper)) == 335_544_320


def test_int8_is_near_and_halves_the_matrices(adapted: tuple[Transformer, Params]) -> None:
    _, params = adapted
    base = {name: leaf for name, leaf in params.items() if name != "lora"}
    flat = {}
    for path, leaf in flatten(base).items():
        if int8.quantised(TABLE[path]):
            numbers, scale = int8.quantise(jnp.array(leaf))
            assert (np.abs(numbers * scale[:, None, :] - leaf) <= scale[:, None, :] * 0.5001).all()
            assert np.abs(np.asarray(numbers)).max() == 127
            flat |= {path: numbers, path + int8.SCALE: scale}
        else:
            flat[path] = leaf
    net = Transformer(ARCH, quantize="int8")
    assert {p: (x.shape, x.dtype.name) for p, x in flat.items()} == {
        p: (s.shape, s.dtype or "float32") for p, s in net.param_table.items()
    }
    got = hidden(net, nest(flat), view())
    want = hidden(Transformer(ARCH), base, view())
    assert 0 < np.abs(got - want).max() < 0.05 * np.abs(want).max()
    # The oracle: the same whole numbers as ordinary weights.
    whole = {
        p: x * flat[p + int8.SCALE][:, None, :] if int8.quantised(TABLE[p]) else x
        for p, x in flat.items()
        if p in TABLE
    }
    np.testing.assert_allclose(got, hidden(Transformer(ARCH), nest(whole), view()), atol=2e-5)


def test_adapters_on_int8_have_the_gradients_of_adapters_on_the_same_weights(
    adapted: tuple[Transformer, Params],
) -> None:
    net, params = adapted
    flat, whole = {}, {}
    for path, leaf in flatten({k: v for k, v in params.items() if k != "lora"}).items():
        flat[path] = whole[path] = leaf
        if int8.quantised(TABLE[path]):
            numbers, scale = int8.quantise(jnp.array(leaf))
            flat |= {path: numbers, path + int8.SCALE: scale}
            whole[path] = numbers * scale[:, None, :]

    def gradient(net: Transformer, base: Params) -> jax.Array:
        loss = lambda own: jnp.sum(jnp.sin(net.hidden(lora.attach(base, own), view())))  # noqa: E731
        return ravel_pytree(jax.jit(jax.grad(loss))(params["lora"]))[0]

    got = gradient(dataclasses.replace(net, quantize="int8"), nest(flat))
    np.testing.assert_allclose(got, gradient(net, nest(whole)), rtol=1e-4, atol=1e-4)
