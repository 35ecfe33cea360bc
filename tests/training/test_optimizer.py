"""Tests schedules, decay, clipping and updates against numbers by hand, DeepSpeed and PyTorch, and state in few bits against float32."""

import functools
import json
import math
from collections.abc import Callable
from typing import Any

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
from jaxblock.training.optim import adamw, moments, precision, schedules
from jaxblock.training.optim.config import OptimizerConfig
from jaxblock.training.optim.gating import count_updates
from jaxblock.training.optim.make import make_optimizer
from jaxblock.training.optim.moments import dequantise_moment, quantise_moment
from jaxblock.training.optim.precision import random_bits, stochastic_bfloat16
from jaxblock.training.state import TrainState, create_state, state_shardings


def _table(vocab_size: int, d_model: int, n_layers: int, n_heads: int, mlp_dim: int) -> Table:
    model = ModelConfig(d_model=d_model, n_layers=n_layers, n_heads=n_heads, mlp_dim=mlp_dim)
    return registry.param_table(registry.architecture_from_config(model, vocab_size=vocab_size, mask_id=10, eos_id=1))


def _config(**fields: Any) -> OptimizerConfig:
    return OptimizerConfig(**{"schedule": "constant", "warmup_steps": 0, "clip_norm": 0.0} | fields)


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
def test_schedule_by_hand(schedule, warmup, final, expected):
    config = OptimizerConfig(lr=1.0, schedule=schedule, warmup_steps=warmup, final_ratio=final)
    rates = np.broadcast_to(jax.jit(schedules.schedule(config, 12))(np.arange(13)), 13)
    assert {step: rates[step] for step in expected} == pytest.approx(expected, abs=1e-6)


def test_deepspeeds_schedule(shared):
    """Compares every stored vector, also one update late from 0, as DeepSpeed's engine orders it."""
    cases = json.loads((shared / "golden" / "train" / "lr_schedules.json").read_text())
    assert len(cases) == 12
    for case in cases:
        wanted = np.asarray(case["ratio_by_iteration"])
        names = {"warmup_steps": "warmup_num_steps", "warmup": "warmup_type", "warmup_floor": "warmup_min_ratio"}
        fields = {ours: case[theirs] for ours, theirs in (names | {"final_ratio": "cos_min_ratio"}).items()}
        for order, ratios in (("before_update", wanted), ("after_update", np.append(0.0, wanted[:-1]))):
            config = OptimizerConfig(lr=0.5, schedule="deepspeed_cosine", scheduler_steps=order, **fields)
            found = schedules.learning_rates(config, case["total_steps"])
            np.testing.assert_allclose(found, 0.5 * ratios, rtol=1e-5, atol=1e-7, err_msg=str(case)[:150])


@pytest.mark.parametrize("decay", ["matrices", "all"])
def test_weight_decay_alone_shrinks_what_it_should(decay):
    """With a gradient of 0 an update is -lr * weight_decay * parameter, and nothing where there is no decay."""
    table = _table(11, 8, 2, 2, 12)
    params = jax.device_get(init_params(table, 0, "float32"))
    norms = {"blocks/attn_norm", "blocks/mlp_norm", "final_norm"}
    assert norms < set(table)
    optimizer = make_optimizer(_config(lr=0.1, weight_decay=0.5, decay=decay), 10, table)
    first = jax.jit(lambda params, grads: optimizer.update(grads, optimizer.init(params), params)[0])
    for path, update in flatten(first(params, jax.tree.map(np.zeros_like, params))).items():
        shrinks = decay == "all" or path not in norms
        np.testing.assert_allclose(update, -0.05 * flatten(params)[path] if shrinks else 0, rtol=1e-6, err_msg=path)


