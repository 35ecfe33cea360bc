"""Defines tables of parameters: an entry has a parameter's shape, logical axes, initialisation and Hugging Face name.

Initialisation, sharding, import and export, weight decay and FLOP counts all use such a table; modules contain no literal
sizes.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util
from jax.typing import DTypeLike

from jaxblock.models.architecture import Architecture
from jaxblock.types import Params
from jaxblock.uniforms import uniform_arrays


@dataclass(frozen=True)
class ParamSpec:
    """Describes one parameter; one that every layer has is stacked over the layers.

    Attributes:
        shape: the shape as it is stored: ``[L, ...]`` for a parameter that every layer has.
        axes: the logical name of each dimension (see ``parallel.rules``); ``layers`` first where stacked.
        std: the standard deviation of random weights; None makes them ones (norms), 0 makes them zeros.
        hf_name: the tensor's name in a checkpoint; ``{layer}`` stands for the layer's index.
        transpose: whether the checkpoint's tensor is transposed: torch stores [out, in], we store [in, out].
        depth_scaled: whether the standard deviation is divided by sqrt(layer + 1) (outputs into the residual stream).
        dtype: the type in which this parameter is stored (int8); None for the type of the whole network.
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
        """Whether the first dimension runs over layers."""
        return self.axes[0] == "layers"

    @property
    def is_matrix(self) -> bool:
        """Whether each layer's tensor has two dimensions or more, so that ``decay: matrices`` decays it."""
        return len(self.shape) - self.stacked >= 2


_DRAWN_AT_ONCE = 2**22
"""The most random numbers that are drawn at once, 16 MiB; the parameters of a larger network are drawn one by one."""

Table = Mapping[str, ParamSpec]
"""The specs of parameters by their path in the nested dict; ``/`` separates levels, as in ``blocks/q``."""


def init_params(table: Table, seed: int, dtype: DTypeLike) -> Params:
    """Draws random weights. A parameter's weights depend on the seed, its path and its shape, not on other parameters.

    Args:
        table: the specs of the parameters.
        seed: the seed of the whole network.
        dtype: the type in which the weights are stored.

    Returns:
        The nested dict of arrays that the table describes.
    """
    return nest(dict(zip(table, _draw_all(tuple(table.items()), seed, jnp.dtype(dtype)), strict=True)))


@partial(jax.jit, static_argnums=(0, 2), inline=True)
def _draw_all(table: tuple[tuple[str, ParamSpec], ...], seed: int | jax.Array, dtype: np.dtype) -> list[jax.Array]:
    """Draws the weights of all parameters, compiled as one program: single operations would be dozens of programs."""
    uniforms = _uniforms({path: spec.shape for path, spec in table if spec.std}, seed)
    return [_weights(spec, uniforms.get(path), dtype) for path, spec in table]


def _uniforms(shapes: Mapping[str, tuple[int, ...]], seed: int | jax.Array) -> dict[str, jax.Array]:
    """Draws uniform numbers in [0, 1) for each path from a key of its own.

    Of a small network all numbers are drawn at once, in lines [n], since the compiler takes half a second for each draw; they are
    those of single draws, bit for bit. A large network's are drawn one by one in their own shapes, so that a device holds its
    own part of one tensor at a time.
    """
    if not shapes:
        return {}
    keys = jax.vmap(jax.random.fold_in, in_axes=(None, 0))(
        jax.random.key(seed), jnp.array([zlib.crc32(path.encode()) for path in shapes], jnp.uint32)
    )
    sizes = [math.prod(shape) for shape in shapes.values()]
    if max(sizes) * len(sizes) > _DRAWN_AT_ONCE:
        return {
            path: jax.random.uniform(key, shapes[path], jnp.float32) for key, path in zip(keys, shapes, strict=True)
        }
    return dict(zip(shapes, uniform_arrays(keys, [(size,) for size in sizes], jnp.float32), strict=True))


def _normal(uniform: jax.Array) -> jax.Array:
    """Turns uniform into normal numbers, truncated at three standard deviations: customary, as no weight starts as an outlier.

    They are those of ``jax.random.truncated_normal`` for the same key.
    """
    most = 3.0
    end = math.erf(most / math.sqrt(2))
    values = math.sqrt(2) * jax.lax.erf_inv(jnp.maximum(-end, uniform * (2 * end) - end))
    inside = float(np.nextafter(np.float32(most), np.float32(0)))
    return jnp.clip(values, -inside, inside)


def _weights(spec: ParamSpec, uniform: jax.Array | None, dtype: DTypeLike) -> jax.Array:
    """Returns one parameter's weights; ``uniform`` numbers are read where its standard deviation is not 0."""
    if uniform is None:
        return (jnp.ones if spec.std is None else jnp.zeros)(spec.shape, dtype)
    values = (spec.std or 0.0) * _normal(uniform).reshape(spec.shape)
    if spec.depth_scaled:
        depth = jnp.arange(1, spec.shape[0] + 1, dtype=jnp.float32)
        values = values / jnp.sqrt(depth).reshape((-1,) + (1,) * (len(spec.shape) - 1))
    return values.astype(dtype)


def abstract_params(table: Table, dtype: DTypeLike) -> Params:
    """Returns the shapes and types of the parameters as a nested dict, without allocating them."""
    return nest({path: jax.ShapeDtypeStruct(spec.shape, spec.dtype or dtype) for path, spec in table.items()})


def nest(flat: Mapping[str, Any]) -> Params:
    """Nests a flat dict: ``{"blocks/q": x}`` becomes ``{"blocks": {"q": x}}``."""
    return traverse_util.unflatten_dict(dict(flat), sep="/")


def flatten(tree: Params) -> dict[str, Any]:
    """Flattens a nested dict: ``{"blocks": {"q": x}}`` becomes ``{"blocks/q": x}``."""
    return traverse_util.flatten_dict(tree, sep="/")


def count_params(table: Table) -> int:
    """Counts the parameters that the table describes."""
    return sum(int(np.prod(spec.shape)) for spec in table.values())


def matmul_flops_per_token(table: Table, arch: Architecture, context: int, *, head: bool = True) -> float:
    """Counts the floating-point operations of one token's forward pass: two per weight of each matrix, plus attention.

    Args:
        table: the specs of the parameters.
        arch: the sizes of the network.
        context: the number of visible keys per query (bidirectional attention sees them all).
        head: whether the vocabulary projection is counted.

    Returns:
        The FLOPs per token of a forward pass (forward and backward together take three times as many).
    """
    weights = sum(float(np.prod(s.shape)) for p, s in table.items() if s.is_matrix and p not in ("embed", "head"))
    projection = arch.vocab_size * arch.d_model if head else 0
    attention = 2 * arch.n_layers * context * arch.n_heads * arch.head_dim
    return 2.0 * (weights + projection + attention)
