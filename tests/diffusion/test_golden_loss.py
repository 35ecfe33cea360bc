"""Losses, masks and gradient norms of the published training scripts, replayed from their stored uniforms."""

import itertools
import json
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxblock.diffusion import canvas as canvases
from jaxblock.diffusion import corruption, laws, objective, sampling
from jaxblock.diffusion.canvas import Layout
from jaxblock.diffusion.config import MethodConfig
from jaxblock.diffusion.sampling import Uniforms
from jaxblock.models.spec import flatten

SUFFIX_PREFIX = list(itertools.product((1.0, 0.0, 0.5), (0.0, 0.3)))
SCALES = {"token": "supervised_tokens", "sequence": "sequence_mean", "batch": "sequences"}
FULL = {
    **{"llada_sft": ("nelbo", "sequence_mean"), "llada_pretrain": ("nelbo", "canvas_tokens")},
    "d1": ("nelbo", "supervised_tokens"),
    **{f"dllm_scheduler_{scale}": ("nelbo", how) for scale, how in SCALES.items()},
    **{f"dllm_uniform_{scale}": ("uniform", how) for scale, how in SCALES.items()},
}
NORMALIZE = sorted({normalize for _, normalize in FULL.values()})
_from_rows = jax.jit(canvases.from_rows, static_argnums=0)


@partial(jax.jit, static_argnums=(0, 1))
def _draw(method, layout, canvas, uniforms, block):
    """Returns the draws [K, B], and the view of the first of them."""
    draws = sampling.draw(method, layout, canvas, uniforms, block)
    first, noise = jax.tree.map(lambda x: x[0], draws), uniforms.noise[:, 0] if method.needs_noise else None
    return draws, corruption.corrupt(layout, canvas, first, method, noise)[0]


@pytest.fixture(scope="module")
def golden(shared):
    folder = shared / "golden" / "loss"
    return folder, json.loads((folder / "cases.json").read_text()), json.loads((folder / "grad_norms.json").read_text())


def _load(folder, name):
    with np.load(folder / f"{name}.npz") as arrays:
        return dict(arrays)


def _canvas(layout, ids, prompt_len, end):
    """The script's rows of a fixed total length, padding visible: a ``paper`` canvas cut to that length."""
    rows, width = ids.shape
    text_len = end - prompt_len
    text = np.zeros((rows, layout.response_len), np.int32)
    for row in range(rows):
        text[row, : text_len[row]] = ids[row, prompt_len[row] : end[row]]
    arrays = ids[:, : prompt_len.max()], prompt_len, text, text_len, np.arange(rows)
    canvas = jax.device_get(_from_rows(layout, *(x.astype(np.int32) for x in arrays)))
    canvas = canvas._replace(ids=canvas.ids[:, :width], length=np.full(rows, width, np.int32))
    np.testing.assert_array_equal(canvas.ids, ids)
    return canvas


def _replay(uniforms, rates, prompt_len, block, layout):
    """The stored uniforms by position of a row, as ours by position of the response and of the block."""
    rows = len(uniforms)
    padded = np.concatenate([uniforms, np.full((rows, layout.response_len), np.nan)], axis=1)
    response = np.stack([u[p : p + layout.response_len] for u, p in zip(padded, prompt_len, strict=True)])
    start = np.maximum(block, 0) * layout.block
    inside = np.stack([r[s : s + layout.block] for r, s in zip(response, start, strict=True)])
    count = np.nan_to_num((rates - laws.RATE_FLOOR) / (1 - laws.RATE_FLOOR))
    return Uniforms(
        block=np.zeros((rows, layout.n_blocks)),
        count=count[:, None],
        stratum=np.zeros((rows, 1)),
        position=inside[:, None],
        noise=response[:, None],
    )


def _check_norms(grad, want, spec_table):
    """Gradient norms by the checkpoint's names, and over all."""
    flat, got = flatten(jax.device_get(grad)), {}
    for path, spec in spec_table.items():
        for layer, leaf in enumerate(flat[path] if spec.stacked else [flat[path]]):
            got[spec.hf_name.format(layer=layer)] = np.linalg.norm(np.asarray(leaf, np.float64))
    got["__global__"] = np.sqrt(sum(v**2 for v in got.values()))
    assert got.keys() == want.keys()
    for name, value in got.items():
        np.testing.assert_allclose(value, want[name], rtol=1e-4, atol=1e-5, err_msg=name)


# The losses of the others are slow: they show the network other views, which are compared in any case.
FAST = ((1.0, 0.0), (0.5, 0.3))
BLOCKWISE = [pytest.param(*case, case in FAST) for case in SUFFIX_PREFIX]
BLOCKWISE += [pytest.param(*case, True, marks=pytest.mark.slow) for case in SUFFIX_PREFIX if case not in FAST]


