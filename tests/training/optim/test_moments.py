"""Tests that optimizer state in few bits follows float32, and that bfloat16 weights move as they should, on any mesh."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxblock.models.config import ModelConfig
from jaxblock.models.families import registry
from jaxblock.models.spec import ParamSpec, Table, abstract_params, count_params, flatten, init_params
from jaxblock.parallel import rules
from jaxblock.parallel.mesh import make_mesh
from jaxblock.training.checkpoints.retention import Keep
from jaxblock.training.checkpoints.writer import CheckpointWriter
from jaxblock.training.optim import adamw, moments
from jaxblock.training.optim.config import OptimizerConfig, Storage
from jaxblock.training.optim.make import make_optimizer
from jaxblock.training.optim.moments import dequantise_moment, quantise_moment
from jaxblock.training.optim.precision import random_bits, stochastic_bfloat16
from jaxblock.training.state import TrainState, create_state, state_shardings


def _table(vocab_size: int, d_model: int, n_layers: int, n_heads: int, mlp_dim: int) -> Table:
    model = ModelConfig(d_model=d_model, n_layers=n_layers, n_heads=n_heads, mlp_dim=mlp_dim)
    return registry.param_table(registry.architecture_from_config(model, vocab_size=vocab_size, mask_id=31, eos_id=1))


@pytest.fixture
def nearest(monkeypatch: pytest.MonkeyPatch) -> None:
    """Breaks stochastic rounding: every draw is one half, which rounds to the nearest."""

    def half(seed: int, step: jax.Array, path: str, shape: tuple[int, ...], layer: jax.Array | None) -> jax.Array:
        return jnp.full(shape, 0x7FFF7FFF, jnp.uint32)

    monkeypatch.setattr(adamw, "random_bits", half)


def _bits(shape: tuple[int, ...]) -> jax.Array:
    return random_bits(0, jnp.int32(0), "x", shape)


def _stored(x: np.ndarray, signed: bool) -> tuple[moments.Quantised, np.ndarray]:
    """Returns numbers in 8 bits, and what those stand for."""
    stored = jax.jit(lambda x: quantise_moment(x, _bits(x.shape), signed=signed))(np.asarray(x, np.float32))
    return stored, np.asarray(jax.jit(dequantise_moment)(stored), np.float64)


def test_random_bits_are_even_and_depend_on_seed_step_path_and_place() -> None:
    @jax.jit
    def drawn() -> Any:
        step, (x, *others) = jnp.int32(0), ((0, 0, "x"), (1, 0, "x"), (0, 0, "y"), (0, 1, "x"))
        one, *rest = (random_bits(seed, step + at, path, (64,)) for seed, at, path in (x, *others))
        return _bits((64, 3, 1024)), random_bits(0, step, "x", (3, 1024), jnp.int32(7)), one, rest

    bits, layer, one, others = jax.device_get(drawn())
    share = np.unpackbits(bits.view(np.uint8)).reshape(-1, 32).mean(0)
    assert np.abs(share - 0.5).max() < 5 * 0.5 / math.sqrt(bits.size)  # five standard deviations
    uniform = bits / 2.0**32 - 0.5
    for axis in range(3):  # neighbours are not correlated
        ahead, behind = (np.delete(uniform, end, axis) for end in (0, -1))
        assert abs((ahead * behind).mean() * 12) < 5 / math.sqrt(ahead.size)
    assert all((other != one).all() for other in others)
    np.testing.assert_array_equal(layer, bits[7])


def test_bfloat16_rounding_is_between_neighbours_and_unbiased() -> None:
    x = np.float32([1.0, 1.001, -1.001, 3e-5, 0.0, -7.77])
    rounded = jax.jit(stochastic_bfloat16)
    drawn = np.asarray(rounded(np.broadcast_to(x, (40_000, 6)), jax.jit(lambda: _bits((40_000, 6)))()))
    np.testing.assert_array_equal(drawn, drawn.astype(jnp.bfloat16).astype(np.float32))
    # Between bfloat16 neighbours; 0 where bfloat16 holds the number exactly.
    gap = np.asarray([0, 2**-7, 2**-7, 2**-23, 0, 2**-5])
    assert (np.abs(drawn - x) <= gap).all()
    assert (np.abs(drawn.mean(0) - x) <= 5 * gap / 2 / 200).all()
    # A GPU's NaN has all bits set: adding to them must not carry over to zero.
    odd = np.asarray([0x7FFFFFFF, 0xFFFFFFFF, 0x7F800000], np.uint32).view(np.float32)
    with np.errstate(invalid="ignore"):
        np.testing.assert_array_equal(rounded(odd, np.full(3, 0xFFFF, np.uint32)), odd)


@pytest.mark.parametrize("signed", [True, False])
def test_eight_bits_are_near_unbiased_and_keep_a_rows_largest(signed: bool) -> None:
    """Errors stay within one spacing (9.05%) over the whole range, 2^16 or 2^32; rows are independent; 0 stays 0."""
    reach = 15.7 if signed else 31.8
    magnitudes = 2.0 ** -np.linspace(0, reach, 64)
    x = np.outer([1.0, 1e-20, 0.0], magnitudes * (np.where(np.arange(64) % 2, -1, 1) if signed else 1))
    many = (5000, 3, 64)
    stored, back = _stored(np.broadcast_to(x, many), signed)
    assert (stored.codes.dtype, stored.codes.shape) == (jnp.int8 if signed else jnp.uint8, many)
    assert (stored.scale.dtype, stored.scale.shape) == (jnp.float32, (5000, 3, 1))
    spacing = 2 ** (1 / moments.PER_OCTAVE) - 1
    assert (np.abs(back - x) <= spacing * np.abs(x) * 1.001).all()
    assert (np.abs(back.mean(0) - x) <= (5 * spacing / 2 / math.sqrt(5000) + 1e-5) * np.abs(x)).all()
    np.testing.assert_array_equal(back[:, :, 0], np.broadcast_to(np.float32(x[:, 0]), (5000, 3)))


def test_what_is_below_the_range_vanishes_or_does_not() -> None:
    """A first moment below its range is 0 on most draws, and itself on average; a second moment is never 0."""
    first = _stored(np.broadcast_to([1.0, 2.0**-20], (50_000, 2)), signed=True)[1][:, 1]
    assert 0.9 < (first == 0).mean() < 1 and first.mean() == pytest.approx(2.0**-20, rel=0.1)
    _, second = _stored(np.asarray([1.0, 2.0**-60, 0.0]), signed=False)
    np.testing.assert_allclose(second[1:], 2 ** (-255 / 8), rtol=1e-5)


def _gradients(step: int) -> dict[str, Any]:
    """Returns noisy gradients whose sizes differ a thousandfold along a row."""
    sizes = np.logspace(-3, 0, 64, dtype=np.float32)
    return {"w": sizes * (0.3 + jax.random.normal(jax.random.key(step), (16, 64)))}


def _adamw(storage: Storage, b2: float) -> optax.GradientTransformation:
    """Makes an AdamW whose updates are Adam's direction with the opposite sign."""
    config = OptimizerConfig(lr=1.0, schedule="constant", warmup_steps=0, clip_norm=0.0, b2=b2, moments=storage)
    return make_optimizer(config, 1, {})


