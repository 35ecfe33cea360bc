"""The bidirectional transformer: nnx modules built from a family's table, run over stacked layers.

Flax NNX defines the modules; everything here is a pure function of a nested dict of arrays. ``nnx.merge`` appears in
this file alone, inside traced code.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from jax.ad_checkpoint import checkpoint_name
from jax.typing import DTypeLike
from jaxtyping import Float, Int

from jaxblock.models.architecture import Architecture, RopeScaling
from jaxblock.models.attention.backends import attend
from jaxblock.models.config import Backend, Remat
from jaxblock.models.embedding import look_up
from jaxblock.models.families import registry
from jaxblock.models.linear import int8, lora
from jaxblock.models.linear.dense import LowRank, dense, rounded_once
from jaxblock.models.linear.fsdp import GatheredWeight, Products, Split, gather_weight, matmul_gathered
from jaxblock.models.linear.lora import Lora
from jaxblock.models.spec import ParamSpec, Table
from jaxblock.parallel.rules import constrain
from jaxblock.types import Params, View

Branches = dict[str, LowRank]
"""A layer's adapters by the name of their matrix."""


class Attention(NamedTuple):
    """How a layer attends. Static."""

    backend: Backend
    causal: bool


@dataclass(frozen=True)
class Splits:
    """How each matrix of a layer lies on the devices, by its name. Static."""

    pairs: tuple[tuple[str, Split], ...]

    def of(self, name: str) -> Split:
        """That of one matrix."""
        return dict(self.pairs)[name]


_LAYER_INPUT = "layer_input"

_POLICIES: dict[str, Any] = {
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "full": jax.checkpoint_policies.nothing_saveable,
    "offload": jax.checkpoint_policies.save_and_offload_only_these_names(
        names_which_can_be_saved=[],
        names_which_can_be_offloaded=[_LAYER_INPUT],
        offload_src="device",
        offload_dst="pinned_host",
    ),
}


def rms_norm(x: Array, scale: Array, eps: float) -> Array:
    """RMSNorm in float32 (or wider), cast back, then scaled, as LLaDA does it; the scale's gradient is summed wide."""
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    normed = wide * jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + eps)
    return rounded_once(jnp.multiply, normed.astype(x.dtype), scale.astype(x.dtype))


def rotary(positions: Int[Array, "B T"], arch: Architecture, dtype: DTypeLike) -> tuple[Array, Array]:
    """Cosines and sines [B, T, 1, H/2] of rotary positions, in float32 or wider."""
    wide = jnp.promote_types(dtype, jnp.float32)
    rate = arch.rope_theta ** (-jnp.arange(0, arch.head_dim, 2, dtype=wide) / arch.head_dim)
    if arch.rope_scaling is not None:
        rate = _stretched(rate, arch.rope_scaling)
    angle = positions[..., None, None].astype(wide) * rate
    return jnp.cos(angle), jnp.sin(angle)


def _stretched(rate: Array, scaling: RopeScaling) -> Array:
    """Rotary frequencies for a longer context (transformers' ``linear`` and ``llama3``)."""
    if scaling.kind == "linear":
        return rate / scaling.factor
    turns = scaling.original_len * rate / (2 * jnp.pi)  # full turns within the first training length
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    kept = jnp.clip((turns - low) / (high - low), 0.0, 1.0)  # 1: fast enough to be left alone
    return (1 - kept) * rate / scaling.factor + kept * rate


def rotate(x: Float[Array, "B T N H"], cos: Array, sin: Array) -> Float[Array, "B T N H"]:
    """Rotates the two halves of each head against each other."""
    first, second = jnp.split(x.astype(cos.dtype), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)


def pick(x: Float[Array, "B T *rest"], at: Int[Array, "B A"]) -> Float[Array, "B A *rest"]:
    """Each row's entries at some positions."""
    return jnp.take_along_axis(x, at.reshape(at.shape + (1,) * (x.ndim - 2)), axis=1)


