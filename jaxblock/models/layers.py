"""Defines one layer of the network as Flax modules, which declare their parts by name.

Shapes come from the family's table of parameters, and the architecture's traits say which optional parts a module has.
The table's names are flat (``blocks/q_bias``), but modules are nested: ``param_name`` maps a nested name to a flat one.
"""

from __future__ import annotations

from collections.abc import Mapping

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from jaxtyping import Float, Int

from jaxblock.models.architecture import Architecture
from jaxblock.models.attention.backends import attend
from jaxblock.models.attention.beside import attend_beside
from jaxblock.models.attention.mask import Mask
from jaxblock.models.config import Backend
from jaxblock.models.linear.dense import dense
from jaxblock.models.linear.fsdp import Products, Split
from jaxblock.models.linear.lora import LowRank
from jaxblock.models.numerics import at_least_float32, rounded_once
from jaxblock.models.rotary import Rotation, rotate
from jaxblock.models.spec import ParamSpec
from jaxblock.types import KeysValues

Specs = Mapping[str, ParamSpec]
"""The specs of a layer's parameters by name: ``q``, ``q_bias``, ``attn_norm``."""

Adapters = Mapping[str, LowRank]
"""The low-rank branches of a layer's matrices, by the name of their matrix."""


def param_name(path: tuple[str, ...]) -> str:
    """Returns the table's name for a parameter of ``Block``: (attention, q, weight) is ``q``, (attention, q, bias) ``q_bias``.

    Args:
        path: the names of the modules that the parameter is in, and its own.
    """
    module, parameter = path[-2:]
    return module if parameter == "weight" else f"{module}_{parameter}"


def rms_norm(x: Float[Array, "*rows D"], scale: Float[Array, " D"], eps: float) -> Float[Array, "*rows D"]:
    """Normalises by the root mean square in float32 or wider, casts back, then scales, as LLaDA does."""
    wide = x.astype(at_least_float32(x.dtype))
    normed = wide * jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + eps)
    return rounded_once(jnp.multiply, normed.astype(x.dtype), scale.astype(x.dtype))


def pick(x: Float[Array, "B T *rest"], at: Int[Array, "B A"]) -> Float[Array, "B A *rest"]:
    """Picks each row's entries at some positions."""
    return jnp.take_along_axis(x, at.reshape(at.shape + (1,) * (x.ndim - 2)), axis=1)


class RMSNorm(nnx.Module):
    """Normalises by the root mean square, with a learnt scale."""

    def __init__(self, spec: ParamSpec, eps: float):
        self.weight = nnx.Param(jnp.zeros(spec.shape[1:]))
        self.eps = eps

    def __call__(self, x: Float[Array, "*rows D"]) -> Float[Array, "*rows D"]:
        """Normalises the last axis (see ``rms_norm``)."""
        return rms_norm(x, self.weight[...], self.eps)


class Linear(nnx.Module):
    """Multiplies by a matrix; has scales per column where the matrix is int8, and a bias where the architecture has one."""

    def __init__(self, spec: ParamSpec, products: Products, *, bias: bool = False):
        _, n_in, n_out = spec.shape
        self.weight = nnx.Param(jnp.zeros((n_in, n_out)))
        self.scale = nnx.Param(jnp.zeros(n_out)) if spec.dtype == "int8" else None
        self.bias = nnx.Param(jnp.zeros(n_out)) if bias else None
        self.split = Split.of(spec.axes[1:]) if products == "fsdp" else None

    def __call__(self, x: Float[Array, "*rows I"], lora: LowRank | None = None) -> Float[Array, "*rows O"]:
        """Multiplies by the matrix and adds the low-rank branch (see ``dense``)."""
        scale = None if self.scale is None else self.scale[...]
        bias = None if self.bias is None else self.bias[...]
        return dense(x, self.weight[...], scale=scale, bias=bias, lora=lora, split=self.split)