def _updates(optimizer: optax.GradientTransformation, steps: int = 100) -> np.ndarray:
    start = {"w": np.zeros((16, 64), np.float32)}

    def one(state: Any, step: jax.Array) -> tuple[Any, Any]:
        updates, state = optimizer.update(_gradients(step), state, start)
        return state, updates["w"]

    return np.asarray(jax.jit(lambda: jax.lax.scan(one, optimizer.init(start), jnp.arange(steps))[1])())


@pytest.mark.parametrize("b2", [0.95, 0.999])
def test_moments_follow_float32(b2: float) -> None:
    """Compares the root mean square error of Adam's direction over 100 steps with that of the direction itself."""
    wanted = _updates(optax.adam(1.0, 0.9, b2))
    bounds: dict[Storage, float] = {"float32": 1e-5, "bfloat16": 0.01, "int8": 0.12}
    for storage, bound in bounds.items():
        found = _updates(_adamw(storage, b2))
        error = np.sqrt(np.mean((found - wanted) ** 2) / np.mean(wanted**2))
        assert error < bound, storage


def _second_moment(storage: Storage, b2: float) -> float:
    """Returns the mean of v, which begins at 1, after gradients of 0.5 for the half-life of b2.

    One element of each row keeps a gradient of 1, so that the row's scale stays.
    """
    optimizer, one = _adamw(storage, b2), np.ones((4, 256), np.float32)
    grads = np.where(np.arange(256) == 0, one, np.float32(0.5))

    def step(state: Any, _: None) -> tuple[Any, None]:
        return optimizer.update({"w": grads}, state, {"w": one})[1], None

    @jax.jit
    def last() -> jax.Array:
        kept: Any = jnp.asarray(one, None if storage == "int8" else storage)
        kept = quantise_moment(jnp.asarray(one), _bits(one.shape), signed=False) if storage == "int8" else kept
        start = optimizer.init({"w": one})._replace(nu={"w": kept})
        kept = jax.lax.scan(step, start, None, _half_life(b2))[0].nu["w"]
        return (dequantise_moment(kept) if storage == "int8" else kept.astype(jnp.float32))[:, 1:].mean()

    return float(last())


