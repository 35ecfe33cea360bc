"""The train step on eight devices does what it does on one: the same draws, loss and updates."""

from __future__ import annotations

import dataclasses
import functools
import os
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxblock import build
from jaxblock.data.loader import Batch
from jaxblock.diffusion import layouts
from jaxblock.diffusion.config import CanvasConfig, MethodConfig
from jaxblock.models.config import LoraConfig, ModelConfig
from jaxblock.models.families import registry
from jaxblock.models.linear import int8
from jaxblock.models.spec import flatten, init_params, nest
from jaxblock.models.transformer import Transformer
from jaxblock.parallel import rules
from jaxblock.parallel.mesh import make_mesh
from jaxblock.training.optim.config import OptimizerConfig
from jaxblock.training.optim.make import make_optimizer
from jaxblock.training.state import create_state, next_average
from jaxblock.training.step import Learner, Objective, jit_step
from jaxblock.types import Lines

ROWS = 16


def _objective(method: MethodConfig, rank: int = 0, **model_fields: Any) -> Objective:
    model = ModelConfig(d_model=16, n_layers=2, n_heads=2, mlp_dim=24, tie_embeddings=True, **model_fields)
    arch = registry.architecture_from_config(model, vocab_size=32, mask_id=31, eos_id=1)
    return Objective(
        net=build.network(arch, model, LoraConfig(rank, dropout=0.3)),
        layout=layouts.training_layout(CanvasConfig(12, 16, 4), method, arch, (2, 1)),
        method=method,
        seed=3,
        rows=ROWS,
        dropout=rank > 0,
    )


def _batch() -> Batch:
    rng = np.random.default_rng(0)

    def some(low: int, high: int, *shape: int) -> np.ndarray:
        return rng.integers(low, high, (ROWS, *shape), dtype=np.int32)

    index = np.arange(ROWS, dtype=np.int32)
    return Batch(some(3, 31, 12), some(3, 13), some(3, 31, 16), some(1, 17), 0 * index, index, index)


class Result(NamedTuple):
    """Holds each step's draws, loss and gradient norm, and after the last step what was trained and its state."""

    draws: Any
    losses: list[float]
    norms: list[float]
    params: Any
    moments: Any
    state: Any


class Case(NamedTuple):
    """Describes a mesh, what is trained, and how the step runs; the default is one device."""

    data: int = 1
    fsdp: int = 1
    tensor: int = 1
    slices: int = 1
    accumulate: int = 1
    rank: int = 0
    quantize: str = "none"
    dtype: str = "float32"
    objective: str = "blockwise"
    lines: Lines | None = None

    def on_one_device(self) -> Case:
        """Returns the same training on one device, all rows at once and at the canvas's width."""
        return self._replace(data=1, fsdp=1, tensor=1, slices=1, accumulate=1, lines=None)


USUAL = Case(1, 2, 2, slices=2, accumulate=2, rank=2, lines=Lines(((1, 28), (1, 27)), 28))
"""It splits parameters, heads and slices, and the batch into parts and lines of two rows, and trains adapters."""
RARER = [Case(2, 2, 2), Case(8), Case(1, 1, 8), Case(1, 2, 2, slices=2, accumulate=2)]
RARER += [Case(1, 4, 2, rank=2, quantize="int8"), Case(2, 4, dtype="bfloat16"), Case(1, 2, 4, objective="classical")]
"""The last: all positions' logits, a chunk at a time, of words that lie on four devices."""

EMITTERS = "xla_cpu_use_fusion_emitters"
"""XLA's flag that `tests/conftest.py` turns off where there is one."""


def _method(case: Case) -> MethodConfig:
    if case.objective == "classical":
        return MethodConfig(objective="classical", draws=2)
    # With adapters, whose comparison allows for what rounding does to tiny gradients.
    prompt = 0.3 if case.rank else 0.0
    return MethodConfig(
        law="stratified_count", draws=2, prefix_mask_rate=0.2, suffix_mask_prob=0.8, prompt_mask_rate=prompt
    )


def _base(net: Transformer) -> Any:
    """Makes frozen weights beneath adapters, in int8 where the network has them so."""
    table = registry.param_table(net.arch)
    flat = flatten(init_params(table, 1, "float32"))
    for path in [path for path, spec in table.items() if net.quantize == "int8" and int8.quantised(spec)]:
        flat[path], flat[path + int8.SCALE] = int8.quantise(flat[path])
    return jax.device_get(nest(flat))


def _moments(opt_state: Any) -> Any:
    parts = jax.tree.leaves(opt_state, is_leaf=lambda x: hasattr(x, "mu"))
    return next((part.mu, part.nu) for part in parts if hasattr(part, "mu"))


