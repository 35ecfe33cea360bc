"""The network: its attention, remat policies and ways to run layers agree, and its parameters are those of its table."""

import dataclasses
import re
from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxblock import build
from jaxblock.cli import config_of, parse
from jaxblock.models.architecture import RopeScaling
from jaxblock.models.config import ModelConfig
from jaxblock.models.families import registry
from jaxblock.models.layers import Block, param_name
from jaxblock.models.linear import lora
from jaxblock.models.linear.lora import Lora
from jaxblock.models.numerics import look_up
from jaxblock.models.spec import ParamSpec, abstract_params, flatten, init_params, matmul_flops_per_token
from jaxblock.models.transformer import Transformer
from jaxblock.types import Part
from tests.models.networks import make_arch, make_view, random_params

ARCH, SEEN = make_arch(vocab_size=13), make_view([9, 7], [[3, 4, 5], [2, 3, 4]], 13)
PARAMS, A, T = random_params(registry.param_table(ARCH)), 3, 9


def loss_and_hidden(net, params, view):
    hidden = net.hidden(params, view)
    return net.nll(params, hidden, view.ids[:, :A]).sum(), hidden


@partial(jax.jit, static_argnums=0)
def value_and_grad(net, params, view):
    """Returns (the loss, the hidden states, the gradient)."""
    (value, hidden), grad = jax.value_and_grad(loss_and_hidden, argnums=1, has_aux=True)(net, params, view)
    return value, hidden, grad


PLAIN = Transformer(ARCH, attention="reference", scan_layers=False)
"""The slow, obvious way: reference attention, layers unrolled, nothing recomputed."""


@pytest.fixture(scope="module")
def plain():
    return jax.device_get(value_and_grad(PLAIN, PARAMS, SEEN))


