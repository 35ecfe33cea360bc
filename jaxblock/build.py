"""Builds network, objective and optimizer from a config and an architecture.

It is the only module that does so: training, the memory plan, the trials that search for a config that fits (`fit/advice.py`)
and `inspect` all call it.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
from jax import Array

from jaxblock.config.config import Config
from jaxblock.diffusion.layouts import training_layout
from jaxblock.models.architecture import Architecture
from jaxblock.models.attention.backends import backend_of
from jaxblock.models.config import LoraConfig, ModelConfig
from jaxblock.models.families import registry
from jaxblock.models.linear.lora import lora_from_config
from jaxblock.models.transformer import Transformer
from jaxblock.training.optim.make import make_optimizer
from jaxblock.training.step import Learner, Objective
from jaxblock.types import Lines

CheckLayer = Callable[[int, Array], None]
"""A function that is called with a layer's number, from 0, and its output."""


def learner(
    config: Config,
    arch: Architecture,
    stop_ids: tuple[int, ...],
    *,
    platform: str | None = None,
    check_layer: CheckLayer | None = None,
    lines: Lines | None = None,
) -> Learner:
    """Builds the static parts of a run's train step: network, objective, optimizer and two settings.

    Args:
        config: the run's settings, checked.
        arch: the network's sizes and special ids.
        stop_ids: the tokens that end a response.
        platform: the platform that the step will run on; None for the default backend of this process.
        check_layer: a function that is called with every layer's output; None for none.
        lines: the widths at which rows are computed; None for the canvas's.

    Raises:
        UserError: an entry of `lora.targets` matches no matrix.
    """
    net = network(arch, config.model, config.lora, platform=platform, check_layer=check_layer)
    train = config.train
    return Learner(
        net=net,
        objective=objective(config, net, stop_ids, lines),
        optimizer=make_optimizer(config.optimizer, train.steps, net.trainable, train.seed),
        accumulate=train.accumulate,
        ema=config.optimizer.ema,
    )


def network(
    arch: Architecture,
    model: ModelConfig,
    lora: LoraConfig | None = None,
    *,
    platform: str | None = None,
    check_layer: CheckLayer | None = None,
) -> Transformer:
    """Builds the network that the ``model`` section describes, without weights.

    Args:
        arch: the network's sizes and special ids.
        model: the ``model`` section, which says how the network runs.
        lora: the ``lora`` section, which says which matrices have adapters; None for no adapters.
        platform: the platform that the network will run on; None for the default backend of this process.
        check_layer: a function that is called with every layer's output; the layers are then unrolled. None for none.

    Raises:
        UserError: an entry of `lora.targets` matches no matrix.
    """
    backend = backend_of(platform or jax.default_backend()) if model.attention == "auto" else model.attention
    return Transformer(
        arch,
        dtype=model.dtype,
        remat=model.remat,
        attention=backend,
        scan_layers=model.scan_layers and check_layer is None,
        loss_chunk=model.loss_chunk,
        lora=None if lora is None else lora_from_config(lora, registry.param_table(arch)),
        quantize=model.quantize,
        check_layer=check_layer,
    )


def objective(config: Config, net: Transformer, stop_ids: tuple[int, ...], lines: Lines | None = None) -> Objective:
    """Builds the loss that the ``canvas`` and ``method`` sections describe.

    Args:
        config: the run's settings; the batch size and the seed of the draws are the ``train`` section's.
        net: the network.
        stop_ids: the tokens that end a response.
        lines: the widths at which rows are computed; None for the canvas's.
    """
    return Objective(
        net=net,
        layout=training_layout(config.canvas, config.method, net.arch, stop_ids),
        method=config.method,
        seed=config.train.seed,
        rows=config.train.batch_size,
        dropout=net.lora is not None and net.lora.dropout > 0,
        lines=lines,
    )
