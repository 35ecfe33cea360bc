"""Losses, masks and gradient norms of the published training scripts, replayed from their stored uniforms."""

import itertools
from functools import partial

import jax
import numpy as np
import pytest

from jaxblock.diffusion import corruption, laws, objective, sampling
from jaxblock.diffusion.canvas import Layout
from jaxblock.diffusion.config import MethodConfig
from jaxblock.diffusion.sampling import Uniforms
from jaxblock.models.spec import flatten
from tests.diffusion.conftest import golden_arrays, golden_json, laid_out


@partial(jax.jit, static_argnums=(0, 1))
def _draw(method, layout, canvas, uniforms, block):
    """Returns the draws [K, B], and the view of the first of them."""
    draws = sampling.draw(method, layout, canvas, uniforms, block)
    first, noise = jax.tree.map(lambda x: x[0], draws), uniforms.noise[:, 0] if method.needs_noise else None
    return draws, corruption.corrupt(layout, canvas, first, method, noise)[0]


def _canvas(layout, ids, prompt_len, end):
    """The script's rows of a fixed total length, padding visible: a ``paper`` canvas of that length."""
    prompts = [row[:n] for row, n in zip(ids, prompt_len, strict=True)]
    texts = [row[n:m] for row, n, m in zip(ids, prompt_len, end, strict=True)]
    canvas = laid_out(layout, prompts, texts, room=prompt_len.max())
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
SUFFIX_PREFIX = list(itertools.product((1.0, 0.0, 0.5), (0.0, 0.3)))
FAST_LOSSES = ((1.0, 0.0), (0.5, 0.3))
BLOCKWISE = [pytest.param(*case, case in FAST_LOSSES) for case in SUFFIX_PREFIX]
BLOCKWISE += [pytest.param(*case, True, marks=pytest.mark.slow) for case in SUFFIX_PREFIX if case not in FAST_LOSSES]


@pytest.mark.parametrize("suffix, prefix, losses", BLOCKWISE)
def test_blockwise(golden_model, suffix, prefix, losses):
    name = f"blockwise_suffix{suffix}_prefix{prefix}"
    case, z = golden_json("loss/cases.json")[name], golden_arrays(f"loss/{name}.npz")
    pad, block = case["pad_id"], z["block_index"].astype(np.int32)
    layout = Layout(40, case["block_size"], "same_position", "paper", None, case["mask_id"], pad, (pad,), total_len=40)
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
    net = golden_model(case["model"]).net
    draws = draws._replace(weight=draws.weight.astype(np.float32))
    noise = np.moveaxis(uniforms.noise, 1, 0).astype(np.float32)

    @jax.jit
    @partial(jax.value_and_grad, has_aux=True)
    def loss(params, canvas, draws, noise, block):
        out = objective.losses(net, params, layout, canvas, draws, method, noise, drawn_blocks=block)
        first, numbers = jax.tree.map(lambda x: x[0], (draws, noise))
        rows = first.weight * objective.token_losses(net, params, layout, canvas, first, method, numbers).sum(-1)
        return out.loss.total / out.loss.weight, rows

    (value, rows), grad = loss(golden_model(case["model"]).params, canvas, draws, noise, block)
    np.testing.assert_allclose(rows, z["row_loss"], rtol=2e-5)
    np.testing.assert_allclose(value, case["loss"], rtol=2e-5)
    _check_norms(grad, golden_json("loss/grad_norms.json")[name], net.param_table)


SCALES = {"token": "supervised_tokens", "sequence": "sequence_mean", "batch": "sequences"}
FULL = {
    "nelbo": {"llada_sft": "sequence_mean", "llada_pretrain": "canvas_tokens", "d1": "supervised_tokens"}
    | {f"dllm_scheduler_{scale}": how for scale, how in SCALES.items()},
    "uniform": {f"dllm_uniform_{scale}": how for scale, how in SCALES.items()},
}


@pytest.mark.parametrize("model", [pytest.param("llada_mha", marks=pytest.mark.slow), "llada_gqa_tied"])
def test_full_sequence(golden_model, model):
    """LLaDA's, d1's and dllm's losses are one law under the fields weighting and normalize."""
    name, net = f"fullseq_{model}", golden_model(model).net
    case, z = golden_json("loss/cases.json")[name], golden_arrays(f"loss/{name}.npz")
    rows, width = z["input_ids"].shape
    longest, block = int(z["answer_len"].max()), np.zeros(rows, np.int32)
    layout = Layout(longest, longest, "same_position", "paper", None, case["mask_id"], 1, (1,), total_len=width)
    canvas = _canvas(layout, z["input_ids"], z["prompt_len"], np.full(rows, width))

    @jax.jit
    @jax.value_and_grad
    def total(params, draws, canvas):
        return objective.losses(net, params, layout, canvas, draws, MethodConfig(normalize="sequences")).loss.total

    for weighting, losses in FULL.items():
        with jax.enable_x64(True):
            stored = z["uniforms"].astype(float), z["p_mask"].astype(float), z["prompt_len"]
            how = MethodConfig(law="floored_bernoulli", blocks="pairs", weighting=weighting)
            draws, view = jax.device_get(_draw(how, layout, canvas, _replay(*stored, block, layout), block))
        np.testing.assert_array_equal(view.ids, z["noisy_ids"])
        for loss, normalize in losses.items():
            share, weight = jax.device_get(objective.normaliser(layout, jax.device_put(canvas), normalize))
            scaled = draws._replace(weight=(draws.weight * share / weight).astype(np.float32))
            value, grad = total(golden_model(model).params, scaled, canvas)
            np.testing.assert_allclose(value, case["losses"][loss]["loss"], rtol=2e-5, err_msg=loss)
            _check_norms(grad, golden_json("loss/grad_norms.json")[f"{name}/{loss}"], net.param_table)
