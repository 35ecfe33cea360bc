"""The train step on eight devices does what it does on one: the same draws, loss and updates."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxblock import wiring
from jaxblock.cli import main
from jaxblock.config import CanvasConfig, MethodConfig, ModelConfig, OptimizerConfig
from jaxblock.data.loader import Batch
from jaxblock.models import params as parameters
from jaxblock.parallel import axes
from jaxblock.training import optimizer as optimizers
from jaxblock.training.state import create
from jaxblock.training.step import Objective, compile_step

ROWS = 16


def _objective(method: MethodConfig) -> Objective:
    model = ModelConfig(d_model=16, n_layers=2, n_heads=2, mlp_dim=24, tie_embeddings=True)
    arch = wiring.architecture(model, vocab_size=32, mask_id=31, eos_id=1)
    return Objective(
        net=wiring.network(arch, model),
        layout=wiring.training_layout(CanvasConfig(12, 16, 4), method, arch, (2, 1)),
        sampling=wiring.sampling(method),
        normalize=method.normalize,
        ablation=wiring.ablation(method),
        seed=3,
        rows=ROWS,
    )


def _batch() -> Batch:
    rng = np.random.default_rng(0)

    def some(low: int, high: int, *shape: int) -> np.ndarray:
        return rng.integers(low, high, (ROWS, *shape), dtype=np.int32)

    index = np.arange(ROWS, dtype=np.int32)
    block = np.zeros(ROWS, np.int32)
    return Batch(some(3, 31, 12), some(3, 13), some(3, 31, 16), some(1, 17), block, index, index)


class Result(NamedTuple):
    draws: Any
    losses: list[float]
    params: Any
    state: Any


@pytest.fixture(scope="module")
def train() -> Callable[[tuple[int, int] | None], Result]:
    """Three steps on a mesh (None: one device)."""
    method = MethodConfig(law="stratified_count", draws=2, prefix_mask_rate=0.2, suffix_mask_prob=0.8)
    objective, batch = _objective(method), _batch()
    net = objective.net
    start = jax.device_get(parameters.init(net.table, 0, "float32"))
    optimizer = optimizers.make(OptimizerConfig(warmup_steps=2, weight_decay=0.1), 9, net.table)

    @functools.cache
    def run(shape: tuple[int, int] | None) -> Result:
        mesh = axes.make_mesh(*(shape or (1,)), devices=None if shape else jax.devices()[:1])
        rows = axes.sharding(mesh, "batch")
        with jax.set_mesh(mesh):
            draw = jax.jit(lambda b, s: objective.draw(b, objective.canvas(b), s), in_shardings=(rows, None))
            draws = [jax.device_get(draw(batch, jnp.int32(step))) for step in range(3)]
            state = create(jax.device_put(start, axes.param_shardings(mesh, net.table)), optimizer, mesh, net.table)
            step_fn = compile_step(objective, optimizer, state, mesh, net.table)
            losses = []
            for _ in range(3):
                state, metrics = step_fn(state, batch, {})
                losses.append(float(metrics.losses.loss.total) / float(metrics.losses.loss.weight))
        return Result(draws, losses, jax.device_get(state.params), state)

    return run


@pytest.mark.parametrize("shape", [(8, 1), (2, 4), (1, 8), (2, 2, 2), (1, 1, 8)])
def test_eight_devices_do_what_one_does(train: Callable[..., Result], shape: tuple[int, int]) -> None:
    one, eight = train(None), train(shape)
    for left, right in zip(jax.tree.leaves(one.draws), jax.tree.leaves(eight.draws), strict=True):
        np.testing.assert_array_equal(left, right)
    assert len({np.asarray(draw.masked).tobytes() for draw, _ in one.draws}) == 3  # each step has its own draws
    np.testing.assert_allclose(eight.losses, one.losses, rtol=1e-6)
    after = parameters.flatten(eight.params)
    for path, value in parameters.flatten(one.params).items():
        np.testing.assert_allclose(after[path], value, rtol=0, atol=1e-6 * np.abs(value).max(), err_msg=path)


def test_optimizer_state_lies_where_its_parameters_lie(train: Callable[..., Result]) -> None:
    state = train((2, 4)).state
    adam = next(
        part for part in jax.tree.leaves(state.opt_state, is_leaf=lambda x: hasattr(x, "mu")) if hasattr(part, "mu")
    )
    for moments in (adam.mu, adam.nu):
        for path, moment in parameters.flatten(moments).items():
            parameter = parameters.flatten(state.params)[path]
            assert moment.sharding.is_equivalent_to(parameter.sharding, parameter.ndim), path
            assert moment.addressable_shards[0].data.size == moment.size // 4, path


def test_a_batch_that_does_not_split_is_an_error(tiny_config: Any, capsys: pytest.CaptureFixture[str]) -> None:
    out = tiny_config.parent / "unsplit"
    assert main(["train", "--config", str(tiny_config), "--train.out", str(out), "--train.batch_size", "12"]) == 2
    assert "train.batch_size 12 does not split over 8 devices" in capsys.readouterr().err
    assert not out.exists()


def test_a_mesh_that_does_not_fit_is_an_error(tiny_config: Any, capsys: pytest.CaptureFixture[str]) -> None:
    where = ["--train.out", str(tiny_config.parent / "unsplit")]
    assert main(["train", "--config", str(tiny_config), *where, "--train.fsdp", "3"]) == 2
    assert "train.fsdp 3" in capsys.readouterr().err
    # 16 embedding columns over 8 devices are fine, 2 x 24 = 48 layers' columns too; 20 columns are not.
    assert main(["train", "--config", str(tiny_config), *where, "--train.fsdp", "8", "--model.d_model", "20"]) == 2
    assert "does not divide by 8" in capsys.readouterr().err
