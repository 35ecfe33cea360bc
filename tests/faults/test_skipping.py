"""Tests batches that give NaN: the compiled program skips the step, and only too many in a row stop the run."""

from collections.abc import Iterator
from typing import Any
from unittest.mock import Mock

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxblock
from jaxblock.config.yaml import load_config
from jaxblock.data.loader import Batch
from jaxblock.diffusion.objective import Losses
from jaxblock.errors import UserError
from jaxblock.models.spec import ParamSpec
from jaxblock.training import loop
from jaxblock.training import step as steps
from jaxblock.training.checkpoints.writer import CheckpointWriter
from jaxblock.training.guard.steps import SkippedSteps
from jaxblock.training.observe.metrics import MetricsWriter
from jaxblock.training.optim import gating
from jaxblock.training.optim.config import OptimizerConfig
from jaxblock.training.optim.make import make_optimizer
from jaxblock.training.optim.schedules import learning_rates
from jaxblock.training.state import TrainState
from jaxblock.training.step import Objective, StepMetrics
from jaxblock.types import Sum
from tests import runs

TABLE = {"w": ParamSpec((8, 8), ("embed", "mlp"), 1.0, "w")}
OPTIMIZERS = [{}, {"moments": "int8"}, {"name": "adafactor"}, {"name": "adafactor", "b1": 0.0}]
OPTIMIZERS = [make_optimizer(OptimizerConfig(warmup_steps=0, **fields), 10, TABLE) for fields in OPTIMIZERS]


@pytest.mark.parametrize("optimizer", [*OPTIMIZERS, optax.adam(0.1)])
def test_a_skipped_update_changes_no_bit(optimizer):
    params = {"w": jnp.linspace(-1, 1, 64).reshape(8, 8).at[0, 0].set(-0.0).astype(jnp.bfloat16)}
    optimizer = gating.gated(optimizer)

    @jax.jit
    def step(params: Any, state: Any, grads: Any, finite: Any) -> Any:
        updates, state = optimizer.update(grads, state, params, finite=finite)
        return optax.apply_updates(params, updates), state

    def bits(tree: Any) -> list[tuple[object, bytes]]:
        return [(leaf.dtype, np.asarray(leaf).tobytes()) for leaf in jax.tree.leaves(tree)]

    good = {"w": jnp.ones((8, 8), jnp.bfloat16)}
    bad = {"w": good["w"].at[3, 3].set(jnp.nan)}
    before = step(params, optimizer.init(params), good, True)
    assert bits(step(*before, bad, False)) == bits(before)
    # The control: without the gate the NaN gets through, or at least something changes.
    assert bits(step(*before, bad, True)) != bits(before)


def _metrics(skipped: bool) -> StepMetrics:
    loss, nothing = Sum(jnp.float32("nan" if skipped else 1), jnp.float32(1)), Sum(jnp.zeros(2), jnp.zeros(2))
    return StepMetrics(
        Losses(loss, nothing, nothing, nothing), jnp.float32("inf" if skipped else 1), jnp.bool_(skipped)
    )


@pytest.mark.parametrize("skipped", [False, True])
def test_a_skipped_step_changes_neither_weights_nor_their_average(skipped, monkeypatch):
    grads = {"w": jnp.ones(3)}
    monkeypatch.setattr(steps, "gradients", lambda *_: (_metrics(skipped).losses, grads))
    optimizer = optax.sgd(0.5)
    state = TrainState({"w": jnp.ones(3)}, optimizer.init(grads), jnp.int32(4), {"w": jnp.zeros(3)})
    after, metrics = steps.train_step(Mock(Objective), optimizer, state, Mock(Batch), ema=0.9)
    moved = [bool((a["w"] != b["w"]).any()) for a, b in ((after.params, state.params), (after.average, state.average))]
    assert moved == [not skipped] * 2 and bool(metrics.skipped) == skipped and after.step == 5


def test_only_too_many_in_a_row_stop_the_run():
    skips, indices = SkippedSteps(3), [np.array([step, 100 + step]) for step in range(4)]

    def check(pattern: str, first: int) -> str | None:
        return skips.check([_metrics(mark == "x") for mark in pattern], first, indices)

    assert check("....", 0) is None
    assert "step 5 (train records 0, 100); 6 (train records 1, 101):" in check("xx..", 4)
    assert check(".x.x", 8) is not None
    with pytest.raises(UserError, match=r"3 steps in a row(.|\n)*step 12.*train records 3, 103(.|\n)*step 14.*1, 101"):
        check("xx..", 12)
    assert SkippedSteps(0).check([_metrics(True)] * 4, 0, indices) is not None


@pytest.mark.slow
def test_a_poisoned_batch_is_skipped_and_three_in_a_row_stop_the_run_and_are_named(
    tiny_config, tmp_path, monkeypatch, ran
):
    """The gradients of step 2 are NaN, and those of all steps from 4 on. The run stops, and so does one that continues it."""
    run, gradients, batches, save = tmp_path / "run", steps.gradients, loop.batches, CheckpointWriter.save
    records: list[str] = []
    updates: dict[int, int] = {}
    closed: list[str] = []

    def poisoned(objective: Any, params: Any, batch: Any, step: Any, *rest: Any) -> Any:
        found, grads = gradients(objective, params, batch, step, *rest)
        bad = (step + 1 == 2) | (step + 1 >= 4)
        return found, jax.tree.map(lambda grad: jnp.where(bad, jnp.nan, grad), grads)

    def noted(*arguments: Any, **named: Any) -> Iterator[Any]:
        for batch in batches(*arguments, **named):
            records.append(f"(train records {', '.join(map(str, batch.index.tolist()))})")
            yield batch

    def saved(self: CheckpointWriter, state: Any, step: int, *rest: Any) -> None:
        updates[step] = gating.count_updates(state.opt_state)
        save(self, state, step, *rest)

    monkeypatch.setattr(steps, "gradients", poisoned)
    monkeypatch.setattr(loop, "batches", noted)
    monkeypatch.setattr(CheckpointWriter, "save", saved)
    monkeypatch.setattr(MetricsWriter, "close", lambda writer: closed.append(writer.path.name))
    command = (
        f"train --config {tiny_config} --train.out {run} --train.steps 12 --train.save_every 3 --train.max_skipped 3"
    )
    said = " ".join(ran(f"{command} {' '.join(runs.QUIET)}", 2).err.split())
    assert f"skipped step 2 {records[1]}" in said and "3 steps in a row (train.max_skipped)" in said
    assert all(f"step {step}: " in said and records[step - 1] in said for step in (4, 5, 6))
    assert closed == ["metrics.jsonl"]  # a run that fails closes its trackers too: what they hold in memory is written
    rows = runs.rows(run)
    assert [row["skipped"] for row in rows] == [False, True, False, True, True]
    # Steps 2 and 3 both tried the second update: its learning rate is logged, not that of the update after it.
    rates = learning_rates(load_config(str(tiny_config)).optimizer, 12)
    assert [row["lr"] for row in rows] == pytest.approx([rates[done] for done in (0, 1, 1, 2, 2)])
    assert updates == {3: 2} and all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(jaxblock.load(run).params))
    # A run that continues after a skipped step also reports the learning rate that the optimizer uses.
    assert "going on from step 3" in ran(f"{command} {' '.join(runs.QUIET)}", 2).err
    assert [str(row) for row in runs.rows(run)] == [str(row) for row in rows]