class Attention(nnx.Module):
    """Computes attention with rotary positions; groups of heads may share keys and values."""

    def __init__(self, arch: Architecture, specs: Specs, backend: Backend, products: Products):
        self.arch, self.backend = arch, backend
        self.q = Linear(specs["q"], products, bias=arch.qkv_bias)
        self.k = Linear(specs["k"], products, bias=arch.qkv_bias)
        self.v = Linear(specs["v"], products, bias=arch.qkv_bias)
        self.o = Linear(specs["o"], products)
        self.q_norm = RMSNorm(specs["q_norm"], arch.norm_eps) if arch.qk_norm else None
        self.k_norm = RMSNorm(specs["k_norm"], arch.norm_eps) if arch.qk_norm else None

    def __call__(
        self,
        h: Float[Array, "B T D"],
        rotation: Rotation,
        mask: Mask,
        at: Int[Array, "B A"] | None,
        adapters: Adapters,
        cached: KeysValues | None,
        first: Int[Array, " B"] | None,
    ) -> tuple[Float[Array, "B wanted D"], KeysValues]:
        """Attends from all positions, or from those at ``at``, to all positions and to what is cached (see ``Block``)."""
        k = rotate(self._heads(self.k(h, adapters.get("k")), self.k_norm), rotation)
        v = self._heads(self.v(h, adapters.get("v")))
        if at is not None:
            h, rotation = pick(h, at), Rotation(pick(rotation.cos, at), pick(rotation.sin, at))
        q = rotate(self._heads(self.q(h, adapters.get("q")), self.q_norm), rotation)
        new = KeysValues(k, v)
        if cached is None:
            attended = attend(q, k, v, mask, self.backend)
        else:
            assert first is not None
            attended = attend_beside(q, new, cached, first, mask, self.backend)
        return self.o(attended.reshape(*h.shape[:2], -1), adapters.get("o")), new

    def _heads(self, x: Float[Array, "B T _"], norm: RMSNorm | None = None) -> Float[Array, "B T N H"]:
        """Splits projected rows into heads, and normalises each head if there is a norm."""
        heads = x.reshape(*x.shape[:2], -1, self.arch.head_dim)
        return heads if norm is None else norm(heads)


class FeedForward(nnx.Module):
    """Computes the gated feed-forward layer (SwiGLU)."""

    def __init__(self, specs: Specs, products: Products):
        self.gate = Linear(specs["gate"], products)
        self.up = Linear(specs["up"], products)
        self.down = Linear(specs["down"], products)

    def __call__(self, h: Float[Array, "B T D"], adapters: Adapters) -> Float[Array, "B T D"]:
        """Computes ``down(silu(gate(h)) * up(h))``."""
        hidden = jax.nn.silu(self.gate(h, adapters.get("gate"))) * self.up(h, adapters.get("up"))
        return self.down(hidden, adapters.get("down"))


class Block(nnx.Module):
    """Computes one layer: attention, then the feed-forward layer; each has a norm before it and adds to the residual stream."""

    def __init__(self, arch: Architecture, specs: Specs, backend: Backend, products: Products = "fsdp"):
        """Declares the layer's parts.

        Args:
            arch: the sizes and traits.
            specs: the specs of the layer's parameters by name, as ``param_name`` makes them.
            backend: the attention backend.
            products: how matrices that are split over devices are multiplied.
        """
        self.attn_norm = RMSNorm(specs["attn_norm"], arch.norm_eps)
        self.attention = Attention(arch, specs, backend, products)
        self.mlp_norm = RMSNorm(specs["mlp_norm"], arch.norm_eps)
        self.mlp = FeedForward(specs, products)

    def __call__(
        self,
        x: Float[Array, "B T D"],
        rotation: Rotation,
        mask: Mask,
        adapters: Adapters,
        at: Int[Array, "B A"] | None = None,
        cached: KeysValues | None = None,
        first: Int[Array, " B"] | None = None,
    ) -> tuple[Float[Array, "B wanted D"], KeysValues]:
        """Adds attention and the feed-forward network to the residual stream.

        Args:
            x: the residual stream.
            rotation: the rotation of each position.
            mask: which keys a query sees.
            adapters: the low-rank branches of this layer's matrices.
            at: the positions whose output is wanted; None for all.
            cached: the keys and values of all canvas positions (see ``beside.keep``), where ``x`` is only a part of them; None
                where it is all.
            first: the canvas position of each row's first position in ``x``, where ``cached`` is given.

        Returns:
            (the residual stream at the wanted positions, the keys and values of the positions of ``x``).
        """
        attended, keys_values = self.attention(self.attn_norm(x), rotation, mask, at, adapters, cached, first)
        x = (x if at is None else pick(x, at)) + attended
        return x + self.mlp(self.mlp_norm(x), adapters), keys_values
