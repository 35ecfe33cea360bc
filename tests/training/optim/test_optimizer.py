"""Tests the schedule, weight decay and clipping against numbers worked out by hand, DeepSpeed's schedule and PyTorch."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxblock.models.config import ModelConfig
from jaxblock.models.families import registry
from jaxblock.models.spec import ParamSpec, Table, flatten, init_params
from jaxblock.training.optim import precision, schedules
from jaxblock.training.optim.config import OptimizerConfig
from jaxblock.training.optim.gating import count_updates
from jaxblock.training.optim.make import make_optimizer
from jaxblock.types import Params


@pytest.fixture(scope="module")
def table() -> Table:
    model = ModelConfig(d_model=8, n_layers=2, n_heads=2, mlp_dim=12)
    return registry.param_table(registry.architecture_from_config(model, vocab_size=11, mask_id=10, eos_id=1))


@pytest.mark.parametrize(
    ("schedule", "warmup", "final", "expected"),
    [
        # Peak 1, warm-up over updates 0 to 3, then 8 updates of decay: a quarter of the way is update 6, half is 8.
        ("cosine", 4, 0.0, {0: 0.25, 3: 1.0, 4: 1.0, 6: 0.5 + 0.5 * 2**-0.5, 8: 0.5, 12: 0.0}),
        ("cosine", 4, 0.2, {4: 1.0, 8: 0.6, 12: 0.2}),
        ("linear", 4, 0.0, {0: 0.25, 1: 0.5, 2: 0.75, 3: 1.0, 4: 1.0, 6: 0.75, 8: 0.5, 12: 0.0}),
        ("linear", 4, 0.5, {8: 0.75, 12: 0.5}),
        ("linear", 0, 0.0, {0: 1.0, 6: 0.5, 12: 0.0}),  # without warm-up the first update is at the peak
        ("constant", 4, 0.0, {0: 0.25, 3: 1.0, 8: 1.0, 12: 1.0}),
    ],
)
def test_schedule_by_hand(
    schedule: Literal["cosine", "linear", "constant"], warmup: int, final: float, expected: dict[int, float]
) -> None:
    config = OptimizerConfig(lr=1.0, schedule=schedule, warmup_steps=warmup, final_ratio=final)
    rates = np.broadcast_to(jax.jit(schedules.schedule(config, 12))(np.arange(13)), 13)
    assert {step: rates[step] for step in expected} == pytest.approx(expected, abs=1e-6)


def test_deepspeeds_schedule(shared: Path) -> None:
    """Compares every stored vector, also one update late from 0, as DeepSpeed's engine orders it."""
    cases = json.loads((shared / "golden" / "train" / "lr_schedules.json").read_text())
    assert len(cases) == 12
    for case in cases:
        steps, wanted = case["total_steps"], np.asarray(case["ratio_by_iteration"])
        for order, ratios in (("before_update", wanted), ("after_update", np.append(0.0, wanted[:-1]))):
            config = OptimizerConfig(
                lr=0.5,
                schedule="deepspeed_cosine",
                warmup_steps=case["warmup_num_steps"],
                warmup=case["warmup_type"],
                warmup_floor=case["warmup_min_ratio"],
                scheduler_steps=order,
                final_ratio=case["cos_min_ratio"],
            )
            found = schedules.learning_rates(config, steps)
            np.testing.assert_allclose(found, 0.5 * ratios, rtol=1e-5, atol=1e-7, err_msg=str(case)[:150])


def _first_update(table: Table, config: OptimizerConfig, params: Params, grads: Params) -> dict[str, np.ndarray]:
    optimizer = make_optimizer(config, 10, table)
    updates = jax.jit(lambda params, grads: optimizer.update(grads, optimizer.init(params), params)[0])(params, grads)
    return flatten(jax.device_get(updates))


@pytest.mark.parametrize("decay", ["matrices", "all"])
def test_weight_decay_alone_shrinks_what_it_should(table: Table, decay: Literal["matrices", "all"]) -> None:
    """With a gradient of 0 an update is -lr * weight_decay * parameter, and nothing where there is no decay."""
    config = OptimizerConfig(lr=0.1, schedule="constant", warmup_steps=0, weight_decay=0.5, decay=decay)
    params = jax.device_get(init_params(table, 0, "float32"))
    norms = {"blocks/attn_norm", "blocks/mlp_norm", "final_norm"}
    assert norms < set(table)
    for path, update in _first_update(table, config, params, jax.tree.map(np.zeros_like, params)).items():
        shrinks = decay == "all" or path not in norms
        np.testing.assert_allclose(update, -0.05 * flatten(params)[path] if shrinks else 0, rtol=1e-6, err_msg=path)


@pytest.mark.parametrize("clip", [0.0, 1e-9, 1e3])
def test_clipping_bounds_the_gradient_before_adam(table: Table, clip: float) -> None:
    """With a large eps Adam's first update, lr * g / (|g| + eps), is nearly linear in g, so that it shows clipping."""
    config = OptimizerConfig(lr=1.0, schedule="constant", warmup_steps=0, eps=1e6, clip_norm=clip)
    params = jax.device_get(init_params(table, 0, "float32"))
    norm = sum(leaf.size for leaf in jax.tree.leaves(params)) ** 0.5
    assert 1e-9 < norm < 1e3
    expected = 1e-6 * (clip / norm if clip == 1e-9 else 1.0)
    for update in _first_update(table, config, params, jax.tree.map(np.ones_like, params)).values():
        np.testing.assert_allclose(-update, expected, rtol=1e-5)