def _half_life(b2: float) -> int:
    return round(math.log(2) / -math.log(b2))


CASES: list[tuple[Storage, float]] = [("bfloat16", 0.95), ("bfloat16", 0.999), ("int8", 0.95), ("int8", 0.999)]


@pytest.mark.parametrize(("storage", "b2"), CASES)
def test_a_second_moment_falls_as_it_should(storage: Storage, b2: float) -> None:
    assert _second_moment(storage, b2) == pytest.approx(0.25 + 0.75 * b2 ** _half_life(b2), rel=0.03)


@pytest.mark.usefixtures("nearest")
@pytest.mark.parametrize(("storage", "b2"), CASES[1:])
def test_rounded_to_the_nearest_it_stays_where_it_was(storage: Storage, b2: float) -> None:
    assert _second_moment(storage, b2) == 1.0


@functools.cache
@jax.jit
def _regression() -> tuple[jax.Array, jax.Array, jax.Array]:
    """Draws inputs, true weights and noise."""
    key = jax.random.key(0)
    inputs = jax.random.normal(key, (150, 32, 16)) * jnp.logspace(-1, 0.5, 16)
    truth = jax.random.normal(jax.random.fold_in(key, 1), (16, 8))
    return inputs, truth, 0.1 * jax.random.normal(jax.random.fold_in(key, 2), (150, 32, 8))


def _fit(config: OptimizerConfig, dtype: str = "float32") -> float:
    """Returns the loss of a small noisy regression after 150 steps."""
    inputs, truth, noise = _regression()
    optimizer = make_optimizer(config, 150, {"w": ParamSpec((16, 8), (None, None), 1.0, "w")})

    def loss(w: Any, x: jax.Array, e: jax.Array) -> jax.Array:
        return jnp.mean((x @ (w["w"].astype(jnp.float32) - truth) - e) ** 2)

    def step(carry: Any, batch: Any) -> tuple[Any, None]:
        w, state = carry
        updates, state = optimizer.update(jax.grad(loss)(w, *batch), state, w)
        return (optax.apply_updates(w, updates), state), None

    @jax.jit
    def last(inputs: jax.Array, noise: jax.Array) -> jax.Array:
        w = {"w": jnp.zeros((16, 8), dtype)}
        (w, _), _ = jax.lax.scan(step, (w, optimizer.init(w)), (inputs, noise))
        return jnp.mean(jax.vmap(lambda x, e: loss(w, x, e))(inputs, noise))

    return float(last(inputs, noise))


@pytest.fixture(scope="module")
def full() -> float:
    return _fit(OptimizerConfig(lr=0.05, warmup_steps=10))


@pytest.mark.parametrize(
    ("fields", "dtype", "bound"),
    [
        ({"moments": "bfloat16"}, "float32", 0.01),
        ({"moments": "int8"}, "float32", 0.01),
        ({"name": "adafactor"}, "float32", 0.01),
        ({"name": "adafactor", "moments": "int8"}, "float32", 0.01),
        ({"name": "adafactor", "b1": 0.0}, "float32", 0.01),
        ({"moments": "int8"}, "bfloat16", 0.06),  # weights with 8 significant bits cannot fit more exactly
    ],
)
def test_training_ends_as_low_as_with_float32(fields: dict[str, Any], dtype: str, bound: float, full: float) -> None:
    assert _fit(OptimizerConfig(lr=0.05, warmup_steps=10, **fields), dtype) == pytest.approx(full, rel=bound)


@pytest.mark.parametrize(("rounding", "moves"), [("nearest", False), ("stochastic", True)])
def test_small_updates_of_bfloat16_weights(rounding: Literal["nearest", "stochastic"], moves: bool) -> None:
    """Applies 200 updates of 1e-5 to 1, whose bfloat16 neighbours are 1/256 below and 1/128 above."""
    config = OptimizerConfig(lr=1e-5, schedule="constant", warmup_steps=0, rounding=rounding)
    optimizer = make_optimizer(config, 200, {"w": ParamSpec((64, 512), (None, None), 1.0, "w")})
    start = {"w": np.ones((64, 512), jnp.bfloat16)}
    grads = {"w": np.where(np.arange(64)[:, None] < 32, -start["w"], start["w"])}

    def step(carry: Any, _: None) -> tuple[Any, None]:
        w, state = carry
        updates, state = optimizer.update(grads, state, w)
        return (optax.apply_updates(w, updates), state), None

    (w, _), _ = jax.jit(lambda w: jax.lax.scan(step, (w, optimizer.init(w)), None, 200))(start)
    assert w["w"].dtype == jnp.bfloat16
    moved = np.asarray(w["w"], np.float64) - 1
    if not moves:
        assert (moved == 0).all()
        return
    for half, wanted in ((moved[:32], 0.002), (moved[32:], -0.002)):
        assert half.mean() == pytest.approx(wanted, rel=0.1)


