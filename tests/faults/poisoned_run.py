"""`python -m tests.faults.poisoned_run STEP ...`: runs jaxblock's command line with NaN gradients in one step."""

from __future__ import annotations

import sys
from typing import Any

import jax
import jax.numpy as jnp

from jaxblock.cli import main
from jaxblock.training import step as steps

if __name__ == "__main__":
    bad = int(sys.argv[1])
    gradients = steps.gradients

    def poisoned(objective: Any, params: Any, batch: Any, step: Any, *rest: Any) -> Any:
        found, grads = gradients(objective, params, batch, step, *rest)
        return found, jax.tree.map(lambda grad: jnp.where(step + 1 == bad, jnp.nan, grad), grads)

    steps.gradients = poisoned
    sys.exit(main(sys.argv[2:]))