@pytest.mark.parametrize("suffix, prefix, losses", BLOCKWISE)
def test_blockwise(golden, golden_model, suffix, prefix, losses):
    folder, cases, norms = golden
    name = f"blockwise_suffix{suffix}_prefix{prefix}"
    case, z = cases[name], _load(folder, name)
    pad, block = case["pad_id"], z["block_index"].astype(np.int32)
    layout = Layout(40, case["block_size"], "same_position", "paper", None, case["mask_id"], pad, (pad,))
    canvas = _canvas(layout, z["input_ids"], z["prompt_len"], z["length"])
    how = dict(law="floored_bernoulli", weighting="masked_mean", normalize="sequences", blocks="pairs")
    method = MethodConfig(**how, prefix_mask_rate=prefix, suffix_mask_prob=suffix)
    with jax.enable_x64(True):  # the stored uniforms and rates are float64
        uniforms = _replay(z["uniforms"], z["p"], z["prompt_len"], block, layout)
        draws, view = jax.device_get(_draw(method, layout, canvas, uniforms, block))
    flags = np.zeros(z["mask_flags"].shape, bool)
    for row, (at, masked, ok) in enumerate(zip(view.active, draws.masked[0], view.valid, strict=True)):
        flags[row, at[masked & ok]] = True
    np.testing.assert_array_equal(flags, z["mask_flags"])
    np.testing.assert_array_equal(view.ids, z["noisy_ids"])
    assert view.length.tolist() == [40] * len(flags)
    if not losses:
        return
    net, params = golden_model(case["model"])

    def loss(params, canvas, draws, noise, block):
        def one(canvas, draws, noise, block):
            canvas, block = jax.tree.map(lambda x: x[None], (canvas, block))
            draws, noise = jax.tree.map(lambda x: x[:, None], (draws, noise))
            out = objective.losses(net, params, layout, canvas, draws, method, noise, drawn_blocks=block)
            return out.loss.total / out.loss.weight

        rows = jax.vmap(one, (0, 1, 1, 0))(canvas, draws, noise[None], block)
        return rows.mean(), rows

    draws = draws._replace(weight=draws.weight.astype(np.float32))
    noise = uniforms.noise[:, 0].astype(np.float32)
    (value, rows), grad = jax.jit(jax.value_and_grad(loss, has_aux=True))(params, canvas, draws, noise, block)
    np.testing.assert_allclose(rows, z["row_loss"], rtol=2e-5)
    np.testing.assert_allclose(value, case["loss"], rtol=2e-5)
    _check_norms(grad, norms[name], net.param_table)


@pytest.mark.parametrize("model", [pytest.param("llada_mha", marks=pytest.mark.slow), "llada_gqa_tied"])
def test_full_sequence(golden, golden_model, model):
    """LLaDA's, d1's and dllm's losses are one law under the fields weighting and normalize."""
    folder, cases, norms = golden
    name = f"fullseq_{model}"
    case, z = cases[name], _load(folder, name)
    net, params = golden_model(model)
    rows, width = z["input_ids"].shape
    longest = int(z["answer_len"].max())
    layout = Layout(longest, longest, "same_position", "paper", None, case["mask_id"], 1, (1,))
    canvas = _canvas(layout, z["input_ids"], z["prompt_len"], np.full(rows, width))

    def total(params, canvas, draws, normalize):
        how, block = MethodConfig(normalize=normalize), jnp.zeros_like(canvas.n_blocks)
        return objective.losses(net, params, layout, canvas, draws, how, drawn_blocks=block).loss

    def by_row(params, canvas, draws):
        canvases_of_one = jax.tree.map(lambda x: x[:, None], canvas)
        draws_of_one = jax.tree.map(lambda x: jnp.moveaxis(x, 1, 0)[:, :, None], draws)
        return jax.vmap(lambda c, d: total(params, c, d, "sequences").total)(canvases_of_one, draws_of_one)

    def value_and_share(params, canvas, draws, normalize):
        value, weight = total(params, canvas, draws, normalize)
        return value / weight, objective.normaliser(layout, canvas, normalize)[0] / weight

    values = jax.jit(lambda *given: {n: value_and_share(*given, n) for n in NORMALIZE})
    # What is divided by what differs from loss to loss; the gradient of a row's own loss does not.
    row_gradients = jax.jit(jax.jacrev(by_row))

    for weighting in ("nelbo", "uniform"):
        with jax.enable_x64(True):
            stored = z["uniforms"].astype(float), z["p_mask"].astype(float), z["prompt_len"]
            uniforms = _replay(*stored, np.zeros(rows, int), layout)
            how = MethodConfig(law="floored_bernoulli", blocks="pairs", weighting=weighting)
            draws, view = jax.device_get(_draw(how, layout, canvas, uniforms, np.zeros(rows, np.int32)))
        np.testing.assert_array_equal(view.ids, z["noisy_ids"])
        draws = draws._replace(weight=draws.weight.astype(np.float32))
        sums, grads = jax.device_get((values(params, canvas, draws), row_gradients(params, canvas, draws)))
        for loss, normalize in [(loss, how) for loss, (asked, how) in FULL.items() if asked == weighting]:
            value, share = sums[normalize]
            np.testing.assert_allclose(value, case["losses"][loss]["loss"], rtol=2e-5, err_msg=loss)
            grad = jax.tree.map(lambda x, share=share: np.tensordot(share, x, 1), grads)
            _check_norms(grad, norms[f"{name}/{loss}"], net.param_table)
