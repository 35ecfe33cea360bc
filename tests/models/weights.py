"""Draws random weights with NumPy, which compiles nothing."""

from __future__ import annotations

import numpy as np

from jaxblock.models.linear import int8
from jaxblock.models.spec import Table, nest
from jaxblock.types import Params


def random_params(table: Table, seed: int = 0, std: float = 0.2) -> Params:
    """Returns weights for a table, every entry different: matrices and biases around 0, norms around 1, int8 as such."""
    rng, flat = np.random.default_rng(seed), {}
    for path, spec in table.items():
        if spec.dtype == "int8":
            flat[path] = rng.integers(-127, 128, spec.shape).astype(np.int8)
        elif path.endswith(int8.SCALE):
            flat[path] = rng.uniform(0.001, 0.003, spec.shape).astype(np.float32)
        else:
            flat[path] = (std * rng.normal(size=spec.shape) + (spec.std is None)).astype(np.float32)
    return nest(flat)
