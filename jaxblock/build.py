"""Config + architecture -> the static objects that the pure functions take. The only place that maps one to the other."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import jax
from jax import Array

from jaxblock.config import files as config_io
from jaxblock.config.config import Config
from jaxblock.diffusion.canvas import Layout
from jaxblock.diffusion.config import CanvasConfig, MethodConfig
from jaxblock.diffusion.decoding.config import DecodeConfig
from jaxblock.errors import UserError
from jaxblock.models.architecture import Architecture
from jaxblock.models.attention.backends import backend_of
from jaxblock.models.config import LoraConfig, ModelConfig
from jaxblock.models.families import registry
from jaxblock.models.linear import lora
from jaxblock.models.linear.lora import Lora
from jaxblock.models.transformer import Transformer


def architecture(model: ModelConfig, *, vocab_size: int, mask_id: int, eos_id: int) -> Architecture:
    """The architecture of a random start over a tokenizer's vocabulary.

    Raises:
        UserError: ``model.alignment`` is not the family's.
    """
    traits = registry.traits(model.family, model.alignment)
    return Architecture(
        **traits,
        family=model.family,
        vocab_size=vocab_size,
        d_model=model.d_model,
        n_layers=model.n_layers,
        n_heads=model.n_heads,
        n_kv_heads=model.n_kv_heads or model.n_heads,
        head_dim=model.d_model // model.n_heads,
        mlp_dim=model.mlp_dim,
        norm_eps=model.norm_eps,
        rope_theta=model.rope_theta,
        max_len=model.max_len,
        tie_embeddings=model.tie_embeddings,
        mask_id=mask_id,
        eos_id=eos_id,
        pad_id=eos_id,
        init_std=model.init_std,
    )


def network(
    arch: Architecture,
    model: ModelConfig,
    lora: Lora | None = None,
    check_layer: Callable[[int, Array], None] | None = None,
    *,
    platform: str | None = None,
) -> Transformer:
    """The network, run as the ``model`` section says.

    Args:
        arch: sizes and ids.
        model: the section.
        lora: adapters beside the weights; None for none.
        check_layer: see ``Transformer``.
        platform: what it will run on, where that is not where it is built.
    """
    backend = backend_of(platform or jax.default_backend()) if model.attention == "auto" else model.attention
    return Transformer(
        arch,
        dtype=model.dtype,
        remat=model.remat,
        attention=backend,
        scan_layers=model.scan_layers and check_layer is None,
        loss_chunk=model.loss_chunk,
        lora=lora,
        int8=model.quantize == "int8",
        check_layer=check_layer,
    )


def adapters(config: LoraConfig, arch: Architecture) -> Lora | None:
    """What the ``lora`` section adapts of a network; None where its rank is 0.

    Raises:
        UserError: a target that matches nothing.
    """
    if not config.rank:
        return None
    targets = lora.resolve(registry.param_table(arch), config.targets, config.unmatched)
    return Lora(config.rank, config.alpha, config.dropout, targets)


def training_layout(
    canvas: CanvasConfig, method: MethodConfig, arch: Architecture, stop_ids: tuple[int, ...]
) -> Layout:
    """The canvas of a training step: classical SFT is one block as long as the response."""
    return Layout(
        response_len=canvas.response_len,
        block=canvas.response_len if method.objective == "classical" else canvas.block,
        alignment=arch.alignment,
        context=canvas.context,
        suffix_window=canvas.suffix_window,
        mask_id=arch.need_mask_id(),
        fill_id=arch.eos_id,
        stop_ids=stop_ids,
        total_len=canvas.total_len,
    )


def scoring_layout(canvas: CanvasConfig, arch: Architecture, stop_ids: tuple[int, ...]) -> Layout:
    """The canvas of the NELBO: the decoder's, whatever the objective and its context were, so that runs compare."""
    return decoding_layout(canvas, DecodeConfig(), arch, stop_ids)


def decoding_layout(
    canvas: CanvasConfig, decode: DecodeConfig, arch: Architecture, stop_ids: tuple[int, ...]
) -> Layout:
    """The canvas of the decoder; ``decode`` overrides the canvas's sizes.

    Always ``aligned``: the view of the ``paper`` context shows where the answer ends, which a decoder cannot know.

    Raises:
        UserError: the block does not divide the response, or an id cannot be what it is to be.
    """
    layout = Layout(
        response_len=decode.response_len or canvas.response_len,
        block=decode.block or canvas.block,
        alignment=arch.alignment,
        context="aligned",
        suffix_window=canvas.suffix_window,
        mask_id=arch.need_mask_id(),
        fill_id=arch.eos_id if decode.fill_id is None else decode.fill_id,
        stop_ids=stop_ids if decode.stop_ids is None else decode.stop_ids,
    )
    config_io.check_blocks(layout.response_len, layout.block, "decode")
    for name, ids in (("fill_id", (layout.fill_id,)), ("stop_ids", layout.stop_ids)):
        for one in ids:
            if not 0 <= one < arch.vocab_size or one == layout.mask_id:
                what = "the mask token" if one == layout.mask_id else f"outside the vocabulary of {arch.vocab_size}"
                raise UserError(f"decode.{name}: {one} is {what}: name a token that ends or fills a response")
    return layout


def check_decoding(canvas: CanvasConfig, decode: DecodeConfig, arch: Architecture) -> None:
    """Raises UserError where decoding on this canvas cannot work: before hours of other work, not after them."""
    layout = decoding_layout(canvas, decode, arch, ())
    width = canvas.prompt_len + max(canvas.response_len, layout.response_len)
    if width > arch.max_len:
        raise UserError(
            f"canvas.prompt_len and the response make {width} positions, but the model was made for {arch.max_len}: "
            "set canvas.prompt_len, canvas.response_len or decode.response_len lower"
        )


def debug(config: Config) -> Config:
    """The same run for debugging: unrolled layers, no remat, no worker processes."""
    model = dataclasses.replace(config.model, scan_layers=False, remat="none")
    return dataclasses.replace(config, model=model, train=dataclasses.replace(config.train, loader_workers=0))
