"""A poisoned batch: the step is skipped inside the compiled program, and only too many in a row stop the run."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxblock.config import OptimizerConfig
from jaxblock.errors import UserError
from jaxblock.models.params import ParamSpec
from jaxblock.training import optimizer as optimizers
from jaxblock.training.skipping import Skips, gated


@pytest.mark.parametrize(
    "settings", [{}, {"moments": "int8"}, {"name": "adafactor"}, {"name": "adafactor", "b1": 0.0}, None], ids=str
)
def test_a_skipped_update_changes_no_bit(settings: dict[str, Any] | None) -> None:
    params = {"w": jnp.linspace(-1, 1, 64).reshape(8, 8).at[0, 0].set(-0.0).astype(jnp.bfloat16)}
    table = {"w": ParamSpec((8, 8), ("embed", "mlp"), 1.0, "w")}
    optimizer = gated(optax.adam(0.1)) if settings is None else None
    if settings is not None:
        optimizer = gated(optimizers.make(OptimizerConfig(warmup_steps=0, **settings), 10, table))

    @jax.jit
    def step(params: Any, state: Any, grads: Any, finite: Any) -> Any:
        updates, state = optimizer.update(grads, state, params, finite=finite)
        return optax.apply_updates(params, updates), state

    good = {"w": jnp.ones((8, 8), jnp.bfloat16)}
    before = step(params, optimizer.init(params), good, True)
    bad = {"w": good["w"].at[3, 3].set(jnp.nan)}
    after = step(*before, bad, False)
    for left, right in zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True):
        assert left.dtype == right.dtype
        assert np.asarray(left).tobytes() == np.asarray(right).tobytes()
    # The control: a gate that is open lets the NaN through, or at least moves something.
    moved = step(*before, bad, True)
    assert not all(np.array_equal(a, b) for a, b in zip(jax.tree.leaves(before), jax.tree.leaves(moved), strict=True))


def _metrics(skipped: bool) -> Any:
    loss = SimpleNamespace(total=np.float32("nan" if skipped else 1))
    return SimpleNamespace(
        losses=SimpleNamespace(loss=loss), grad_norm=np.float32("inf" if skipped else 1), skipped=np.bool_(skipped)
    )


def test_only_too_many_in_a_row_stop_the_run() -> None:
    skips = Skips(3)
    indices = [np.array([step, 100 + step]) for step in range(4)]
    assert skips.look([_metrics(False)] * 4, 0, indices) is None
    assert "step 5, 6:" in (skips.look([_metrics(s) for s in (True, True, False, False)], 4, indices) or "")
    assert skips.look([_metrics(s) for s in (False, True, False, True)], 8, indices) is not None
    with pytest.raises(UserError, match=r"3 steps in a row(.|\n)*step 12.*train records 3, 103(.|\n)*step 14.*1, 101"):
        skips.look([_metrics(s) for s in (True, True, False, False)], 12, indices)
    assert Skips(0).look([_metrics(True)] * 4, 0, indices) is not None