BYTES: list[tuple[dict[str, Any], float, float]] = [
    # (fields, bytes a weight at least, at most)
    ({}, 8, 8.0001),
    ({"moments": "bfloat16"}, 4, 4.0001),
    ({"moments": "int8"}, 2, 2.003),
    ({"name": "adafactor"}, 4, 4.005),
    ({"name": "adafactor", "moments": "int8"}, 1, 1.005),
    ({"name": "adafactor", "b1": 0.0}, 0, 0.003),
]


@pytest.mark.parametrize(("fields", "least", "most"), BYTES)
def test_bytes_of_state_for_each_weight_of_8b(fields: dict[str, Any], least: float, most: float) -> None:
    """The bytes are computed from the state's shapes; nothing is allocated."""
    table = _table(126_464, 4096, 32, 32, 12_288)
    optimizer = make_optimizer(OptimizerConfig(**fields), 10, table)
    state = jax.eval_shape(optimizer.init, abstract_params(table, "bfloat16"))
    size = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))
    assert count_params(table) == 8_015_581_184
    assert least <= size / count_params(table) <= most


Updated = tuple[TrainState, TrainState]


@pytest.fixture(scope="module")
def updated() -> Iterator[Callable[[dict[str, Any]], Updated]]:
    """Updates bfloat16 weights three times on one device, and layer by layer on eight.

    Gradients are not clipped, because a sum over devices would differ in its rounding.
    """
    whole = _table(256, 128, 2, 2, 256)
    table = {path: whole[path] for path in ("embed", "blocks/q", "blocks/attn_norm")}  # fewer tensors compile faster
    start = jax.device_get(init_params(table, 0, "bfloat16"))
    grads = jax.device_get(init_params(table, 1, "bfloat16"))

    def run(fields: dict[str, Any]) -> Updated:
        optimizer = make_optimizer(OptimizerConfig(lr=1e-4, warmup_steps=0, clip_norm=0.0, **fields), 9, table)
        states = []
        for shape, devices, loop_from in (((1, 1), jax.devices()[:1], 2**24), ((1, 8), None, 0)):
            patch.setattr(adamw, "LOOP_FROM", loop_from)
            mesh = make_mesh(*shape, devices=devices)
            with jax.set_mesh(mesh):
                state = create_state(jax.device_put(start, rules.param_shardings(mesh, table)), optimizer, mesh, table)
                placed = state_shardings(state.opt_state, mesh, table)

                def step(state: TrainState, grads: Any) -> TrainState:
                    updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
                    return TrainState(optax.apply_updates(state.params, updates), opt_state, state.step + 1)

                update = jax.jit(step, in_shardings=(placed, placed.params), out_shardings=placed)
                for _ in range(3):
                    state = update(state, grads)
            states.append(state)
        return states[0], states[1]

    with pytest.MonkeyPatch.context() as patch:
        yield run


def test_eight_bit_moments_and_rounding_do_not_depend_on_mesh_or_loop(
    updated: Callable[..., Updated], tmp_path: Path
) -> None:
    one, many = updated({"moments": "int8", "weight_decay": 0.1})
    chex.assert_trees_all_equal(jax.device_get(one), jax.device_get(many), strict=True)
    adam = many.opt_state
    for path, weight in flatten(many.params).items():
        codes, scale = flatten(adam.mu)[path]
        assert codes.sharding.is_equivalent_to(weight.sharding, weight.ndim), path
        assert codes.addressable_shards[0].data.size == codes.size // 8, path
        assert scale.sharding.shard_shape(scale.shape)[-1] == 1, path
    # A checkpoint of the split state is read onto one device.
    checkpoints = CheckpointWriter(tmp_path, Keep(1))
    checkpoints.save(many, 3, {})
    read = checkpoints.restore(3, one)
    checkpoints.close()
    chex.assert_trees_all_equal(jax.device_get(read), jax.device_get(many), strict=True)


def test_adafactors_statistics_have_a_place_on_the_mesh(updated: Callable[..., Updated]) -> None:
    one, many = updated({"name": "adafactor", "moments": "bfloat16"})
    factored = many.opt_state[0][1]
    assert factored.v_row["blocks"]["q"].shape == (2, 128) and factored.v["blocks"]["q"].shape == (1,)
    for path, weight in flatten(one.params).items():
        left, right = (np.asarray(x, np.float32) for x in (weight, flatten(many.params)[path]))
        # Means are summed in another order: now and then a weight is rounded the other way.
        assert (left == right).mean() > 0.99 and np.abs(left - right).max() <= 2**-7 * np.abs(left).max(), path
