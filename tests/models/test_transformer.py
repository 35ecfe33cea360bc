"""The network: its attention, remat policies and ways to run layers agree, and its parameters are those of its table."""

from __future__ import annotations

import dataclasses
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.flatten_util import ravel_pytree

from jaxblock.models.architecture import Architecture
from jaxblock.models.families import registry
from jaxblock.models.layers import Block, param_name
from jaxblock.models.numerics import look_up
from jaxblock.models.spec import abstract_params, count_params, flatten, init_params, matmul_flops_per_token
from jaxblock.models.transformer import Transformer
from jaxblock.types import View

B, T, A = 2, 9, 3
SIZES = dict(vocab_size=13, d_model=16, n_layers=2, n_heads=4, n_kv_heads=2, head_dim=4, mlp_dim=24)
REST = dict(norm_eps=1e-5, rope_theta=100.0, max_len=64, mask_id=11, eos_id=10, pad_id=10)


def make_arch(tied=False, **changes):
    return Architecture("llada", tie_embeddings=tied, **{**SIZES, **REST, **changes})


# One program a table, where op by op would be dozens.
init = jax.jit(lambda arch, seed: init_params(registry.param_table(arch), seed, "float32"), static_argnums=(0, 1))


def make_view(seed=0):
    draw = np.random.default_rng(seed)
    active = jnp.asarray([[3, 4, 5], [2, 3, 4]], jnp.int32)
    return View(
        ids=jnp.asarray(draw.integers(0, 13, (B, T)), jnp.int32),
        positions=jnp.broadcast_to(jnp.arange(T, dtype=jnp.int32), (B, T)),
        length=jnp.asarray([9, 7], jnp.int32),
        active=active,
        at=active - 1,
        valid=jnp.ones((B, A), bool),
    )


def value_and_grad(net, params, view):
    targets = view.ids[:, :A]

    def loss(params):
        hidden = net.hidden(params, view)
        return net.nll(params, hidden, targets).sum(), hidden

    (value, hidden), grad = jax.jit(jax.value_and_grad(loss, has_aux=True))(params)
    return value, hidden, ravel_pytree(grad)[0]


@pytest.fixture(scope="module")
def plain():
    """The slow, obvious way: reference attention, layers unrolled, nothing recomputed."""
    net = Transformer(make_arch(), attention="reference", scan_layers=False)
    params = init(net.arch, 0)
    return net, params, value_and_grad(net, params, make_view())


VARIANTS = {
    "xla attention": dict(attention="xla", scan_layers=False),
    "scanned": dict(scan_layers=True),
    "scanned, dots": dict(attention="xla", scan_layers=True, remat="dots"),
    "unrolled, full": dict(scan_layers=False, remat="full"),
    "scanned, offload": dict(scan_layers=True, remat="offload"),
    "loss in chunks": dict(scan_layers=False, loss_chunk=2),
}


@pytest.mark.parametrize("name", VARIANTS)
def test_variants_agree_in_value_and_gradient(plain, name):
    net, params, want = plain
    got = value_and_grad(dataclasses.replace(net, **VARIANTS[name]), params, make_view())
    chex.assert_trees_all_close(got, want, rtol=2e-5, atol=2e-5)


def test_tied_embeddings_are_the_untied_network_with_both_uses_summed(plain):
    net, params, _ = plain
    both = params | {"head": params["embed"].T}
    value, hidden, grad = value_and_grad(net, both, make_view())
    grad = ravel_pytree(both)[1](grad)
    tied = dataclasses.replace(net, arch=make_arch(tied=True))
    assert tied.param_table.keys() == net.param_table.keys() - {"head"}
    one = {name: leaf for name, leaf in params.items() if name != "head"}
    got = value_and_grad(tied, one, make_view())
    want = {name: leaf for name, leaf in grad.items() if name != "head"} | {"embed": grad["embed"] + grad["head"].T}
    chex.assert_trees_all_close(got, (value, hidden, ravel_pytree(want)[0]), rtol=2e-5, atol=2e-5)