class Block(nnx.Module):
    """One layer. Its parameters are those of the table, under the table's names; some families lack some of them."""

    def __init__(
        self, specs: dict[str, ParamSpec], arch: Architecture, attention: Attention, products: Products = "fsdp"
    ):
        self.arch, self.attention, self.products = arch, attention, products
        self.splits = Splits(tuple((name, Split.of(spec.axes[1:])) for name, spec in specs.items() if spec.is_matrix))
        for name, spec in specs.items():
            setattr(self, name, nnx.Param(jnp.zeros(spec.shape[1:])))

    def __call__(
        self,
        x: Float[Array, "B T D"],
        cos: Array,
        sin: Array,
        length: Int[Array, " B"],
        at: Array | None = None,
        branches: Branches | None = None,
    ) -> Array:
        """Attention, then the feed-forward layer, each added to the residual stream.

        Args:
            x: the residual stream [B, T, D].
            cos: of the rotary positions [B, T, 1, H/2].
            sin: likewise.
            length: visible keys of each row.
            at: positions [B, A] whose output is wanted; None for all.
            branches: the adapters of this layer's matrices.

        Returns:
            The residual stream [B, T, D], or [B, A, D] at the wanted positions.
        """
        arch, rows = self.arch, x.shape[0]
        branches = branches or {}

        def project(name: str, h: Array) -> Array:
            weights = (self._own(name), self._own(name + int8.SCALE), self._own(name + "_bias"))
            lora, split = branches.get(name), self.splits.of(name) if self.products == "fsdp" else None
            return dense(h, weights[0], scale=weights[1], bias=weights[2], lora=lora, split=split)

        def heads(name: str, h: Array, count: int) -> Array:
            split = project(name, h).reshape(rows, -1, count, arch.head_dim)
            norm = self._own(name + "_norm")
            return split if norm is None else rms_norm(split, norm, arch.norm_eps)

        h = rms_norm(x, self._own("attn_norm"), arch.norm_eps)
        k = rotate(heads("k", h, arch.n_kv_heads), cos, sin)
        v = heads("v", h, arch.n_kv_heads)
        if at is not None:
            x, h, cos, sin = (pick(a, at) for a in (x, h, cos, sin))
        q = rotate(heads("q", h, arch.n_heads), cos, sin)
        h = attend(q, k, v, length, self.attention.backend, causal=self.attention.causal)
        x = x + project("o", h.reshape(rows, x.shape[1], -1))
        h = rms_norm(x, self._own("mlp_norm"), arch.norm_eps)
        h = jax.nn.silu(project("gate", h)) * project("up", h)
        return x + project("down", h)

    def _own(self, name: str) -> Any:
        param = getattr(self, name, None)
        return None if param is None else param[...]


