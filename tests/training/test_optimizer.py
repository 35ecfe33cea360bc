"""The optimizer's schedule, weight decay and clipping, against numbers worked out by hand."""

from __future__ import annotations

from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxblock import wiring
from jaxblock.config import ModelConfig, OptimizerConfig
from jaxblock.models import families
from jaxblock.models.params import Table, flatten, init
from jaxblock.training import optimizer as optimizers


@pytest.fixture(scope="module")
def table() -> Table:
    model = ModelConfig(d_model=8, n_layers=2, n_heads=2, mlp_dim=12)
    return families.table(wiring.architecture(model, vocab_size=11, mask_id=10, eos_id=1))


@pytest.mark.parametrize(
    ("schedule", "final", "expected"),
    [
        # Peak 1, warm-up over updates 0 to 3, then 8 updates of decay: a quarter of the way is update 6, half is 8.
        ("cosine", 0.0, {0: 0.25, 3: 1.0, 4: 1.0, 6: 0.5 + 0.5 * 2**-0.5, 8: 0.5, 12: 0.0}),
        ("cosine", 0.2, {4: 1.0, 8: 0.6, 12: 0.2}),
        ("linear", 0.0, {0: 0.25, 1: 0.5, 2: 0.75, 3: 1.0, 4: 1.0, 6: 0.75, 8: 0.5, 12: 0.0}),
        ("linear", 0.5, {8: 0.75, 12: 0.5}),
        ("constant", 0.0, {0: 0.25, 3: 1.0, 8: 1.0, 12: 1.0}),
    ],
)
def test_schedule_by_hand(
    schedule: Literal["cosine", "linear", "constant"], final: float, expected: dict[int, float]
) -> None:
    config = OptimizerConfig(lr=1.0, schedule=schedule, warmup_steps=4, final_ratio=final)
    rate = optimizers.schedule(config, 12)
    assert {step: float(rate(step)) for step in expected} == pytest.approx(expected, abs=1e-6)


def test_without_warm_up_the_first_update_is_at_the_peak() -> None:
    assert float(optimizers.schedule(OptimizerConfig(lr=0.3, warmup_steps=0), 10)(0)) == pytest.approx(0.3)


@pytest.mark.parametrize("decay", ["matrices", "all"])
def test_weight_decay_alone_shrinks_what_it_should(table: Table, decay: Literal["matrices", "all"]) -> None:
    """With a gradient of 0 an update is -lr * weight_decay * parameter, and nothing where there is no decay."""
    config = OptimizerConfig(lr=0.1, schedule="constant", warmup_steps=0, weight_decay=0.5, decay=decay)
    params = init(table, 0, "float32")
    optimizer = optimizers.make(config, 10, table)
    updates, _ = optimizer.update(jax.tree.map(jnp.zeros_like, params), optimizer.init(params), params)
    norms = {"blocks/attn_norm", "blocks/mlp_norm", "final_norm"}
    assert norms < set(table)
    for path, update in flatten(updates).items():
        shrinks = decay == "all" or path not in norms
        np.testing.assert_allclose(update, -0.05 * flatten(params)[path] if shrinks else 0, rtol=1e-6, err_msg=path)


@pytest.mark.parametrize("clip", [0.0, 1e-9])
def test_clipping_bounds_the_gradient_before_adam(table: Table, clip: float) -> None:
    """With a large eps Adam's first update is lr * g / (|g| + eps), nearly linear in g: clipping shows."""
    config = OptimizerConfig(lr=1.0, schedule="constant", warmup_steps=0, eps=1e6, clip_norm=clip)
    params = init(table, 0, "float32")
    grads = jax.tree.map(jnp.ones_like, params)
    optimizer = optimizers.make(config, 10, table)
    updates, _ = optimizer.update(grads, optimizer.init(params), params)
    count = sum(leaf.size for leaf in jax.tree.leaves(params))
    expected = 1e-6 * (clip / count**0.5 if clip else 1.0)
    for update in jax.tree.leaves(updates):
        np.testing.assert_allclose(-update, expected, rtol=1e-5)


def test_optimizer_state_is_float32_under_bfloat16_weights(table: Table) -> None:
    state = optimizers.make(OptimizerConfig(), 10, table).init(init(table, 0, "bfloat16"))
    moments = {leaf.dtype for leaf in jax.tree.leaves(state) if leaf.ndim}
    assert moments == {jnp.dtype("float32")}