def test_head_on_the_active_block_is_a_slice_of_all_logits(plain):
    net, params, (value, hidden, _) = plain
    view = make_view()
    whole = jax.jit(net.all_logits)(params, view.ids, view.positions, view.length)
    block = jnp.take_along_axis(whole, view.at[..., None], axis=1)
    np.testing.assert_allclose(net.logits(params, hidden), block, rtol=1e-5, atol=1e-5)
    chosen = jnp.take_along_axis(jax.nn.log_softmax(block), view.ids[:, :A, None], axis=-1)
    np.testing.assert_allclose(-chosen.sum(), value, rtol=1e-5)


def test_what_is_not_visible_does_not_matter_and_what_is_does(plain):
    """Bidirectional over the visible keys: the last visible token reaches the first hidden state."""
    net, params, _ = plain
    view = make_view()
    net = dataclasses.replace(net, attention="xla")
    run = jax.jit(lambda view: net.hidden(params, view))
    hidden = run(view)
    beyond = run(view._replace(ids=view.ids.at[1, 7:].set(3)))
    np.testing.assert_array_equal(hidden, beyond)
    last = run(view._replace(ids=view.ids.at[1, 6].set((view.ids[1, 6] + 1) % 13)))
    assert (np.abs(last - hidden)[1].max(-1) > 1e-4).all()
    moved = run(view._replace(positions=view.positions + 5))
    np.testing.assert_allclose(moved, hidden, atol=1e-5)  # rotary positions are relative


def test_the_table_is_the_modules_parameters():
    for arch in (make_arch(), make_arch(tied=True), make_arch(n_kv_heads=4)):
        table = registry.param_table(arch)
        layer = {p.removeprefix("blocks/"): s for p, s in table.items() if s.stacked}
        module = nnx.eval_shape(lambda layer=layer, arch=arch: Block(arch, layer, "xla"))
        state = {param_name(path): leaf.shape for path, leaf in nnx.to_flat_state(nnx.state(module))}
        assert state == {name: spec.shape[1:] for name, spec in layer.items()}
        params = init(arch, 0)
        flat = flatten(params)
        assert {p: x.shape for p, x in flat.items()} == {p: s.shape for p, s in table.items()}
        assert jax.tree.map(jnp.shape, params) == jax.tree.map(lambda s: s.shape, abstract_params(table, "float32"))
        assert count_params(table) == sum(x.size for x in flat.values())
        assert all(len(spec.axes) == len(spec.shape) for spec in table.values())
        assert len({spec.hf_name for spec in table.values()}) == len(table)
        assert {p for p, s in table.items() if not s.is_matrix} == {"final_norm", "blocks/attn_norm", "blocks/mlp_norm"}


def test_every_parameter_is_used(plain):
    _, params, (_, _, flat) = plain
    for path, grad in flatten(ravel_pytree(params)[1](flat)).items():
        assert (np.abs(grad).reshape(len(grad), -1).max(-1) > 0).all() or path in ("embed", "final_norm"), path
        assert np.abs(grad).max() > 0, path


def test_initialisation_follows_the_table():
    arch = make_arch(d_model=64, n_heads=8, head_dim=8, n_kv_heads=8, mlp_dim=128, vocab_size=512)
    table = registry.param_table(arch)
    flat = flatten(init(arch, 0))
    for path, spec in table.items():
        values = np.asarray(flat[path], np.float64)
        if spec.std is None:
            assert (values == 1).all()
            continue
        depth = np.sqrt(np.arange(1, arch.n_layers + 1)) if spec.depth_scaled else np.ones(len(values))
        for layer in range(len(values)) if spec.stacked else [slice(None)]:
            scale = spec.std / (depth[layer] if spec.stacked else 1.0)
            # Cut at three deviations, a normal keeps 0.9866 of its deviation.
            assert abs(values[layer].std() / scale / 0.9866 - 1) < 0.05, path
            assert np.abs(values[layer]).max() <= 3.001 * scale
    assert (flat["embed"] == init(arch, 0)["embed"]).all()
    assert (flat["embed"] != init(arch, 1)["embed"]).any()