def test_clipping_is_torchs():
    """The 1e-6 shows near zero: a gradient of norm 1e-6 clipped to 1e-6 is halved. A smaller norm is not clipped."""
    grads = {"a": np.float32([6e-7]), "b": np.float32([8e-7])}
    half, whole = jax.jit(lambda grads: [precision.clip_share(grads, clip) for clip in (1e-6, 1.0)])(grads)
    assert float(half) == pytest.approx(0.5, rel=1e-6) and float(whole) == 1.0
    # Summed in float32: in bfloat16 the sum of 1,000 squares of 1 would stop at 256.
    norm = jax.jit(precision.global_norm)({"a": np.ones((1000,), jnp.bfloat16)})
    assert float(norm) == pytest.approx(1000**0.5)


Gradient = Callable[[Any, Any], Any]


def _updated(config: OptimizerConfig, begin: np.ndarray, gradient: Gradient, over: Any, steps: int = 10) -> Any:
    """Updates a matrix once for each element of ``over``, by ``gradient(matrix, element)``.

    Returns:
        (every update, the matrix at the end, the optimizer's state at the end).
    """
    optimizer = make_optimizer(config, steps, {"w": ParamSpec(begin.shape, (None, None), 1.0, "w")})

    def step(carry: Any, at: Any) -> tuple[Any, Any]:
        params, state = carry
        updates, state = optimizer.update({"w": gradient(params["w"], at)}, state, params)
        return (optax.apply_updates(params, updates), state), updates["w"]

    params = {"w": begin}
    (end, state), updates = jax.jit(lambda over: jax.lax.scan(step, (params, optimizer.init(params)), over))(over)
    return updates, end["w"], state


@pytest.mark.parametrize(("b1", "last", "wanted"), [(0.9, 1, 1), (0.0, 10, 1), (0.0, 0.1, "smaller")])
def test_adafactors_first_updates_by_hand(b1, last, wanted):
    """g = r c^T has a second moment of rank one: v = g^2 exactly, so the direction is the sign, as Adam's is."""
    row, column = np.logspace(-3, 1, 128, dtype=np.float32)[:, None], np.linspace(-1, 1, 256, dtype=np.float32)[None]
    grads, sizes = row * column, np.float32([1, 1, last])
    config = _config(
        name="adafactor", lr=0.1, b1=b1, moments="int8"
    )  # each row's first moments are one number but for the sign
    updates, _, _ = _updated(config, np.zeros_like(grads), lambda _, size: size * grads, sizes)
    if wanted == "smaller":  # the decay is b2 with Adam's correction
        share = 0.95 * (1 - 0.95**2) / (1 - 0.95**3)
        wanted = last / (share + (1 - share) * last**2) ** 0.5
    for update, factor in zip(
        updates, (1, 1, wanted), strict=True
    ):  # of a larger gradient a step is cut to an RMS of 1
        np.testing.assert_allclose(update, -0.1 * factor * np.sign(grads), rtol=1e-3)


@pytest.mark.parametrize(
    "settings",
    [
        {"moments": "int8"},
        {"name": "adafactor", "b1": 0.0, "weight_decay": 0.1},
        {"name": "adafactor", "moments": "bfloat16", "rounding": "nearest"},
    ],
    ids=str,
)
def test_updates_are_counted_whatever_else_the_state_holds(settings):
    """A parameter may be called ``step``, and a number of another link of the chain too."""
    params = {"step": np.ones((8, 8), jnp.bfloat16)}
    table = {"step": ParamSpec((8, 8), ("embed", "mlp"), 1.0, "w")}
    made = make_optimizer(OptimizerConfig(warmup_steps=0, **settings), 10, table)
    other = optax.GradientTransformation(lambda _: {"step": 7}, lambda updates, state, _: (updates, state))
    optimizer = optax.chain(other, made)

    @jax.jit
    def states(params: Any) -> list[Any]:
        found = [optimizer.init(params)]
        for _ in range(2):
            found.append(optimizer.update(params, found[-1], params)[1])
        return found

    assert [count_updates(state) for state in states(params)] == [0, 1, 2]
    with pytest.raises(ValueError, match="counters are"):
        count_updates(other.init(params))


# State in few bits


