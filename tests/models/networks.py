"""Makes tiny networks, with weights and views that NumPy draws, which compiles nothing."""

from typing import Any

import numpy as np

from jaxblock.models.architecture import Architecture
from jaxblock.models.families import registry
from jaxblock.models.linear import int8
from jaxblock.models.spec import Table, nest
from jaxblock.types import Params, View


def make_arch(family: str = "llada", **changes: Any) -> Architecture:
    """Returns the sizes of two layers with four heads in two groups."""
    sizes = dict(vocab_size=32, d_model=16, n_layers=2, n_heads=4, n_kv_heads=2, head_dim=4, mlp_dim=24)
    rest = dict(norm_eps=1e-5, rope_theta=100.0, max_len=64, tie_embeddings=False, mask_id=11, eos_id=10, pad_id=10)
    return Architecture(family, **{**sizes, **rest, **registry.traits(family), **changes})


def make_view(length: list[int], active: list[int] | list[list[int]], vocab: int) -> View:
    """Returns a view of rows of these lengths, whose active positions are predicted from the ones before."""
    rows, width = len(length), max(length)
    ids = np.random.default_rng(0).integers(0, vocab, (rows, width)).astype(np.int32)
    positions = np.broadcast_to(np.arange(width, dtype=np.int32), ids.shape)
    where = np.broadcast_to(np.array(active, np.int32), (rows, np.shape(active)[-1]))
    return View(ids, positions, np.array(length, np.int32), where, where - 1, np.ones(where.shape, bool))


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