@pytest.mark.parametrize("stored", ["float32", "bfloat16"])
def test_the_gradient_of_a_lookup_is_summed_in_float32(stored):
    """Thousands of one token, as of the mask: in bfloat16 their sum would stop at 256 terms."""
    table = jnp.arange(12, dtype=stored).reshape(4, 3)
    ids = jnp.array([[2] * 4095 + [1]] * 2)

    def loss(table):
        return jax.vmap(lambda rows: look_up(table, rows, "bfloat16"))(ids).astype(jnp.float32).sum()

    assert (look_up(table, ids, "bfloat16") == table[ids].astype(jnp.bfloat16)).all()
    grad = jax.jit(jax.grad(loss))(table)
    want = jnp.array([0, 2, 2 * 4095, 0])[:, None] * jnp.ones((4, 3))
    assert grad.dtype == stored
    np.testing.assert_array_equal(grad, want.astype(stored))
    # Looking up alone, as decoding does, takes nothing for a gradient.
    forward = jax.jit(look_up, static_argnums=2).lower(table, ids, "bfloat16").compile()
    assert forward.as_text().count(" gather(") == 1


def test_remat_still_sees_the_products():
    """``dots`` saves what matmuls gave: it must recompute fewer of them than ``full``."""

    def products(remat):
        net = Transformer(make_arch(), remat=remat)
        params = init(net.arch, 0)
        loss = lambda p: net.nll(p, net.hidden(p, make_view()), make_view().ids[:, :A]).sum()  # noqa: E731
        return str(jax.make_jaxpr(jax.grad(loss))(params)).count("dot_general")

    assert products("none") <= products("dots") < products("full")


def test_offload_sends_each_layers_input_to_the_host():
    """Without the name that its policy looks for, nothing would be sent, and no value would tell."""
    net = Transformer(make_arch(), remat="offload", dtype="bfloat16")
    params = init(net.arch, 0)
    loss = lambda p: net.nll(p, net.hidden(p, make_view()), make_view().ids[:, :A]).sum()  # noqa: E731
    text = str(jax.make_jaxpr(jax.grad(loss))(params))
    assert f"{net.arch.n_layers},{B},{T},{net.arch.d_model}" in re.findall(r"bf16<host>\[([\d,]+)\]", text)


def test_both_modes_of_nnx(plain):
    """flax keeps two ways to walk modules; ours hold no shared references, so either will do."""
    if not hasattr(nnx, "set_graph_mode"):
        pytest.skip("this flax has one mode only")
    net, params, want = plain
    for mode in (True, False):
        with nnx.set_graph_mode(mode):
            got = value_and_grad(dataclasses.replace(net), params, make_view())
        np.testing.assert_array_equal(got[2], want[2])


def test_bfloat16_compute_keeps_float32_outputs(plain):
    net, params, want = plain
    low = dataclasses.replace(net, dtype="bfloat16", attention="xla")
    hidden = jax.jit(lambda p: low.hidden(p, make_view()))(jax.tree.map(lambda x: x.astype(jnp.bfloat16), params))
    assert hidden.dtype == jnp.bfloat16
    assert low.logits(params, hidden).dtype == jnp.float32
    assert low.nll(params, hidden, make_view().ids[:, :A]).dtype == jnp.float32
    np.testing.assert_allclose(hidden.astype(jnp.float32), want[1], atol=0.15)


def test_flops_count_the_matrices_and_attention():
    arch = make_arch()
    table = registry.param_table(arch)
    per_layer = 16 * 16 + 2 * 16 * 8 + 16 * 16 + 3 * 16 * 24
    forward = matmul_flops_per_token(table, arch, context=T)
    assert forward == 2 * (2 * per_layer + 13 * 16 + 2 * 2 * T * 16)
    assert matmul_flops_per_token(table, arch, T, head=False) == forward - 2 * 13 * 16


@pytest.mark.parametrize("change", ["missing", "unknown"])
def test_a_missing_or_unknown_weight_is_an_error(plain, change):
    """A bias that a checkpoint lacks must not be taken for none."""
    net = dataclasses.replace(plain[0], arch=make_arch(qkv_bias=True))
    params = init(net.arch, 0)
    blocks = {name: leaf for name, leaf in params["blocks"].items() if name != "k_bias" or change == "unknown"}
    extra = {"o_bias": blocks["q_bias"]} if change == "unknown" else {}
    with pytest.raises(ValueError, match=r"missing or unknown: \['(k_bias|o_bias)'\]"):
        net.hidden(params | {"blocks": blocks | extra}, make_view())
