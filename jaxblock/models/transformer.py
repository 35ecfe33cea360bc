"""Computes the network by pure functions of a nested dict of arrays.

The layer is a Flax NNX module (``layers.Block``). This file splits the module from its parameters once, and runs it over
stacked layers. ``nnx.merge`` is called only in this file, inside traced code.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import chex
import jax
import jax.numpy as jnp
from flax import nnx, traverse_util
from jax import Array
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Float, Int

from jaxblock.models.architecture import Architecture
from jaxblock.models.attention import beside
from jaxblock.models.attention.mask import Mask, MaskKind
from jaxblock.models.config import Backend, Quantize, Remat
from jaxblock.models.families import registry
from jaxblock.models.layers import Block, param_name, pick, rms_norm
from jaxblock.models.linear import int8, lora
from jaxblock.models.linear.fsdp import GatheredWeight, Products, Split, gather_weight, matmul_gathered
from jaxblock.models.linear.lora import Lora
from jaxblock.models.lines import lay, lay_positions
from jaxblock.models.numerics import at_least_float32, look_up
from jaxblock.models.rotary import Rotation, compute_rotation
from jaxblock.models.spec import Table
from jaxblock.parallel.rules import constrain
from jaxblock.types import Cache, KeysValues, Params, Part, Places, View

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


@dataclass(frozen=True)
class Transformer:
    """Computes a network by pure functions of its parameters (see ``types.Network``).

    It is hashable, because jitted functions take it as a static argument.

    Attributes:
        arch: the sizes, traits and special ids.
        dtype: the type of computation and activations; float64 is for proofs.
        remat: what the backward pass recomputes (see ``ModelConfig``).
        attention: the attention backend.
        scan_layers: run the layers by ``lax.scan``; False unrolls them.
        loss_chunk: the number of positions of a row whose logits ``nll`` holds at once; None for all.
        lora: the adapters beside the weights, under ``params["lora"]``; None for none.
        quantize: ``int8`` where the layers' matrices are int8 (see ``linear.int8``).
        mask: whether attention is ``bidirectional`` or ``causal``; ``causal`` is for comparing an autoregressive checkpoint
            with transformers.
        products: ``fsdp`` states the exchanges between devices, ``plain`` leaves them to the compiler (for tests).
        places: the places of a line, where ``hidden`` lays rows of several widths side by side (see ``models.lines``); () where
            each row is by itself.
        check_layer: called with (layer, hidden states) after each unrolled layer; finds NaNs in debug mode.
    """

    arch: Architecture
    dtype: str = "float32"
    remat: Remat = "none"
    attention: Backend = "xla"
    scan_layers: bool = True
    loss_chunk: int | None = None
    lora: Lora | None = None
    quantize: Quantize = "none"
    mask: MaskKind = "bidirectional"
    products: Products = "fsdp"
    places: Places = ()
    check_layer: Callable[[int, Array], None] | None = None

    @cached_property
    def param_table(self) -> Table:
        """The specs of the weights, without adapters."""
        table = registry.param_table(self.arch)
        return int8.int8_table(table) if self.quantize == "int8" else table

    @cached_property
    def trainable(self) -> Table:
        """The specs of the trained parameters: the adapters where there are any, else all weights."""
        return self.param_table if self.lora is None else lora.adapter_table(registry.param_table(self.arch), self.lora)

    @cached_property
    def _block(self) -> tuple[nnx.GraphDef, dict[str, tuple[str, ...]]]:
        """The layer's module without its parameters, and the path of each parameter in it by its name in the table."""
        specs = {path.removeprefix("blocks/"): spec for path, spec in self.param_table.items() if spec.stacked}
        module = nnx.eval_shape(lambda: Block(self.arch, specs, self.attention, self.products))
        graph, state = nnx.split(module)
        paths = [tuple(map(str, path)) for path, _ in nnx.to_flat_state(state)]
        return graph, {param_name(path): path for path in paths}

    def _with_params(self, own: Params) -> Block:
        """Returns the layer's module with the parameters of one layer in it.

        Raises:
            ValueError: a parameter is missing, or there is one that the layer does not have.
        """
        graph, paths = self._block
        if wrong := own.keys() ^ paths.keys():
            raise ValueError(f"a layer's parameters are {sorted(paths)}; missing or unknown: {sorted(wrong)}")
        return nnx.merge(graph, traverse_util.unflatten_dict({paths[name]: leaf for name, leaf in own.items()}))  # noqa: TID251

    def unstacked(self, params: Params) -> Params:
        """Returns the parameters with those of each layer by themselves, in a tuple, where layers are unrolled.

        Otherwise every pass copies every layer's matrices out of their stack, which in a loop XLA does again and again: for
        passes of few positions that takes as long as a quarter of the products.
        """
        if self.scan_layers or isinstance(params["blocks"], tuple):
            return params
        found = {**params, "blocks": _by_layer(params["blocks"], self.arch.n_layers)}
        if self.lora is not None:
            adapters = params[lora.KEY]
            found[lora.KEY] = {**adapters, "blocks": _by_layer(adapters["blocks"], self.arch.n_layers)}
        return found

    def hidden(self, params: Params, view: View, row_keys: Array | None = None) -> Float[Array, "B A D"]:
        """Computes the hidden states at ``view.at``, after the last norm.

        Args:
            params: the parameters, as ``param_table`` describes them, and adapters where there are any.
            view: what the network sees.
            row_keys: one random key for each row [B], for the adapters' dropout; None for no dropout.
        """
        chex.assert_equal_shape([view.active, view.at, view.valid])
        x = self._in_lines(params, view, row_keys) if self.places else self.trunk(params, *view[:3], view.at, row_keys)
        return rms_norm(x, params["final_norm"], self.arch.norm_eps)

    def _in_lines(self, params: Params, view: View, row_keys: Array | None) -> Float[Array, "B A D"]:
        """Computes what ``trunk`` does at ``view.at``, with the rows side by side in lines."""
        rotation = Rotation(*(lay(part, self.places) for part in self._rotation(view.positions, view.length)))
        x, mask = self._embedded(params, lay(view.ids, self.places)), Mask(view.length, self.mask, self.places)
        x, _ = self._run(params, x, rotation, mask, lay_positions(view.at, self.places), row_keys)
        return x.reshape(*view.at.shape, -1)

    def trunk(
        self,
        params: Params,
        ids: Int[Array, "B T"],
        positions: Int[Array, "B T"],
        length: Int[Array, " B"],
        at: Int[Array, "B A"] | None = None,
        row_keys: Array | None = None,
    ) -> Float[Array, "B wanted D"]:
        """Computes the residual stream before the last norm, of every position or only of those at ``at``.

        Where layers are unrolled, the last one is trimmed: it computes only the positions at ``at``, which saves a third
        of a small network's work. Scanned layers must all be alike, and splitting the last one off would copy the stack of
        the others. The last layer is not trimmed either where that would change its result: under dropout, which is drawn
        by position, and under a causal mask.
        """
        chex.assert_rank(ids, 2)
        chex.assert_equal_shape([ids, positions])
        chex.assert_shape(length, ids.shape[:1])
        x = self._embedded(params, ids)
        return self._run(params, x, self._rotation(positions, length), Mask(length, self.mask), at, row_keys)[0]

    def refresh(self, params: Params, view: View) -> tuple[Float[Array, "B A D"], Cache]:
        """Computes what ``hidden`` does, and returns the keys and values of all positions beside it."""
        x, rotation = self._embedded(params, view.ids), self._rotation(view.positions, view.length)
        x, cache = self._run(params, x, rotation, Mask(view.length, self.mask), view.at, keep=True)
        assert cache is not None
        return rms_norm(x, params["final_norm"], self.arch.norm_eps), cache

    def update(self, params: Params, part: Part, cache: Cache) -> Float[Array, "B A D"]:
        """Computes the hidden states at ``part.at``, where only the positions of ``part`` are computed anew.

        Their queries see all visible positions; the keys and values of the positions that are not in the part are those of
        the last ``refresh``, which a bidirectional network would compute otherwise now: the result is an approximation.

        Args:
            params: the parameters.
            part: the positions to compute, and their tokens.
            cache: the keys and values of all positions.
        """
        if self.mask == "causal":
            raise ValueError(
                "a cache needs a bidirectional network: a causal mask would take the part's first query for the canvas's"
            )
        at = part.first[:, None] + jnp.arange(part.ids.shape[1], dtype=jnp.int32)
        last = part.length[:, None] - 1  # the last visible position, since ``dynamic`` scaling counts positions
        whole = compute_rotation(jnp.concatenate([jnp.minimum(at, last), last], axis=1), self.arch, self.dtype)
        rotation = Rotation(whole.cos[:, :-1], whole.sin[:, :-1])
        x = self._embedded(params, part.ids)
        x, _ = self._run(params, x, rotation, Mask(part.length, self.mask), part.at, cached=cache, first=part.first)
        return rms_norm(x, params["final_norm"], self.arch.norm_eps)

    def _rotation(self, positions: Int[Array, "B T"], length: Int[Array, " B"]) -> Rotation:
        """Returns the rotations of positions; hidden ones get the last visible one's, since ``dynamic`` scaling counts positions."""
        last = jnp.take_along_axis(positions, length[:, None] - 1, axis=1)
        return compute_rotation(jnp.minimum(positions, last), self.arch, self.dtype)

    def _run(
        self,
        params: Params,
        x: Float[Array, "B T D"],
        rotation: Rotation,
        mask: Mask,
        at: Int[Array, "B A"] | None,
        row_keys: Array | None = None,
        *,
        cached: Cache | None = None,
        first: Int[Array, " B"] | None = None,
        keep: bool = False,
    ) -> tuple[Float[Array, "B wanted D"], Cache | None]:
        """Runs all layers (see ``trunk``).

        Args:
            params: the parameters.
            x: the embedded tokens.
            rotation: the rotation of each position.
            mask: which keys a query sees.
            at: the positions whose output is wanted; None for all.
            row_keys: the random keys of the adapters' dropout [B]; None for no dropout.
            cached: the keys and values of the canvas, where ``x`` is a part of it (see ``update``).
            first: the canvas position of each row's first position in ``x``, where ``cached`` is given.
            keep: whether the keys and values are returned.

        Returns:
            (the residual stream before the last norm, the keys and values or None).
        """
        drops = self.lora is not None and self.lora.dropout > 0 and row_keys is not None

        def layer(
            x: Array,
            own: Params,
            adapters: Params,
            index: Array | int,
            old: KeysValues | None,
            at: Array | None = None,
        ) -> tuple[Array, KeysValues | None]:
            x = checkpoint_name(x, _LAYER_INPUT) if self.remat == "offload" else x
            keys = row_keys if drops else None
            branches = {} if self.lora is None else lora.layer_branches(self.lora, adapters, index, keys, mask.places)
            x, new = self._with_params(own)(x, rotation, mask, branches, at, old, first)
            return constrain(x, "batch", None, None), beside.keep(*new, self.attention) if keep else None

        if self.remat != "none":
            layer = jax.checkpoint(layer, policy=_POLICIES[self.remat], prevent_cse=not self.scan_layers)
        stacks = (params["blocks"], params[lora.KEY]["blocks"] if self.lora else {})
        if self.scan_layers:
            xs: tuple[Any, ...] = (*stacks, jnp.arange(self.arch.n_layers), cached)
            x, kept = jax.lax.scan(lambda x, own: layer(x, *own), x, xs)
            return x if at is None else pick(x, at), kept
        trimmed = None if drops or self.mask == "causal" else at
        count, layers = self.arch.n_layers, list[Any]()
        by_layer = zip(*(_by_layer(stack, count) for stack in stacks), cached or [None] * count, strict=True)
        for index, (own, adapters, old) in enumerate(by_layer):
            x, kept = layer(x, own, adapters, index, old, trimmed if index == count - 1 else None)
            layers.append(kept)
            if self.check_layer is not None:
                self.check_layer(index, x)
        x = x if at is None or trimmed is not None else pick(x, at)
        return x, tuple(layers) if keep else None

    def _embedded(self, params: Params, ids: Int[Array, "B T"]) -> Float[Array, "B T D"]:
        """Looks up the embeddings of tokens.

        Each device first looks up its columns of the embedding for all rows of its ``fsdp`` group; an all-to-all then
        exchanges columns for rows. By itself XLA would gather the whole embedding, and copy all rows to every device for
        its gradient.
        """
        columns = look_up(params["embed"], constrain(ids, "rows", None), self.dtype)
        return constrain(constrain(columns, "rows", None, "embed"), "batch", None, None)

    def logits(self, params: Params, hidden: Float[Array, "*rows D"]) -> Float[Array, "*rows V"]:
        """Computes the logits of hidden states, in float32 or wider."""
        return self._logits(self._head(params, hidden), hidden)

    def all_logits(
        self, params: Params, ids: Int[Array, "B T"], positions: Int[Array, "B T"], length: Int[Array, " B"]
    ) -> Float[Array, "B T V"]:
        """Computes the logits of every position, as the network gives them, before any shift."""
        x = self.trunk(params, ids, positions, length)
        return self.logits(params, rms_norm(x, params["final_norm"], self.arch.norm_eps))

    def nll(
        self, params: Params, hidden: Float[Array, "*rows A D"], targets: Int[Array, "*rows A"]
    ) -> Float[Array, "*rows A"]:
        """Computes the negative log-likelihoods of targets, in nats, in float32 or wider.

        With ``loss_chunk`` set, it processes that many positions of a row at a time and recomputes their logits for the
        gradient, so that only the logits of one chunk are in memory.
        """
        chex.assert_equal(hidden.shape[:-1], targets.shape)
        width, chunk, head = hidden.shape[-2], self.loss_chunk, self._head(params, hidden)
        if chunk is None or chunk >= width:
            return self._nll(head, hidden, targets)
        short = -width % chunk
        pad = [(0, 0)] * (hidden.ndim - 2)
        hidden = jnp.pad(hidden, [*pad, (0, short), (0, 0)])
        targets = jnp.pad(targets, [*pad, (0, short)])
        n_chunks = (width + short) // chunk
        hidden = jnp.moveaxis(hidden.reshape(*hidden.shape[:-2], n_chunks, chunk, hidden.shape[-1]), -3, 0)
        targets = jnp.moveaxis(targets.reshape(*targets.shape[:-1], n_chunks, chunk), -2, 0)
        one = jax.checkpoint(self._nll, prevent_cse=False)
        found = jax.lax.map(lambda part: one(head, *part), (hidden, targets))
        return jnp.moveaxis(found, 0, -2).reshape(*found.shape[1:-1], width + short)[..., :width]

    @property
    def _head_split(self) -> Split | None:
        return Split.of(("embed", "vocab")) if self.products == "fsdp" else None

    def _head(self, params: Params, hidden: Array) -> GatheredWeight:
        """Gathers the matrix that turns hidden states into logits, in the type of the hidden states."""
        head = params["embed"].T if self.arch.tie_embeddings else params["head"]
        return gather_weight(head, hidden.dtype, self._head_split)

    def _logits(self, head: GatheredWeight, hidden: Array) -> Array:
        return matmul_gathered(hidden, head, at_least_float32(hidden.dtype), self._head_split)

    def _nll(self, head: GatheredWeight, hidden: Array, targets: Array) -> Array:
        logits = self._logits(head, hidden)
        # A gather would copy all logits to each device where the vocabulary is split over devices, so we select and sum.
        here = jnp.arange(logits.shape[-1]) == targets[..., None]
        chosen = jnp.sum(jnp.where(here, logits, 0), axis=-1)
        return jax.nn.logsumexp(logits, axis=-1) - chosen


def _by_layer(stack: Params | tuple[Params, ...], layers: int) -> tuple[Params, ...]:
    """Returns each layer's parameters from stacked ones; those that are one by one already (``Transformer.unstacked``) as they are.

    The gradient of a split is one concatenation. That of picking layer after layer would add up as many arrays of the size of the
    stack, zero but for one layer, which XLA for CPUs does element by element: a twentieth of a train step.
    """
    if isinstance(stack, tuple):
        return stack
    leaves, tree = jax.tree.flatten(stack)
    split = [[part.reshape(part.shape[1:]) for part in jax.lax.split(leaf, (1,) * layers)] for leaf in leaves]
    return tuple(jax.tree.unflatten(tree, [parts[index] for parts in split]) for index in range(layers))
