"""The bidirectional transformer: nnx modules built from a family's table, run over stacked layers.

Flax NNX defines the modules; everything here is a pure function of a nested dict of arrays. ``nnx.merge`` appears in
this file alone, inside traced code.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from jax.typing import DTypeLike
from jaxtyping import Float, Int

from jaxblock.models import families
from jaxblock.models.attention import Backend, attend
from jaxblock.models.params import Architecture, ParamSpec, Table
from jaxblock.parallel.axes import constrain
from jaxblock.types import Params, View

Remat = Literal["none", "dots", "full"]

_POLICIES: dict[str, Any] = {
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "full": jax.checkpoint_policies.nothing_saveable,
}


def dense(x: Float[Array, "*rows I"], w: Float[Array, "I O"]) -> Float[Array, "*rows O"]:
    """``x @ w`` in x's type. float32 means float32 on every platform: no TF32, no bfloat16 passes."""
    return _matmul(x, w, x.dtype)


def _plain_matmul(x: Array, w: Array, out: DTypeLike) -> Array:
    return jnp.matmul(x, w.astype(x.dtype), precision=_precision(x), preferred_element_type=out)


_matmul = jax.custom_vjp(_plain_matmul, nondiff_argnums=(2,))


def _matmul_forward(x: Array, w: Array, out: DTypeLike) -> tuple[Array, tuple[Array, Array]]:
    # Not _matmul: remat policies look for matmuls, and would not see one inside a function with a gradient of its own.
    return _plain_matmul(x, w, out), (x, w)


def _matmul_backward(out: DTypeLike, saved: tuple[Array, Array], grad: Array) -> tuple[Array, Array]:
    # JAX's own gradient of w is (grad^T x)^T. XLA's CPU backend then writes grad transposed from inside the loop that
    # computes it, which took a quarter of a train step (half of one with scanned layers); x^T grad needs none of that.
    x, w = saved
    grad = grad.astype(x.dtype)
    rows = tuple(range(x.ndim - 1))
    dx = jnp.matmul(grad, w.T.astype(x.dtype), precision=_precision(x))
    dw = jax.lax.dot_general(x, grad, ((rows, rows), ((), ())), precision=_precision(x))
    return dx, dw.astype(w.dtype)


_matmul.defvjp(_matmul_forward, _matmul_backward)


def _precision(x: Array) -> str:
    return "highest" if x.dtype == jnp.float32 else "default"


def rms_norm(x: Array, scale: Array, eps: float) -> Array:
    """RMSNorm in float32 (or wider), cast back, then scaled, as LLaDA does it."""
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    normed = wide * jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + eps)
    return normed.astype(x.dtype) * scale.astype(x.dtype)


def rotary(positions: Int[Array, "B T"], head_dim: int, theta: float, dtype: DTypeLike) -> tuple[Array, Array]:
    """Cosines and sines [B, T, 1, H/2] of rotary positions, in float32 or wider."""
    wide = jnp.promote_types(dtype, jnp.float32)
    rate = theta ** (-jnp.arange(0, head_dim, 2, dtype=wide) / head_dim)
    angle = positions[..., None, None].astype(wide) * rate
    return jnp.cos(angle), jnp.sin(angle)


def rotate(x: Float[Array, "B T N H"], cos: Array, sin: Array) -> Float[Array, "B T N H"]:
    """Rotates the two halves of each head against each other."""
    first, second = jnp.split(x.astype(cos.dtype), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)


def pick(x: Float[Array, "B T *rest"], at: Int[Array, "B A"]) -> Float[Array, "B A *rest"]:
    """Each row's entries at some positions."""
    return jnp.take_along_axis(x, at.reshape(at.shape + (1,) * (x.ndim - 2)), axis=1)


class Block(nnx.Module):
    """One layer. Its parameters are those of the table, under the table's names."""

    attn_norm: nnx.Param[Array]
    q: nnx.Param[Array]
    k: nnx.Param[Array]
    v: nnx.Param[Array]
    o: nnx.Param[Array]
    mlp_norm: nnx.Param[Array]
    gate: nnx.Param[Array]
    up: nnx.Param[Array]
    down: nnx.Param[Array]

    def __init__(self, specs: dict[str, ParamSpec], arch: Architecture, attention: Backend):
        self.arch, self.attention = arch, attention
        for name, spec in specs.items():
            setattr(self, name, nnx.Param(jnp.zeros(spec.shape[1:])))

    def __call__(
        self, x: Float[Array, "B T D"], cos: Array, sin: Array, length: Int[Array, " B"], at: Array | None = None
    ) -> Array:
        """Attention, then the feed-forward layer, each added to the residual stream.

        Args:
            x: the residual stream [B, T, D].
            cos: of the rotary positions [B, T, 1, H/2].
            sin: likewise.
            length: visible keys of each row.
            at: positions [B, A] whose output is wanted; None for all.

        Returns:
            The residual stream [B, T, D], or [B, A, D] at the wanted positions.
        """
        arch, (rows, width, _) = self.arch, x.shape
        h = rms_norm(x, self.attn_norm[...], arch.norm_eps)
        k = dense(h, self.k[...]).reshape(rows, width, arch.n_kv_heads, arch.head_dim)
        v = dense(h, self.v[...]).reshape(rows, width, arch.n_kv_heads, arch.head_dim)
        k = rotate(k, cos, sin)
        if at is not None:
            x, h, cos, sin = (pick(a, at) for a in (x, h, cos, sin))
        q = rotate(dense(h, self.q[...]).reshape(rows, -1, arch.n_heads, arch.head_dim), cos, sin)
        h = attend(q, k, v, length, self.attention).reshape(rows, x.shape[1], -1)
        x = x + dense(h, self.o[...])
        h = rms_norm(x, self.mlp_norm[...], arch.norm_eps)
        h = jax.nn.silu(dense(h, self.gate[...])) * dense(h, self.up[...])
        return x + dense(h, self.down[...])


