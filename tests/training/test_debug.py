"""Tests debug mode, and the check that a model can learn one batch by heart."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxblock import build
from jaxblock.fit import shapes
from jaxblock.models.config import ModelConfig
from jaxblock.models.families import registry
from jaxblock.models.spec import init_params
from jaxblock.training.guard.debug import NanFinder, not_finite
from tests import runs


def test_nan_finder_names_the_first_bad_layer_under_grad_and_vmap():
    model = ModelConfig(d_model=8, n_layers=3, n_heads=2, mlp_dim=8)
    arch = registry.architecture_from_config(model, vocab_size=9, mask_id=8, eos_id=1)
    finder = NanFinder()
    net = build.network(arch, model, check_layer=finder.layer)
    params = jax.device_get(jax.jit(lambda: init_params(net.param_table, 0, "float32"))())
    params["blocks"]["gate"] = params["blocks"]["gate"].copy()
    params["blocks"]["gate"][1, 0, 0] = np.nan
    assert not_finite(params) == ["blocks/gate (layer 1)"]

    def loss(params: dict, ids: jax.Array) -> jax.Array:
        return net.all_logits(params, ids, jnp.arange(4)[None].repeat(2, 0), jnp.array([4, 4])).sum()

    jax.jit(jax.vmap(jax.grad(loss), in_axes=(None, 0)))(params, np.ones((2, 2, 4), np.int32))
    jax.effects_barrier()
    assert min(finder._layers) == 1


@pytest.mark.slow
def test_debug_mode_compiles_no_step_and_shows_the_batch(tiny_config, tmp_path, ran, monkeypatch):
    command = f"train --config {tiny_config} --train.steps 2 {' '.join(runs.QUIET)} --train.out {tmp_path}"
    with monkeypatch.context() as patch:
        patch.setattr(shapes, "jit_step", lambda *arguments: pytest.fail("a step was compiled"))
        shown = ran(f"{command}/run --train.debug").err
    assert "block 0" in shown and "masked, weight" in shown
    ran(f"{command}/jitted")
    slow, jitted = runs.rows(tmp_path / "run"), runs.rows(tmp_path / "jitted")
    assert [row["step"] for row in slow] == [1, 2]
    np.testing.assert_allclose([row["loss"] for row in jitted], [row["loss"] for row in slow], rtol=1e-5)


@pytest.mark.slow
def test_one_batch_can_be_learnt_by_heart(tiny_config, tmp_path, ran):
    flags = (
        f"--train.overfit_one_batch --train.log_every 20 {' '.join(runs.QUIET)} --method.draws 4 --optimizer.lr 0.01"
    )
    ran(f"train --config {tiny_config} --train.out {tmp_path} {flags} --model.d_model 32 --train.steps 300")
    losses = [row["loss"] for row in runs.rows(tmp_path)]
    assert losses[0] > 1 and losses[-1] < 0.01, losses
