"""Makes small networks of every family, with grouped keys and sizes that all differ, so that a wrong transpose shows."""

import functools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from jaxblock.huggingface.save import save_checkpoint
from jaxblock.models.architecture import Architecture
from jaxblock.models.families import registry
from jaxblock.types import Params
from tests.models.networks import random_params

SIZES: dict[str, Any] = dict(vocab_size=40, mask_id=39, eos_id=1, pad_id=2, max_len=64, tie_embeddings=False)
SIZES |= dict(d_model=16, n_layers=3, n_heads=4, n_kv_heads=2, head_dim=4, mlp_dim=24, norm_eps=1e-5, rope_theta=1e4)


@functools.cache
def _small(family: str = "llada", dtype: Any = jnp.float32, **changes: Any) -> tuple[Architecture, Params]:
    arch = Architecture(family=family, **(SIZES | registry.traits(family) | changes))
    params = random_params(registry.param_table(arch), std=0.1)
    return arch, jax.device_put(jax.tree.map(lambda leaf: leaf.astype(dtype), params))


@pytest.fixture(scope="session")
def small():
    """Returns ``small(family, dtype, **fields of Architecture)``, which makes an architecture and random weights."""
    return _small


@pytest.fixture(scope="session")
def saved(tmp_path_factory):
    """Returns ``saved``, which writes what ``small`` makes, once for equal arguments. Tests must not change the folder."""

    @functools.cache
    def save(*which: Any, **changes: Any) -> Path:
        folder = tmp_path_factory.mktemp("saved") / "checkpoint"
        save_checkpoint(folder, *_small(*which, **changes))
        return folder

    return save