def _bits(shape: tuple[int, ...]) -> jax.Array:
    return random_bits(0, jnp.int32(0), "x", shape)


def _stored(x: np.ndarray, signed: bool) -> tuple[moments.Quantised, np.ndarray]:
    """Returns numbers in 8 bits, and what those stand for."""
    stored = jax.jit(lambda x: quantise_moment(x, _bits(x.shape), signed=signed))(np.asarray(x, np.float32))
    return stored, np.asarray(jax.jit(dequantise_moment)(stored), np.float64)


def test_random_bits_are_even_and_depend_on_seed_step_path_and_place():
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


def test_bfloat16_rounding_is_between_neighbours_and_unbiased():
    x = np.float32([1.0, 1.001, -1.001, 3e-5, 0.0, -7.77])
    rounded = jax.jit(stochastic_bfloat16)
    drawn = np.asarray(rounded(np.broadcast_to(x, (40_000, 6)), jax.jit(lambda: _bits((40_000, 6)))()))
    np.testing.assert_array_equal(drawn, drawn.astype(jnp.bfloat16).astype(np.float32))
    # Between bfloat16 neighbours; 0 where bfloat16 holds the number exactly.
    gap = np.asarray([0, 2**-7, 2**-7, 2**-23, 0, 2**-5])
    assert (np.abs(drawn - x) <= gap).all() and (np.abs(drawn.mean(0) - x) <= 5 * gap / 2 / 200).all()
    # A GPU's NaN has all bits set: adding to them must not carry over to zero.
    odd = np.asarray([0x7FFFFFFF, 0xFFFFFFFF, 0x7F800000], np.uint32).view(np.float32)
    with np.errstate(invalid="ignore"):
        np.testing.assert_array_equal(rounded(odd, np.full(3, 0xFFFF, np.uint32)), odd)


@pytest.mark.parametrize("signed", [True, False])
def test_eight_bits_are_near_unbiased_and_keep_a_rows_largest(signed):
    """Errors stay within one spacing (9.05%) over the whole range, 2^16 or 2^32; rows are independent; 0 stays 0."""
    magnitudes = 2.0 ** -np.linspace(0, 15.7 if signed else 31.8, 64)
    x = np.outer([1.0, 1e-20, 0.0], magnitudes * (np.where(np.arange(64) % 2, -1, 1) if signed else 1))
    many = (5000, 3, 64)
    stored, back = _stored(np.broadcast_to(x, many), signed)
    assert (stored.codes.dtype, stored.codes.shape) == (jnp.int8 if signed else jnp.uint8, many)
    assert (stored.scale.dtype, stored.scale.shape) == (jnp.float32, (5000, 3, 1))
    spacing = 2 ** (1 / moments.PER_OCTAVE) - 1
    assert (np.abs(back - x) <= spacing * np.abs(x) * 1.001).all()
    assert (np.abs(back.mean(0) - x) <= (5 * spacing / 2 / math.sqrt(5000) + 1e-5) * np.abs(x)).all()
    np.testing.assert_array_equal(back[:, :, 0], np.broadcast_to(np.float32(x[:, 0]), (5000, 3)))


def test_what_is_below_the_range_vanishes_or_does_not():
    """A first moment below its range is 0 on most draws, and itself on average; a second moment is never 0."""
    first = _stored(np.broadcast_to([1.0, 2.0**-20], (50_000, 2)), signed=True)[1][:, 1]
    assert 0.9 < (first == 0).mean() < 1 and first.mean() == pytest.approx(2.0**-20, rel=0.1)
    _, second = _stored(np.asarray([1.0, 2.0**-60, 0.0]), signed=False)
    np.testing.assert_allclose(second[1:], 2 ** (-255 / 8), rtol=1e-5)