@dataclass(frozen=True)
class Transformer:
    """A network as pure functions of its parameters (see ``types.Network``). Hashable: jitted code closes over it.

    Attributes:
        arch: sizes and ids.
        dtype: compute and activation type.
        remat: what the backward pass recomputes.
        attention: attention backend.
        scan_layers: run layers by ``lax.scan``; False unrolls them.
        loss_chunk: positions of a row whose logits are held at once by ``nll``; None for all.
        lora: adapters beside the weights, under ``params["lora"]``; None for none.
        int8: the layers' matrices are int8 (``models.int8``).
        causal: hide later keys, as an autoregressive checkpoint was trained: for comparing with its origin alone.
        products: ``fsdp`` states the exchanges between devices, ``plain`` leaves them to the compiler (an oracle for tests).
        check_layer: called with (layer, hidden) after each unrolled layer; locates NaNs in debug mode.
    """

    arch: Architecture
    dtype: str = "float32"
    remat: Remat = "none"
    attention: Backend = "xla"
    scan_layers: bool = True
    loss_chunk: int | None = None
    lora: Lora | None = None
    int8: bool = False
    causal: bool = False
    products: Products = "fsdp"
    check_layer: Callable[[int, Array], None] | None = None

    @cached_property
    def param_table(self) -> Table:
        """The specs of the weights, adapters not among them."""
        table = registry.param_table(self.arch)
        return int8.int8_table(table) if self.int8 else table

    @cached_property
    def trainable(self) -> Table:
        """The specs of what is trained: the adapters where there are any, else the weights."""
        return self.param_table if self.lora is None else lora.adapter_table(registry.param_table(self.arch), self.lora)

    @cached_property
    def _graph(self) -> nnx.GraphDef:
        specs = {p.removeprefix("blocks/"): s for p, s in self.param_table.items() if s.stacked}
        attention = Attention(self.attention, self.causal)
        module = nnx.eval_shape(lambda: Block(specs, self.arch, attention, self.products))
        return nnx.split(module)[0]

    def hidden(self, params: Params, view: View, row_keys: Array | None = None) -> Float[Array, "B A D"]:
        """Hidden states at ``view.at`` after the last norm.

        Args:
            params: the table's nested dict.
            view: what the network sees.
            row_keys: one random key a row [B], for the adapters' dropout; None for no dropout.

        Returns:
            Hidden states [B, A, D].
        """
        x = self.trunk(params, view.ids, view.positions, view.length, view.at, row_keys)
        return rms_norm(x, params["final_norm"], self.arch.norm_eps)

    def trunk(
        self,
        params: Params,
        ids: Int[Array, "B T"],
        positions: Int[Array, "B T"],
        length: Int[Array, " B"],
        at: Int[Array, "B A"] | None = None,
        row_keys: Array | None = None,
    ) -> Float[Array, "B wanted D"]:
        """The residual stream before the last norm, of every position or at ``at`` alone.

        Unrolled, the last layer computes no more than is wanted (a third of a small network's work). Scanned layers are
        all alike: splitting the last off would copy the stack of the others. Nor is it trimmed where a trimmed layer
        would be another function: under dropout, whose draws are by position, and under a causal mask.
        """
        x = self._embedded(params, ids)
        cos, sin = rotary(positions, self.arch, self.dtype)
        drops = self.lora is not None and self.lora.dropout > 0 and row_keys is not None

        def layer(x: Array, own: Params, adapters: Params, index: Array | int, at: Array | None = None) -> Array:
            x = checkpoint_name(x, _LAYER_INPUT) if self.remat == "offload" else x
            block = nnx.merge(self._graph, own)
            branches = self._branches(adapters, index, row_keys if drops else None)
            return constrain(block(x, cos, sin, length, at, branches), "batch", None, None)

        if self.remat != "none":
            layer = jax.checkpoint(layer, policy=_POLICIES[self.remat], prevent_cse=not self.scan_layers)
        stacks = (params["blocks"], params[lora.KEY]["blocks"] if self.lora else {})
        if self.scan_layers:
            xs = (*stacks, jnp.arange(self.arch.n_layers))
            x = jax.lax.scan(lambda x, own: (layer(x, *own), None), x, xs)[0]
            return x if at is None else pick(x, at)
        trimmed = None if drops or self.causal else at
        for index in range(self.arch.n_layers):
            own, adapters = jax.tree.map(lambda leaf, i=index: leaf[i], stacks)
            x = layer(x, own, adapters, index, trimmed if index == self.arch.n_layers - 1 else None)
            if self.check_layer is not None:
                self.check_layer(index, x)
        return x if at is None or trimmed is not None else pick(x, at)

    def _embedded(self, params: Params, ids: Int[Array, "B T"]) -> Float[Array, "B T D"]:
        """Each device looks up its columns of the embedding for its group's rows; then columns are traded for rows.

        Left to itself the compiler gathers the whole embedding, and its gradient copies all rows to every device.
        """
        columns = look_up(params["embed"], constrain(ids, "rows", None), self.dtype)
        return constrain(constrain(columns, "rows", None, "embed"), "batch", None, None)

    def _branches(self, adapters: Params, layer: Array | int, row_keys: Array | None) -> Branches:
        """One layer's low-rank branches; each has dropout keys of its own, made of the row's, the layer and its place."""
        if self.lora is None:
            return {}
        branches = {}
        for place, path in enumerate(self.lora.targets):
            name, keys = path.removeprefix("blocks/"), None
            if row_keys is not None:
                fold = jax.vmap(lambda key, place=place: jax.random.fold_in(jax.random.fold_in(key, layer), place))
                keys = fold(row_keys)
            pair = adapters[name]
            branches[name] = LowRank(pair["a"], pair["b"], self.lora.scale, self.lora.dropout, keys)
        return branches

    def logits(self, params: Params, hidden: Float[Array, "*rows D"]) -> Float[Array, "*rows V"]:
        """float32 (or wider) logits of hidden states."""
        return self._logits(self._head(params, hidden.dtype), hidden)

    @property
    def _head_split(self) -> Split | None:
        return Split.of(("embed", "vocab")) if self.products == "fsdp" else None

    def _head(self, params: Params, dtype: DTypeLike) -> GatheredWeight:
        head = params["embed"].T if self.arch.tie_embeddings else params["head"]
        return gather_weight(head, dtype, self._head_split)

    def _logits(self, head: GatheredWeight, hidden: Array) -> Array:
        return matmul_gathered(hidden, head, jnp.promote_types(hidden.dtype, jnp.float32), self._head_split)

    def nll(
        self, params: Params, hidden: Float[Array, "*rows A D"], targets: Int[Array, "*rows A"]
    ) -> Float[Array, "*rows A"]:
        """Negative log-likelihoods of targets, in nats, in float32 or wider.

        With ``loss_chunk`` set, so many positions at a time: their logits are made, used and made again for the gradient,
        so that memory holds one chunk's.
        """
        width, chunk, head = hidden.shape[-2], self.loss_chunk, self._head(params, hidden.dtype)
        if chunk is None or chunk >= width:
            return self._nll(head, hidden, targets)
        short = -width % chunk
        pad = [(0, 0)] * (hidden.ndim - 2)
        hidden = jnp.pad(hidden, [*pad, (0, short), (0, 0)])
        targets = jnp.pad(targets, [*pad, (0, short)])
        split = (width + short) // chunk
        hidden = jnp.moveaxis(hidden.reshape(*hidden.shape[:-2], split, chunk, hidden.shape[-1]), -3, 0)
        targets = jnp.moveaxis(targets.reshape(*targets.shape[:-1], split, chunk), -2, 0)
        one = jax.checkpoint(self._nll, prevent_cse=False)
        found = jax.lax.map(lambda part: one(head, *part), (hidden, targets))
        return jnp.moveaxis(found, 0, -2).reshape(*found.shape[1:-1], width + short)[..., :width]

    def _nll(self, head: GatheredWeight, hidden: Array, targets: Array) -> Array:
        logits = self._logits(head, hidden)
        # Not a gather: where the vocabulary is split over devices, a gather would bring all logits to each of them.
        here = jnp.arange(logits.shape[-1]) == targets[..., None]
        chosen = jnp.sum(jnp.where(here, logits, 0), axis=-1)
        return jax.nn.logsumexp(logits, axis=-1) - chosen

    def all_logits(
        self, params: Params, ids: Int[Array, "B T"], positions: Int[Array, "B T"], length: Int[Array, " B"]
    ) -> Float[Array, "B T V"]:
        """Logits of every position, as the network gives them, before any shift."""
        x = self.trunk(params, ids, positions, length)
        return self.logits(params, rms_norm(x, params["final_norm"], self.arch.norm_eps))