def test_clipping_is_torchs() -> None:
    """The 1e-6 shows near zero: a gradient of norm 1e-6 clipped to 1e-6 is halved. A smaller norm is not clipped."""
    grads = {"a": np.float32([6e-7]), "b": np.float32([8e-7])}
    half, whole = jax.jit(lambda grads: [precision.clip_share(grads, clip) for clip in (1e-6, 1.0)])(grads)
    assert float(half) == pytest.approx(0.5, rel=1e-6) and float(whole) == 1.0
    # Summed in float32: in bfloat16 the sum of 1,000 squares of 1 would stop at 256.
    norm = jax.jit(precision.global_norm)({"a": np.ones((1000,), jnp.bfloat16)})
    assert float(norm) == pytest.approx(1000**0.5)


def test_adamw_is_torchs(table: Table) -> None:
    """Compares five steps with torch.optim.AdamW and torch's clipping, on random gradients."""
    torch = pytest.importorskip("torch")
    config = OptimizerConfig(
        lr=0.05, schedule="constant", warmup_steps=0, weight_decay=0.3, decay="all", b2=0.99, eps=1e-3, clip_norm=2.0
    )
    params = init_params(table, 0, "float32")
    theirs = {path: torch.nn.Parameter(torch.tensor(np.asarray(value))) for path, value in flatten(params).items()}
    adam = torch.optim.AdamW(theirs.values(), lr=0.05, betas=(0.9, 0.99), eps=1e-3, weight_decay=0.3)
    optimizer = make_optimizer(config, 5, table)

    @jax.jit
    def step(params: Params, state: optax.OptState, grads: Params) -> tuple[Params, optax.OptState]:
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    state = optimizer.init(params)
    for seed in range(5):
        grads = init_params(table, seed + 1, "float32")
        params, state = step(params, state, grads)
        for path, grad in flatten(grads).items():
            theirs[path].grad = torch.tensor(np.asarray(grad))
        torch.nn.utils.clip_grad_norm_(theirs.values(), 2.0)
        adam.step()
    for path, value in flatten(params).items():
        np.testing.assert_allclose(value, theirs[path].detach().numpy(), rtol=0, atol=2e-6, err_msg=path)


def test_optimizer_state_is_float32_under_bfloat16_weights(table: Table) -> None:
    optimizer = make_optimizer(OptimizerConfig(), 10, table)
    state = jax.eval_shape(lambda: optimizer.init(init_params(table, 0, "bfloat16")))
    moments = {leaf.dtype for leaf in jax.tree.leaves(state) if leaf.ndim}
    assert moments == {jnp.dtype("float32")}


def test_adafactors_first_updates_by_hand() -> None:
    """g = r c^T has a second moment of rank one: v = g^2 exactly, so the direction is the sign, as Adam's is."""
    table = {"w": ParamSpec((128, 256), (None, None), 1.0, "w")}
    row, column = np.logspace(-3, 1, 128, dtype=np.float32)[:, None], np.linspace(-1, 1, 256, dtype=np.float32)[None]
    params, grads = {"w": np.zeros((128, 256), np.float32)}, {"w": row * column}

    def updates(b1: float, sizes: Sequence[float]) -> list[np.ndarray]:
        fields = dict(name="adafactor", lr=0.1, schedule="constant", warmup_steps=0, clip_norm=0.0, b1=b1)
        optimizer = make_optimizer(OptimizerConfig(**fields), 10, table)  # type: ignore[arg-type]

        def step(state: Any, size: jax.Array) -> tuple[Any, jax.Array]:
            updates, state = optimizer.update({"w": size * grads["w"]}, state, params)
            return state, updates["w"]

        return list(jax.jit(lambda sizes: jax.lax.scan(step, optimizer.init(params), sizes)[1])(np.float32(sizes)))

    # A gradient ten times the last one: the decay is b2 with Adam's correction, and the step is cut to an RMS of 1.
    share = 0.95 * 0.05 / (1 - 0.95**2)
    assert 10 / (share + (1 - share) * 100) ** 0.5 > 1
    smaller = 0.1 / (share + (1 - share) * 0.01) ** 0.5
    for b1, sizes, wanted in (
        (0.0, (1, 1, 1), (1, 1, 1)),
        (0.9, (1, 1, 1), (1, 1, 1)),
        (0.0, (1, 10), (1, 1)),
        (0.0, (1, 0.1), (1, smaller)),
    ):
        for update, factor in zip(updates(b1, sizes), wanted, strict=True):
            np.testing.assert_allclose(update, -0.1 * factor * np.sign(grads["w"]), rtol=1e-3)


class _Key(NamedTuple):
    """An optimizer's state that has an integer which counts nothing."""

    draws: jax.Array


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"moments": "int8"},
        {"name": "adafactor"},
        {"name": "adafactor", "b1": 0.0, "weight_decay": 0.1},
        {"name": "adafactor", "moments": "bfloat16", "rounding": "nearest"},
    ],
    ids=str,
)
def test_updates_are_counted_whatever_else_the_state_holds(settings: dict[str, Any]) -> None:
    params = {"step": np.ones((8, 8), jnp.bfloat16)}  # a parameter's name is no counter's
    table = {"step": ParamSpec((8, 8), ("embed", "mlp"), 1.0, "w")}
    made = make_optimizer(OptimizerConfig(warmup_steps=0, **settings), 10, table)
    other = optax.GradientTransformation(lambda _: _Key(np.int32(7)), lambda updates, state, _: (updates, state))
    for optimizer in (made, optax.chain(other, made)):
        state, update = jax.jit(optimizer.init)(params), jax.jit(optimizer.update)
        for done in range(3):
            assert count_updates(state) == done
            _, state = update(params, state, params)
    with pytest.raises(ValueError, match="counters are"):
        count_updates(other.init(params))