@pytest.mark.parametrize(
    "variant",
    [
        dict(attention="xla", remat="full", loss_chunk=2),
        dict(attention="xla", scan_layers=True, remat="dots"),
        dict(scan_layers=True, remat="offload"),
        dict(places=((1, 9), (1, 7))),  # the rows side by side in a line, each at its own width
    ],
    ids=lambda variant: " ".join(map(str, variant.values())),
)
def test_variants_agree_in_value_and_gradient(plain, variant):
    got = value_and_grad(dataclasses.replace(PLAIN, **variant), PARAMS, SEEN)
    chex.assert_trees_all_close(got, plain, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize(
    ("layers", "d", "platform", "scans"),
    [(8, 512, "cpu", False), (8, 512, "tpu", True), (17, 512, "cpu", True), (8, 16, "cpu", True)],
)
def test_layers_are_unrolled_where_that_is_faster(layers, d, platform, scans):
    """On a CPU, if there are few and not tiny; a flag may choose."""
    arch = make_arch(n_layers=layers, d_model=d)
    assert build.network(arch, ModelConfig(), platform=platform).scan_layers == scans
    for flag, chosen in (("--model.scan_layers", True), ("--model.no_scan_layers", False)):
        model = config_of(parse("train", [flag])).model
        assert build.network(arch, model, platform=platform).scan_layers is chosen


def test_tied_embeddings_are_the_untied_network_with_both_uses_summed():
    one = {name: leaf for name, leaf in PARAMS.items() if name != "head"}
    value, hidden, grad = jax.device_get(value_and_grad(PLAIN, one | {"head": one["embed"].T}, SEEN))
    tied = dataclasses.replace(PLAIN, arch=make_arch(vocab_size=13, tie_embeddings=True))
    assert tied.param_table.keys() == PLAIN.param_table.keys() - {"head"}
    grad["embed"] = grad["embed"] + grad.pop("head").T
    chex.assert_trees_all_close(value_and_grad(tied, one, SEEN), (value, hidden, grad), rtol=2e-5, atol=2e-5)


def test_head_on_the_active_block_is_a_slice_of_all_logits(plain):
    value, hidden, _ = plain

    @jax.jit
    def both(params, view, hidden):
        return PLAIN.all_logits(params, view.ids, view.positions, view.length), PLAIN.logits(params, hidden)

    whole, logits = jax.device_get(both(PARAMS, SEEN, hidden))
    block = np.take_along_axis(whole, SEEN.at[..., None], axis=1)
    np.testing.assert_allclose(logits, block, rtol=1e-5, atol=1e-5)
    chosen = np.take_along_axis(block, SEEN.ids[:, :A, None], axis=-1)[..., 0] - np.log(np.exp(block).sum(-1))
    np.testing.assert_allclose(-chosen.sum(), value, rtol=1e-5)


def test_what_is_not_visible_does_not_matter_and_what_is_does():
    """Bidirectional over the visible keys: the last visible token reaches the first hidden state."""
    run = jax.jit(Transformer(ARCH).hidden)
    hidden = run(PARAMS, SEEN)
    beyond, last = SEEN.ids.copy(), SEEN.ids.copy()
    beyond[1, 7:], last[1, 6] = 3, (last[1, 6] + 1) % 13
    np.testing.assert_array_equal(hidden, run(PARAMS, SEEN._replace(ids=beyond)))
    assert (np.abs(run(PARAMS, SEEN._replace(ids=last)) - hidden)[1].max(-1) > 1e-4).all()
    moved = run(PARAMS, SEEN._replace(positions=SEEN.positions + 5))
    np.testing.assert_allclose(moved, hidden, atol=1e-5)  # rotary positions are relative


def test_the_table_is_the_modules_parameters():
    for arch in (ARCH, make_arch(vocab_size=13, tie_embeddings=True), make_arch(n_kv_heads=4)):
        table = registry.param_table(arch)
        layer = {p.removeprefix("blocks/"): s for p, s in table.items() if s.stacked}
        module = nnx.eval_shape(lambda layer=layer, arch=arch: Block(arch, layer, "xla"))
        state = {param_name(path): leaf.shape for path, leaf in nnx.to_flat_state(nnx.state(module))}
        assert state == {name: spec.shape[1:] for name, spec in layer.items()}
        params = jax.eval_shape(lambda table=table: init_params(table, 0, "float32"))
        assert {path: leaf.shape for path, leaf in flatten(params).items()} == {p: s.shape for p, s in table.items()}
        assert params == abstract_params(table, "float32")
        assert {p for p, s in table.items() if not s.is_matrix} == {"final_norm", "blocks/attn_norm", "blocks/mlp_norm"}


def test_every_parameter_is_used(plain):
    for path, grad in flatten(plain[2]).items():
        used = grad.reshape(len(grad), -1).any(-1)
        assert used.any() if path in ("embed", "final_norm") else used.all(), path


def test_initialisation_follows_the_table(monkeypatch):
    arch = make_arch(d_model=64, n_heads=8, head_dim=8, n_kv_heads=8, mlp_dim=128, vocab_size=512)
    table = registry.param_table(arch) | {"zeros": ParamSpec((3, 2), (None, None), 0.0, "")}
    params = jax.device_get(init_params(table, 0, "float32"))
    for path, values in flatten(params).items():
        spec = table[path]
        if not spec.std:
            assert (values == (spec.std is None)).all()
            continue
        for layer, own in enumerate(values if spec.stacked else [values]):
            scale = spec.std / np.sqrt(layer + 1) if spec.depth_scaled else spec.std
            # Cut at three deviations, a normal keeps 0.9866 of its deviation.
            assert abs(own.std() / scale / 0.9866 - 1) < 0.05 and np.abs(own).max() <= 3.001 * scale, path
    # A parameter's weights depend on the seed, not on the others of its table.
    one = {"embed": table["embed"]}
    assert (params["embed"] == init_params(one, 0, "float32")["embed"]).all()
    assert (params["embed"] != init_params(one, 1, "float32")["embed"]).any()
    # A large network's are drawn one by one: the same weights. (A table of its own, so that it is compiled anew.)
    monkeypatch.setattr("jaxblock.models.spec._DRAWN_AT_ONCE", 0)
    del params["zeros"], table["zeros"]
    chex.assert_trees_all_equal(params, jax.device_get(init_params(table, 0, "float32")))


@pytest.mark.parametrize("stored", ["float32", "bfloat16"])
def test_the_gradient_of_a_lookup_is_summed_in_float32(stored):
    """Thousands of one token, as of the mask: in bfloat16 their sum would stop at 256 terms."""
    table = np.arange(12).astype(stored).reshape(4, 3)
    ids = np.array([[2] * 4095 + [1]] * 2, np.int32)

    def loss(table):
        rows = jax.vmap(lambda rows: look_up(table, rows, "bfloat16"))(ids)
        return rows.astype(jnp.float32).sum(), rows

    grad, rows = jax.jit(jax.grad(loss, has_aux=True))(table)
    assert (np.asarray(rows) == table[ids].astype(rows.dtype)).all() and rows.dtype == jnp.bfloat16
    want = np.array([0, 2, 2 * 4095, 0])[:, None] * np.ones((4, 3))
    assert grad.dtype == stored
    np.testing.assert_array_equal(grad, want.astype(stored))
    # Looking up alone, as decoding does, takes nothing for a gradient.
    forward = jax.jit(look_up, static_argnums=2).lower(table, ids, "bfloat16")
    assert forward.as_text().count('"stablehlo.gather"(') == 1


def traced(remat, dtype="float32"):
    """Returns the gradient's program as text, not compiled."""
    net = Transformer(ARCH, remat=remat, dtype=dtype)
    return str(jax.make_jaxpr(jax.grad(lambda p: loss_and_hidden(net, p, jax.tree.map(jnp.asarray, SEEN))[0]))(PARAMS))


def test_remat_still_sees_the_products_and_offload_the_layers_inputs():
    """``dots`` saves what matmuls gave: it must recompute fewer of them than ``full``.

    Without the name that its policy looks for, ``offload`` would send nothing to the host, and no value would tell.
    """
    none, dots, full = (traced(remat).count("dot_general") for remat in ("none", "dots", "full"))
    assert none <= dots < full
    text = traced("offload", "bfloat16")
    assert f"{ARCH.n_layers},2,{T},{ARCH.d_model}" in re.findall(r"bf16<host>\[([\d,]+)\]", text)


def test_bfloat16_compute_keeps_float32_outputs(plain):
    low = dataclasses.replace(PLAIN, dtype="bfloat16", attention="xla")

    @jax.jit
    def outputs(params, view):
        params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
        hidden = low.hidden(params, view)
        return hidden, low.logits(params, hidden), low.nll(params, hidden, view.ids[:, :A])

    hidden, *wide = outputs(PARAMS, SEEN)
    assert hidden.dtype == jnp.bfloat16 and all(x.dtype == jnp.float32 for x in wide)
    np.testing.assert_allclose(hidden.astype(np.float32), plain[1], atol=0.15)


def test_flops_count_the_matrices_and_attention():
    table = registry.param_table(ARCH)
    per_layer = 16 * 16 + 2 * 16 * 8 + 16 * 16 + 3 * 16 * 24
    forward = matmul_flops_per_token(table, ARCH, context=T)
    assert forward == 2 * (2 * per_layer + 13 * 16 + 2 * 2 * T * 16)
    assert matmul_flops_per_token(table, ARCH, T, head=False) == forward - 2 * 13 * 16


def test_a_missing_or_unknown_weight_is_an_error():
    """A bias that a checkpoint lacks must not be taken for none."""
    biased = abstract_params(registry.param_table(make_arch(qkv_bias=True)), "float32")
    for bias, params in ((True, PARAMS), (False, biased)):
        with pytest.raises(ValueError, match=r"missing or unknown: \['k_bias', 'q_bias', 'v_bias'\]"):
            jax.eval_shape(Transformer(make_arch(qkv_bias=bias)).hidden, params, SEEN)


CACHED = {
    "norms of queries and keys": (dict(family="qwen3", qk_norm=True), dict(scan_layers=False)),
    "rotations that depend on the length": (
        dict(family="llama", rope_scaling=RopeScaling("dynamic", 2.0, original_len=4)),
        dict(scan_layers=True),
    ),
    "biases, adapters on int8": (
        dict(family="dream"),
        dict(scan_layers=True, quantize="int8", lora=Lora(2, 4.0, 0.0, ("blocks/k", "blocks/v", "blocks/down"))),
    ),
    "rows in memory order of heads": (dict(n_kv_heads=4), dict(scan_layers=False, attention="reference")),
}


@pytest.mark.parametrize("sizes, how", CACHED.values(), ids=CACHED)
def test_a_pass_beside_a_cache_that_is_not_stale_is_a_full_pass(sizes, how):
    """Rows of three lengths, a part that begins elsewhere in each and in one goes beyond the canvas; then all positions anew."""
    net = Transformer(make_arch(vocab_size=13, **sizes), **how)
    params = random_params(net.param_table)
    if net.lora is not None:
        params = lora.attach(params, random_params(net.trainable, 1))
    seen = make_view([9, 7, 6], [[3, 4], [2, 3], [5, 5]], 13)
    size = 6

    @jax.jit
    def run(params, seen, other):
        first = jnp.array([2, 0, 4], jnp.int32)
        ids = jnp.take_along_axis(seen.ids, jnp.minimum(first[:, None] + jnp.arange(size), T - 1), axis=1)
        exact, cache = net.refresh(params, seen)
        beside = net.update(params, Part(ids, first, seen.length, seen.at - first[:, None]), cache)
        anew = net.update(params, Part(other.ids, 0 * first, other.length, other.at), cache)
        return net.hidden(params, seen), exact, beside, net.hidden(params, other), anew

    full, exact, beside, changed, anew = jax.device_get(run(params, seen, seen._replace(ids=seen.ids[:, ::-1])))
    chex.assert_trees_all_close((exact, beside, anew), (full, full, changed), rtol=2e-5, atol=2e-5)
    assert np.abs(full - changed).max() > 0.1