@pytest.fixture(scope="module")
def train() -> Callable[[Case], Result]:
    """Trains three steps on a mesh, with a moving average; with ``rank``, adapters (with dropout) beside a frozen base."""
    batch, config = _batch(), OptimizerConfig(warmup_steps=2, weight_decay=0.1)

    @functools.cache
    def run(case: Case) -> Result:
        chunk = 4 if case.objective == "classical" else None
        objective = _objective(_method(case), case.rank, quantize=case.quantize, dtype=case.dtype, loss_chunk=chunk)
        objective = dataclasses.replace(objective, lines=case.lines)
        net = objective.net
        start = jax.device_get(init_params(net.trainable, 0, "float32"))
        optimizer = make_optimizer(config, 9, net.trainable)
        one = case == case.on_one_device()._replace(accumulate=case.accumulate)
        mesh = make_mesh(*case[:3], slices=case.slices, devices=jax.devices()[:1] if one else None)
        rows = rules.sharding(mesh, "batch")
        with jax.set_mesh(mesh):
            draw = jax.jit(lambda b, s: objective.draw(b, objective.canvas(b), s), in_shardings=(rows, None))
            draws = [jax.device_get(draw(batch, jnp.int32(step))) for step in range(3)]
            params = jax.device_put(start, rules.param_shardings(mesh, net.trainable))
            state = create_state(params, optimizer, mesh, net.trainable, averaged=True)
            base = {}
            if case.rank:
                base = jax.device_put(_base(net), rules.param_shardings(mesh, net.param_table))
            step_fn = jit_step(Learner(net, objective, optimizer, case.accumulate, ema=0.9), state, mesh)
            if case.dtype == "bfloat16" and EMITTERS in os.environ["XLA_FLAGS"]:
                # As users compile. With the tests' older emitters the third step's sums round to another bfloat16 number for
                # one token (45 bars in four columns of its embedding's first moment, 1 to 4 bars elsewhere; no weight does,
                # and steps 1 and 2 are within 0.3 bars). Rounding is all it is: the same rows in two parts on one device, a
                # program fused in other places, are 450 to 1,700 bars apart with either emitters.
                step_fn = step_fn.lower(state, batch, base).compile({EMITTERS: True})
            losses, norms = [], []
            for _ in range(3):
                state, metrics = step_fn(state, batch, base)
                losses.append(float(metrics.losses.loss.total) / float(metrics.losses.loss.weight))
                norms.append(float(metrics.grad_norm))
        trained = jax.device_get((state.params, state.average))
        return Result(draws, losses, norms, trained, jax.device_get(_moments(state.opt_state)), state)

    return run


@pytest.mark.slow
@pytest.mark.parametrize("case", [USUAL, *RARER], ids=str)
def test_any_mesh_and_any_parts_do_what_one_device_does_at_once(train, case):
    one, several = train(case.on_one_device()), train(case)
    for left, right in zip(jax.tree.leaves(one.draws), jax.tree.leaves(several.draws), strict=True):
        np.testing.assert_array_equal(left, right)
    assert len({np.asarray(draw.masked).tobytes() for draw, _ in one.draws}) == 3  # each step has its own draws
    np.testing.assert_allclose(several.losses, one.losses, rtol=1e-6)
    # Clipping and Adam divide gradients by their sizes. The norms tell those; the moments, the second a square, the rest.
    np.testing.assert_allclose(several.norms, one.norms, rtol=1e-5)
    # Adapters' b begin at 0, and Adam divides each gradient by its own size: where that is tiny, its rounding counts.
    share = 1e-4 if case.rank else 2e-6
    pairs = zip((*several.params, *several.moments), (*one.params, *one.moments), (1, 1, 1, 2), strict=True)
    for ours, theirs, power in pairs:
        ours = flatten(ours)
        for path, value in flatten(theirs).items():
            atol = power * share * np.abs(value).max()
            np.testing.assert_allclose(ours[path], value, rtol=0, atol=atol, err_msg=path)
    if case.fsdp * case.tensor > 1:  # optimizer state lies where its parameters lie
        parameters = flatten(several.state.params)
        for path, moment in [
            pair for moments in _moments(several.state.opt_state) for pair in flatten(moments).items()
        ]:
            assert moment.sharding.is_equivalent_to(parameters[path].sharding, moment.ndim), path
    average = [np.abs(a - b).max() for a, b in zip(*map(jax.tree.leaves, one.params), strict=True)]
    assert max(average) > 1e-4


@pytest.mark.slow
def test_bfloat16_computes_and_float32_remembers(train):
    wide, low = train(Case()), train(Case(dtype="bfloat16"))
    assert {leaf.dtype for leaf in jax.tree.leaves((low.params, low.moments))} == {np.dtype(np.float32)}
    apart = np.abs(np.divide(low.losses, wide.losses) - 1)
    assert (apart > 1e-6).any() and (apart < 1e-2).all()
    # What an update leaves is finer than bfloat16: kept in that, some weights would not have moved.
    kept = np.concatenate([leaf.ravel() for leaf in jax.tree.leaves(low.params[0])])
    assert (kept != kept.astype(jnp.bfloat16).astype(np.float32)).mean() > 0.9


def test_dropout_keys_differ_by_step_draw_and_row():
    objective, batch = _objective(MethodConfig(draws=2), rank=2), _batch()
    keys = jax.jit(lambda batch, step: jax.random.key_data(objective.row_keys(objective.canvas(batch), step)))
    flat = np.concatenate([np.asarray(keys(batch, step)).reshape(2 * ROWS, -1) for step in range(2)])
    assert len(np.unique(flat, axis=0)) == len(flat) == 2 * 2 * ROWS
    whole = _objective(MethodConfig(), rank=0)
    assert jax.eval_shape(lambda batch: whole.row_keys(whole.canvas(batch), 0), batch) is None


def test_the_average_is_what_its_definition_says():
    """Replays the average from the parameters after each step: the first has the share 1 - 1/10, the second 1 - 2/11 ..."""
    average, decay, averaged = np.array([1.0, -2.0], np.float32), 0.15, jax.jit(next_average, static_argnums=3)
    want = average.astype(np.float64)
    for k, params in enumerate(([0.5, 0.5], [3.0, 1.0], [2.0, 2.0])):
        average = np.asarray(averaged({"w": average}, {"w": np.asarray(params, np.float32)}, np.int32(k), decay)["w"])
        d = min(decay, (1 + k) / (10 + k))
        want = d * want + (1 - d) * np.array(params)
        np.testing.assert_allclose(average, want, rtol=1e-6)
