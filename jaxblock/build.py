"""Config + architecture -> the static objects that the pure functions take. The only place that maps one to the other."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import jax
from jax import Array

from jaxblock.config.config import Config
from jaxblock.models.architecture import Architecture
from jaxblock.models.attention.backends import backend_of
from jaxblock.models.config import LoraConfig, ModelConfig
from jaxblock.models.families import registry
from jaxblock.models.linear.lora import lora_from_config
from jaxblock.models.transformer import Transformer


def network(
    arch: Architecture,
    model: ModelConfig,
    lora: LoraConfig | None = None,
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
        lora=lora_from_config(lora or LoraConfig(), registry.param_table(arch)),
        int8=model.quantize == "int8",
        check_layer=check_layer,
    )


def debug(config: Config) -> Config:
    """The same run for debugging: unrolled layers, no remat, no worker processes."""
    model = dataclasses.replace(config.model, scan_layers=False, remat="none")
    return dataclasses.replace(config, model=model, train=dataclasses.replace(config.train, loader_workers=0))