@dataclass(frozen=True)
class Transformer:
    """A network as pure functions of its parameters (see ``types.Network``). Hashable: jitted code closes over it.

    Attributes:
        arch: sizes and ids.
        dtype: compute and activation type.
        remat: what the backward pass recomputes.
        attention: attention backend.
        scan_layers: run layers by ``lax.scan``; False unrolls them.
        check_layer: called with (layer, hidden) after each unrolled layer; locates NaNs in debug mode.
    """

    arch: Architecture
    dtype: str = "float32"
    remat: Remat = "none"
    attention: Backend = "xla"
    scan_layers: bool = True
    check_layer: Callable[[int, Array], None] | None = None

    @cached_property
    def table(self) -> Table:
        """The family's parameter specs."""
        return families.table(self.arch)

    @cached_property
    def _graph(self) -> nnx.GraphDef:
        specs = {p.removeprefix("blocks/"): s for p, s in self.table.items() if s.stacked}
        module = nnx.eval_shape(lambda: Block(specs, self.arch, self.attention))
        return nnx.split(module)[0]

    def hidden(self, params: Params, view: View, cache: None = None) -> tuple[Float[Array, "B A D"], None]:
        """Hidden states at ``view.at`` after the last norm.

        Args:
            params: the table's nested dict.
            view: what the network sees.
            cache: the seam for cache policies; without one every position is computed.

        Returns:
            ([B, A, D], the cache).
        """
        x = self.trunk(params, view.ids, view.positions, view.length, view.at)
        return rms_norm(x, params["final_norm"], self.arch.norm_eps), cache

    def trunk(
        self,
        params: Params,
        ids: Int[Array, "B T"],
        positions: Int[Array, "B T"],
        length: Int[Array, " B"],
        at: Int[Array, "B A"] | None = None,
    ) -> Float[Array, "B wanted D"]:
        """The residual stream before the last norm, of every position or at ``at`` alone.

        Unrolled, the last layer computes no more than is wanted (a third of a small network's work). Scanned layers are
        all alike: splitting the last off would copy the stack of the others.
        """
        x = constrain(params["embed"].astype(self.dtype)[ids], "batch", None, None)
        cos, sin = rotary(positions, self.arch.head_dim, self.arch.rope_theta, self.dtype)

        def layer(x: Array, block_params: Params, at: Array | None = None) -> Array:
            block = nnx.merge(self._graph, block_params)
            return constrain(block(x, cos, sin, length, at), "batch", None, None)

        if self.remat != "none":
            layer = jax.checkpoint(layer, policy=_POLICIES[self.remat], prevent_cse=not self.scan_layers)
        if self.scan_layers:
            x = jax.lax.scan(lambda x, p: (layer(x, p), None), x, params["blocks"])[0]
            return x if at is None else pick(x, at)
        for index in range(self.arch.n_layers):
            own = jax.tree.map(lambda leaf, i=index: leaf[i], params["blocks"])
            x = layer(x, own, at if index == self.arch.n_layers - 1 else None)
            if self.check_layer is not None:
                self.check_layer(index, x)
        return x

    def logits(self, params: Params, hidden: Float[Array, "*rows D"]) -> Float[Array, "*rows V"]:
        """float32 (or wider) logits of hidden states."""
        head = params["embed"].T if self.arch.tie_embeddings else params["head"]
        return _matmul(hidden, head, jnp.promote_types(hidden.dtype, jnp.float32))

    def nll(
        self, params: Params, hidden: Float[Array, "*rows D"], targets: Int[Array, "*rows"]
    ) -> Float[Array, "*rows"]:
        """Negative log-likelihoods of targets, in nats, in float32 or wider."""
        logits = self.logits(params, hidden)
        chosen = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
        return jax.nn.logsumexp(logits, axis=-1) - chosen

    def all_logits(
        self, params: Params, ids: Int[Array, "B T"], positions: Int[Array, "B T"], length: Int[Array, " B"]
    ) -> Float[Array, "B T V"]:
        """Logits of every position, as the network gives them, before any shift."""
        x = self.trunk(params, ids, positions, length)
        return self.logits(params, rms_norm(x, params["final_norm"], self.arch.norm_eps))
