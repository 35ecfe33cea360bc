"""Makes small networks of every family, with grouped keys and sizes that all differ, so that a wrong transpose shows."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import pytest

from jaxblock.models.architecture import Architecture
from jaxblock.models.families import registry
from jaxblock.models.spec import init_params
from jaxblock.types import Params

SIZES: dict[str, Any] = {
    "vocab_size": 40,
    "d_model": 16,
    "n_layers": 3,
    "n_heads": 4,
    "n_kv_heads": 2,
    "head_dim": 4,
    "mlp_dim": 24,
    "norm_eps": 1e-5,
    "rope_theta": 1e4,
    "max_len": 64,
    "tie_embeddings": False,
    "mask_id": 39,
    "eos_id": 1,
    "pad_id": 2,
}

Small = Callable[..., tuple[Architecture, Params]]


def _small(family: str = "llada", dtype: Any = jnp.float32, **changes: Any) -> tuple[Architecture, Params]:
    arch = Architecture(family=family, **(SIZES | registry.traits(family) | changes))
    return arch, init_params(registry.param_table(arch), 7, dtype)


@pytest.fixture(scope="session")
def small() -> Small:
    """Returns ``small(family, dtype, **fields of Architecture)``, which makes an architecture and random weights."""
    return _small
