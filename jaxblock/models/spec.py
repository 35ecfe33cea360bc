"""What a family's parameters are: one table that owns every shape, logical axis, initialiser and Hugging Face name.

Initialisation, sharding, import and export, weight decay and FLOP counts are all read off this table; modules hold
no literal sizes.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util
from jax.typing import DTypeLike

from jaxblock.models.architecture import Architecture
from jaxblock.types import Params


@dataclass(frozen=True)
class ParamSpec:
    """One tensor (of one layer, where ``axes[0]`` is not ``layers`` in the table's per-layer view).

    Attributes:
        shape: the stacked shape: ``[L, ...]`` for a layer's tensor.
        axes: a logical axis name per dimension; ``layers`` first where stacked.
        std: standard deviation of a normal initialisation; None initialises to ones (norms), 0 to zeros.
        depth_scaled: divide the standard deviation by sqrt(layer + 1) (outputs into the residual stream).
        hf_name: the checkpoint's name; ``{layer}`` stands for the layer's index.
        transpose: torch keeps [out, in], we keep [in, out].
        dtype: storage type where it is the tensor's own (int8); None for the type of the whole network.
    """

    shape: tuple[int, ...]
    axes: tuple[str | None, ...]
    std: float | None
    hf_name: str
    transpose: bool = False
    depth_scaled: bool = False
    dtype: str | None = None

    @property
    def stacked(self) -> bool:
        """Whether axis 0 runs over layers."""
        return self.axes[0] == "layers"

    @property
    def is_matrix(self) -> bool:
        """Whether weight decay applies under ``decay: matrices``."""
        return len(self.shape) - self.stacked >= 2


Table = Mapping[str, ParamSpec]
"""Specs by path; ``/`` separates levels: ``blocks/q``."""


def init_params(table: Table, seed: int, dtype: DTypeLike) -> Params:
    """Random weights. A tensor's values depend on the seed, its path and its shape, never on the other tensors.

    Args:
        table: the family's specs.
        seed: of the whole network.
        dtype: storage type.

    Returns:
        The nested dict of arrays that the table describes.
    """
    flat = {path: _draw(spec, seed, path, dtype) for path, spec in table.items()}
    return nest(flat)


def _draw(spec: ParamSpec, seed: int, path: str, dtype: DTypeLike) -> jax.Array:
    if spec.std is None:
        return jnp.ones(spec.shape, dtype)
    if spec.std == 0:
        return jnp.zeros(spec.shape, dtype)
    key = jax.random.fold_in(jax.random.key(seed), zlib.crc32(path.encode()))
    # Three standard deviations are the customary cut: no weight starts as an outlier.
    values = spec.std * jax.random.truncated_normal(key, -3.0, 3.0, spec.shape, jnp.float32)
    if spec.depth_scaled:
        depth = jnp.arange(1, spec.shape[0] + 1, dtype=jnp.float32)
        values = values / jnp.sqrt(depth).reshape((-1,) + (1,) * (len(spec.shape) - 1))
    return values.astype(dtype)


def abstract_params(table: Table, dtype: DTypeLike) -> Params:
    """Shapes and types of the parameters, nothing allocated."""
    return nest({path: jax.ShapeDtypeStruct(spec.shape, spec.dtype or dtype) for path, spec in table.items()})


def nest(flat: Mapping[str, Any]) -> Params:
    """``{"blocks/q": x}`` -> ``{"blocks": {"q": x}}``."""
    return traverse_util.unflatten_dict(dict(flat), sep="/")


def flatten(tree: Params) -> dict[str, Any]:
    """``{"blocks": {"q": x}}`` -> ``{"blocks/q": x}``."""
    return traverse_util.flatten_dict(tree, sep="/")


def count_params(table: Table) -> int:
    """How many parameters."""
    return sum(int(np.prod(spec.shape)) for spec in table.values())


def matmul_flops_per_token(table: Table, arch: Architecture, context: int, *, head: bool = True) -> float:
    """Floating-point operations of one token's forward pass: two per weight of each matrix, plus attention.

    Args:
        table: the family's specs.
        arch: sizes.
        context: visible keys per query (bidirectional attention sees them all).
        head: count the vocabulary projection.

    Returns:
        FLOPs of the forward pass per token (three times as much for forward and backward).
    """
    weights = sum(float(np.prod(s.shape)) for p, s in table.items() if s.is_matrix and p not in ("embed", "head"))
    projection = arch.vocab_size * arch.d_model if head else 0
    attention = 2 * arch.n_layers * context * arch.n_heads * arch.head_dim
    return 2.0 * (weights + projection + attention)