@pytest.mark.parametrize("storage, b2", [("bfloat16", 0.95), ("bfloat16", 0.999), ("int8", 0.95), ("int8", 0.999)])
def test_a_second_moment_falls_as_it_should_and_rounded_to_the_nearest_stays(storage, b2, monkeypatch):
    """The first gradient makes it 1; the others are 0.5 for the half-life of b2, but in a column that keeps the rows' scales."""
    steps, kept = round(math.log(2) / -math.log(b2)), np.arange(256) == 0
    sizes = np.float32([(1 - b2) ** -0.5, *[1] * steps])

    def mean_after() -> float:
        gradient = lambda _, size: jnp.where(kept | (size > 1), size, 0.5) * jnp.ones((4, 1))  # noqa: E731
        config = _config(lr=1.0, b2=b2, moments=storage)
        nu = _updated(config, np.ones((4, 256), np.float32), gradient, sizes)[2].nu["w"]
        return float((dequantise_moment(nu) if storage == "int8" else nu.astype(jnp.float32))[:, 1:].mean())

    assert mean_after() == pytest.approx(0.25 + 0.75 * b2**steps, rel=0.03)
    if (storage, b2) != ("bfloat16", 0.95):  # every draw is one half, which rounds to the nearest
        half = lambda seed, step, path, shape, layer: jnp.full(shape, 0x7FFF7FFF, jnp.uint32)  # noqa: E731
        monkeypatch.setattr(adamw, "random_bits", half)
        assert mean_after() == pytest.approx(1.0, rel=1e-6)


@pytest.fixture(scope="module")
def fitted() -> Callable[..., float]:
    """Returns a function that fits a small noisy regression in 150 steps, and returns the loss."""

    @jax.jit
    def drawn() -> tuple[jax.Array, jax.Array]:
        key = jax.random.key(0)
        inputs = jax.random.normal(key, (150, 32, 16)) * jnp.logspace(-1, 0.5, 16)
        truth, noise = (
            jax.random.normal(jax.random.fold_in(key, at), s) for at, s in ((1, (16, 8)), (2, (150, 32, 8)))
        )
        return inputs, inputs @ truth + 0.1 * noise

    inputs, outputs = jax.device_get(drawn())

    def loss(w: Any, x: Any, y: Any) -> Any:
        return jnp.mean((x @ w.astype(jnp.float32) - y) ** 2)

    @functools.cache
    def fit(dtype: str = "float32", **fields: Any) -> float:
        config = OptimizerConfig(lr=0.05, warmup_steps=10, **fields)
        gradient = lambda w, batch: jax.grad(loss)(w, *batch)  # noqa: E731
        w = _updated(config, np.zeros((16, 8), dtype), gradient, (inputs, outputs), steps=150)[1]
        return float(loss(w, inputs, outputs))

    return fit


@pytest.mark.parametrize(
    ("fields", "bound"),
    [
        ({"moments": "bfloat16"}, 0.01),
        ({"moments": "int8"}, 0.01),
        ({"name": "adafactor"}, 0.01),
        ({"name": "adafactor", "moments": "int8"}, 0.01),
        ({"name": "adafactor", "b1": 0.0}, 0.01),
        ({"moments": "int8", "dtype": "bfloat16"}, 0.06),  # weights with 8 significant bits cannot fit more exactly
    ],
)
def test_training_ends_as_low_as_with_float32(fields, bound, fitted):
    assert fitted(**fields) == pytest.approx(fitted(), rel=bound)


@pytest.mark.slow
@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
def test_small_updates_of_bfloat16_weights(rounding):
    """Applies 200 updates of 1e-5 to 1, whose bfloat16 neighbours are 1/256 below and 1/128 above."""
    start = np.ones((64, 512), jnp.bfloat16)
    grads = np.where(np.arange(64)[:, None] < 32, -start, start)
    _, weights, _ = _updated(_config(lr=1e-5, rounding=rounding), start, lambda *_: grads, np.arange(200))
    assert weights.dtype == jnp.bfloat16
    moved = np.asarray(weights, np.float64) - 1
    wanted = 0.0 if rounding == "nearest" else 0.002
    assert (moved[:32].mean(), -moved[32:].mean()) == pytest.approx((wanted, wanted), rel=0.1)
    assert moved.any() == (rounding == "stochastic")


@pytest.mark.parametrize(
    ("fields", "least", "most"),
    [
        ({}, 8, 8.0001),
        ({"moments": "bfloat16"}, 4, 4.0001),
        ({"moments": "int8"}, 2, 2.003),
        ({"name": "adafactor"}, 4, 4.005),
        ({"name": "adafactor", "moments": "int8"}, 1, 1.005),
        ({"name": "adafactor", "b1": 0.0}, 0, 0.003),
    ],
)
def test_bytes_of_state_for_each_weight_of_8b(fields, least, most):
    """The bytes are computed from the state's shapes; nothing is allocated."""
    table = _table(126_464, 4096, 32, 32, 12_288)
    optimizer = make_optimizer(OptimizerConfig(**fields), 10, table)
    state = jax.eval_shape(optimizer.init, abstract_params(table, "bfloat16"))
    size = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))
    assert count_params(table) == 8_015_581_184
    assert least <= size / count_params(table) <= most


def _on_one_and_on_eight(fields: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> list[TrainState]:
    """Updates bfloat16 weights three times on one device, and layer by layer on eight.

    Gradients are not clipped, because a sum over devices would differ in its rounding.
    """
    whole = _table(256, 128, 2, 2, 256)
    table = {path: whole[path] for path in ("embed", "blocks/q", "blocks/attn_norm")}  # fewer tensors compile faster
    start, grads = (jax.device_get(init_params(table, seed, "bfloat16")) for seed in (0, 1))
    optimizer = make_optimizer(OptimizerConfig(lr=1e-4, warmup_steps=0, clip_norm=0.0, **fields), 9, table)
    states = []
    for shape, devices, loop_from in (((1, 1), jax.devices()[:1], 2**24), ((1, 8), None, 0)):
        monkeypatch.setattr(adamw, "LOOP_FROM", loop_from)
        mesh = make_mesh(*shape, devices=devices)

        def step(state: TrainState, grads: Any) -> TrainState:
            updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
            return TrainState(optax.apply_updates(state.params, updates), opt_state, state.step + 1)

        with jax.set_mesh(mesh):
            state = create_state(jax.device_put(start, rules.param_shardings(mesh, table)), optimizer, mesh, table)
            placed = state_shardings(state.opt_state, mesh, table)
            update = jax.jit(step, in_shardings=(placed, placed.params), out_shardings=placed)
            for _ in range(3):
                state = update(state, grads)
        states.append(state)
    return states


@pytest.mark.slow
def test_eight_bit_moments_and_rounding_do_not_depend_on_mesh_or_loop(monkeypatch):
    one, many = _on_one_and_on_eight({"moments": "int8", "weight_decay": 0.1}, monkeypatch)
    chex.assert_trees_all_equal(jax.device_get(one), jax.device_get(many), strict=True)
    for path, weight in flatten(many.params).items():
        codes, scale = flatten(many.opt_state.mu)[path]
        assert codes.sharding.is_equivalent_to(weight.sharding, weight.ndim), path
        assert codes.addressable_shards[0].data.size == codes.size // 8, path
        assert scale.sharding.shard_shape(scale.shape)[-1] == 1, path


def test_adafactors_statistics_have_a_place_on_the_mesh(monkeypatch):
    one, many = _on_one_and_on_eight({"name": "adafactor", "moments": "bfloat16"}, monkeypatch)
    factored = many.opt_state[0][1]
    assert factored.v_row["blocks"]["q"].shape == (2, 128) and factored.v["blocks"]["q"].shape == (1,)
    for path, weight in flatten(one.params).items():
        left, right = (np.asarray(x, np.float32) for x in (weight, flatten(many.params)[path]))
        # Means are summed in another order: now and then a weight is rounded the other way.
        assert (left == right).mean() > 0.99 and np.abs(left - right).max() <= 2**-7 * np.abs(left).max(), path
